"""Images of a VAE by the file, resumable, on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.owned_folder import SHEET_NAME
from common.precision import Precision
from common.progress import progress_bar
from pipelines.devices import open_device
from pipelines.labels import class_number
from pipelines.latents.pipeline import LatentPipeline
from pipelines.one_by_one import Use, sample_each
from pipelines.pictures import is_complete_png, save_png
from pipelines.prior_requests import labels_of
from pipelines.sample_folders import recorded_samples, sheet, summary, write_npz, write_samples
from pipelines.settings import results_folder
from stage1_vae.model import Pixels

AT_ONCE = 64  # images
BEFORE = {"label": None, "temperature": 1.0, "precision": None}  # what builds did that recorded none of these


class LatentSettings(NamedTuple):
    """What samples of a VAE depend on besides the model."""

    seed: int
    pixels: Pixels
    label: int | str | None = None  # of a VAE that knows classes; None: all in turn
    temperature: float | tuple[float, ...] = 1.0  # of a hierarchy: of all groups, or of each
    precision: Precision | None = None  # what the networks compute in; None: as their weights are


def generate_from_latents(
    model: str, out: Path, num: int, asked: LatentSettings, device_name: str | None, as_npz: bool = False
) -> str:
    """Writes the images that `out` lacks; returns one line that says what was made and where. as_npz: all in one .npz
    file too.

    Sample i is the file `{i:06d}.png`, a function of the model, the settings and i alone. Raises UserError for a folder
    begun with other settings or by another command.
    """
    state, device = open_device(device_name)
    pipeline = LatentPipeline.from_pretrained(model).to(device)
    label = class_number(pipeline.class_names, asked.label)

    def classes_of(samples: Sequence[int]) -> list[int] | None:
        return labels_of(pipeline, samples, label)

    classes_of(range(num))  # refuses a label that the model does not have
    pipeline.check_temperature(asked.temperature)
    pipeline.check_precision(asked.precision)
    settings = {"model": pipeline.fingerprint(), **asked._asdict(), "label": label}
    with results_folder(out, "generate", settings, state, defaults=BEFORE):
        missing = [i for i in range(num) if not is_complete_png(out / f"{i:06d}.png")]
        state.wait_for_everyone()  # all have looked before one writes
        mine = missing[state.process_index :: state.num_processes]
        with progress_bar(len(mine), "images", shown=state.is_main_process) as progress:
            for start in range(0, len(mine), AT_ONCE):
                some = mine[start : start + AT_ONCE]
                write = to_files([out / f"{i:06d}.png" for i in some])
                sample_each(
                    pipeline,
                    some,
                    asked.seed,
                    asked.pixels,
                    write,
                    classes_of(some),
                    asked.temperature,
                    asked.precision,
                )
                progress.update(len(some))
        state.wait_for_everyone()
        if state.is_main_process:
            there = max(num, recorded_samples(out))  # an earlier run may have made more
            labels = classes_of(range(there))
            write_samples(out, settings, labels, there, pipeline.class_names)
            turns = labels if label is None else None
            save_png(sheet(out, there, turns, pipeline.class_names), out / SHEET_NAME)
            if as_npz:
                write_npz(out, num, labels)
    return summary(out, num, len(missing), as_npz=as_npz)


def to_files(paths: Sequence[Path]) -> Use[None]:
    return lambda i, picture: save_png(picture, paths[i])
