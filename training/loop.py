"""The one training loop: `fit` runs a Task on a Dataset, on any number of processes, and survives being
killed.

A step is a function of the weights, the config and the step's number: samples (training/data.py), learning
rate and random seed (training/schedules.py) follow from the number. So a checkpoint holds the weights, the
optimiser and a few counters; a continued run repeats what an uninterrupted one would have done, bit for bit
on the CPU; and N processes with B/N samples each, or k micro-batches of B/k, do what one process does with B.
What a step does is in training/trainer.py.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config import TrainConfig
from training.data import explain_dead_workers
from training.metrics_log import RunLog
from training.run_folder import RunFacts
from training.signals import stop_on_signals, this_command
from training.task import Dataset, Task
from training.trainer import StopReason, Trainer

__all__ = ["FitResult", "TrainConfig", "fit"]


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
        """One line for a person: what was done, how good it is, and the command that goes on from here."""
        if not self.finished:
            return f"{self.run} is stopped after step {self.steps_done}; the same command continues"
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        validated = f", validation: {figures} (kept: step {self.best_step})" if figures else ""
        return (
            f"{self.steps_done} steps in {self.minutes:.1f} minutes{validated}; "
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
) -> FitResult:
    """Trains `task.model`, or continues from the newest good checkpoint in the folder `run`.

    The best weights by `task.best_metric` on `validation_data` go to `run/model` (those that `task.guard` keeps
    where there is one, and the last ones where nothing is validated); `task.model` is left with the last ones.
    `resolved_config` is the config of the whole run as plain values, `config` under "train": it goes to
    `run/config.yaml`, and the fingerprints of `facts` to `run/run.json`. SIGINT and SIGTERM end the run after its
    current step.

    Raises UserError: a config or data other than the run began with, no undamaged checkpoint left, a full disk, a batch
    that the processes cannot share, `max_nonfinite_steps` steps in a row without a finite loss and gradient.
    """
    trainer = Trainer(task, train_data, validation_data, config, Path(run))
    with stop_on_signals() as stop:
        damages = trainer.open_run(resolved_config, facts)
        log = RunLog(trainer.run, trainer.accelerator, config.tracker, trainer.progress.step, config.steps)
        with closing(log), closing(trainer.loader), explain_dead_workers():
            for damage in damages:
                log.say(f"{damage}; continuing from step {trainer.progress.step}")

            if trainer.progress.step == 0:
                trainer.start()

            while (reason := trainer.reason_to_stop()) is None:
                log.step_done(trainer.step(stop))
                step, worth_saving = trainer.progress.step, False
                if trainer.due(config.log_every):
                    metrics = trainer.metrics_since_last_line()
                    log.train(step, metrics, task.warnings(metrics))
                if trainer.due(config.validate_every) and len(validation_data):
                    verdict = trainer.validate()
                    worth_saving = verdict.keep or verdict.roll_back
                    log.validation(step, trainer.progress.validation, improved=verdict.keep and task.guard is None)
                    if verdict.warning is not None:
                        log.say(f"warning: {verdict.warning}")
                    if verdict.roll_back:
                        log.say(trainer.roll_back())
                if trainer.due(config.preview_every):
                    log.preview(step, trainer.preview())
                if worth_saving or trainer.due(config.save_every) or trainer.reason_to_stop() is not None:
                    log.flush()
                    trainer.save()

            if trainer.progress.best_step is None:
                trainer.save_model()
            if reason == "signal":
                log.say(f"{stop.signal_name or 'a signal'}: step {trainer.progress.step} is done and saved")
                log.say(f"continue with: {this_command()}")
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
