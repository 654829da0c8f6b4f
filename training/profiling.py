"""What a training would spend its time and memory on: a few of its steps, taken apart.

The steps are those of the loop itself, around whose parts a clock is put from outside: ordinary trainings pay nothing
for it. On a GPU the clock reads events on the device's own time line and waits for nothing, so steps overlap with the
host as they always do. What happens between steps is done once, and counts as often as the config has it done.
"""

from __future__ import annotations

import cProfile
import math
import os
import pstats
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.clock import OTHER, Clock, DeviceClock, clock_of
from training.config import TrainConfig
from training.data import explain_dead_workers, groups_of
from training.loop import FitResult
from training.metrics_log import COMMUNICATION, PREVIEWS, SAVING, VALIDATION, WAITING, peak_memory
from training.profiled_memory import Kept, memory_of
from training.run_folder import RunFacts
from training.setup import communication_seconds
from training.signals import StopRequest, stop_on_signals
from training.task import Batch, Dataset, Evaluation, Task
from training.trainer import Trainer

WARM_UP = 3  # steps before those that count: memory is found, code is compiled, workers start
FORWARD, BACKWARD, OPTIMISER = "forward", "backward", "optimiser"
NORMS, FIGURES, STATISTICS, AVERAGES = "gradient norms", "reading the loss", "codebook, statistics", "averaged weights"
STEP_ROWS = (WAITING, FORWARD, BACKWARD, COMMUNICATION, NORMS, FIGURES, OPTIMISER, STATISTICS, AVERAGES, OTHER)
VALIDATED = 4  # batches of each process that are validated, for the time of all to be told from them
FETCHED, FETCH_SECONDS = 5, 2.0  # batches that are fetched in this process, to see what takes time; or so long

# Of what a data set does in Python's profiler: which built-in functions are which part.
PARTS_OF_FETCHING = {
    "reading files": re.compile(r"io\.open|posix\.(open|stat|read)|'(read|readinto|readline|seek|recv)' of"),
    "decoding": re.compile(r"of 'ImagingDecoder'|zlib|lzma|bz2"),
    "scaling": re.compile(r"'(resize|reduce)' of 'ImagingCore'"),
}


@dataclass(frozen=True)
class Between:
    """What is done between steps."""

    seconds: float  # each time
    every: int  # steps


@dataclass(frozen=True)
class Fetching:
    """A micro-batch of the data set, fetched by one process that has nothing else to do."""

    seconds: float
    parts: dict[str, float]  # shares of it, which add up to 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A few steps of a training, taken apart."""

    device: str
    samples: str  # what a person calls them
    processes: int
    train: TrainConfig
    micro_batch: int  # samples
    first_step: int
    skipped_steps: int
    seconds_of_steps: list[float]  # one by one, on the host
    step: dict[str, float]  # seconds of a step by activity, `forward: encoder` inside `forward`; the mean
    between: dict[str, Between]
    fetching: Fetching
    memory: dict[str, int]  # bytes that are held by this process, by what for
    activations: int  # bytes that the forward pass of a micro-batch keeps for its backward pass
    peak: int | None  # bytes of a GPU's memory at the worst instant of a step, or of this process at its worst
    capacity: int | None  # bytes that the device has; None where it shares the machine's memory
    host_waits: float | None  # share of the steps that the host waits for the device; None where they are one
    cores: int
    threads: int
    notes: list[str] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        return sum(self.step.values())

    @property
    def wall_seconds(self) -> float:
        """Of a step, with its part of what is done between steps."""
        return self.step_seconds + sum(one.seconds / one.every for one in self.between.values())

    @property
    def samples_per_second(self) -> float:
        """Of steps alone, as the log has it."""
        return self.train.batch_size / self.step_seconds

    def within(self, activity: str) -> float:
        """Seconds of a step in an activity and in the parts of it."""
        return sum(seconds for name, seconds in self.step.items() if name.partition(": ")[0] == activity)

    @property
    def shares(self) -> dict[str, float]:
        """Of the wall time; they add up to 1."""
        seconds = {row: self.within(row) for row in STEP_ROWS}
        seconds |= {name: one.seconds / one.every for name, one in self.between.items()}
        return {name: value / self.wall_seconds for name, value in seconds.items()}


