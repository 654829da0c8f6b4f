"""What a prior is asked to draw: a class, a text, a picture that goes with codes which are there already, or nothing in
particular."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from codes.spec import Codes, Grid
from common.errors import UserError


@dataclass(frozen=True)
class TextSpec:
    """Captions as a prior reads them: tokens of a vocabulary, at most `length` of them."""

    length: int  # t, tokens of a caption; longer ones are cut
    vocabulary: int  # of the tokenizer

    def __post_init__(self) -> None:
        for name in ("length", "vocabulary"):
            if getattr(self, name) < 1:
                raise UserError(f"text {name}={getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class EmbeddingSpec:
    """Captions as vectors of a text encoder: `length` of them, each of `width` numbers."""

    length: int  # t
    width: int  # d of the encoder
    encoder: str | None = None  # folder or hub id of the encoder; None: known to whoever gives the vectors

    def __post_init__(self) -> None:
        for name in ("length", "width"):
            if getattr(self, name) < 1:
                raise UserError(f"embedding {name}={getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class Condition:
    """The condition of a batch. A prior of `num_classes` classes also has a null label, `num_classes`: any class. A
    text without tokens, and embeddings of which none counts, are any text."""

    labels: Tensor | None = None  # b, int64 in [0, num_classes]; None for a prior without classes
    codes: Codes | None = None  # one int64 b h w for each grid that the prior is given: coarser levels, or other codes
    text: Tensor | None = None  # b t, int64 tokens, -1 behind the last
    embeddings: Tensor | None = None  # b t d, float, a text encoder's
    embedding_mask: Tensor | None = None  # b t, bool, True for an embedding that counts
    order: Tensor | None = None  # b n, int64: which code of each sample comes first, second, ...; None: raster order

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Every tensor changed in the same way."""
        optional = {
            name: None if (value := getattr(self, name)) is None else change(value)
            for name in ("labels", "text", "embeddings", "embedding_mask", "order")
        }
        return type(self)(codes=None if self.codes is None else tuple(map(change, self.codes)), **optional)

    def tensors(self) -> list[Tensor]:
        """All that are there, in the order of `map`."""
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(keep)
        return found

    def to(self, device: torch.device) -> Self:
        return self.map(lambda tensor: tensor.to(device))

    def forget(self, which: Tensor, num_classes: int) -> Self:
        """With the null label and any text for the samples `which` (b, bool). Given codes stay as they are."""
        nothing = {"labels": num_classes, "text": -1, "embedding_mask": False}
        changed = {
            name: tensor.masked_fill(which.view(-1, *[1] * (tensor.dim() - 1)), value)
            for name, value in nothing.items()
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **changed)

    def joined(self, other: Self) -> Self:
        """Of the samples of both, which have the same parts."""
        others = iter(other.tensors())
        return self.map(lambda tensor: torch.cat([tensor, next(others)]))

    def check(
        self,
        batch: int,
        num_classes: int,
        given: Sequence[Grid] = (),
        text: TextSpec | None = None,
        embeddings: EmbeddingSpec | None = None,
    ) -> None:
        """Raises UserError unless labels are given exactly if the prior has classes, codes of exactly the grids
        `given`, and text and embeddings exactly if it reads them, one for each sample."""
        if num_classes == 0:
            if self.labels is not None:
                raise UserError("got labels for a prior without classes, expected none; leave the labels out")
        elif self.labels is None:
            raise UserError(
                f"got no labels for a prior of {num_classes} classes; give each sample a label from 0 to "
                f"{num_classes - 1}, or {num_classes} for any class"
            )
        elif tuple(self.labels.shape) != (batch,):
            raise UserError(f"got labels of shape {tuple(self.labels.shape)}, expected ({batch},): one for each sample")
        shapes = [tuple(grid.shape) for grid in self.codes or ()]
        expected = [(batch, grid.height, grid.width) for grid in given]
        if shapes != expected:
            raise UserError(f"got given codes of shapes {shapes}, expected {expected}: those that the prior goes by")
        check_text("text", self.text, (batch, text.length) if text else None)
        vectors = (batch, embeddings.length, embeddings.width) if embeddings else None
        check_text("embeddings", self.embeddings, vectors)
        check_text("embedding_mask", self.embedding_mask, vectors[:2] if vectors else None)

    def check_range(self, num_classes: int) -> None:
        """Raises UserError when a label is no class and not the null label. Waits for the device, unlike `check`."""
        if self.labels is None or self.labels.numel() == 0:
            return
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        if lowest < 0 or highest > num_classes:
            raise UserError(
                f"got label {lowest if lowest < 0 else highest}, expected 0 to {num_classes - 1}, or {num_classes} "
                "for any class"
            )


def check_text(name: str, tensor: Tensor | None, expected: tuple[int, ...] | None) -> None:
    """Raises UserError unless a field of `Condition` has the shape that its prior reads."""
    shape = None if tensor is None else tuple(tensor.shape)
    if shape == expected:
        return
    if expected is None:
        raise UserError(f"got {name} for a prior that reads none; leave it out")
    raise UserError(
        f"got {'no ' + name if shape is None else f'{name} of shape {shape}'}, expected {expected}: the prior was "
        "trained on captions and reads one for each sample"
    )
