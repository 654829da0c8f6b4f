"""What a run says: metrics.jsonl, timing.jsonl, previews, the tracker, the progress bar and the lines
between.

metrics.jsonl holds what the seed and the config determine, one JSON object per line: `{"step": 50, "split":
"train", ...}`, means over the steps since the last such line, `{"step": 500, "split": "validation",
...}`, means over the held-out samples, and `{"step": 500, "split": "evaluation", ...}`, distances of
reconstructions or samples. timing.jsonl holds what the clock says: `images`, whatever the samples are, `seconds`,
and of them `training_seconds`, `waiting_seconds` and those between steps since the run began; `images_per_second`,
`waiting_share` of the training, and `shares` of the wall time, which add up to 1, since the last line; and
`memory_bytes`, the largest so far. A continued run takes the lines after its checkpoint away, so that metrics.jsonl is,
byte for byte, that of a run which was never interrupted.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.errors import explain_disk_errors
from common.files import atomic_file, flush, json_value, write_text
from common.progress import progress_bar
from common.wording import counted
from training.clock import OTHER, Clock
from training.trackers import Tracker, open_tracker

METRICS_NAME = "metrics.jsonl"
TIMING_NAME = "timing.jsonl"
ALWAYS_TIMED = ("images", "seconds", "training_seconds", "waiting_seconds")  # in lines of every version
SLOW_DATA = 0.1  # share of the training time spent waiting for data above which a person should act
PATIENCE = 0.5  # share of a run's steps after which a warning that still holds is said again
WARM_UP = 2  # steps that are slower than those to come, for memory to be found and code to be compiled
MEASURED_STEPS, MEASURED_SECONDS = 20, 10.0  # whichever comes first is enough to tell how long a run will take
SETTING = re.compile(r"(?<![\w.-])((?:model|data|train|perceptual|adversarial)(?:\.[a-z]\w*)+)(?:=([^\s,;]+))?")
FIGURE = re.compile(r"\d+(?:\.\d+)?%|\d+\.\d+(?:e[+-]?\d+)?")


WAITING, COMMUNICATION, COMPUTING = "waiting for data", "communication", "computing"
VALIDATION, PREVIEWS, SAVING = "validation", "previews", "saving"
WORTH_SAYING = 0.01  # share of the wall time


@dataclass
class Timing:
    """Running totals of a run, or of a part of it."""

    images: int = 0  # training samples, over all processes
    seconds: float = 0.0  # wall clock
    training_seconds: float = 0.0  # of them spent in steps, not in validation, previews and checkpoints
    waiting_seconds: float = 0.0  # of these spent waiting for data, on the process that waited longest
    communication_seconds: float = 0.0  # of these for the exchange of gradients, where that is known
    validation_seconds: float = 0.0  # of `seconds`, between steps; evaluations too
    preview_seconds: float = 0.0
    saving_seconds: float = 0.0  # checkpoints and run/model

    @property
    def images_per_second(self) -> float:
        return self.images / self.training_seconds if self.training_seconds else 0.0

    @property
    def waiting_share(self) -> float:
        return self.waiting_seconds / self.training_seconds if self.training_seconds else 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Of the wall time, by what it went to; they add up to 1."""
        between = self.validation_seconds + self.preview_seconds + self.saving_seconds
        computing = self.training_seconds - self.waiting_seconds - self.communication_seconds
        seconds = {
            COMPUTING: max(computing, 0.0),
            WAITING: self.waiting_seconds,
            COMMUNICATION: self.communication_seconds,
            VALIDATION: self.validation_seconds,
            PREVIEWS: self.preview_seconds,
            SAVING: self.saving_seconds,
            OTHER: max(self.seconds - self.training_seconds - between, 0.0),
        }
        total = sum(seconds.values())
        return {name: value / total if total else 0.0 for name, value in seconds.items()}

    def since(self, earlier: Timing) -> Timing:
        """What has been added to earlier totals."""
        return Timing(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})


class StepReport(NamedTuple):
    """One step: its mean loss, and what it took."""

    loss: float
    images: int  # samples, over all processes
    seconds: float
    waiting_seconds: float  # of them spent waiting for data
    communication_seconds: float | None = (
        None  # of them, of a step like it, for the exchange of gradients; None: unknown
    )


