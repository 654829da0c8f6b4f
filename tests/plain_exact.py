"""Exact arithmetic 1 and the walk of a transformer in plain Python, written from docs/format.md: floats are IEEE 754
float64, and each operation below is rounded once. One grid of codes, a class, no caption and no given codes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from decimal import Context, Decimal

Vector = list[float]
Matrix = list[list[float]]

EXACT_DECIMALS = Context(prec=50)
LOG2 = 0.6931471805599453


def power(base: float, exponent: float) -> float:
    return float(EXACT_DECIMALS.exp(EXACT_DECIMALS.multiply(EXACT_DECIMALS.ln(Decimal(base)), Decimal(exponent))))


OCTAVE = [power(2.0, -n / 256) for n in range(256)]
POWERS = [math.ldexp(number, -octaves) for octaves in range(64) for number in OCTAVE] + [2.0**-64]


def bits_for(terms: int) -> int:
    return (53 - (terms - 1).bit_length()) // 2


def rounded(x: Vector, terms: int) -> Vector:
    c = max(map(abs, x)) * 2.0 ** (54 - bits_for(terms))
    return [(number + c) - c for number in x]


def in_units(x: Vector, terms: int) -> tuple[Vector, float]:
    scale, c = max(map(abs, x)), 1.5 * 2.0 ** (52 - bits_for(terms))
    return [(number / max(scale, 2.0**-500) + c) - c for number in x], scale


def dot(x: Vector, y: Vector) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))  # exact, if both are rounded


def product(matrix: Matrix, x: Vector) -> Vector:
    on_grid = rounded(x, len(x))
    return [dot(rounded(row, len(x)), on_grid) for row in matrix]


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


def mean_square(x: Vector) -> float:
    on_grid = rounded(x, len(x))
    return dot(on_grid, on_grid) * (1 / len(x))


def layer_norm(x: Vector, epsilon: float) -> Vector:
    mean = sum(rounded(x, len(x))) * (1 / len(x))
    centred = [number - mean for number in x]
    size = math.sqrt(mean_square(centred) + epsilon)
    return [number / size for number in centred]


def unit(x: Vector) -> Vector:
    on_grid = rounded(x, len(x))
    size = max(math.sqrt(dot(on_grid, on_grid)), 1e-12)
    return [number / size for number in x]


def rms_norm(x: Vector, gain: Vector) -> Vector:
    size = math.sqrt(mean_square(x)) + 1e-6
    return [number / size * own for number, own in zip(x, gain, strict=True)]


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
    """`model.safetensors` of float32: matrices, and vectors as a matrix of one row."""
    length = struct.unpack("<Q", data[:8])[0]
    weights = {}
    for name, facts in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        assert facts["dtype"] == "F32"
        columns, (begin, end) = facts["shape"][-1], facts["data_offsets"]
        numbers = struct.unpack(f"<{(end - begin) // 4}f", data[8 + length + begin : 8 + length + end])
        weights[name] = [list(numbers[i : i + columns]) for i in range(0, len(numbers), columns)]
    return weights


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
        self.places = size[0] * size[1]
        self.place = 0
        # Of each layer and head of keys: keys, values in units, and the scales of those.
        self.known: list[list[tuple[Matrix, Matrix, Vector]]] = [
            [([], [], []) for _ in range(shared)] for _ in range(layers)
        ]

    def next(self, previous: int | None) -> Vector:
        x = self.before if previous is None else self.weights["embedding.weight"][previous]
        for layer in range(self.layers):
            x = self.block(x, layer)
        self.place += 1
        return product(self.weights["output.weight"], rms_norm(x, self.weights["norm.gain"][0]))

    def block(self, x: Vector, layer: int) -> Vector:
        own = {name: self.weights[f"blocks.{layer}.{name}"] for name in BLOCK}
        qkv = product(own["attention.qkv.weight"], rms_norm(x, own["attention_norm.gain"][0]))
        parts = [qkv[i : i + self.width] for i in range(0, len(qkv), self.width)]
        scale = 1 / math.sqrt(self.width)
        queries = [[n * scale for n in turned(q, self.angles[self.place + 1])] for q in parts[: self.heads]]
        for number, (keys, values, scales) in enumerate(self.known[layer]):
            key = turned(parts[self.heads + number], self.angles[self.place])
            value, size = in_units(parts[self.heads + self.shared + number], self.places)
            keys.append(rounded(key, self.width))
            values.append(value)
            scales.append(size)
        answers: Vector = []
        for number, query in enumerate(queries):
            keys, values, scales = self.known[layer][number * self.shared // self.heads]
            on_grid = rounded(query, self.width)
            shares = softmax([dot(on_grid, key) for key in keys])
            weighed = rounded([share * size for share, size in zip(shares, scales, strict=True)], self.places)
            answers += [dot(weighed, list(column)) for column in zip(*values, strict=True)]
        x = added(x, product(own["attention.out.weight"], answers))
        hidden = product(own["feed_forward.gate_up.weight"], rms_norm(x, own["feed_forward_norm.gain"][0]))
        gate, up = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
        opened = [silu(g) * u for g, u in zip(gate, up, strict=True)]
        return added(x, product(own["feed_forward.down.weight"], opened))


BLOCK = (
    "attention_norm.gain",
    "attention.qkv.weight",
    "attention.out.weight",
    "feed_forward_norm.gain",
    "feed_forward.gate_up.weight",
    "feed_forward.down.weight",
)


def added(x: Vector, y: Vector) -> Vector:
    return [a + b for a, b in zip(x, y, strict=True)]
