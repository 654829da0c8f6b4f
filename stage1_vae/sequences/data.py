"""Sequences to learn: lines of a text file as tokens, and drawings as the moves of a pen.

Tokens are int64, b L, `END` after the last and `PAD` behind it. Strokes are float32, b L 5, as sketch-rnn has them (Ha
and Eck 2018, arXiv:1704.03477, section 3.1): the pen's move (dx, dy), y upwards, and which state it is in after it, a
unit vector of (draws on, is lifted, has ended); the row that ends, and all behind it, move nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, check_fields
from common.files import json_value
from training.task import Batch

PAD, END, UNKNOWN, FIRST = 0, 1, 2, 3  # tokens; the first of the vocabulary's
HERSHEY = "hershey"
FONTS = ("futural", "futuram", "rowmans", "cursive", "scripts", "scriptc")
ENDED = (0.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class SequenceDataConfig:
    """Which sequences: a text file, a file of drawings, or the characters of single-line fonts."""

    path: str | None = None  # file.txt of lines, file.ndjson of drawings as Quick, Draw! has them, or hershey
    unit: Literal["character", "word"] = "character"  # of a text: what a token is
    vocabulary: int = 10_000  # of a text: as many tokens at most, the most frequent ones; others are unknown
    fonts: tuple[str, ...] = FONTS  # of hershey
    longest: int = 100  # tokens, or moves of the pen, the end included; longer sequences are left out
    validation_count: int = 100  # sequences that are never trained on
    stretch: float = 0.15  # of drawings in training: both axes are scaled by chance, by as much less or more

    def __post_init__(self) -> None:
        object.__setattr__(self, "fonts", tuple(self.fonts))
        check_fields(
            self,
            [
                ("unit", self.unit in ("character", "word"), "character or word"),
                ("vocabulary", self.vocabulary >= 1, "at least 1"),
                ("fonts", len(self.fonts) >= 1, "at least one font"),
                ("longest", self.longest >= 2, "at least 2"),
                ("validation_count", self.validation_count >= 0, "0 or more"),
                ("stretch", 0 <= self.stretch < 1, "a share from 0 to below 1"),
            ],
        )


class Sequences:
    """training.task.Dataset. A batch is {"sequences": b L or b L 5, "draws": b, "numbers": b}, L of its longest."""

    groups = None

    def __init__(
        self,
        items: Sequence[np.ndarray],
        names: Sequence[str],
        numbers: Sequence[int],
        stretch: float = 0.0,
        seed: int = 0,
    ) -> None:
        """items: int64 n, or float32 n 3: moves and 1 where the pen is lifted after it. numbers: of the items, for
        their noise. stretch, seed: of drawings in training."""
        self.items, self.names, self.numbers = list(items), list(names), list(numbers)
        self.stretch, self.seed = stretch, seed

    def __len__(self) -> int:
        return len(self.items)

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        chosen = [self.stretched(self.items[index], draw) for index, draw in zip(indices, draws, strict=True)]
        length = max(len(item) for item in chosen) + 1
        whole = [tokens_of(item, length) if item.ndim == 1 else strokes_of(item, length) for item in chosen]
        return {
            "sequences": torch.stack(whole),
            "draws": torch.tensor(list(draws)),
            "numbers": torch.tensor([self.numbers[index] for index in indices]),
        }

    def stretched(self, item: np.ndarray, draw: int) -> np.ndarray:
        if item.ndim == 1 or not self.stretch:
            return item
        chance = np.random.default_rng([self.seed, draw])
        scale = 1 + self.stretch * (2 * chance.random(2) - 1)
        return np.concatenate([item[:, :2] * scale, item[:, 2:]], axis=1).astype(np.float32)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item.shape} {item.dtype}".encode() + item.tobytes())
        return digest.hexdigest()


def tokens_of(item: np.ndarray, length: int) -> Tensor:
    found = torch.full((length,), PAD, dtype=torch.int64)
    found[: len(item)] = torch.from_numpy(item)
    found[len(item)] = END
    return found


def strokes_of(item: np.ndarray, length: int) -> Tensor:
    """n 3 -> length 5"""
    found = torch.tensor(ENDED).repeat(length, 1)
    lifted = torch.from_numpy(item[:, 2])
    found[: len(item)] = torch.stack(
        [*torch.from_numpy(item[:, :2]).T, 1 - lifted, lifted, torch.zeros_like(lifted)], dim=1
    )
    return found


def open_sequences(config: SequenceDataConfig, seed: int) -> tuple[Sequences, Sequences, list[str] | None]:
    """Sequences to train on, those held out, and the vocabulary of a text, whose first token is number `FIRST`. Raises
    UserError."""
    if config.path is None:
        raise UserError("no sequences are named: set sequences.path to a .txt file, a .ndjson file, or hershey")
    place = Path(config.path).expanduser()
    if config.path == HERSHEY:
        items, names = hershey_glyphs(config.fonts)
    elif place.suffix == ".ndjson":
        items, names = read_drawings(place)
    else:
        return open_text(config, place, seed)
    kept = [i for i, item in enumerate(items) if 0 < len(item) < config.longest]
    training, held_out = split(kept, config, len(items))
    scale = float(np.concatenate([items[i][:, :2] for i in training]).std())
    if scale == 0:
        raise UserError(f"sequences.path={config.path}: the pens of {len(training)} drawings never move")
    items = [np.concatenate([item[:, :2] / scale, item[:, 2:]], axis=1).astype(np.float32) for item in items]

    def part(chosen: list[int], stretch: float) -> Sequences:
        return Sequences([items[i] for i in chosen], [names[i] for i in chosen], chosen, stretch, seed)

    return part(training, config.stretch), part(held_out, 0.0), None


def open_text(config: SequenceDataConfig, place: Path, seed: int) -> tuple[Sequences, Sequences, list[str]]:
    try:
        lines = [line.strip() for line in place.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"sequences.path={place} cannot be read as UTF-8 ({error}); name another file") from error
    told = [list(line) if config.unit == "character" else line.split() for line in lines]
    kept = [i for i, tokens in enumerate(told) if 0 < len(tokens) < config.longest]
    training, held_out = split(kept, config, len(lines))
    counts = Counter(token for i in training for token in told[i])
    vocabulary = [token for token, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0]))[: config.vocabulary]]
    number = {token: FIRST + place for place, token in enumerate(vocabulary)}

    def part(chosen: list[int]) -> Sequences:
        items = [np.array([number.get(token, UNKNOWN) for token in told[i]], dtype=np.int64) for i in chosen]
        return Sequences(items, [lines[i] for i in chosen], chosen, 0.0, seed)

    return part(training), part(held_out), vocabulary


def split(kept: list[int], config: SequenceDataConfig, count: int) -> tuple[list[int], list[int]]:
    """Positions to train on, and held out: evenly by a fixed chance. Raises UserError where too few are left."""
    if len(kept) <= config.validation_count:
        raise UserError(
            f"sequences.path={config.path} holds {count} sequences, of which {len(kept)} are no longer than "
            f"sequences.longest={config.longest}, expected more than sequences.validation_count="
            f"{config.validation_count}: give fewer to hold out, or a larger longest"
        )
    order = np.random.default_rng(0).permutation(len(kept))
    held_out = sorted(kept[i] for i in order[: config.validation_count])
    known = set(held_out)
    return [i for i in kept if i not in known], held_out


def moves_of(strokes: Sequence[Sequence[tuple[float, float]]]) -> np.ndarray:
    """Polylines, y upwards, as moves of the pen, n 3: from the start of the first, whose place does not count. A move
    to the start of a stroke is one of a lifted pen.

    A stroke of one point is a dot: a move to it, after which the pen is lifted at once. The pen starts on the paper, so
    that no move can say a dot before all lines: there it is left out. Of dots alone there are no moves.
    """
    first = next((number for number, stroke in enumerate(strokes) if len(stroke) > 1), len(strokes))
    points = [(x, y, place == len(stroke) - 1) for stroke in strokes[first:] for place, (x, y) in enumerate(stroke)]
    if not points:
        return np.zeros((0, 3), dtype=np.float32)
    absolute = np.array([(x, y) for x, y, _ in points], dtype=np.float32)
    lifted = np.array([float(last) for _, _, last in points], dtype=np.float32)
    return np.concatenate([np.diff(absolute, axis=0), lifted[1:, None]], axis=1)


def hershey_glyphs(fonts: Sequence[str]) -> tuple[list[np.ndarray], list[str]]:
    """All characters of fonts that are drawn by single lines. Raises UserError without the package, and for a font that
    it does not have."""
    try:
        from HersheyFonts import HersheyFonts
    except ImportError as error:
        raise UserError('sequences.path=hershey needs another package: pip install "zellige[sequences]"') from error
    items, names = [], []
    reader = HersheyFonts()
    for font in fonts:
        if font not in reader.default_font_names:
            known = ", ".join(sorted(reader.default_font_names))
            raise UserError(f"sequences.fonts has {font}, expected some of {known}")
        reader.load_default_font(font)
        for character in sorted(reader.all_glyphs):
            strokes = [[(x, -y) for x, y in stroke] for stroke in reader.strokes_for_text(character)]
            strokes = [stroke for stroke in strokes if len(stroke) > 1]
            if strokes:
                items.append(moves_of(strokes))
                names.append(f"{character} of {font}")
    return items, names


def read_drawings(place: Path) -> tuple[list[np.ndarray], list[str]]:
    """Drawings as Quick, Draw! publishes them: a JSON object in each line, whose "drawing" is a list of strokes, each a
    list of x and one of y, y downwards. Raises UserError."""
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"sequences.path={place} cannot be read as UTF-8 ({error}); name another file") from error
    items, names = [], []
    try:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            found = json_value(line)
            strokes = [[(x, -y) for x, y in zip(one[0], one[1], strict=True)] for one in found["drawing"]]
            if not np.isfinite([point for stroke in strokes for point in stroke]).all():
                raise ValueError("a place of the pen is no finite number")
            if any(len(stroke) > 1 for stroke in strokes):
                items.append(moves_of(strokes))
                names.append(str(found.get("word", number)))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f'{place}, line {number}: {error}; expected a JSON object with "drawing": a list of strokes, each a '
            "list of x and a list of y"
        ) from error
    return items, names