class RunLog:
    """The voice of a run. Only the main process speaks; on the others every method is silent."""

    def __init__(
        self,
        run: Path,
        accelerator: Accelerator,
        tracker: str,
        step: int,
        steps: int,
        config: Mapping[str, Any] | None = None,
        samples: str = "images",
        clock: Clock | None = None,
    ):
        """step: that of the checkpoint the run continues from, or 0; steps: of the whole run; config: of the whole run,
        nested, which the tracker shows; samples: as `RunFacts` has them, of which speeds have the last word; clock:
        that of what is done between steps."""
        self.run = run
        self.clock, self.device = clock or Clock(), accelerator.device
        self.counted = samples.split()[-1]
        self.steps = steps
        self.main = accelerator.is_main_process
        self.total = Timing()
        self.tracker: Tracker | None = None
        if self.main:
            _, damaged = keep_lines(run / METRICS_NAME, step)
            times, _ = keep_lines(run / TIMING_NAME, step)
            for line in [line for line in times if all(is_number(line.get(name)) for name in ALWAYS_TIMED)][-1:]:
                told = {f.name: line[f.name] for f in fields(Timing) if is_number(line.get(f.name))}
                self.total = Timing(**told)
            with explain_disk_errors(run):
                self.tracker = open_tracker(tracker, run, step, config or {})
        self._begin = time.perf_counter() - self.total.seconds
        self._logged, self._before = replace(self.total), replace(self.total)
        self._said: dict[str, tuple[int, str]] = {}  # of each kind of warning: when it was said, and how
        self._pace = Pace(steps - step)
        self._bar = progress_bar(steps, "steps", shown=self.main, done=step)
        if self.main and damaged:
            self.say(
                f"{run / METRICS_NAME}: {counted(damaged, 'damaged line')} taken out: curves have a gap there, and the "
                "training has none"
            )

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self.main:
            tqdm.write(text)

    def step_done(self, step: StepReport) -> None:
        """Counts a step and moves the progress bar; once, after the first ones, says how long the others will take."""
        if (left := self._pace.step_done(step.seconds)) is not None:
            self.say(left)
        self.total.images += step.images
        self.total.training_seconds += step.seconds
        self.total.waiting_seconds += step.waiting_seconds
        self.total.communication_seconds += step.communication_seconds or 0.0
        speed = self.total.since(self._logged).images_per_second
        self._bar.set_postfix_str(f"loss {step.loss:.4g}, {speed:,.0f} {self.counted}/s", refresh=False)
        self._bar.update()

    def train(self, step: int, metrics: Mapping[str, float], warnings: Sequence[str]) -> None:
        """A line on the steps since the last one, and its warnings, as `warn` says them."""
        if not self.main:
            return
        self._look_at_clock()
        recent = self.total.since(self._logged)
        self._logged = replace(self.total)
        rates = {"images_per_second": recent.images_per_second, "waiting_share": recent.waiting_share}
        self._append(METRICS_NAME, {"step": step, "split": "train", **metrics})
        memory = {} if (peak := peak_memory(self.device)) is None else {"memory_bytes": peak}
        shares = recent.shares
        self._append(TIMING_NAME, {"step": step, **asdict(self.total), **rates, "shares": shares, **memory})
        by_name = {f"share_of_{name.replace(' ', '_')}": share for name, share in shares.items()}
        self._track("train", {**metrics, **rates, **by_name, **memory}, step)
        speed = f"{recent.images_per_second:,.0f} {self.counted}/s, {in_shares(shares)}"
        self.say(f"step {step}/{self.steps}  {phrase(metrics)}  {speed}")
        if recent.waiting_share > SLOW_DATA and recent.waiting_seconds > 1:
            smaller = ", or smaller image files" if self.counted == "images" else ""
            warnings = [*warnings, f"training waits for data: try more --train.workers{smaller}"]
        for warning in warnings:
            self.warn(step, warning)

    def warn(self, step: int, warning: str) -> None:
        """Says a warning, but not one of the same words, its figures aside, that was said before: that is repeated when
        it has got `much_worse`, or after half of the run."""
        kind = FIGURE.sub("#", warning)
        if kind in self._said:
            when, before = self._said[kind]
            if step - when < PATIENCE * self.steps and not much_worse(before, warning):
                return
        self._said[kind] = (step, warning)
        self.say(f"warning: {as_options(warning)}")

    def validation(self, step: int, metrics: Mapping[str, float], *, improved: bool) -> None:
        """A line on the held-out samples."""
        if self.main:
            self._append(METRICS_NAME, {"step": step, "split": "validation", **metrics})
            self._track("validation", metrics, step)
            best = "  (best so far)" if improved else ""
            self.say(f"step {step}/{self.steps}  validation: {phrase(metrics)}{best}")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line on distances of reconstructions or samples."""
        if self.main:
            self._append(METRICS_NAME, {"step": step, "split": "evaluation", **metrics})
            self._track("evaluation", metrics, step)
            self.say(f"step {step}/{self.steps}  evaluation: {phrase(metrics)}")

    def preview(self, step: int, picture: Tensor | None) -> None:
        """Writes previews/step_XXXXXXXX.png. picture: c H W in [-1, 1], or None where there is nothing to show."""
        if self.main and picture is not None:
            unit = ((picture.detach().float().cpu() + 1) / 2).clamp(0, 1)
            array = (unit * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()  # H W c
            image = Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)
            with atomic_file(self.run / "previews" / f"step_{step:08d}.png") as path:
                image.save(path, format="PNG")
            if self.tracker is not None:
                with explain_disk_errors(self.run):
                    self.tracker.picture("preview", image, step)

    def flush(self) -> None:
        """Waits until all lines are on the disk: a checkpoint must not outlive a crash that its lines do not."""
        for path in (self.run / METRICS_NAME, self.run / TIMING_NAME):
            if self.main and path.exists():
                flush(path)

    def ended(self) -> None:
        """A line on what the time of a run went to, where it took some."""
        self._look_at_clock()
        if self.total.seconds > MEASURED_SECONDS:
            memory = "" if (peak := peak_memory(self.device)) is None else f"; at most {in_bytes(peak)} of memory"
            self.say(
                f"time of the run: computing {self.total.shares[COMPUTING]:.0%}, {in_shares(self.total.shares)}{memory}"
            )

    def _look_at_clock(self) -> None:
        spent, total, before = self.clock.seconds(), self.total, self._before
        total.seconds = time.perf_counter() - self._begin
        total.validation_seconds = before.validation_seconds + spent.get(VALIDATION, 0.0)
        total.preview_seconds = before.preview_seconds + spent.get(PREVIEWS, 0.0)
        total.saving_seconds = before.saving_seconds + spent.get(SAVING, 0.0)

    def close(self) -> None:
        self._look_at_clock()
        self._bar.close()
        if self.tracker is not None:
            self.tracker.close()

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        # JSON knows no NaN and no infinity: null stands for them.
        known = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        with explain_disk_errors(self.run / name), open(self.run / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(known) + "\n")

    def _track(self, split: str, values: Mapping[str, float], step: int) -> None:
        if self.tracker is not None:
            with explain_disk_errors(self.run):
                self.tracker.figures(split, values, step)


class Pace:
    """How long a run will take, from its first steps."""

    def __init__(self, steps_left: int) -> None:
        self.left = steps_left
        self.steps, self.seconds = -WARM_UP, 0.0
        self.told = False

    def step_done(self, seconds: float) -> str | None:
        """A line, once; None before and after, and where a person need not wait for long."""
        self.left -= 1
        self.steps += 1
        if self.told or self.steps <= 0:
            return None
        self.seconds += seconds
        if self.steps < MEASURED_STEPS and self.seconds < MEASURED_SECONDS:
            return None
        self.told = True
        rest = self.left * self.seconds / self.steps
        if rest < MEASURED_SECONDS:
            return None
        return f"at this rate: {duration(rest)} left, validations and checkpoints not counted"


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held so far: of a GPU's memory, or, where it computes on the CPU, of the
    machine's. None where nobody counts them."""
    if device.type in ("cuda", "xpu"):
        return torch.accelerator.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return None
    peak = getrusage(RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def in_bytes(count: float) -> str:
    """`12 MB`, `1.4 GB`"""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.{0 if count >= 1e7 else 1}f} MB"


