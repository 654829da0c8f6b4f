"""What quantizers and autoencoders made of several quantizers share: figures and warnings by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.draws import uniform


def named(part: str, figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`perplexity` of `depth0` becomes `depth0_perplexity`."""
    return {f"{part}_{name}": value for name, value in figures.items()}


def figures_of(part: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """What `named` has made of a part's figures, under their own names again."""
    return {name.removeprefix(f"{part}_"): value for name, value in metrics.items() if name.startswith(f"{part}_")}


def mean_over(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each figure, scalars, over parts that all have the same ones."""
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}


def health_over(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Of all parts together the mean `perplexity` and `codes_used_share`, and how many `dead_codes` and
    `revived_codes` there are, where each part tells; and each part's own health, but for these numbers, by `named`."""
    together: dict[str, Tensor] = {}
    for name in ("perplexity", "codes_used_share", "dead_codes", "revived_codes"):
        if all(name in part for part in parts.values()):
            values = torch.stack([part[name].float() for part in parts.values()])
            together[name] = values.sum() if name.endswith("_codes") else values.mean()
    for part, figures in parts.items():
        together |= named(part, {name: value for name, value in figures.items() if not name.endswith("_codes")})
    return together


def draw_kept(b: int, depth: int, share: float, device: torch.device, *, fewest: int = 1) -> Tensor:
    """How many of `depth` layers or scales the decoder sees of each of b images, int64: all, or with chance `share`
    `fewest` to `depth` alike."""
    whether, which = uniform(b, 2, device=device).unbind(1)
    drawn = (which * (depth - fewest + 1)).long().clamp(max=depth - fewest) + fewest
    return torch.where(whether < share, drawn, depth)
