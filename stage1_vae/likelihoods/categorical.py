"""Categorical likelihood of 8-bit images, as in van den Oord et al. 2016, "Pixel Recurrent Neural Networks"
(arXiv:1601.06759)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stage1_vae.likelihoods.base import Likelihood, at_least_float

LEVELS = 256


@dataclass(frozen=True, kw_only=True)
class CategoricalConfig:
    """Each number of an image is one of 256 levels, each with a probability of its own; of channels, too."""

    kind: Literal["categorical"] = "categorical"


class Categorical(Likelihood):
    """The network puts out 256 logits of the first channel, then those of the next. Images are taken for the nearest
    levels."""

    discrete = True

    def __init__(self, config: CategoricalConfig, channels: int) -> None:
        super().__init__(config, channels)
        self.outputs = LEVELS * channels

    def logits(self, outputs: Tensor) -> Tensor:
        """`... c 256 H W`"""
        outputs = at_least_float(outputs)
        return outputs.unflatten(-3, (self.channels, LEVELS))

    def log_prob(self, outputs: Tensor, images: Tensor, seen: Tensor | None = None) -> Tensor:
        log_p = self.logits(outputs).log_softmax(dim=-3)
        chosen = ((images.clamp(-1, 1) + 1) * 127.5).round().long().unsqueeze(-3)  # ... c 1 H W
        leading = torch.broadcast_shapes(log_p.shape[:-4], chosen.shape[:-4])
        log_p, chosen = log_p.expand(*leading, *log_p.shape[-4:]), chosen.expand(*leading, *chosen.shape[-4:])
        of_pixels = log_p.gather(-3, chosen).squeeze(-3)  # ... c H W
        return (of_pixels if seen is None else of_pixels * seen).sum(dim=(-3, -2, -1))

    def mean(self, outputs: Tensor) -> Tensor:
        levels = torch.arange(LEVELS, device=outputs.device)[:, None, None] / 127.5 - 1
        return (self.logits(outputs).softmax(dim=-3) * levels).sum(dim=-3)

    def mode(self, outputs: Tensor) -> Tensor:
        return self.logits(outputs).argmax(dim=-3) / 127.5 - 1

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        p = self.logits(outputs).softmax(dim=-3).movedim(-3, -1)  # ... c H W 256
        drawn = torch.multinomial(p.reshape(-1, LEVELS), 1, generator=generator)
        return drawn.view(p.shape[:-1]) / 127.5 - 1
