"""Many bits of a place as several codes, and the use of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import cast

import torch
from torch import Tensor, nn

from codes.spec import Codes
from stage1_vq.quantizers.bits import bits_to_codes, codes_to_bits
from stage1_vq.quantizers.parts import figures_of, health_over
from stage1_vq.quantizers.usage import CodeUsage

MOST_BITS_PER_CODE = 16  # their use is counted code by code


class BitGroups(nn.ModuleList):
    """The d bits of a place in groups of at most `bits_per_code`, each of which is a code, first bit most significant;
    and how much of the codes of each group is in use, all grids of a group together."""

    def __init__(self, d: int, bits_per_code: int, warn_below: float, name: str) -> None:
        """warn_below: as for `CodeUsage`; name: of a group in figures, before its number, where there are several."""
        self.sizes = [min(bits_per_code, d - start) for start in range(0, d, bits_per_code)]  # bits of each
        self.names = [f"{name}{number}" for number in range(len(self.sizes))]
        super().__init__(CodeUsage(2**bits, warn_below) for bits in self.sizes)

    def codes(self, bits: Tensor) -> Codes:
        """b d h w, bool, to one b h w for each group."""
        return tuple(bits_to_codes(group) for group in bits.split(self.sizes, 1))

    def bits(self, codes: Sequence[Tensor]) -> Tensor:
        """The inverse, of the first groups alone where there are no more codes."""
        return torch.cat([codes_to_bits(grid, bits) for grid, bits in zip(codes, self.sizes, strict=False)], 1)

    def usages(self) -> Iterator[CodeUsage]:
        return (cast(CodeUsage, usage) for usage in self)

    def note(self, codes: Codes) -> None:
        """codes: group after group, and then those of further grids in the same way."""
        for usage, grid in zip(cycle(self.usages()), codes, strict=False):
            usage.note(grid)

    def step(self) -> None:
        """Ends a step."""
        for usage in self.usages():
            usage.step()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """`CodeUsage.health`, or with several groups `parts.health_over` them."""
        healths = [usage.health(steps_per_epoch) for usage in self.usages()]
        return healths[0] if len(healths) == 1 else health_over(dict(zip(self.names, healths, strict=True)))

    def discard(self) -> None:
        for usage in self.usages():
            usage.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int, remedies: Sequence[str]) -> list[str]:
        if len(self) == 1:
            return next(self.usages()).warnings(metrics, steps_per_epoch, remedies)
        return [
            f"{name}: {line}"
            for name, usage in zip(self.names, self.usages(), strict=True)
            for line in usage.warnings(figures_of(name, metrics), steps_per_epoch, remedies)
        ]
