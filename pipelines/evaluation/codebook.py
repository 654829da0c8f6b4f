"""How the codes of test images are used: shares of the codebook, and how evenly."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codes.shards import CodeDataset
from codes.spec import Codes, CodeSpec, Grid
from pipelines.evaluation.gathering import Values
from pipelines.figures import entropy, frequency_bits

SEEN_OFTEN = 10  # codes for each entry of a codebook, below which the share in use is that of a sample


class Codebook:
    """Figures of the codes of images."""

    title = "codebook"

    def __init__(self, spec: CodeSpec, training: CodeDataset | None = None) -> None:
        """training: codes that the prior was trained on."""
        self.spec = spec
        self.training_counts = None if training is None else training.counts()

    def measure(self, codes: Codes) -> dict[str, Tensor]:
        return {f"codes {grid.name}": part.int() for grid, part in zip(self.spec.grids, codes, strict=True)}

    def figures(self, values: Values) -> dict[str, Any]:
        """Of each grid: the share of its vocabulary that occurs, out of how many, among how many codes; perplexity and
        entropy of these codes' frequencies, 2**entropy and bits; and the bits per code of a prior that knows only
        frequencies: those in training images, or else an estimate from these."""
        found: dict[str, Any] = {}
        for number, grid in enumerate(self.spec.grids):
            count, of = counts(values, grid), suffix(grid, self.spec)
            shares = count[count > 0].double() / count.sum()
            bits = float(-(shares * shares.log2()).sum())
            found[f"codes_used{of}"] = float((count > 0).double().mean())
            found[f"codebook_size{of}"] = grid.vocabulary
            found[f"codes_counted{of}"] = int(count.sum())
            found[f"codebook_perplexity{of}"] = 2**bits
            found[f"codebook_entropy{of}"] = abs(bits)  # of one code alone -0.0
            if self.training_counts is not None:
                found[f"bits_by_training_frequencies{of}"] = frequency_bits(count, self.training_counts[number])
            else:
                found[f"estimated_entropy_of_codes{of}"] = entropy(count)
        return found

    def notes(self, values: Values) -> list[str]:
        """A line where so few codes were counted that entries which nothing uses look like ones that were not met."""
        found = []
        for grid in self.spec.grids:
            counted = int(values[f"codes {grid.name}"].size)
            if counted < SEEN_OFTEN * grid.vocabulary:
                found.append(
                    f"note: codes_used{suffix(grid, self.spec)} is of {counted:,} codes only, for a codebook of "
                    f"{grid.vocabulary:,}: of more images it would be larger"
                )
        return found


def counts(values: Values, grid: Grid) -> Tensor:
    """How often each code of a grid occurs, `k`, int64."""
    return torch.from_numpy(np.bincount(values[f"codes {grid.name}"].ravel(), minlength=grid.vocabulary))


def codes_of(values: Values, spec: CodeSpec) -> list[np.ndarray]:
    return [values[f"codes {grid.name}"].astype(np.int64) for grid in spec.grids]


def suffix(grid: Grid, spec: CodeSpec) -> str:
    """What tells the keys of several grids apart."""
    return f"_{word(grid.name)}" if len(spec.grids) > 1 else ""


def word(name: str) -> str:
    """A grid's name as part of a key: letters, digits and underscores."""
    return re.sub(r"\W", "_", name)
