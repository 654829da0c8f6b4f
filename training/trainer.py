"""What the loop is made of: opening a run, one step, one validation, one checkpoint.

What it is made on is in training/setup.py, and what a checkpoint holds in training/state.py."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from common.computing import computing_in
from common.draws import MicroBatch, draws_of
from common.layout import place_after_place
from common.model_io import PretrainedModel
from common.processes import on_main_process
from common.recompute import Recomputation
from common.starting import in_training
from training.checkpoint import Checkpoints
from training.clock import Clock, spent_on
from training.config import TrainConfig
from training.data import Loader, Sample, Share, batches_of, sample_order
from training.ema import EMA
from training.launcher import asked_shards
from training.metrics_log import PREVIEWS, SAVING, VALIDATION, StepReport
from training.optimizers import Learner
from training.progress import Progress
from training.run_folder import RunFacts, open_run_folder, write_config
from training.saving import Saver
from training.schedules import step_seed
from training.setup import (
    communication_seconds,
    compiled,
    find_data_parallel,
    make_accelerator,
    make_equal,
    make_learner,
    recomputed_blocks,
    wrap,
)
from training.signals import StopRequest
from training.state import load, restore, state_of, tensors_of
from training.task import Batch, Dataset, Evaluation, Task, Verdict

if TYPE_CHECKING:
    from training.sharding import Shares

StopReason = Literal["steps", "patience", "signal"]


class Trainer:
    """A task on this process's device, with everything that a step changes."""

    def __init__(
        self, task: Task, train_data: Dataset, validation_data: Dataset, config: TrainConfig, run: Path
    ) -> None:
        self.task, self.train_data, self.validation_data = task, train_data, validation_data
        self.config, self.run = config, run
        self.accelerator = make_accelerator(config)
        self.share = Share(
            batch_size=config.batch_size,
            accumulate=config.accumulate,
            processes=self.accelerator.num_processes,
            process=self.accelerator.process_index,
        )
        self.order = sample_order(train_data, config.batch_size, config.seed)
        self.checkpoints = Checkpoints(run / "checkpoints", config.keep_newest, config.keep_every)
        self.progress = Progress()
        self.clock = Clock()
        self.stopping = False  # whether a signal has reached any process
        self.save_clock = time.monotonic()  # of the last checkpoint; no clock of the day, which may be set back
        self.save_time = False  # whether on any process train.save_minutes have gone by since then
        self.held_out: Loader | None = None  # of validations, from the first one on
        self.skipped = False  # whether the last step was

        in_training(task.model.to(self.accelerator.device))
        for companion in task.companions.values():
            companion.module.to(self.accelerator.device)
            if config.compile and (companion.optimizer is not None or companion.compiled):
                companion.module.compile()
        self.asked_shards = asked_shards() if self.accelerator.num_processes > 1 else None
        if self.asked_shards:
            from training.sharding import check_shares  # takes seconds to import

            check_shares(task)
            make_equal(task.model)  # shares are of one model
        self.ema = EMA(task.model, config.ema_decay) if config.ema_decay else None
        blocks = recomputed_blocks(task.model) if config.checkpoint_activations else []
        self.recomputation = Recomputation(blocks, compiled=config.compile)
        self.shares: Shares | None = None  # None: each process has the whole model; and before `spread`
        self.model = task.model if self.asked_shards else wrap(task.model, self.accelerator, config)
        self.data_parallel = find_data_parallel(self.model, config.log_every)
        self.learner = make_learner(task.model, config)
        self.saver = Saver(
            self.checkpoints,
            self.accelerator,
            shares=self.asked_shards is not None,
            background=config.save_in_background,
            timeout_minutes=config.timeout_minutes,
        )
        self.companions = {  # those that learn
            name: Learner(module, optimizer, schedule)
            for name, (module, optimizer, schedule, *_) in task.companions.items()
            if optimizer is not None and schedule is not None
        }
        self.kept = {name: companion.module for name, companion in task.companions.items() if companion.kept}

    # ---- a run: opened, continued, ended -------------------------------------------------------------------

    def open_run(self, resolved_config: dict[str, Any], facts: RunFacts | None = None) -> list[str]:
        """Takes up the newest good checkpoint, if there is one; returns a line on each damaged one passed over.
        Raises UserError when all are damaged, or config or data are not those the run began with."""
        step, damages = on_main_process(self.accelerator, lambda: self._open_folder(resolved_config, facts))
        if step is not None:
            self._spread()
            restore(self, step)
        requests = (
            self.order.samples(draws)
            for number in range(self.progress.step, self.config.steps)
            for draws in self.share.draws(number)
        )
        self.loader = self._loader(self.train_data, requests)
        self.batches: Iterator[Batch] = self.loader
        return damages

    def close(self) -> None:
        """Ends what works beside the steps: the writing of checkpoints, and the processes that fetch samples."""
        with ExitStack() as stack:
            for loader in (self.loader, self.held_out):
                if loader is not None:
                    stack.callback(loader.close)
            self.saver.close()

    def _open_folder(self, resolved_config: dict[str, Any], facts: RunFacts | None) -> tuple[int | None, list[str]]:
        open_run_folder(self.run)
        step, damages = self.checkpoints.newest_good()
        write_config(self.run, resolved_config, facts, continued=step is not None)
        return step, damages

    def start(self) -> None:
        """Lets the task of a new run look at the samples of the first step before it is taken."""
        first = list(islice(self.batches, self.config.accumulate))
        self._seed("all processes")
        with torch.no_grad(), self.accelerator.autocast():
            self.task.start(self.model, first)
        if self.ema:
            self.ema.reset()
        self.batches = chain(first, self.loader)
        self._spread()

    def _spread(self) -> None:
        """Leaves each process its share of the model, where that is asked for: when the task has begun, for what it
        does to weights it does to whole ones."""
        if self.asked_shards is None:
            return
        from training.sharding import Shares  # takes seconds to import

        accelerator = self.accelerator
        self.shares = Shares(self.task.model, self.asked_shards, accelerator.device, accelerator.num_processes)
        if self.ema:
            self.shares.of(self.ema.model, self.task.model)
            self.ema.find_weights()
        self.model = compiled(self.task.model, self.config)
        self.learner = make_learner(self.task.model, self.config)

    def reason_to_stop(self) -> StopReason | None:
        if self.progress.owed:
            return "signal"
        if self.progress.step >= self.config.steps:
            return "steps"
        if 0 < self.config.patience <= self.progress.validations_since_best:
            return "patience"
        return "signal" if self.stopping else None

    def save_due(self) -> bool:
        """Whether a checkpoint is, whatever else has happened."""
        return self.due(self.config.save_every) or self.checkpoints.is_milestone(self.progress.step) or self.save_time

    def due(self, every: int) -> bool:
        """Whether what happens every so many steps, and after the last one, happens now."""
        return every > 0 and (self.progress.step % every == 0 or self.progress.step == self.config.steps)

    # ---- a step --------------------------------------------------------------------------------------------

    def step(self, stop: StopRequest) -> StepReport:
        """One optimiser step, or a skipped one when the loss or the gradient is not finite on any process, or the
        gradient is larger than the config lets pass."""
        begin, waited = time.perf_counter(), self.loader.seconds_waited
        self._seed(self.accelerator.process_index)
        scaler = self.accelerator.scaler
        parts = [
            self._forward_backward(batch, draws)
            for draws, batch in zip(self.share.draws(self.progress.step), self.batches, strict=False)
        ]
        if self.shares:
            self.learner.average_whole()
        norms = {"grad_norm": self.learner.clip(scaler)}
        learning = {name: companion for name, companion in self.companions.items() if companion.has_gradients()}
        for name, companion in learning.items():
            companion.average()
            norms[f"{name}_grad_norm"] = companion.clip(scaler)
        own_wait = self.loader.seconds_waited - waited
        # What one process knows and all must agree on goes with the figures, which they exchange anyway.
        minutes = (time.monotonic() - self.save_clock) / 60
        asked = {"stops": bool(stop), "saves": 0 < self.config.save_minutes <= minutes}
        asks = {name: torch.tensor(float(one), device=norms["grad_norm"].device) for name, one in asked.items()}
        figures, waits = self._figures(parts, own_wait, **norms, **asks)
        self.stopping, self.save_time = (figures.pop(name) > 0 for name in asked)
        longest = max(waits)  # it holds up all others, which wait for its gradients

        finite = math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])
        if finite and figures["grad_norm"] <= (self.config.skip_grad_norm or math.inf):
            self._update(figures, learning)
        else:
            self._skip(figures["grad_norm"] if finite else None)
        for learner in (self.learner, *learning.values()):
            learner.forget()
        if scaler is not None:
            # An overflow of float16 in the model lowers the loss scale for the next step. Companions keep float32 there
            # (`full_precision_for_float16`): one that has diverged says nothing of the scale, and leaves it as it is.
            diverged = math.isfinite(figures["grad_norm"]) and not all(
                math.isfinite(figures.get(f"{name}_grad_norm", math.inf)) for name in learning
            )
            scaler.update(scaler.get_scale() if diverged else None)
        self.progress.step += 1
        return StepReport(
            loss=figures["loss"],
            images=self.config.batch_size,
            seconds=time.perf_counter() - begin,
            waiting_seconds=longest,
            communication_seconds=communication_seconds(self.data_parallel, longest - own_wait),
        )

    def _forward_backward(self, batch: Batch, draws: range) -> dict[str, Tensor]:
        if self.config.channels_last:
            batch = {name: place_after_place(value) if is_map(value) else value for name, value in batch.items()}
        # Divides losses by the number of micro-batches, and lets processes exchange gradients after the last.
        products = computing_in("tf32" if self.config.precision == "tf32" else None, self.accelerator.device)
        with products, self.accelerator.accumulate(self.model), draws_of(self._micro_batch(draws)):
            if self.shares:
                self.shares.average_with(self.accelerator.sync_gradients)
            with self.accelerator.autocast(), self.recomputation.on():
                output = self.task.step(self.model, batch, self.progress.step)
            resting = self._names(output.resting)
            for loss in (*output.companion_losses.values(), output.loss):
                self.accelerator.backward(loss)
        for name in resting:
            # Adam passes over a weight without a gradient: moments and decay stay too.
            self.task.model.get_parameter(name).grad = None
        return {"loss": output.loss.detach(), **output.metrics}

    def _names(self, weights: Sequence[nn.Parameter]) -> list[str]:
        """Of weights of the model as they are now: a share is another tensor than what is gathered for a pass."""
        if not weights:
            return []
        names = {weight: name for name, weight in self.task.model.named_parameters()}
        return [names[weight] for weight in weights]

    def _figures(
        self, parts: list[dict[str, Tensor]], wait: float, **shared: Tensor
    ) -> tuple[dict[str, float], list[float]]:
        """Scalars averaged over micro-batches and processes, and for how many seconds each process has waited for data,
        of which `wait` is this one's. Reading them is the loop's one wait for the device in a step: it decides, on all
        processes alike, whether the step counts and whether it is the last."""
        rows = torch.stack([torch.stack([part[name].float() for name in parts[0]]) for part in parts])
        processes, names = self.accelerator.num_processes, [*parts[0], *shared]
        waits = torch.zeros(processes)  # a place for each: the mean over processes has all of them
        waits[self.accelerator.process_index] = processes * wait
        others = torch.stack([value.float() for value in shared.values()])
        row = torch.cat([rows.mean(0), others, waits.to(rows.device)])
        values = self.accelerator.reduce(row, "mean").tolist()
        return dict(zip(names, values, strict=False)), values[len(names) :]

    def _update(self, figures: dict[str, float], learning: dict[str, Learner]) -> None:
        self.learner.move(self.progress.step)
        for name, companion in learning.items():
            if math.isfinite(figures[f"{name}_grad_norm"]):
                companion.move(self.progress.step)
            else:
                del figures[f"{name}_grad_norm"]
                self.progress.companion_skips[name] = self.progress.companion_skips.get(name, 0) + 1
        self._seed("all processes")
        self.task.after_step(self.progress.step)
        self.skipped = False
        if self.ema:
            self.ema.update(self.progress.step)
        self.progress.count(figures)

    def _skip(self, norm: float | None) -> None:
        """norm: of a gradient that is too large; None: it or the loss is not finite."""
        self.task.discard_step()
        self.skipped = True
        self.progress.count_skipped(norm)
        saved = self.checkpoints.steps()
        good = f"the last good checkpoint is {self.checkpoints.path(saved[-1])}" if saved else "none is saved yet"
        self.progress.check_skipped(self.config, good)

    def metrics_since_last_line(self) -> dict[str, float]:
        """Means over the steps since the last call, skipped ones left out; and what describes the last one."""
        progress = self.progress
        return {
            **progress.means(),
            **({} if self.skipped else as_numbers(self.task.health())),
            "learning_rate": self.learner.schedule(progress.step - 1),
            "skipped_steps": progress.skipped_steps,
            **({"large_gradients": progress.large_gradients} if self.config.skip_grad_norm else {}),
            **{f"{name}_learning_rate": one.schedule(progress.step - 1) for name, one in self.companions.items()},
            **{f"{name}_skipped_steps": progress.companion_skips.get(name, 0) for name in self.companions},
            **({} if self.task.guard is None else {"rollbacks": progress.rollbacks}),
        }

    # ---- between steps -------------------------------------------------------------------------------------

    @spent_on(VALIDATION)
    def validate(self, stop: StopRequest | None = None) -> Verdict | None:
        """Means over the held-out samples, whatever process saw them, to `progress`. A new best, or what the task's
        guard keeps, is saved to run/model. None, and nothing else, if `stop` comes meanwhile to a run of one process:
        several would have to agree on it after each batch."""
        count = len(self.validation_data)
        values: dict[str, list[Tensor]] = {}
        with self._at_rest() as model:
            for batch in self._held_out().again():
                if stop and self.accelerator.num_processes == 1:
                    return None
                for name, per_sample in self.task.validate(model, batch).items():
                    values.setdefault(name, []).append(per_sample.float())
        seen = gather_object([{name: torch.cat(parts).tolist() for name, parts in values.items()}])
        # fsum is exact: the mean does not depend on the order of the samples, nor on who saw which.
        metrics = {name: math.fsum(v for part in seen for v in part.get(name, [])) / count for name in seen[0]}

        progress, value = self.progress, metrics[self.task.best_metric]
        progress.validation = metrics
        if self.task.guard is not None:
            verdict = self.task.guard.judge(metrics, progress.validations_since_best, progress.step)
        else:
            verdict = Verdict(math.isfinite(value) and (progress.best_value is None or value < progress.best_value))
        if verdict.keep:
            progress.best = metrics
            progress.best_value, progress.best_step, progress.validations_since_best = value, progress.step, 0
            self.save_model()
        else:
            progress.validations_since_best += 1
        return verdict

    def _held_out(self) -> Loader:
        """This process's batches of the held-out samples, by workers that stay for all validations: to start them takes
        seconds where they are not forked."""
        if self.held_out is None or self.held_out.dataset is not self.validation_data:
            if self.held_out is not None:
                self.held_out.close()
            state, data = self.accelerator, self.validation_data
            batches_of_all = batches_of(data, range(len(data)), self.share.size)
            mine = islice(batches_of_all, state.process_index, None, state.num_processes)
            requests = [[(index, index) for index in batch] for batch in mine]
            self.held_out = self._loader(data, requests, repeated=True)
        return self.held_out

    @spent_on(SAVING)
    def roll_back(self) -> str:
        """Takes model, optimisers, averages and companions back to the checkpoint of the last validation whose weights
        were kept. The run does not go back: steps, samples and learning rate go on. Returns a line on it."""
        self.saver.wait()
        progress, good = self.progress, self.progress.best_step
        damage = None if good is None else on_main_process(self.accelerator, lambda: self.checkpoints.damage(good))
        if good is None or damage is not None or self.task.guard is None:
            return f"no rollback: there is no good checkpoint to return to ({damage or 'none was kept'})"
        load(self, good)
        progress.rollbacks += 1
        progress.validations_since_best = 0
        self.task.guard.rolled_back(progress.step, progress.rollbacks)
        return f"rollback {progress.rollbacks}: weights and optimisers are those of step {good} again"

    @spent_on(VALIDATION)
    def evaluate(self, evaluation: Evaluation) -> dict[str, float]:
        with self._at_rest() as model:
            return evaluation(model)

    @spent_on(PREVIEWS)
    def preview(self) -> Tensor | None:
        """The task's picture, `c H W` in [-1, 1], on the main process."""
        with self._at_rest() as model:
            return self.task.preview(model) if self.accelerator.is_main_process else None

    @contextmanager
    def _at_rest(self) -> Iterator[PretrainedModel]:
        """The model as it would be used: averaged weights if there are, in eval mode, without gradients. Where it is in
        shares, one that each process has whole meanwhile: all enter together."""
        model = self.ema.model if self.ema else self.task.model
        try:
            with self.shares.whole(model) if self.shares else nullcontext(model) as whole:
                whole.eval()
                with torch.no_grad(), self.accelerator.autocast():
                    yield whole
        finally:
            in_training(self.task.model)

    @spent_on(SAVING)
    def save_model(self) -> None:
        """Writes run/model."""
        with self._at_rest() as model:
            on_main_process(self.accelerator, lambda: model.save_pretrained(self.run / "model"))

    @spent_on(SAVING)
    def save(self) -> None:
        """Writes a checkpoint, or begins to, where train.save_in_background says so. Raises UserError when the disk is
        full."""
        self.saver.save(self.progress.step, tensors_of(self), state_of(self), self.progress.best_step)
        self.save_clock, self.save_time = time.monotonic(), False

    # ---- small things --------------------------------------------------------------------------------------

    def _seed(self, who: int | str) -> None:
        """Makes random numbers a function of the step: each process its own for the forward pass, and all the
        same for what they must agree on."""
        torch.manual_seed(step_seed(self.config.seed, self.progress.step, who))

    def _micro_batch(self, draws: range) -> MicroBatch:
        """By which samples draw the same on however many processes and in however many micro-batches."""
        config, step = self.config, self.progress.step
        place, size = draws.start % config.batch_size, config.batch_size
        return MicroBatch(step_seed(config.seed, step, "samples"), place, len(draws), size)

    def _loader(self, dataset: Dataset, requests: Iterable[list[Sample]], *, repeated: bool = False) -> Loader:
        config = self.config
        return Loader(
            dataset,
            requests,
            workers=config.workers,
            prefetch=config.prefetch,
            device=self.accelerator.device,
            repeated=repeated,
        )


def as_numbers(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """All of them in one wait for the device."""
    if not scalars:
        return {}
    return dict(zip(scalars, torch.stack([value.float() for value in scalars.values()]).tolist(), strict=True))


def is_map(value: Any) -> bool:
    """b c h w."""
    return isinstance(value, Tensor) and value.ndim == 4
