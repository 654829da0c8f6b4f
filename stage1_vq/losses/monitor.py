"""Does the adversarial phase make reconstructions worse? What each validation is judged by."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WATCHED = ("mse", "perceptual")  # validation metrics, lower is better; those that there are


class QualityMonitor(nn.Module):
    """Compares validations with the best values so far, which before the adversarial phase are those to keep up with.
    The best values are a buffer: they are in checkpoints, and go back in a rollback."""

    best: Tensor  # of each of WATCHED; infinity where it was never seen

    def __init__(self, warn_ratio: float) -> None:
        """warn_ratio: how many times its best value a metric may be."""
        super().__init__()
        self.warn_ratio = warn_ratio
        self.register_buffer("best", torch.full((len(WATCHED),), math.inf))

    def complaint(self, metrics: dict[str, float]) -> str | None:
        """What is wrong with a validation, or None; then it may set new best values."""
        best = dict(zip(WATCHED, self.best.tolist(), strict=True))
        seen = {name: metrics[name] for name in WATCHED if name in metrics}
        for name, value in seen.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
            if value > self.warn_ratio * best[name]:
                times = value / best[name] if best[name] else math.inf
                return f"{name} {value:.4g} is {times:.2f} times its best, {best[name]:.4g}"
        self.best.copy_(torch.tensor([min(best[name], seen.get(name, math.inf)) for name in WATCHED]))
        return None
