"""Codes and how to describe them: the contract between autoencoders and priors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor

from common.errors import UserError
from common.file_names import is_plain

Codes = tuple[Tensor, ...]
"""One int64 tensor `b h w` per grid, coarse to fine, in the order in which a prior generates them."""


@dataclass(frozen=True)
class Grid:
    """One grid of codes: `height` x `width` numbers in [0, vocabulary)."""

    name: str
    height: int
    width: int
    vocabulary: int

    def __post_init__(self) -> None:
        if not is_plain(self.name):  # exported, its codes are files of this name
            raise TypeError(f"a grid is called {self.name!r}")

    @property
    def size(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class CodeSpec:
    """What the codes of one image look like, and the image that they stand for."""

    grids: tuple[Grid, ...]
    image_height: int  # H, pixels
    image_width: int  # W, pixels
    image_channels: int = 3

    @property
    def codes_per_image(self) -> int:
        return sum(grid.size for grid in self.grids)

    @property
    def bits_per_image(self) -> float:
        """Bits of one image's codes when every code is equally likely."""
        return sum(grid.size * math.log2(grid.vocabulary) for grid in self.grids)

    @property
    def image_dimensions(self) -> int:
        """H * W * c: what "bits per image-dimension" divides by."""
        return self.image_height * self.image_width * self.image_channels

    def check(self, codes: Sequence[Tensor]) -> None:
        """Raises UserError unless `codes` has this spec's grids, shapes and value range."""
        if len(codes) != len(self.grids):
            raise UserError(f"got codes of {len(codes)} grids, expected {len(self.grids)}: {self.describe()}")
        for tensor, grid in zip(codes, self.grids, strict=True):
            if tuple(tensor.shape[1:]) != (grid.height, grid.width):
                raise UserError(
                    f"grid {grid.name!r} has shape {tuple(tensor.shape[1:])}, expected {grid.height}x{grid.width}"
                )
            if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < grid.vocabulary:
                raise UserError(
                    f"grid {grid.name!r} holds codes from {int(tensor.min())} to {int(tensor.max())}, "
                    f"expected 0 to {grid.vocabulary - 1}"
                )

    def describe(self) -> str:
        """One phrase for messages: `7x7 codes of 128 (28x28x1 images)`."""
        grids = " + ".join(f"{grid.height}x{grid.width} codes of {grid.vocabulary}" for grid in self.grids)
        return f"{grids} ({self.image_height}x{self.image_width}x{self.image_channels} images)"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`. Raises UserError when fields are missing or unknown."""
        try:
            return cls(**{**value, "grids": tuple(Grid(**grid) for grid in value["grids"])})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"not a description of codes: {error}; the file is damaged or from another version"
            ) from error
