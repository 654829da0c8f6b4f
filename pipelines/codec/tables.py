"""Frequency tables: how often each code occurs, alone or beside its neighbours. Whole numbers in a file, so that what
they code is decoded on any machine.

A grid has one or two tables, of contexts by k: `alone` (one context), `left` and `upper` (the neighbour's code, or k at
the border). The frequencies of a code are the sum of its rows; with both neighbours that is the even mixture of what
each predicts. Rows of all tables of a grid sum to `TOTAL` together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from codes.shards import CodeDataset
from codes.spec import Codes, CodeSpec
from common.errors import UserError
from common.files import atomic_file
from common.tensor_files import load_tensors, save_tensors
from pipelines.codec.archive import as_array
from pipelines.codec.entropy_coding import (
    LARGEST_VOCABULARY,
    TOTAL,
    Decoder,
    Encoder,
    frequencies,
    weights_of,
)

TABLES_NAME = "tables.safetensors"
CHOICES: tuple[tuple[str, ...], ...] = (("alone",), ("left",), ("upper",), ("left", "upper"))
LARGEST_CONTEXT = 2048  # k beyond which neighbours are no contexts: their tables have k² entries
HELD_OUT = 10  # every tenth image judges which contexts pay
JUDGES = 2000  # at most so many images
GAIN = 0.99  # contexts pay if they leave less than this share of the bits
STRENGTH = 32  # a context counts for as much as the mean of all when it has been seen so often
BATCH = 256


class GridTables:
    """The tables of one grid, by context: int `contexts k`."""

    def __init__(self, tables: Mapping[str, np.ndarray]):
        self.tables = dict(tables)
        self.vocabulary = next(iter(tables.values())).shape[1]
        # Their sum is a row of weights as the coders take them: frequencies less one.
        first, *others = tables.values()
        self.weights = dict(zip(tables, [weights_of(first), *(t.astype(np.float32) for t in others)], strict=True))

    def encode(self, codes: np.ndarray, encoder: Encoder) -> None:
        """codes: h w."""
        if "alone" in self.tables:
            return encoder.encode(codes.reshape(-1), self.weights["alone"][0])
        contexts = {name: neighbours(codes, name, self.vocabulary) for name in self.tables}
        for row in range(len(codes)):  # a row at a time: all weights at once would be h w k numbers
            encoder.encode(codes[row], sum_of([self.weights[name][contexts[name][row]] for name in self.tables]))
        return None

    def decode(self, height: int, width: int, decoder: Decoder) -> np.ndarray:
        """Codes, h w. Raises DamagedPayloadError."""
        if "alone" in self.tables:
            return decoder.decode(self.weights["alone"][0], height * width).reshape(height, width)
        codes = np.empty((height, width), np.int64)
        left, upper = self.weights.get("left"), self.weights.get("upper")
        for row in range(height):
            above = codes[row - 1] if row else np.full(width, self.vocabulary)
            if left is None:
                assert upper is not None
                codes[row] = decoder.decode(upper[above])
                continue
            before = self.vocabulary
            for column in range(width):
                weights = left[before] if upper is None else left[before] + upper[above[column]]
                before = codes[row, column] = decoder.decode(weights[None])[0]
        return codes

    def bits(self, codes: np.ndarray) -> np.ndarray:
        """What each code costs, b h w; codes: b h w."""
        parts = [table[neighbours(codes, name, self.vocabulary), codes] for name, table in self.tables.items()]
        counts = sum_of([part.astype(np.float64) for part in parts])
        return np.log2(TOTAL) - np.log2(counts)


def neighbours(codes: np.ndarray, name: str, vocabulary: int) -> np.ndarray:
    """The context of each code, ... h w: `vocabulary` at the border; codes: ... h w."""
    if name == "alone":
        return np.zeros_like(codes)
    contexts = np.full_like(codes, vocabulary)
    if name == "left":
        contexts[..., :, 1:] = codes[..., :, :-1]
    else:
        contexts[..., 1:, :] = codes[..., :-1, :]
    return contexts


def sum_of(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else arrays[0] + arrays[1]


class CodeTables:
    """The tables of all grids of a model's codes, by the grid's name."""

    def __init__(self, grids: Mapping[str, GridTables]):
        self.grids = dict(grids)

    def arrays(self) -> dict[str, np.ndarray]:
        return {f"{grid}.{name}": t for grid, own in self.grids.items() for name, t in own.tables.items()}

    def fingerprint(self) -> str:
        """SHA-256: equal for equal tables."""
        digest = hashlib.sha256()
        for name, table in sorted(self.arrays().items()):
            digest.update(f"{name} {table.shape}".encode())
            digest.update(np.ascontiguousarray(table, dtype="<i4").tobytes())
        return digest.hexdigest()

    def check_fit(self, spec: CodeSpec) -> None:
        """Raises UserError unless there are tables for exactly these grids."""
        ours = {name: own.vocabulary for name, own in self.grids.items()}
        theirs = {grid.name: grid.vocabulary for grid in spec.grids}
        if ours != theirs:
            raise UserError(
                f"the tables are of grids {described(ours)}, expected {described(theirs)}, those of the model; make "
                "them from its own codes by `zellige tables`"
            )

    def encode(self, codes: Codes, spec: CodeSpec) -> bytes:
        """Codes of one image, 1 h w each, to its payload."""
        encoder = Encoder()
        for grid, tensor in zip(spec.grids, codes, strict=True):
            self.grids[grid.name].encode(as_array(tensor)[0], encoder)
        return encoder.finish()

    def decode(self, payload: bytes, spec: CodeSpec) -> Codes:
        """Inverse of `encode`. Raises DamagedPayloadError."""
        decoder = Decoder(payload)
        grids = [self.grids[grid.name].decode(grid.height, grid.width, decoder) for grid in spec.grids]
        return tuple(torch.from_numpy(grid)[None] for grid in grids)

    def save(self, folder: Path) -> None:
        """Writes the tables into a model folder."""
        with atomic_file(folder / TABLES_NAME) as temporary:
            save_tensors({name: torch.from_numpy(table) for name, table in self.arrays().items()}, temporary)


def load_tables(folder: Path) -> CodeTables | None:
    """The tables of a model folder; None where there are none. Raises UserError when they are damaged."""
    path = folder / TABLES_NAME
    if not path.is_file():
        return None
    grids: dict[str, dict[str, np.ndarray]] = {}
    try:
        for name, tensor in load_tensors(path).items():
            grid, _, context = name.rpartition(".")
            grids.setdefault(grid, {})[context] = tensor.numpy()
        for own in grids.values():
            check_tables(own)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); make it anew by `zellige tables`, or delete it") from error
    return CodeTables({name: GridTables(dict(sorted(own.items()))) for name, own in grids.items()})


def check_tables(own: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError unless these are tables of one grid that can drive a coder."""
    if tuple(sorted(own)) not in CHOICES:
        raise ValueError(f"tables {', '.join(own)} of one grid")
    for name, table in own.items():
        k = table.shape[-1]
        if table.dtype != np.int32 or table.shape != ((1 if name == "alone" else k + 1), k):
            raise ValueError(f"table {name} of {table.dtype} {table.shape}")
        if table.min() < 1 or (table.sum(axis=1, dtype=np.int64) != TOTAL // len(own)).any():
            raise ValueError(f"table {name} has a row of a wrong sum")


def fit_tables(spec: CodeSpec, batches: Iterable[Codes]) -> CodeTables:
    """Tables of these codes. Neighbours are contexts where they save at least 1% of the bits of held-out images.

    Raises UserError for a vocabulary too large for tables.
    """
    for grid in spec.grids:
        if grid.vocabulary > LARGEST_VOCABULARY:
            raise UserError(
                f"grid {grid.name!r} has a vocabulary of {grid.vocabulary}, expected at most {LARGEST_VOCABULARY} for "
                "tables; compress in mode packed"
            )
    names = [CHOICES[0] if g.vocabulary > LARGEST_CONTEXT else ("alone", "left", "upper") for g in spec.grids]
    counts = [{name: count_table(name, g.vocabulary) for name in own} for own, g in zip(names, spec.grids, strict=True)]
    judges: list[list[np.ndarray]] = []
    seen = 0
    for codes in batches:
        arrays = [as_array(grid) for grid in codes]
        numbers = np.arange(seen, seen + len(arrays[0]))
        judging = (numbers % HELD_OUT == HELD_OUT - 1) & (numbers < HELD_OUT * JUDGES)
        seen += len(arrays[0])
        if judging.any():
            judges.append([array[judging] for array in arrays])
        for own, array in zip(counts, arrays, strict=True):
            add_counts(own, array[~judging])
    grids = {}
    for number, (grid, own) in enumerate(zip(spec.grids, counts, strict=True)):
        held_out = [part[number] for part in judges]
        chosen = CHOICES[0]
        if held_out and len(own) > 1:
            codes_held = np.concatenate(held_out)
            cost = {c: GridTables(tables_of(own, c)).bits(codes_held).sum() for c in CHOICES}
            best = min(cost, key=cost.__getitem__)
            chosen = best if cost[best] < GAIN * cost[CHOICES[0]] else CHOICES[0]
        for part in held_out:
            add_counts(own, part)
        grids[grid.name] = GridTables(tables_of(own, chosen))
    return CodeTables(grids)


def fit_tables_to_shards(codes: CodeDataset) -> CodeTables:
    """Tables of the images of a split of code shards."""
    parts = (range(start, min(start + BATCH, len(codes))) for start in range(0, len(codes), BATCH))
    return fit_tables(codes.code_spec, (codes.fetch(part, part)["codes"] for part in parts))


def count_table(name: str, vocabulary: int) -> np.ndarray:
    return np.zeros((1 if name == "alone" else vocabulary + 1, vocabulary), np.int64)


def add_counts(counts: Mapping[str, np.ndarray], codes: np.ndarray) -> None:
    for name, table in counts.items():
        k = table.shape[1]
        flat = (neighbours(codes, name, k) * k + codes).reshape(-1)
        table += np.bincount(flat, minlength=table.size).reshape(table.shape)


def tables_of(counts: Mapping[str, np.ndarray], chosen: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Counts to frequencies. What a context has not shown is filled up with the mean of all contexts."""
    mean = counts["alone"][0] + 0.5
    mean = mean / mean.sum()
    tables = {}
    for name in chosen:
        table = counts[name] if name == "alone" else counts[name] + STRENGTH * mean
        shares = (table + 1e-9) / (table + 1e-9).sum(axis=1, keepdims=True)
        tables[name] = frequencies(shares, TOTAL // len(chosen)).astype(np.int32)
    return tables


def described(vocabularies: Mapping[str, int]) -> str:
    return ", ".join(f"{name} of {k} codes" for name, k in vocabularies.items()) or "none"
