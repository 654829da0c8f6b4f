"""Arithmetic whose results are the same on every machine, bit for bit.

Between machines, devices, thread counts and versions of libraries only two things differ: the order in which rounded
numbers are added, and how library functions round. So here

- a sum is taken of numbers on one grid, so few bits apart that their type holds every partial sum exactly. Then no
  order of additions, no blocking and no fused multiplication changes it. The factors of matrix products are rounded to
  grids first (`on_grid`): of 20 bits for sums in float64, of 8 bits for those of attention in float32, whose caches are
  read at every step. Sums of more terms than that are sums of such sums, in order. There are no others;
- everything else is made of single additions, subtractions, multiplications and divisions of float64, each an operation
  of its own, which IEEE 754 rounds in one way only, of comparisons, and of look-ups in tables that decimal arithmetic
  made. No tensor is divided by a Python number: on GPUs torch multiplies by its inverse then.

There is no `torch.exp`, softmax, convolution or norm. Tensors are float64, on any device that has it, but for the
factors of attention, which are exact in bfloat16 and TF32 too: a device that takes those for float32 products changes
nothing. A row of a batch does not depend on the other rows, nor on how many there are. Nothing here knows codes or
priors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Context, Decimal
from functools import cache, wraps
from typing import Concatenate, NamedTuple, ParamSpec, Self

import torch
from torch import Tensor, nn

from common.errors import UserError

MANTISSA = 53  # bits of float64: integers up to 2**53 and their sums up to it are exact
SMALLEST = 2.0**-40  # the size of a row's largest number is taken to be at least this
EXPONENT = 0x7FF0000000000000  # of a float64's bits, those that tell its power of two
SHARE_BITS = 30  # behind the point, of the numerators of a softmax: 2**23 of them have an exact sum
STEPS = 256  # of the table of powers of two, for each octave
OCTAVES = 64  # of that table: it ends at 2**-64
LOG2 = 0.6931471805599453  # the natural logarithm of 2
DECIMALS = Context(prec=50)
CHECK = [-160588353477.33203, -8041.702267066808, -35963.73863226827]  # what every device finds in `check_device`
PIECE = 2**17  # numbers that a CPU takes at a time, see `in_pieces`

Rest = ParamSpec("Rest")


# ---- pieces ---------------------------------------------------------------------------------------------------------


def in_pieces(function: Callable[Concatenate[Tensor, Rest], Tensor]) -> Callable[Concatenate[Tensor, Rest], Tensor]:
    """The function, one of each row along the last axis by itself, of a few rows after the others where there are many:
    what lies between x and the result stays in a CPU's cache then, which is several times as fast, and small."""

    @wraps(function)
    def of_pieces(x: Tensor, *rest: Rest.args, **named: Rest.kwargs) -> Tensor:
        if x.numel() <= PIECE or x.device.type != "cpu":
            return function(x, *rest, **named)
        rows = x.reshape(-1, x.shape[-1]).split(rows_at_once(x.shape[-1]))
        return torch.cat([function(some, *rest, **named) for some in rows]).view(*x.shape[:-1], -1)

    return of_pieces


