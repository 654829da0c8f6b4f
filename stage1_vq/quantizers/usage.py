"""How much of a codebook is in use: what the log says of every quantizer, and what revival goes by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.compatibility import never_compiled
from common.distributed import sum_over_processes

REVIVE_AFTER = 100  # steps: the default of quantizers that revive codes


class CodeUsage(nn.Module):
    """Counts codes between two steps, and remembers when each was last used. All processes come to the same numbers.

    `steps` is no schedule and not the number of the run's step: it says how far `steps_since_use` looks back. Both
    stand still when a step is skipped, whose codes nobody counted, and both go back with the weights in a rollback.
    """

    pending_counts: Tensor  # k, int64: uses since the last `step`
    counts: Tensor  # k, int64: uses in the step that the last `step` ended, on all processes together
    steps_since_use: Tensor  # k, int64
    steps: Tensor  # scalar, int64: calls of `step`

    def __init__(self, codebook_size: int, warn_below: float = 0.5) -> None:
        """warn_below: the share of codes used in an epoch below which `warnings` warns."""
        super().__init__()
        self.codebook_size, self.warn_below = codebook_size, warn_below
        self.register_buffer("pending_counts", torch.zeros(codebook_size, dtype=torch.int64), persistent=False)
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.int64), persistent=False)
        self.register_buffer("steps_since_use", torch.zeros(codebook_size, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @never_compiled
    @torch.no_grad()
    def note(self, codes: Tensor) -> None:
        """codes: int64, any shape."""
        numbers = codes.flatten()
        # `bincount` would make the host wait for a GPU, in each forward pass, and takes k more numbers.
        self.pending_counts.index_add_(0, numbers, torch.ones_like(numbers))

    @torch.no_grad()
    def step(self) -> Tensor:
        """Ends a step; returns how often each code was used in it, on all processes together: k, int64."""
        self.counts.copy_(sum_over_processes(self.pending_counts))
        self.steps += 1
        self.steps_since_use.add_(1).masked_fill_(self.counts > 0, 0)
        self.pending_counts.zero_()
        return self.counts

    def discard(self) -> None:
        """Forgets what was noted since the last `step`."""
        self.pending_counts.zero_()

    @torch.no_grad()
    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """`perplexity` of the last step's codes, and over the last epoch the share of codes that were used
        (`codes_used_share`) and the number of those that were not (`dead_codes`)."""
        shares = self.counts / self.counts.sum().clamp(min=1)
        used = (self.steps_since_use < self.window(steps_per_epoch)).sum()
        return {
            "perplexity": torch.special.entr(shares).sum().exp(),
            "codes_used_share": used / self.codebook_size,
            "dead_codes": self.codebook_size - used,
        }

    def window(self, steps_per_epoch: int) -> Tensor:
        """Steps that a report of the last epoch looks back over."""
        return self.steps.clamp(max=steps_per_epoch)

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int, remedies: Sequence[str]) -> list[str]:
        """One line when, after a first epoch, too few codes are in use."""
        share = metrics.get("codes_used_share")
        if share is None or share >= self.warn_below or int(self.steps) < steps_per_epoch:
            return []
        return [
            f"only {share:.0%} of {self.codebook_size} codes were used in the last epoch, below "
            f"warn_usage_below={self.warn_below:.0%}; try {', or '.join(remedies)}"
        ]


def usage_remedies(revive_after: int, kmeans_iterations: int, steps_per_epoch: int, path: str) -> list[str]:
    """What helps when few codes are in use, by the settings of the codebook at `path` of the config: what its defaults
    are already is not recommended, also where an epoch is shorter than the steps after which a code is revived."""
    remedies = [f"a smaller {path}.codebook_size"]
    soon_enough = min(max(steps_per_epoch, REVIVE_AFTER), 500)
    if not 0 < revive_after <= soon_enough:
        remedies.append(f"{path}.revive_after={soon_enough}")
    if not kmeans_iterations:
        remedies.append(f"{path}.kmeans_iterations=10")
    return remedies