class Profiler:
    """Takes the place of `fit`: a task, its data and its config, as a command builds them, are measured."""

    def __init__(self, steps: int, at: float, *, between: bool = True) -> None:
        """steps: that count; at: the share of the run after which they are taken, as what a step does may depend on it;
        between: whether validation, previews and saving are measured as well."""
        self.steps, self.at, self.between = steps, at, between
        self.measured: Measured | None = None

    def fit(
        self,
        task: Task,
        train_data: Dataset,
        validation_data: Dataset,
        config: TrainConfig,
        run: Path,
        resolved_config: dict[str, Any],
        facts: RunFacts | None = None,
        evaluation: Evaluation | None = None,
    ) -> FitResult:
        """Measures, with `run` as a folder that nobody needs afterwards. Raises UserError, as `fit` does."""
        begin = time.perf_counter()
        drained = config.workers * config.prefetch  # micro-batches that stand ready before the first one counts
        needed = WARM_UP + 1 + self.steps + math.ceil(drained / config.accumulate)
        config = replace(config, steps=max(config.steps, needed))
        trainer = Trainer(task, train_data, validation_data, config, run)
        trainer.progress.step = min(int(self.at * config.steps), config.steps - needed)
        trainer.open_run(resolved_config)
        with stop_on_signals() as stop, closing(trainer), explain_dead_workers():
            trainer.start()
            self.measured = self._measure(trainer, drained, (facts or RunFacts()).samples.split()[-1], stop)
            trainer.saver.wait()  # the folder is removed next
        if trainer.accelerator.num_processes > 1:
            trainer.accelerator.wait_for_everyone()
        return FitResult(
            run=run,
            steps_done=trainer.progress.step,
            finished=True,
            stopped_by="steps",
            metrics={},
            best_value=None,
            best_step=None,
            minutes=(time.perf_counter() - begin) / 60,
            images_per_second=self.measured.samples_per_second,
            waiting_share=self.measured.within(WAITING) / self.measured.step_seconds,
        )

    def _measure(self, trainer: Trainer, drained: int, samples: str, stop: StopRequest) -> Measured:
        config, device = trainer.config, trainer.accelerator.device
        kept = Kept([*trainer.task.model.parameters(), *trainer.task.model.buffers()])
        first_step = trainer.progress.step
        for number in range(WARM_UP):
            with kept.counted(trainer.task) if number == WARM_UP - 1 else ExitStack():
                trainer.step(stop)
            interrupt(stop)
        for _ in range(drained):  # so that the steps find what the workers make, and not what they had made
            next(trainer.batches)
        trainer.step(stop)
        memory = memory_of(trainer)
        if device.type in ("cuda", "xpu"):
            torch.accelerator.reset_peak_memory_stats(device)
        clock = clock_of(device)
        exchanges: list[float] = []
        if trainer.data_parallel is not None:
            trainer.data_parallel._set_ddp_runtime_logging_sample_rate(1)
        with around_parts(trainer, clock):
            before, reports = dict(clock.seconds()), []
            for _ in range(self.steps):
                reports.append(trainer.step(stop))
                if (told := communication_seconds(trainer.data_parallel, 0.0)) is not None:
                    exchanges.append(told)  # of the step before this one
                interrupt(stop)
            after = dict(clock.seconds())
        peak = peak_memory(device)
        step = {name: (seconds - before.get(name, 0.0)) / self.steps for name, seconds in after.items()}
        waits = sum(report.waiting_seconds for report in reports) / self.steps
        tell_communication(step, statistics.mean(exchanges[1:]) if exchanges[1:] else 0.0, waits)
        host_waits = clock.host[FIGURES] / sum(clock.host.values()) if isinstance(clock, DeviceClock) else None
        notes = []
        if trainer.accelerator.num_processes > 1 and trainer.data_parallel is None:
            notes.append("the exchange between processes stands inside forward and backward: nobody times it apart")
        if trainer.progress.skipped_steps:
            notes.append(f"{trainer.progress.skipped_steps} steps were skipped, for their loss or gradient")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return Measured(
            device=name,
            samples=samples,
            processes=trainer.accelerator.num_processes,
            train=config,
            micro_batch=trainer.share.size,
            first_step=first_step,
            skipped_steps=trainer.progress.skipped_steps,
            seconds_of_steps=[report.seconds for report in reports],
            step=step,
            between=between_steps(trainer, stop) if self.between else {},
            fetching=fetching(trainer),
            memory=memory,
            activations=kept.bytes,
            peak=peak,
            capacity=torch.accelerator.get_memory_info(device)[1] if device.type in ("cuda", "xpu") else None,
            host_waits=host_waits,
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            notes=notes,
        )


