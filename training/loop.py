"""The one training loop: `fit` runs a Task on a Dataset, on any number of processes, and survives being
killed.

A step is a function of the weights, the config and the step's number: samples (training/data.py), learning
rate and random seed (training/schedules.py) follow from the number. So a checkpoint holds the weights, the
optimiser and a few counters; a continued run repeats what an uninterrupted one would have done, bit for bit
on the CPU; and N processes with B/N samples each, or k micro-batches of B/k, do what one process does with B.
What a step does is in training/trainer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import Stopped
from common.processes import on_main_process
from common.wording import counted
from training.config import TrainConfig
from training.data import explain_dead_workers
from training.metrics_log import PREVIEWS, SAVING, RunLog
from training.run_folder import RunFacts, held_run
from training.signals import StopRequest, stop_on_signals, this_command
from training.task import Dataset, Evaluation, Task
from training.trainer import StopReason, Trainer

__all__ = ["FitResult", "TrainConfig", "fit", "in_place_of_training"]


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a run came to."""

    run: Path
    steps_done: int
    finished: bool  # False: stopped by a signal, the same command continues
    stopped_by: StopReason  # "steps", "patience" or "signal"
    metrics: dict[str, float]  # of the best validation, that of the weights in run/model
    best_value: float | None  # its value of the task's best metric: the lowest one, unless the task has a guard
    best_step: int | None  # where it was reached: run/model holds the weights of that step
    minutes: float  # wall-clock time of the whole run, restarts included
    images_per_second: float  # training samples over training time, without validation, previews and checkpoints
    waiting_share: float  # share of the training time spent waiting for data

    def summary(self, next_command: str) -> str:
        """One line for a person: what was done, how good it is, and the command that goes on from here. Raises Stopped
        where a signal ended the run."""
        if not self.finished:
            raise Stopped(f"{self.run} is stopped after step {self.steps_done}; the same command continues")
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        validated = f", validation: {figures} (kept: step {self.best_step})" if figures else ""
        return (
            f"{counted(self.steps_done, 'step')} in {self.minutes:.1f} minutes{validated}; "
            f"the model is in {self.run / 'model'}; next: {next_command}"
        )


def fit(
    task: Task,
    train_data: Dataset,
    validation_data: Dataset,
    config: TrainConfig,
    run: Path,
    resolved_config: dict[str, Any],
    facts: RunFacts | None = None,
    evaluation: Evaluation | None = None,
) -> FitResult:
    """Trains `task.model`, or continues from the newest good checkpoint in the folder `run`.

    The best weights by `task.best_metric` on `validation_data` go to `run/model` (those that `task.guard` keeps
    where there is one, and the last ones where nothing is validated); `task.model` is left with the last ones.
    `resolved_config` is the config of the whole run as plain values, `config` under "train": it goes to
    `run/config.yaml`, and the fingerprints of `facts` to `run/run.json`. `evaluation` is asked every
    `config.evaluate_every` steps, for the log alone. SIGINT, SIGTERM and SIGUSR1 end the run after its current step.

    Raises UserError: a folder of anything but a run, or in which another process trains; a config or data other than
    the run began with; no undamaged checkpoint left, a full disk, a batch that the processes cannot share,
    `max_nonfinite_steps` steps in a row without a finite loss and gradient.
    """
    if (other := IN_PLACE.get()) is not None:
        return other(task, train_data, validation_data, config, Path(run), resolved_config, facts, evaluation)
    trainer = Trainer(task, train_data, validation_data, config, Path(run))
    with stop_on_signals() as stop, ExitStack() as stack:
        on_main_process(trainer.accelerator, lambda: stack.enter_context(held_run(trainer.run)))
        damages = trainer.open_run(resolved_config, facts)
        facts = facts or RunFacts()
        log = RunLog(
            trainer.run,
            trainer.accelerator,
            config.tracker,
            trainer.progress.step,
            config.steps,
            resolved_config,
            facts.samples,
            trainer.clock,
        )
        with closing(log), closing(trainer), explain_dead_workers():
            for damage in damages:
                log.say(f"{damage}; continuing from step {trainer.progress.step}")
            if trainer.accelerator.is_main_process and (line := facts.opened()):
                log.say(line)
            log.say(opening(trainer, facts))
            for note in facts.notes:
                log.say(f"note: {note}")

            if trainer.progress.step == 0:
                trainer.start()
            if trainer.progress.owed:
                look(trainer, log, stop, evaluation)

            while (reason := trainer.reason_to_stop()) is None:
                log.step_done(trainer.step(stop))
                if trainer.due(config.log_every):
                    metrics = trainer.metrics_since_last_line()
                    log.train(trainer.progress.step, metrics, task.warnings(metrics))
                if trainer.stopping and looks_next(trainer):
                    put_off(trainer, log)
                else:
                    look(trainer, log, stop, evaluation)

            with trainer.clock.on(SAVING):
                trainer.saver.wait()
            if trainer.progress.best_step is None:
                trainer.save_model()
            if reason == "signal":
                later = "; what is due after it comes first next time" if trainer.progress.owed else ""
                log.say(f"{stop.signal_name or 'a signal'}: step {trainer.progress.step} is done and saved{later}")
                log.say(f"continue with: {this_command()}")
            log.ended()
    if reason == "signal":
        # A launcher takes the first process that ends so for a failure, and ends the others: none may be at work then.
        trainer.accelerator.wait_for_everyone()
    return FitResult(
        run=trainer.run,
        steps_done=trainer.progress.step,
        finished=reason != "signal",
        stopped_by=reason,
        metrics=trainer.progress.best or trainer.progress.validation,
        best_value=trainer.progress.best_value,
        best_step=trainer.progress.best_step,
        minutes=log.total.seconds / 60,
        images_per_second=log.total.images_per_second,
        waiting_share=log.total.waiting_share,
    )


