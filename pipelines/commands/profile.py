"""`zellige profile TRAINING`: what limits a training, told by a few of its steps. It leaves nothing behind."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list

from common.errors import UserError
from common.files import write_json
from common.processes import process_state, use_device
from common.wording import either
from pipelines.fields import options_of
from pipelines.help import help_of
from pipelines.options import (
    STAGES,
    ArgumentPeek,
    asks_for_help,
    kind_of_model,
    read_options,
    read_recipe,
    split_device,
)
from pipelines.trainings import (
    check_images,
    check_table,
    shards_of,
    train_sequence,
    train_stage1,
    train_stage2,
    train_table,
    train_vae,
)
from stage1_vae.sequences.train import Stage1SequenceConfig
from stage1_vae.tables.train import Stage1TableConfig
from stage1_vae.train import Stage1VAEConfig
from stage1_vq.train import Stage1Config
from stage2_prior.latents import LATENT_PRIORS
from stage2_prior.train import Stage2Config
from stage2_prior.train_latents import Stage2LatentConfig
from training.advice import Compared, advice, table
from training.loop import FitResult, in_place_of_training
from training.metrics_log import as_options
from training.profiling import Measured, Profiler


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Takes a few steps of a training apart: what time and memory go to, and what to do about it. All options of the
    training are given as to itself; its run folder is left alone."""

    steps: int = 20  # that are measured, after some that are not
    at: float = 0.5  # share of the training after which they are taken: what a step does may change in its course
    compare: tuple[str, ...] = ()  # settings to measure beside the recipe's, such as train.precision=bf16; repeatable
    json: str | None = None  # file for the table and the advice as JSON

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UserError(f"steps={self.steps}, expected at least 2; 20 is usual")
        if not 0 <= self.at <= 1:
            raise UserError(f"at={self.at}, expected a share of the training, from 0 to 1")


class Training(NamedTuple):
    config_class: type[Any]
    train: Callable[..., FitResult]
    check: Callable[[Any], Any]  # raises UserError where the config names no data


TRAININGS = {
    "train-stage1": Training(Stage1Config, train_stage1, lambda config: check_images(config.data.path)),
    "train-vae": Training(Stage1VAEConfig, train_vae, lambda config: check_images(config.data.path)),
    "train-table": Training(Stage1TableConfig, train_table, lambda config: check_table(config.table.path)),
    "train-sequence": Training(Stage1SequenceConfig, train_sequence, lambda config: None),
    "train-stage2": Training(Stage2Config, train_stage2, shards_of),
}


def prepare(arguments: Sequence[str]) -> Callable[[], str]:
    """Reads and checks the arguments; what it returns measures, and tells what to do. Raises UserError."""
    if asks_for_help(arguments):
        usage = "zellige profile TRAINING --config RECIPE [--FIELD VALUE ...] [--OPTION VALUE ...]"
        note = f"TRAINING is {either(list(TRAININGS))}, whose own --help shows the fields."
        print(help_of(usage, ProfileConfig, options_of(ProfileConfig), note=note))
        raise SystemExit(0)
    if not arguments or arguments[0] not in TRAININGS:
        got = f"got {arguments[0]}" if arguments else "got none"
        raise UserError(
            f"profile needs a training, {either(list(TRAININGS))}, {got}: put profile before the command that trains, "
            "as in zellige profile train-stage1 --config folder --data.path photos"
        )
    own, rest = split_own(arguments[1:])
    device, rest = split_device(rest)
    wanted = read_options("profile", ProfileConfig, own)
    command = arguments[0]
    config, run = read_training(command, rest)
    others = [(text, read_training(command, [*rest, *words_of(text)])[0]) for text in wanted.compare]

    def profile() -> str:
        state = use_device(device)
        with scratch_beside(run) as scratch:
            first = measured(wanted, command, config, scratch / "first", device)
            if state.is_main_process:
                print(table(first), flush=True)
            compared = []
            for number, (text, other) in enumerate(others):
                changed = measured(wanted, command, other, scratch / f"other{number}", device, between=False)
                again = measured(wanted, command, config, scratch / f"again{number}", device, between=False)
                compared.append(comparison(text, first, changed, again))
        said = advice(first, compared)
        if wanted.json is not None and state.is_main_process:
            write_json(Path(wanted.json), as_json(first, compared, said))
        return "\n".join(["", "what to do:", *(f"* {sentence}" for sentence in said)])

    return profile