def in_shares(shares: Mapping[str, float]) -> str:
    """`waiting for data 2%, validation 11%`: that of waiting, and those worth saying, but for computing itself."""
    said = {name: share for name, share in shares.items() if share >= WORTH_SAYING or name == WAITING}
    return ", ".join(f"{name} {share:.0%}" for name, share in said.items() if name not in (COMPUTING, OTHER))


def duration(seconds: float) -> str:
    """`50 s`, `12 min`, `3 h 20 min`, `2 days 4 h`"""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = round(minutes / 60)
    if hours < 24:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} day{'s' if hours >= 48 else ''} {hours % 24} h"


def much_worse(before: str, now: str) -> bool:
    """Whether the first figure of a warning has got worse by a factor of two: a share (`40%`), which is one of codes in
    use, has halved, or another figure (`0.31`), which is an error or a ratio, has doubled."""
    figures = FIGURE.search(before), FIGURE.search(now)
    if figures[0] is None or figures[1] is None:
        return False
    was, is_now = (float(figure[0].rstrip("%")) for figure in figures if figure)
    return is_now <= was / 2 if figures[1][0].endswith("%") else is_now >= 2 * was


def as_options(text: str) -> str:
    """The settings in a text as the command line takes them: `model.width=8` is `--model.width 8`."""
    return SETTING.sub(lambda match: f"--{match[1]} {match[2]}" if match[2] else f"--{match[1]}", text)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def keep_lines(path: Path, step: int) -> tuple[list[dict[str, Any]], int]:
    """Takes the lines after `step`, and those that are none, from a JSON-lines file; returns the rest, and how many
    were damaged, a last one that a kill cut short not counted."""
    if not path.exists():
        return [], 0
    kept, values, damaged = "", [], 0
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in [*lines, last]:
        try:
            value = json_value(line)
            beyond = value["step"] > step
        except (ValueError, TypeError, KeyError):
            damaged += line is not last
            continue
        if not beyond:
            kept += line + "\n"
            values.append(value)
    write_text(path, kept)
    return values, damaged


def phrase(metrics: Mapping[str, float]) -> str:
    """`loss 0.0312  perplexity 97.4`"""
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())
