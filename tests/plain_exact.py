"""Exact arithmetic 1 and the walk of a transformer in plain Python, written from docs/format.md: floats are IEEE 754
float64, and each operation below is rounded once. One grid of codes, a class, no caption and no given codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Context, Decimal

from tests.plain_zlg import read_tensors

Vector = list[float]
Matrix = list[list[float]]

EXACT_DECIMALS = Context(prec=50)
LOG2 = 0.6931471805599453


def power(base: float, exponent: float) -> float:
    return float(EXACT_DECIMALS.exp(EXACT_DECIMALS.multiply(EXACT_DECIMALS.ln(Decimal(base)), Decimal(exponent))))


OCTAVE = [power(2.0, -n / 256) for n in range(256)]
POWERS = [math.ldexp(number, -octaves) for octaves in range(64) for number in OCTAVE] + [2.0**-64]


def steps_of(x: Vector, bits: int) -> float:
    """c of a row's grid: numbers round to multiples of p / 2^bits when it is added and subtracted."""
    _, exponent = math.frexp(max(2.0**-40, *map(abs, x)))  # p = 2^exponent is the power of two above the largest
    return math.ldexp(1.5, 52 - bits + exponent)


def on_grid(x: Vector, bits: int) -> Vector:
    c = steps_of(x, bits)
    return [(number + c) - c for number in x]


def in_two(x: Vector) -> tuple[Vector, Vector]:
    c = steps_of(x, 8)
    high = [(number + c) - c for number in x]
    c = c * 2.0**-8
    return high, [(number - part + c) - c for number, part in zip(x, high, strict=True)]


def in_units(x: Vector) -> tuple[Vector, float]:
    scale, c = max(map(abs, x)), 1.5 * 2.0**44
    return [(number / max(scale, 2.0**-40) + c) - c for number in x], scale


def dot(x: Vector, y: Vector, terms: int) -> float:
    """Of numbers on grids: sums of so many products are exact, and are added up in order."""
    exact = [
        sum(a * b for a, b in zip(x[first : first + terms], y[first : first + terms], strict=True))
        for first in range(0, len(x), terms)
    ]
    total = exact[0]
    for part in exact[1:]:
        total = total + part
    return total


def product(matrix: Matrix, x: Vector) -> Vector:
    factors = on_grid(x, 20)
    return [dot(on_grid(row, 20), factors, 4096) for row in matrix]


def exp_of_minus(x: float) -> float:
    steps = min(x * (256 / LOG2), 256.0 * 64)
    whole = round(steps)  # to even at a half
    part, unit = -steps + whole, LOG2 / 256
    return ((part * (unit * unit / 2) + unit) * part + 1) * POWERS[whole]


def exp(x: float) -> float:
    return 1 / exp_of_minus(x) if x > 0 else exp_of_minus(-x)


def sigmoid(x: float) -> float:
    decayed = exp_of_minus(abs(x))
    return (decayed if x < 0 else 1.0) / (decayed + 1)


def silu(x: float) -> float:
    return sigmoid(x) * x


def tanh(x: float) -> float:
    decayed = exp_of_minus(2 * abs(x))
    return math.copysign((1 - decayed) / (decayed + 1), x)


def elu(x: float) -> float:
    return exp_of_minus(-x) - 1 if x < 0 else x