def interrupt(stop: StopRequest) -> None:
    if stop:
        raise KeyboardInterrupt


# ---- the parts of a step -----------------------------------------------------------------------------------


@contextmanager
def around_parts(trainer: Trainer, clock: Clock) -> Iterator[None]:
    """Inside, the clock is on whatever part of a step the trainer is at."""
    task, batches = trainer.task, trainer.batches
    backward_of: dict[int, str] = {}  # by id of the loss

    def name_losses(output: Any) -> None:
        backward_of.update({id(loss): f"{BACKWARD}: {name}" for name, loss in output.companion_losses.items()})

    with ExitStack() as stack:
        for owner, method, activity in (
            (trainer, "_figures", FIGURES),
            (trainer.learner, "clip", NORMS),
            (trainer.learner, "move", OPTIMISER),
            (task, "after_step", STATISTICS),
            *(((trainer.ema, "update", AVERAGES),) if trainer.ema else ()),
            *(((trainer.learner, "average_whole", COMMUNICATION),) if trainer.shares else ()),
            *((learner, "average", COMMUNICATION) for learner in trainer.companions.values()),
            *((learner, "clip", f"{NORMS}: {name}") for name, learner in trainer.companions.items()),
            *((learner, "move", f"{OPTIMISER}: {name}") for name, learner in trainer.companions.items()),
        ):
            stack.enter_context(timed(owner, method, clock, always(activity)))
        stack.enter_context(timed(task, "step", clock, always(FORWARD), name_losses))
        stack.enter_context(
            timed(trainer.accelerator, "backward", clock, lambda loss: backward_of.pop(id(loss), BACKWARD))
        )
        if not trainer.config.compile:  # hooks would break the compiled graph
            parts = [*task.model.named_children()]
            parts += [(name, companion.module) for name, companion in task.companions.items()]
            for name, module in parts:
                stack.enter_context(called(module, name, clock))
        trainer.batches = waited_for(batches, clock)
        stack.callback(setattr, trainer, "batches", batches)
        yield


def always(activity: str) -> Callable[..., str]:
    return lambda *args, **kwargs: activity


@contextmanager
def timed(
    owner: Any,
    method: str,
    clock: Clock,
    activity: Callable[..., str],
    look: Callable[[Any], None] = lambda result: None,
) -> Iterator[None]:
    """Inside, calls of a method of this one object are counted as an activity. look: at what it returns."""
    plain = getattr(owner, method)

    @wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.on(activity(*args, **kwargs)):
            result = plain(*args, **kwargs)
        look(result)
        return result

    had = method in vars(owner)
    setattr(owner, method, call)
    try:
        yield
    finally:
        setattr(owner, method, plain) if had else delattr(owner, method)


@contextmanager
def called(module: nn.Module, name: str, clock: Clock) -> Iterator[None]:
    """Inside, calls of a module are counted as a part of the activity that they fall into."""
    inside: list[Any] = []

    def enter(*_: Any) -> None:
        inside.append(clock.on(f"{clock.activity.partition(': ')[0]}: {name}"))
        inside[-1].__enter__()

    def leave(*_: Any) -> None:
        inside.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def waited_for(batches: Iterator[Batch], clock: Clock) -> Iterator[Batch]:
    while True:
        with clock.on(WAITING):
            batch = next(batches)
        yield batch


