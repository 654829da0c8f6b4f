"""Models of which numbers are missing, p(s|x), where that depends on the numbers themselves (Ipsen, Mattei and Frellsen
2021, "not-MIWAE: Deep Generative Modelling with Missing not at Random Data", arXiv:2006.12871, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class AtRandomConfig:
    """Whether a number is missing says nothing about it beyond what the seen ones say: there is nothing to model."""

    kind: Literal["at_random"] = "at_random"


@dataclass(frozen=True, kw_only=True)
class SelfMaskingConfig:
    """Whether a number is missing goes by that number alone: logit p(seen) = -w (x - c), w and c of each column."""

    kind: Literal["self_masking"] = "self_masking"
    missing: Literal["unknown", "high", "low"] = "unknown"  # rather those are: the sign of w is learned or known


@dataclass(frozen=True, kw_only=True)
class LinearMaskConfig:
    """Whether a number is missing goes by all numbers of its row: logit p(seen) is an affine function of these."""

    kind: Literal["linear"] = "linear"


MaskConfig = AtRandomConfig | SelfMaskingConfig | LinearMaskConfig


class SelfMasking(nn.Module):
    def __init__(self, config: SelfMaskingConfig, numbers: int) -> None:
        super().__init__()
        self.missing = config.missing
        self.slope = nn.Parameter(torch.zeros(numbers) if config.missing == "unknown" else torch.full((numbers,), -1.0))
        self.centre = nn.Parameter(torch.zeros(numbers))

    def forward(self, values: Tensor) -> Tensor:
        """Logits of being seen, ... p, of whole rows, ... p."""
        slope: Tensor = self.slope
        if self.missing != "unknown":
            slope = F.softplus(slope) if self.missing == "high" else -F.softplus(slope)
        return -slope * (values - self.centre)


class LinearMask(nn.Module):
    def __init__(self, config: LinearMaskConfig, numbers: int) -> None:
        super().__init__()
        self.layer = nn.Linear(numbers, numbers)

    def forward(self, values: Tensor) -> Tensor:
        """Logits of being seen, ... p, of whole rows, ... p."""
        result: Tensor = self.layer(values)
        return result


MASKS: dict[str, Any] = {  # modules, each with a config class of its own; of at_random there is none
    "at_random": (None, AtRandomConfig),
    "self_masking": (SelfMasking, SelfMaskingConfig),
    "linear": (LinearMask, LinearMaskConfig),
}


def build_mask(config: MaskConfig, numbers: int) -> nn.Module | None:
    module, _ = MASKS[config.kind]
    return None if module is None else module(config, numbers)


def log_probability(logits: Tensor, seen: Tensor) -> Tensor:
    """log p(s|x) of each row, in nats: logits ... p of being seen, and which are, p bools that broadcast -> ..."""
    return torch.where(seen, F.logsigmoid(logits), F.logsigmoid(-logits)).sum(-1)
