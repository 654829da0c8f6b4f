"""What the loop asks of a stage: a task that takes steps, and a dataset that it draws batches from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from common.model_io import PretrainedModel
from training.optimizers import OptimizerSettings, Schedule

Batch = dict[str, Any]
"""Named tensors (or tuples of tensors) whose first axis is the batch; the loop moves them to the device."""


Evaluation = Callable[[Any], dict[str, float]]
"""What is logged every `train.evaluate_every` steps: figures of the task's model as it would be used, averaged weights
if there are, in eval mode and without gradients. Called on all processes alike, and gives all of them the same."""


class StepOutput(NamedTuple):
    loss: Tensor  # scalar with a graph, a mean per element, image or code: never a sum over the batch
    metrics: dict[str, Tensor]  # scalars, detached
    companion_losses: Mapping[str, Tensor] = {}  # likewise, of the companions of these names that learn in this step
    resting: Sequence[nn.Parameter] = ()  # weights that this step does not move, the same in all its micro-batches


class Companion(NamedTuple):
    """A network that a task uses beside its model. The loop moves it to the device.

    One that learns, such as a discriminator, does so by its own loss (StepOutput.companion_losses), and the loop does
    for it what it does for the model: micro-batches, the average over processes, loss scaling, clipping, its optimiser
    at its schedule's learning rate, checkpoints. With train.compile a call of the module is compiled, and
    `module.forward` is not. A step at which only its own gradient is not finite passes it over; one that the model
    skips, it skips too.
    """

    module: nn.Module
    optimizer: OptimizerSettings | None = None  # None: it does not learn
    schedule: Schedule | None = None  # of one that learns
    kept: bool = False  # of one that does not: whether its buffers change in a run, and belong into checkpoints
    compiled: bool = False  # of one that does not: whether train.compile is for it, too


class Verdict(NamedTuple):
    """What a validation means for the run."""

    keep: bool  # these weights are worth keeping: they go to run/model, and a checkpoint holds them
    warning: str | None = None
    roll_back: bool = False  # return to the checkpoint of the last weights that were kept


class Guard(Protocol):
    """Judges validations where the lowest `best_metric` is not what a person wants."""

    def judge(self, metrics: dict[str, float], bad_before: int, step: int) -> Verdict:
        """metrics: of this validation, after `step` steps; bad_before: validations in a row, just before it, that were
        not kept. Called on all processes alike."""
        ...

    def rolled_back(self, step: int, rollbacks: int) -> None:
        """Called after model, optimisers, averages and companions have returned to a checkpoint for the `rollbacks`-th
        time. The run does not return: its next step is number `step`, counted from 0."""
        ...

    def state(self) -> dict[str, Any]:
        """What it remembers besides tensors of companions: JSON in a checkpoint, equal on all processes. A rollback
        leaves it as it is."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave, of the checkpoint that the run continues from."""
        ...


class Task(Protocol):
    """One kind of training. The loop owns steps, accumulation, optimisers, EMA, logging and checkpoints.

    Where processes have shares of the model (training/sharding.py), `step` may only call it: its weights are whole in
    `start`, `validate` and `preview` alone. A task of which something reads them in a step has an attribute
    `reads_weights` that names it, and does without shares.

    Steps are counted by the loop alone, from 0, skipped ones included, and no number comes twice, also after a
    rollback. What changes in the course of a run goes by the number that `step` and `after_step` are given.
    """

    model: PretrainedModel  # what is trained, averaged, checkpointed and saved
    best_metric: str  # the validation metric, lower is better, by which the best weights are kept
    companions: dict[str, Companion]  # by name; their files in a checkpoint are called so
    guard: Guard | None  # decides which weights are kept, in best_metric's place

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Called once before the first step of a new run with this process's micro-batches of that step. Here and in
        `after_step` the global random generator gives all processes the same numbers, in `step` each its own, as
        dropout takes them. What a task draws for samples it draws there by common/draws.py."""

    def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
        """Loss of one micro-batch of this step. `model` is the trained model as the loop has wrapped it (DDP,
        compile)."""
        ...

    def after_step(self, step: int) -> None:
        """Called after the optimiser's part of this step, but not of a skipped one."""
        ...

    def health(self) -> dict[str, Tensor]:
        """More scalars for the log, which describe the step that the last `after_step` ended: called at log lines
        alone, before the next step."""
        ...

    def discard_step(self) -> None:
        """Called in place of `after_step` when a step was skipped: forget what its micro-batches left."""

    def validate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Per-sample metrics, each `b`, in eval mode without gradients: their means are logged."""
        ...

    def preview(self, model: nn.Module) -> Tensor | None:
        """A picture for a person, `c H W` in [-1, 1], or None where the task has no picture to show."""
        ...

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """What a person should know about a log line's metrics, each with its remedy."""
        ...


class Dataset(Protocol):
    """Samples by index, fetched a batch at a time.

    One whose samples cannot all share a batch, such as images of several shapes, has an attribute `groups` besides, n
    integers: a batch then holds samples of one group only (training.data.groups_of). One that wants some of its samples
    in every batch, however rare they are, has an attribute `mixture` instead (training.data.Mixture). One whose samples
    are fetched by blocks of many has an attribute `blocks`, n integers (training.data.BlockOrder).
    """

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        """Samples `indices` as one batch. `draws[j]` is the number of the draw in the whole run: random augmentation is
        a function of it and the seed alone, so that data depends neither on workers nor on restarts."""
        ...