def tell_communication(step: dict[str, float], exchange: float, longest_wait: float) -> None:
    """Takes the exchange of gradients out of the backward pass; and out of the exchange that part in which this process
    waits for another one which waits for data."""
    exchange = min(exchange, step.get(BACKWARD, 0.0))
    waits_for_others = min(exchange, max(longest_wait - step.get(WAITING, 0.0), 0.0))
    if exchange:
        step[BACKWARD] -= exchange
        step[COMMUNICATION] = step.get(COMMUNICATION, 0.0) + exchange - waits_for_others
        step[WAITING] = step.get(WAITING, 0.0) + waits_for_others


# ---- between steps -----------------------------------------------------------------------------------------


class First:
    """The first samples of a data set, as one."""

    def __init__(self, data: Dataset, count: int) -> None:
        self.data, self.count = data, min(count, len(data))
        groups = groups_of(data)
        self.groups = None if groups is None else groups[: self.count]

    def __len__(self) -> int:
        return self.count

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        return self.data.fetch(indices, draws)


def between_steps(trainer: Trainer, stop: StopRequest) -> dict[str, Between]:
    """Validation, a preview and a checkpoint, of those that the config asks for. Of the validation a few batches are
    done, and its time follows from theirs."""
    config, data, found = trainer.config, trainer.validation_data, dict[str, Between]()
    at_once = trainer.share.size * trainer.share.processes

    def seconds_of(what: Callable[[], Any], activity: str) -> float:
        before = trainer.clock.seconds().get(activity, 0.0)
        what()
        if trainer.accelerator.device.type != "cpu":
            torch.accelerator.synchronize(trainer.accelerator.device)
        interrupt(stop)
        return trainer.clock.seconds().get(activity, 0.0) - before

    def validation_of(batches: int) -> float:
        trainer.validation_data = First(data, batches * at_once)
        try:
            return seconds_of(trainer.validate, VALIDATION)
        finally:
            trainer.validation_data = data

    if config.validate_every and len(data):
        batches = math.ceil(len(data) / at_once)
        validation_of(1)  # memory is found, and files are opened
        seconds = one = validation_of(1)
        if batches > 1:
            some = min(VALIDATED, batches)
            seconds += max(validation_of(some) - one, 0.0) / (some - 1) * (batches - 1)
        found[VALIDATION] = Between(seconds, config.validate_every)
    if config.preview_every:
        found[PREVIEWS] = Between(seconds_of(trainer.preview, PREVIEWS), config.preview_every)
    found[SAVING] = Between(seconds_of(trainer.save, SAVING), config.save_every)
    return found


# ---- data --------------------------------------------------------------------------------------------------


def fetching(trainer: Trainer) -> Fetching:
    """What a worker does, here and alone; in other batches than those of the steps, whose files may be in memory."""
    step = trainer.progress.step + trainer.config.workers * trainer.config.prefetch + 1
    seconds: list[float] = []
    profile = cProfile.Profile()
    while len(seconds) < FETCHED and (sum(seconds) < FETCH_SECONDS or not seconds):
        for draws in trainer.share.draws(step)[:1]:
            indices, numbers = zip(*trainer.order.samples(draws), strict=True)
            begin = time.perf_counter()
            trainer.train_data.fetch(indices, numbers)
            seconds.append(time.perf_counter() - begin)
        step += 1
    indices, numbers = zip(*trainer.order.samples(trainer.share.draws(step)[0]), strict=True)
    profile.runcall(trainer.train_data.fetch, indices, numbers)
    return Fetching(statistics.median(seconds), parts_of(pstats.Stats(profile)))


def parts_of(stats: pstats.Stats) -> dict[str, float]:
    """Shares of the time in the profile, by part."""
    seconds = dict.fromkeys([*PARTS_OF_FETCHING, "the rest"], 0.0)
    for (_, _, function), (_, _, own, _, _) in stats.stats.items():  # type: ignore[attr-defined]
        part = next((part for part, pattern in PARTS_OF_FETCHING.items() if pattern.search(function)), "the rest")
        seconds[part] += own
    total = sum(seconds.values()) or 1.0
    return {part: value / total for part, value in seconds.items()}
