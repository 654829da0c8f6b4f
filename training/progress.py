"""What a run remembers besides its tensors, and when it has skipped too many steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.errors import UserError
from training.config import TrainConfig


@dataclass
class Progress:
    """JSON in a checkpoint, equal on all processes."""

    step: int = 0  # steps done, skipped ones included
    skipped_steps: int = 0
    nonfinite_in_a_row: int = 0  # skipped for any reason
    large_gradients: int = 0  # steps skipped for a norm above train.skip_grad_norm
    smallest_skipped: float | None = None  # norm of those in a row; None: the last step was not one of them
    companion_skips: dict[str, int] = field(default_factory=dict)  # steps that passed over a companion alone
    validation: dict[str, float] = field(default_factory=dict)  # metrics of the last one
    # Of the best one, whose weights are in run/model; where the task has a guard, of the last one that it kept.
    best: dict[str, float] = field(default_factory=dict)
    best_value: float | None = None
    best_step: int | None = None
    validations_since_best: int = 0
    rollbacks: int = 0
    owed: bool = False  # a signal came: what was due after the last step is to be done before the next one
    # Of each metric since the last log line: sum over the steps, and number of steps that had it.
    sums: dict[str, list[float]] = field(default_factory=dict)

    def count(self, figures: Mapping[str, float]) -> None:
        """Of a step that was taken."""
        self.nonfinite_in_a_row, self.smallest_skipped = 0, None
        for name, value in figures.items():
            total, steps = self.sums.get(name, (0.0, 0))
            self.sums[name] = [total + value, steps + 1]

    def means(self) -> dict[str, float]:
        """Of the figures since the last call."""
        means = {name: total / steps for name, (total, steps) in self.sums.items()}
        self.sums = {}
        return means

    def count_skipped(self, norm: float | None) -> None:
        """norm: of a gradient that is too large; None: it or the loss is not finite."""
        self.skipped_steps += 1
        self.nonfinite_in_a_row += 1
        if norm is not None:
            self.large_gradients += 1
            before = self.smallest_skipped
            self.smallest_skipped = norm if before is None else min(norm, before)

    def check_skipped(self, config: TrainConfig, good: str) -> None:
        """Raises UserError after too many skipped steps in a row. good: what to say of the last good checkpoint."""
        if self.nonfinite_in_a_row < config.max_nonfinite_steps:
            return
        row = f"{self.nonfinite_in_a_row} steps in a row, up to step {self.step + 1},"
        if self.smallest_skipped is None:
            raise UserError(
                f"{row} had a loss or gradient that is not finite; they were skipped and changed no weights; {good}; "
                "start another run with a lower train.learning_rate, a longer train.warmup_steps or train.precision=no"
            )
        raise UserError(
            f"{row} were skipped and changed no weights, as their gradients' norms, {self.smallest_skipped:.4g} "
            f"and more, are above train.skip_grad_norm={config.skip_grad_norm:g}, or not finite; {good}; start "
            "another run with a larger train.skip_grad_norm, some two times the usual grad_norm of the log, or, where "
            "it was not reached before, with a lower train.learning_rate or a longer train.warmup_steps"
        )