IN_PLACE: ContextVar[Callable[..., FitResult] | None] = ContextVar("IN_PLACE", default=None)


@contextmanager
def in_place_of_training(other: Callable[..., FitResult]) -> Iterator[None]:
    """Inside, `fit` calls `other` with its arguments: whoever builds a task for it builds it for `other`."""
    token = IN_PLACE.set(other)
    try:
        yield
    finally:
        IN_PLACE.reset(token)


def looks_next(trainer: Trainer) -> bool:
    """Whether a validation, an evaluation or a preview is due."""
    config = trainer.config
    validates = trainer.due(config.validate_every) and len(trainer.validation_data) > 0
    return validates or trainer.due(config.evaluate_every) or trainer.due(config.preview_every)


def put_off(trainer: Trainer, log: RunLog) -> None:
    """Saves before what is due: it may take longer than a job is given to end, and the steps would be lost."""
    trainer.progress.owed = True
    save(trainer, log)


def look(trainer: Trainer, log: RunLog, stop: StopRequest, evaluation: Evaluation | None) -> None:
    """What is due after a step: a validation with what follows from it, an evaluation, a preview, a checkpoint."""
    step, config, worth_saving = trainer.progress.step, trainer.config, False
    owed, trainer.progress.owed = trainer.progress.owed, False
    if trainer.due(config.validate_every) and len(trainer.validation_data):
        verdict = trainer.validate(stop)
        if verdict is None:
            put_off(trainer, log)
            return
        worth_saving = verdict.keep or verdict.roll_back
        log.validation(step, trainer.progress.validation, improved=verdict.keep and trainer.task.guard is None)
        if verdict.warning is not None:
            log.warn(step, verdict.warning)
        if verdict.roll_back:
            log.say(trainer.roll_back())
    if evaluation is not None and trainer.due(config.evaluate_every):
        log.evaluation(step, trainer.evaluate(evaluation))
    if trainer.due(config.preview_every):
        with trainer.clock.on(PREVIEWS):
            log.preview(step, trainer.preview())
    if worth_saving or owed or trainer.save_due() or trainer.reason_to_stop() is not None:
        save(trainer, log)


def save(trainer: Trainer, log: RunLog) -> None:
    with trainer.clock.on(SAVING):
        log.flush()
    trainer.save()


def opening(trainer: Trainer, facts: RunFacts) -> str:
    """The first line of a run: `on cpu: 297 images and 6 held out, 1.2 million parameters, 2,000 steps of 64 are 431
    epochs`, and where it continues."""
    config, images, held_out = trainer.config, len(trainer.train_data), len(trainer.validation_data)
    device, processes = trainer.accelerator.device, trainer.accelerator.num_processes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    each = f"{processes} processes on {name}" if processes > 1 else f"on {name}"
    epochs = config.steps * config.batch_size / images
    done = trainer.progress.step
    samples = facts.samples.removesuffix("s") if images == 1 else facts.samples
    going_on = f"; continuing from step {done:,}, {max(config.steps - done, 0):,} are left" if done else ""
    return (
        f"{each}: {images:,} {samples} and {held_out:,} held out, "
        f"{in_words(sum(weight.numel() for weight in trainer.learner.weights))} parameters, "
        f"{config.steps:,} steps of {config.batch_size:,} are {epochs:,.{0 if epochs >= 10 else 1}f} epochs{going_on}"
    )


def in_words(count: int) -> str:
    """`950`, `12 thousand`, `1.2 million`, `1.4 billion`"""
    for size, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            return f"{count / size:.{1 if count < 10 * size else 0}f} {word}"
    return str(count)
