"""What decides codes is float32 on devices that would take less: seen by the operations that are dispatched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.float32 import full_precision
from stage1_vq.quantizers import build_quantizer, float32
from stage1_vq.quantizers.float32 import ProductConv2d
from tests.stage1_vq.tiny import DIM, QUANTIZER_ROWS

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear"}
MKLDNN: Any = torch.backends.mkldnn
BACKENDS = (torch.backends.cuda.matmul, MKLDNN.matmul, MKLDNN.conv)


class Recorded(TorchDispatchMode):
    """The names of the operations inside, each with the precision that products had then."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.operations.append((name, torch.backends.cuda.matmul.fp32_precision))
        return func(*args, **(kwargs or {}))


def all_that_a_step_does(row: str) -> list[tuple[str, str]]:
    torch.manual_seed(0)
    quantizer, z = build_quantizer(QUANTIZER_ROWS[row]), torch.randn(3, DIM, 4, 4, requires_grad=True)
    with Recorded() as recorded:
        quantizer.initialise([z.detach()])
        quantized = quantizer(z)
        quantizer.codes(z)
        quantizer.codes_to_latents(quantized.codes)
        quantizer.update()
        operations = list(recorded.operations)
        (quantized.z_q.square().mean() + sum(quantized.losses.values())).backward()
        backward = [(name, "backward") for name, _ in recorded.operations[len(operations) :]]
    return operations + backward


@pytest.fixture
def inexact_convolutions(monkeypatch) -> None:
    """As on a GPU, where cuDNN takes TF32 for convolutions."""
    monkeypatch.setattr(float32, "EXACT_CONVOLUTIONS", ())


@pytest.fixture
def careless_user() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("row", sorted(QUANTIZER_ROWS))
def test_no_quantizer_convolves_where_convolutions_are_less_than_float32(row, inexact_convolutions):
    names = {name for name, _ in all_that_a_step_does(row)}
    assert not {name for name in names if "conv" in name}
    assert len(names) > 10, "the test must see operations"


@pytest.mark.parametrize("row", sorted(QUANTIZER_ROWS))
def test_products_are_float32_whatever_the_user_has_set(row, careless_user):
    found = {(name, precision) for name, precision in all_that_a_step_does(row) if precision != "backward"}
    assert {precision for name, precision in found if name in PRODUCTS} <= {"ieee"}
    assert torch.get_float32_matmul_precision() == "medium"


def test_the_precision_is_the_users_again_however_it_was_set(careless_user):
    for backend in BACKENDS:
        backend.fp32_precision = "tf32"
    try:
        with full_precision():
            assert [backend.fp32_precision for backend in BACKENDS] == ["ieee"] * 3
        with pytest.raises(ZeroDivisionError), full_precision():
            _ = 1 / 0
        assert [backend.fp32_precision for backend in BACKENDS] == ["tf32"] * 3
    finally:
        for backend in BACKENDS:
            backend.fp32_precision = "none"


def test_nothing_is_touched_where_the_user_has_set_nothing(monkeypatch):
    def refuse(precision: str) -> None:
        raise AssertionError(precision)

    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", refuse)
    with full_precision():
        pass


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_product_is_the_convolution(kernel, inexact_convolutions):
    torch.manual_seed(0)
    layer, x = ProductConv2d(5, 7, kernel), torch.randn(2, 5, 6, 4, requires_grad=True)
    expected = F.conv2d(x, layer.weight, layer.bias, padding=kernel // 2)
    upstream = torch.randn_like(expected)
    inputs = (x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y, inputs, upstream) for y in (layer(x), expected))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-4)


def test_a_cpu_keeps_its_convolution():
    torch.manual_seed(0)
    layer, x = ProductConv2d(5, 7, 3), torch.randn(2, 5, 6, 4)
    with Recorded() as recorded:
        y = layer(x)
    assert "convolution" in {name for name, _ in recorded.operations}
    expected: Tensor = F.conv2d(x, layer.weight, layer.bias, padding=1)
    assert torch.equal(y, expected)