def split_own(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of the command itself, as `read_options` takes them, and those of the training."""
    peek = ArgumentPeek(add_help=False, allow_abbrev=False)
    for name in ("steps", "at", "json"):
        peek.add_argument(f"--{name}")
    peek.add_argument("--compare", action="append")
    named, rest = peek.parse_known_args(arguments)
    own: list[str] = []
    for name, value in vars(named).items():
        if value is not None:
            own += [f"--{name}", repr(value) if isinstance(value, list) else value]
    return own, rest


def read_training(command: str, arguments: Sequence[str]) -> tuple[Any, Path]:
    """The config and the run folder of a training, as its own command reads them. Raises UserError."""
    training, recipes = TRAININGS[command], next(name for name, (known, _) in STAGES.items() if known == command)
    config_class = training.config_class
    if command == "train-stage2" and kind_of_model(command, recipes, arguments) in LATENT_PRIORS:
        config_class = Stage2LatentConfig
    config, run = read_recipe(command, config_class, recipes, arguments)
    training.check(config)
    return config, run


def words_of(settings: str) -> list[str]:
    """`train.precision=bf16 train.compile=true` as options. Raises UserError."""
    words: list[str] = []
    for setting in settings.split():
        name, equals, value = setting.removeprefix("--").partition("=")
        if not equals:
            raise UserError(f"compare={settings}, expected settings as in train.precision=bf16, several with a space")
        words += [f"--{name}", value]
    if not words:
        raise UserError("compare is empty, expected settings as in train.precision=bf16")
    return words


def measured(
    wanted: ProfileConfig, command: str, config: Any, run: Path, device: str | None, *, between: bool = True
) -> Measured:
    profiler = Profiler(wanted.steps, wanted.at, between=between)
    try:
        with in_place_of_training(profiler.fit):
            TRAININGS[command].train(config, run, device=device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the memory of the device is full at a batch of {config.train.batch_size} in {config.train.accumulate} "
            f"pieces: give a larger --train.accumulate, or a smaller --train.batch_size ({str(error).split('. ')[0]})"
        ) from error
    finally:
        gc.collect()  # models and optimisers of this run
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    assert profiler.measured is not None
    return profiler.measured


def comparison(settings: str, first: Measured, changed: Measured, again: Measured) -> Compared:
    """Medians of steps, so that a pause of the machine decides nothing."""
    speeds = [one.train.batch_size / median(one.seconds_of_steps) for one in (first, again)]
    speed = changed.train.batch_size / median(changed.seconds_of_steps)
    known = first.capacity is not None and first.peak and changed.peak
    memory = changed.peak / first.peak if known and changed.peak and first.peak else None
    return Compared(settings, speed / mean(speeds), memory, abs(speeds[0] - speeds[1]) / mean(speeds))


@contextmanager
def scratch_beside(run: Path) -> Iterator[Path]:
    """A folder for all processes on the disk of the run, so that saving takes what it would; it is removed."""
    state, name = process_state(), [""]
    if state.is_main_process:
        place = next(parent for parent in run.absolute().parents if parent.is_dir())
        name = [tempfile.mkdtemp(prefix=".zellige-profile-", dir=place)]
    broadcast_object_list(name)
    try:
        yield Path(name[0])
    finally:
        if state.is_main_process:
            shutil.rmtree(name[0], ignore_errors=True)


def as_json(first: Measured, compared: Sequence[Compared], said: Sequence[str]) -> dict[str, Any]:
    values = asdict(first)
    return {
        **values,
        "step_seconds": first.step_seconds,
        "wall_seconds": first.wall_seconds,
        "samples_per_second": first.samples_per_second,
        "shares": first.shares,
        "compared": [{**asdict(one), "options": as_options(one.settings)} for one in compared],
        "advice": list(said),
    }