def gelu(x: float) -> float:
    size = abs(x) * 0.7071067811865476
    t = 1 / (size * 0.3275911 + 1)
    tail = ((((t * 1.061405429 - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    tail = tail * exp_of_minus(size * size) * 0.5
    return (1 - tail if x >= 0 else tail) * x


def gelu_by_tanh(x: float) -> float:
    return sigmoid(((x * x) * 0.07135481627260025 + 1.5957691216057308) * x) * x


def numerators(x: Vector) -> list[int]:
    """Of a softmax, in units of 2^-30."""
    largest, c = max(x), 1.5 * 2.0**22
    return [int(((exp_of_minus(largest - number) + c) - c) * 2.0**30) for number in x]


def softmax(x: Vector) -> Vector:
    parts = [number * 2.0**-30 for number in numerators(x)]
    total = sum(parts)
    return [part / total for part in parts]


def mean(x: Vector) -> float:
    return sum(on_grid(x, 20)) * (1 / len(x))


def sum_of_squares(x: Vector) -> float:
    return sum(number * number for number in on_grid(x, (53 - (len(x) - 1).bit_length()) // 2))


def mean_square(x: Vector) -> float:
    return sum_of_squares(x) * (1 / len(x))


def layer_norm(x: Vector, epsilon: float) -> Vector:
    middle = mean(x)
    centred = [number - middle for number in x]
    size = math.sqrt(mean_square(centred) + epsilon)
    return [number / size for number in centred]


def unit(x: Vector) -> Vector:
    size = max(math.sqrt(sum_of_squares(x)), 1e-12)
    return [number / size for number in x]


def rms_norm(x: Vector, epsilon: float) -> Vector:
    size = math.sqrt(mean_square(x)) + epsilon
    return [number / size for number in x]


class Cache:
    """Keys and values of one head at the places so far."""

    def __init__(self) -> None:
        self.keys: Matrix = []
        self.values: Matrix = []  # in units
        self.scales: Vector = []

    def add(self, key: Vector, value: Vector) -> None:
        units, scale = in_units(value)
        self.keys.append(on_grid(key, 8))
        self.values.append(units)
        self.scales.append(scale)

    def answer(self, query: Vector, hidden: Sequence[bool] | None = None) -> Vector:
        """query: scaled; hidden: of each place, whether the query does not see it."""
        high, low = in_two(query)
        scores = [dot(high, key, 256) + dot(low, key, 256) for key in self.keys]
        if hidden is not None:
            scores = [-1e4 if unseen else score for score, unseen in zip(scores, hidden, strict=True)]
        shares = [share * scale for share, scale in zip(softmax(scores), self.scales, strict=True)]
        high, low = in_two(shares)
        columns = [list(column) for column in zip(*self.values, strict=True)]
        return [dot(high, column, 256) + dot(low, column, 256) for column in columns]


def cosine_and_sine(x: float) -> tuple[float, float]:
    quarters = float(round(x * 0.6366197723675814))
    rest = x - quarters * 1.5707963267341256 - quarters * 6.077100506506192e-11
    square, sine, cosine = rest * rest, 0.0, 0.0
    for n in (13, 11, 9, 7, 5, 3):
        sine = (sine + (-1) ** (n // 2) / math.factorial(n)) * square
    for n in (14, 12, 10, 8, 6, 4, 2):
        cosine = (cosine + (-1) ** (n // 2) / math.factorial(n)) * square
    sine, cosine = (sine + 1) * rest, cosine + 1
    return ((cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine))[int(quarters) & 3]


def turned(x: Vector, angles: Sequence[tuple[float, float]]) -> Vector:
    parts = []
    for (cosine, sine), first, second in zip(angles, x[::2], x[1::2], strict=True):
        parts += [first * cosine - second * sine, first * sine + second * cosine]
    return parts


def read_weights(data: bytes) -> dict[str, Matrix]:
    """`model.safetensors`: matrices, and vectors as a matrix of one row."""
    return {
        name: [list(map(float, numbers[i : i + shape[-1]])) for i in range(0, len(numbers), shape[-1])]
        for name, (shape, numbers) in read_tensors(data).items()
    }


class PlainTransformer:
    """Logits of one image, code after code."""

    def __init__(
        self, weights: Mapping[str, Matrix], layers: int, heads: int, shared: int, size: tuple[int, int], label: int
    ):
        """shared: heads of keys and values; size: h, w of the grid; label: the last one is the null label."""
        self.weights, self.layers, self.heads, self.shared = weights, layers, heads, shared
        self.width = len(weights["norm.gain"][0]) // heads  # of a head
        self.before = weights["classes.weight"][label]
        pairs = self.width // 4
        turns = [power(100.0, -pair / pairs) for pair in range(pairs)]
        angles = [[0.0] * (2 * pairs)]
        for row in range(size[0]):
            for column in range(size[1]):
                angles.append([row * turn for turn in turns] + [column * turn for turn in turns])
        self.angles = [[cosine_and_sine(angle) for angle in place] for place in angles]
        self.place = 0
        self.known = [[Cache() for _ in range(shared)] for _ in range(layers)]

    def next(self, previous: int | None) -> Vector:
        x = self.before if previous is None else self.weights["embedding.weight"][previous]
        for layer in range(self.layers):
            x = self.block(x, layer)
        self.place += 1
        return product(self.weights["output.weight"], self.normalised(x, "norm.gain"))

    def normalised(self, x: Vector, gain: str) -> Vector:
        return [number * own for number, own in zip(rms_norm(x, 1e-6), self.weights[gain][0], strict=True)]

    def block(self, x: Vector, layer: int) -> Vector:
        own = f"blocks.{layer}."
        qkv = product(self.weights[own + "attention.qkv.weight"], self.normalised(x, own + "attention_norm.gain"))
        parts = [qkv[i : i + self.width] for i in range(0, len(qkv), self.width)]
        scale = 1 / math.sqrt(self.width)
        queries = [[n * scale for n in turned(q, self.angles[self.place + 1])] for q in parts[: self.heads]]
        keys, values = parts[self.heads : self.heads + self.shared], parts[self.heads + self.shared :]
        for cache, key, value in zip(self.known[layer], keys, values, strict=True):
            cache.add(turned(key, self.angles[self.place]), value)
        answers: Vector = []
        for number, query in enumerate(queries):
            answers += self.known[layer][number * self.shared // self.heads].answer(query)
        x = added(x, product(self.weights[own + "attention.out.weight"], answers))
        before = self.normalised(x, own + "feed_forward_norm.gain")
        hidden = product(self.weights[own + "feed_forward.gate_up.weight"], before)
        gate, up = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
        opened = [silu(g) * u for g, u in zip(gate, up, strict=True)]
        return added(x, product(self.weights[own + "feed_forward.down.weight"], opened))


def added(x: Vector, y: Vector) -> Vector:
    return [a + b for a, b in zip(x, y, strict=True)]