def rows_at_once(numbers: int) -> int:
    """Rows of so many numbers in a piece."""
    return max(1, PIECE // max(1, numbers))


# ---- sums -----------------------------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """Sums of so many products, of factors of so many bits, that a type holds exactly."""

    type: torch.dtype
    terms: int
    bits: int


FINE = Sums(torch.float64, 4096, 20)  # of linear layers and norms: 4096 * 2**20 * 2**20 = 2**52
COARSE = Sums(torch.float32, 256, 8)  # of attention, whose caches are large: 256 * 2**8 * 2**8 = 2**24


def on_grid(x: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Each row of x along `dim` on a grid of its own: whole numbers of at most 2**bits in size, times a power of two.

    With p the smallest power of two above the row's largest size, but not below 2**-39, (x + c) - c for
    c = 1.5 * 2**(52 - bits) p rounds to multiples of 2**-bits p.
    """
    c = grid_constant(x, bits, dim)
    return (x + c).sub_(c)


def grid_constant(x: Tensor, bits: int, dim: int = -1) -> Tensor:
    """The c of `on_grid`, of each row."""
    sizes = x.abs().amax(dim=dim, keepdim=True).clamp_(min=SMALLEST)
    halves = (sizes.view(torch.int64) & EXPONENT).view(torch.float64)  # p / 2
    return halves * (3 * 2.0 ** (MANTISSA - 1 - bits))


def factors_of(x: Tensor) -> Tensor:
    """Rows along the last axis as linear layers take them."""
    return on_grid(x, FINE.bits).to(FINE.type)


def in_two(x: Tensor) -> Tensor:
    """`... m n` as `... 2m n` of COARSE's type, two parts of each row that add up to it: the row on its grid, and what
    is left on a grid as much finer as the grid has bits."""
    c = grid_constant(x, COARSE.bits)
    high = (x + c).sub_(c)
    c.mul_(2.0**-COARSE.bits)
    low = (x - high).add_(c).sub_(c)
    return torch.cat([high, low], dim=-2).to(COARSE.type)


def in_units(x: Tensor) -> tuple[Tensor, Tensor]:
    """`... d` as units `... d` of COARSE's type and scales `...`: a row's scale is its largest size, and its units,
    between -1 and 1, have COARSE's bits behind the point, in all rows the same. So sums may go over rows."""
    scales = x.abs().amax(dim=-1, keepdim=True)
    c = 1.5 * 2.0 ** (MANTISSA - 1 - COARSE.bits)
    units = (x / scales.clamp(min=SMALLEST)).add_(c).sub_(c)
    return units.to(COARSE.type), scales.squeeze(-1)


def product_of(a: Tensor, b: Tensor, sums: Sums = FINE) -> Tensor:
    """Matrices `... m k` and `... k n` of factors of `sums`, multiplied, in float64. Its sums of `sums.terms` products
    are exact; more of them are added up one after the other."""
    parts = [x @ y for x, y in zip(a.split(sums.terms, dim=-1), b.split(sums.terms, dim=-2), strict=True)]
    total = parts[0].double()
    for part in parts[1:]:
        total.add_(part.double())
    return total


class Product:
    """A linear layer: `... in` -> `... out`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight: out in, of any floating type; bias: out."""
        self.matrix = factors_of(weight.detach().double()).t()
        self.bias = None if bias is None else bias.detach().double()

    @classmethod
    def of(cls, layer: nn.Linear) -> Self:
        return cls(layer.weight, layer.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return multiplied(x.flatten(0, -2), self.matrix, self.bias).view(*x.shape[:-1], -1)


@in_pieces
def multiplied(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """x: n in; matrix: in out, factors."""
    product = product_of(factors_of(x), matrix)
    return product if bias is None else product.add_(bias)


def mean(x: Tensor) -> Tensor:
    """Over the last axis, which is kept."""
    return on_grid(x, FINE.bits).sum(dim=-1, keepdim=True) * (1 / x.shape[-1])


def mean_square(x: Tensor) -> Tensor:
    """Over the last axis, which is kept."""
    return sum_of_squares(x).mul_(1 / x.shape[-1])


def sum_of_squares(x: Tensor) -> Tensor:
    """Over the last axis, which is kept."""
    bits = (MANTISSA - (x.shape[-1] - 1).bit_length()) // 2  # so many squares of so many bits have a sum below 2**53
    factors = on_grid(x, bits)
    return (factors * factors).sum(dim=-1, keepdim=True)


# ---- functions ------------------------------------------------------------------------------------------------------


def power(base: float, exponent: float) -> float:
    """base**exponent for a base above 0, rounded once."""
    return float(DECIMALS.exp(DECIMALS.multiply(DECIMALS.ln(Decimal(base)), Decimal(exponent))))


@cache
def powers_of_two(device: torch.device) -> Tensor:
    """2**(-n / 256) for n from 0 to 64 * 256."""
    octave = [power(2, -n / STEPS) for n in range(STEPS)]
    table = [math.ldexp(number, -octaves) for octaves in range(OCTAVES) for number in octave]
    return torch.tensor([*table, 2.0**-OCTAVES], dtype=torch.float64, device=device)


@in_pieces
def exp_of_minus(x: Tensor) -> Tensor:
    """exp(-x) for x of at least 0, to a relative error of 5e-10; not below 2**-64."""
    steps = (x * (STEPS / LOG2)).clamp_(max=STEPS * OCTAVES)
    whole = steps.round()
    part = steps.neg_().add_(whole)  # exp(-x) = 2**(-whole / 256) exp(part ln 2 / 256), |part| <= 1/2
    unit = LOG2 / STEPS
    series = (part * (unit * unit / 2)).add_(unit).mul_(part).add_(1)
    places = whole.long().clamp_(0, STEPS * OCTAVES)  # of NaN, which stays NaN, it is no place
    return series.mul_(powers_of_two(x.device).index_select(0, places.flatten()).view(x.shape))


def square_root(x: Tensor) -> Tensor:
    """Of x from 0 to 2**900, rounded once, as IEEE 754 has it. torch's own is not: in float64 MKL's, which it takes on
    x86, is one unit in the last place off for 1 of 100 numbers, and can have half of the digits only where the first
    call of a process runs on several threads (pytorch issue 188792). Two corrections make it right from there."""
    root = x.sqrt()
    for _ in range(2):
        # x - root**2 without rounding: root is the sum of two numbers whose products are exact (Dekker 1971).
        scaled = root * (2.0**27 + 1)
        high = scaled - (scaled - root)
        low = root - high
        rest = (x - high * high).sub_(high * low * 2).sub_(low * low)
        root = rest.div_((root * 2).clamp_(min=2.0**-500)).add_(root)
    return root


def exp(x: Tensor) -> Tensor:
    """exp(x), not below 2**-64 and not above 2**64."""
    decayed = exp_of_minus(x.abs())
    return torch.where(x > 0, torch.ones_like(x).div_(decayed), decayed)


@in_pieces
def sigmoid(x: Tensor) -> Tensor:
    decayed = exp_of_minus(x.abs())
    return torch.maximum(decayed, x.sign()).div_(decayed + 1)


@in_pieces
def tanh(x: Tensor) -> Tensor:
    decayed = exp_of_minus(x.abs().mul_(2))
    return torch.copysign((1 - decayed).div_(decayed + 1), x)


@in_pieces
def silu(x: Tensor) -> Tensor:
    return sigmoid(x).mul_(x)


@in_pieces
def elu(x: Tensor) -> Tensor:
    return exp_of_minus(x.clamp(max=0).neg_()).sub_(1).add_(x.clamp(min=0))


@in_pieces
def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), to an error of 1e-9."""
    decayed = exp_of_minus(x.abs())
    s = decayed.div_(decayed + 2)  # log(1 + d) = 2 (s + s**3 / 3 + s**5 / 5 + ...), s = d / (d + 2)
    square = s * s
    series = torch.zeros_like(s)
    for n in range(19, 1, -2):
        series.add_(1 / n).mul_(square)
    return series.add_(1).mul_(s).mul_(2).add_(x.clamp(min=0))


@in_pieces
def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function of x, by formula 7.1.26 of Abramowitz and Stegun, to 1.5e-7 of x."""
    size = x.abs() * 0.7071067811865476
    t = torch.ones_like(x).div_((size * 0.3275911).add_(1))
    series = t * 1.061405429
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series.add_(coefficient).mul_(t)
    tail = series.mul_(exp_of_minus(size.mul_(size))).mul_(0.5)  # of the distribution beyond |x|
    return torch.where(x < 0, tail, 1 - tail).mul_(x)


@in_pieces
def gelu_by_tanh(x: Tensor) -> Tensor:
    """The approximation of Hendrycks and Gimpel 2016 (arXiv:1606.08415)."""
    # (1 + tanh(y)) / 2 = sigmoid(2 y), y = 0.7978845608028654 (x + 0.044715 x**3)
    twice = (x * x).mul_(0.07135481627260025).add_(1.5957691216057308).mul_(x)
    return sigmoid(twice).mul_(x)


def cosine_and_sine(angles: Sequence[Sequence[float]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of angles in radians, up to 2**20, to an error of 1e-12: two tensors of the shape of `angles`."""
    x = torch.tensor(angles, dtype=torch.float64, device=device)
    quarters = (x * 0.6366197723675814).round()  # 2 / pi
    # pi / 2 in two parts: of the first, 33 bits, a multiple is exact.
    rest = x - quarters * 1.5707963267341256 - quarters * 6.077100506506192e-11
    square = rest * rest
    sine, cosine = torch.zeros_like(x), torch.zeros_like(x)
    for n in (13, 11, 9, 7, 5, 3):
        sine.add_((-1) ** (n // 2) / math.factorial(n)).mul_(square)
    for n in (14, 12, 10, 8, 6, 4, 2):
        cosine.add_((-1) ** (n // 2) / math.factorial(n)).mul_(square)
    sine, cosine = sine.add_(1).mul_(rest), cosine.add_(1)
    turns = quarters.long() & 3
    cosines = torch.where(turns & 1 == 0, cosine, sine)
    sines = torch.where(turns & 1 == 0, sine, cosine)
    return (
        torch.where((turns == 1) | (turns == 2), -cosines, cosines),
        torch.where(turns >= 2, -sines, sines),
    )


# ---- layers ---------------------------------------------------------------------------------------------------------


def softmax(x: Tensor) -> Tensor:
    """Over the last axis."""
    numerators = numerators_of_softmax(x)
    return numerators / numerators.sum(dim=-1, keepdim=True)


def numerators_of_softmax(x: Tensor) -> Tensor:
    """exp(x - max x) over the last axis, rounded to 30 bits behind the point; their sum is exact."""
    c = 1.5 * 2.0 ** (MANTISSA - 1 - SHARE_BITS)
    return exp_of_minus(x.amax(dim=-1, keepdim=True) - x).add_(c).sub_(c)


@in_pieces
def layer_norm(x: Tensor, epsilon: float) -> Tensor:
    """Over the last axis, without gain and bias."""
    centred = x - mean(x)
    return centred.div_(square_root(mean_square(centred).add_(epsilon)))


@in_pieces
def rms_norm(x: Tensor, epsilon: float) -> Tensor:
    """x / (rms(x) + epsilon) over the last axis."""
    return x / square_root(mean_square(x)).add_(epsilon)


@cache
def check_device(device: torch.device) -> None:
    """Raises UserError for a device whose float64 is not that of IEEE 754, or whose matrix products are not sums of
    exact products: its results would be its own."""
    numbers = torch.arange(4096, dtype=torch.float64, device=device).view(64, 64) * 0.7071067811865476
    sizes = exp(numbers * 0.01 - 10) / square_root(numbers + 1.1)
    found = [float(x) for x in (Product(sizes - 0.3)(numbers - 1e3)[[0, 31, 63], [63, 17, 5]])]
    if found != CHECK:
        raise UserError(
            f"{device} computes {found}, expected {CHECK}: its float64 is not that of IEEE 754, and files in mode "
            "prior are not the same there as elsewhere; take the CPU (--device cpu), or mode table"
        )
    largest = 2**COARSE.bits
    factors = (torch.arange(64 * COARSE.terms).view(64, -1) * 7919 % (2 * largest + 1) - largest).double()
    factors[:2] = largest  # the largest sum, and one that is less by the smallest product
    factors[1, -1] = 1
    with torch.autocast(device.type, enabled=False):
        there = factors.to(device, COARSE.type)
        sums = product_of(there, there.mT, COARSE).cpu()
    if not torch.equal(sums, product_of(factors, factors.mT)):
        raise UserError(
            f"{device} does not add up {COARSE.terms} products of {COARSE.bits} bits in {COARSE.type} without "
            "rounding, and files in mode prior are not the same there as elsewhere; take the CPU (--device cpu), or "
            "mode table"
        )


@in_pieces
def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis, and 0 for 0."""
    return x / square_root(sum_of_squares(x)).clamp_(min=1e-12)


class Attention:
    """Attention over places that come one after the other: their keys and values wait in a cache.

    rows: as many as samples times heads; width: of a head. What is asked, `rows m d`, is answered in the same shape.
    Queries and shares go in two parts, which costs little where one place asks at a time.
    """

    def __init__(self, rows: int, places: int, width: int, device: torch.device):
        """places: as many as there may be."""
        self.keys = torch.zeros(rows, places, width, dtype=COARSE.type, device=device)
        self.values = torch.zeros_like(self.keys)  # in units
        self.scales = torch.zeros(rows, places, dtype=torch.float64, device=device)
        self.places = 0  # that are known

    def add(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: rows m d, of the next m places."""
        here = slice(self.places, self.places + keys.shape[1])
        self.keys[:, here] = on_grid(keys, COARSE.bits).to(COARSE.type)
        self.values[:, here], self.scales[:, here] = in_units(values)
        self.places = here.stop

    def __call__(self, queries: Tensor, hidden: Tensor | None = None) -> Tensor:
        """What the places known so far answer. queries: rows m d, scaled; hidden: `m places` or `rows m places`, True
        where a query does not see a place; it must see one."""
        at_once = rows_at_once(queries.shape[1] * self.places) if queries.device.type == "cpu" else len(queries)
        answers = []
        for first in range(0, len(queries), max(1, at_once)):
            rows = slice(first, first + at_once)
            of_rows = hidden[rows] if hidden is not None and hidden.dim() == 3 else hidden
            answers.append(self.answers(queries[rows], rows, of_rows))
        return torch.cat(answers)

    def answers(self, queries: Tensor, rows: slice, hidden: Tensor | None) -> Tensor:
        """Of some rows."""
        scores = summed_up(product_of(in_two(queries), self.keys[rows, : self.places].mT, COARSE))
        if hidden is not None:
            scores.masked_fill_(hidden, -1e4)
        shares = softmax(scores).mul_(self.scales[rows, None, : self.places])
        return summed_up(product_of(in_two(shares), self.values[rows, : self.places], COARSE))


def summed_up(parts: Tensor) -> Tensor:
    """Of the products of what `in_two` gave, `... 2m n` -> `... m n`."""
    high, low = parts.chunk(2, dim=-2)
    return high + low
