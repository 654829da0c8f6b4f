"""Sums do not depend on their order, functions are those of the library to the stated error, and plain Python, which
has one rounding to a line, finds the same bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common import exact
from common.errors import UserError
from common.exact import Product

DOUBLE = torch.float64


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=DOUBLE, generator=generator) * scale


@pytest.mark.parametrize("sums", [exact.FINE, exact.COARSE])
def test_sums_of_so_many_products_are_exact(sums):
    mantissa = {torch.float64: 53, torch.float32: 24}[sums.type]
    assert sums.terms * 2 ** (2 * sums.bits) <= 2**mantissa
    largest = torch.full((1, sums.terms), 2.0**sums.bits, dtype=sums.type)
    largest[0, -1] = 2.0**sums.bits - 1
    assert float(exact.product_of(largest, largest.t(), sums)) == sum(x * x for x in largest[0].tolist())


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 3e7])
@pytest.mark.parametrize("bits", [8, 20])
def test_numbers_on_a_grid_are_whole_numbers_of_few_bits_times_a_power_of_two(scale, bits):
    x = numbers(50, 300, scale=scale)
    x[7, 3] = 2 * x[7].abs().max()
    x[8, 4] = -(2.0 ** math.ceil(math.log2(float(x[8].abs().max()))))  # a power of two itself
    for row, own in zip(exact.on_grid(x, bits), x, strict=True):
        above = 2.0 ** math.frexp(float(own.abs().max()))[1]
        whole = row / (above * 2.0**-bits)
        assert torch.equal(whole, whole.round())
        assert float(whole.abs().max()) <= 2**bits
        assert float((row - own).abs().max()) <= above * 2.0 ** -(bits + 1)
    assert torch.equal(exact.on_grid(x.t(), bits, dim=0), exact.on_grid(x, bits).t())


def test_rows_of_zeros_and_of_next_to_nothing():
    assert torch.equal(exact.on_grid(torch.zeros(2, 3, dtype=DOUBLE), 8), torch.zeros(2, 3, dtype=DOUBLE))
    assert torch.equal(exact.on_grid(torch.full((2, 3), 1e-200, dtype=DOUBLE), 8), torch.zeros(2, 3, dtype=DOUBLE))
    units, scales = exact.in_units(torch.zeros(2, 3, dtype=DOUBLE))
    assert torch.equal(units, torch.zeros(2, 3))
    assert torch.equal(scales, torch.zeros(2, dtype=DOUBLE))


@pytest.mark.parametrize("width", [3, 64, 700, 5000])
def test_a_product_does_not_depend_on_the_order_of_its_terms_nor_on_the_batch(width):
    weight, bias, x = numbers(40, width, seed=1), numbers(40, seed=2), numbers(9, width, seed=3, scale=20)
    product = Product(weight, bias)(x)
    if width <= exact.FINE.terms:
        order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
        assert torch.equal(Product(weight[:, order], bias)(x[:, order]), product)
    assert torch.equal(Product(weight, bias)(x[4:5]), product[4:5])
    expected = x @ weight.t() + bias
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    # One by one, in Python.
    a, b = exact.on_grid(x, 20), exact.on_grid(weight, 20)
    for i, j in ((0, 0), (3, 17), (8, 39)):
        total = 0.0
        for start in range(0, width, 4096):
            part = 0.0
            for k in range(start, min(start + 4096, width)):
                part += float(a[i, k]) * float(b[j, k])
            total += part
        assert total + float(bias[j]) == float(product[i, j])


def test_two_parts_of_a_row_add_up_to_it():
    x = numbers(6, 4, 30, scale=3)
    parts = exact.in_two(x)
    assert parts.dtype == torch.float32
    high, low = parts.double().chunk(2, dim=-2)
    assert torch.equal(high, exact.on_grid(x, 8))
    above = 2.0 ** torch.frexp(x.abs().amax(dim=-1, keepdim=True)).exponent
    assert torch.equal(low / (above * 2.0**-16), (low / (above * 2.0**-16)).round())
    assert bool(((high + low - x).abs() <= above * 2.0**-17).all())


def test_sums_over_rows_in_units_do_not_depend_on_their_order():
    values, shares = numbers(200, 16, scale=5), exact.softmax(numbers(3, 200, seed=1))
    units, scales = exact.in_units(values)
    found = exact.product_of(exact.in_two(shares * scales), units, exact.COARSE)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    again = exact.product_of(exact.in_two((shares * scales)[:, order]), units[order], exact.COARSE)
    assert torch.equal(again, found)
    torch.testing.assert_close(exact.summed_up(found), shares @ values, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("ours", "theirs", "error"),
    [
        (exact.sigmoid, torch.sigmoid, 1e-9),
        (exact.tanh, torch.tanh, 1e-9),
        (exact.silu, torch.nn.functional.silu, 2e-8),
        (exact.elu, torch.nn.functional.elu, 1e-9),
        (exact.softplus, torch.nn.functional.softplus, 3e-9),
        (exact.gelu, torch.nn.functional.gelu, 1e-6),
        (exact.gelu_by_tanh, lambda x: torch.nn.functional.gelu(x, approximate="tanh"), 2e-8),
        (exact.exp_of_minus, lambda x: torch.exp(-x.abs()), 5e-10),
    ],
)
def test_functions_are_those_of_the_library(ours, theirs, error):
    x = torch.cat([torch.linspace(-30, 30, 20001, dtype=DOUBLE), torch.tensor([0.0, -0.0, 1e-300, 500, -500])])
    if ours is exact.exp_of_minus:
        x = x.abs()
    torch.testing.assert_close(ours(x.clone()), theirs(x), rtol=0, atol=error)


def test_exponentials_on_both_sides():
    x = torch.linspace(-40, 40, 10001, dtype=DOUBLE)
    torch.testing.assert_close(exact.exp(x), x.exp(), rtol=1e-9, atol=0)
    assert float(exact.exp(torch.tensor([1e4], dtype=DOUBLE))) == 2.0**64


def test_an_exponential_in_plain_python():
    """One rounding a line, in the order of docs/format.md."""
    table = [exact.power(2, -n / 256) for n in range(256)]
    unit = 0.6931471805599453 / 256
    x = numbers(500).abs() * 20
    for value, found in zip(x.tolist(), exact.exp_of_minus(x).tolist(), strict=True):
        steps = min(value * (256 / 0.6931471805599453), 256 * 64)
        whole = round(steps)
        part = -steps + whole
        series = part * (unit * unit / 2)
        series += unit
        series *= part
        series += 1
        assert series * math.ldexp(table[whole % 256], -(whole // 256)) == found


def test_powers_are_rounded_once():
    assert exact.power(2.0, -0.5) == math.sqrt(0.5)
    assert exact.power(10000.0, -0.25) == 0.1
    table = exact.powers_of_two(torch.device("cpu"))
    assert len(table) == 64 * 256 + 1
    assert float(table[256]) == 0.5
    assert float(table[-1]) == 2.0**-64


def test_cosines_and_sines():
    angles = [[-3.0, 0.0, 0.5, 1.0], [2.0, 100.0, 6.283185307179586, 99999.5]]
    cosine, sine = exact.cosine_and_sine(angles, torch.device("cpu"))
    expected = torch.tensor(angles, dtype=DOUBLE)
    torch.testing.assert_close(cosine, expected.cos(), rtol=0, atol=1e-11)
    torch.testing.assert_close(sine, expected.sin(), rtol=0, atol=1e-11)


def test_softmax_and_norms():
    x = numbers(7, 90, scale=6)
    torch.testing.assert_close(exact.softmax(x), x.softmax(-1), rtol=0, atol=5e-9)
    numerators = exact.numerators_of_softmax(x) * 2.0**30
    assert torch.equal(numerators, numerators.round())
    normed = torch.nn.functional.layer_norm(x, (90,), eps=1e-5)
    torch.testing.assert_close(exact.layer_norm(x, 1e-5), normed, rtol=0, atol=1e-4)
    rms = x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(exact.rms_norm(x, 1e-6), x / (rms + 1e-6), rtol=0, atol=1e-4)


def test_attention_answers_as_the_library(monkeypatch):
    keys, values, queries = (numbers(6, 5, 8, seed=seed) for seed in range(3))
    attention = exact.Attention(6, 5, 8, torch.device("cpu"))
    for place in range(5):
        attention.add(keys[:, place : place + 1], values[:, place : place + 1])
    hidden = torch.ones(5, 5).triu(1).bool()
    expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=1.0)
    torch.testing.assert_close(attention(queries, hidden), expected, rtol=0, atol=0.05)
    monkeypatch.setattr(exact, "COARSE", exact.FINE)
    finer = exact.Attention(6, 5, 8, torch.device("cpu"))
    finer.add(keys, values)
    torch.testing.assert_close(finer(queries, hidden), expected, rtol=0, atol=1e-4)


def test_a_device_that_computes_otherwise_is_refused(monkeypatch):
    exact.check_device(torch.device("cpu"))
    exact.check_device.cache_clear()
    monkeypatch.setattr(exact, "on_grid", lambda x, bits, dim=-1: x)  # sums whose rounding depends on their order
    with pytest.raises(UserError, match=r"cpu computes .*: its float64 is not that of IEEE 754.*; take the CPU"):
        exact.check_device(torch.device("cpu"))
    exact.check_device.cache_clear()


def test_a_device_whose_float32_products_are_rounded_is_refused(monkeypatch):
    plain = exact.product_of

    def rounded(a, b, sums=exact.FINE):
        products = plain(a, b, sums)
        return products if sums == exact.FINE else products.mul_(1 - 2.0**-23).float().double()

    exact.check_device.cache_clear()
    monkeypatch.setattr(exact, "product_of", rounded)
    with pytest.raises(
        UserError, match=r"cpu does not add up 256 products of 8 bits in torch.float32 without rounding"
    ):
        exact.check_device(torch.device("cpu"))
    exact.check_device.cache_clear()


@pytest.mark.parametrize("own_masks", [False, True])
def test_pieces_of_a_large_tensor_give_the_bits_of_the_whole(monkeypatch, own_masks):
    x, weight, bias = numbers(3, 7, 10, scale=3), numbers(4, 10, seed=1), numbers(4, seed=2)
    keys, values, queries = (numbers(6, 5, 8, seed=seed) for seed in (3, 4, 5))
    hidden = torch.ones(5, 5).triu(1).bool()
    if own_masks:
        hidden = hidden | (torch.arange(5) == torch.arange(6)[:, None, None] - 2) & ~torch.eye(5, dtype=torch.bool)

    def results() -> list[Tensor]:
        attention = exact.Attention(6, 5, 8, torch.device("cpu"))
        attention.add(keys, values)
        functions = (
            exact.silu,
            exact.elu,
            exact.softplus,
            exact.gelu,
            exact.gelu_by_tanh,
            exact.tanh,
            exact.unit,
            exact.softmax,
        )
        return [
            *(function(x) for function in functions),
            exact.layer_norm(x, 1e-5),
            exact.rms_norm(x, epsilon=1e-5),
            Product(weight, bias)(x),
            attention(queries, hidden),
        ]

    whole = results()
    for piece in (1, 50, 64):
        monkeypatch.setattr(exact, "PIECE", piece)
        for ours, expected in zip(results(), whole, strict=True):
            assert torch.equal(ours, expected)


def test_no_tensor_between_is_larger_than_a_piece():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
            nonlocal largest
            result = function(*arguments, **(settings or {}))
            if isinstance(result, Tensor) and function.overloadpacket.__name__ in ("mul", "add", "abs", "mm", "bmm"):
                largest = max(largest, result.numel())
            return result

    x, attention = numbers(600, 512), exact.Attention(64, 100, 8, torch.device("cpu"))
    with Watch():
        exact.gelu_by_tanh(exact.layer_norm(x, 1e-5))
        Product(numbers(512, 512))(x)
        attention.add(numbers(64, 100, 8), numbers(64, 100, 8))
        attention(numbers(64, 100, 8))
    assert 0 < largest <= 2**18  # numbers, of a weight, which is rounded at once


def test_a_square_root_is_right_whatever_the_library_begins_with(monkeypatch):
    """As one of half the digits, which MKL can give in one of several threads."""
    x = torch.arange(1, 20001, dtype=DOUBLE) * 0.7
    root = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: root(x).float().double())
    assert exact.square_root(x).tolist() == [math.sqrt(number) for number in x.tolist()]


def test_a_square_root_is_rounded_once():
    """As that of Python's `math`, which is the processor's own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.arange(20_000).double(), torch.rand(20_000, dtype=torch.float64, generator=generator)])
    x = torch.cat([x, x[1:] * 1e-30, x * 1e60, torch.tensor([0.0, 2.0**-200, 2.0**900], dtype=torch.float64)])
    assert exact.square_root(x).tolist() == [math.sqrt(number) for number in x.tolist()]
