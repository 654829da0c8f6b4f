"""New images by class, at several temperatures and weights of guidance: the same noise at each, so that a slider shows
what the setting alone does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codes.spec import Codes
from common.progress import with_progress
from pipelines.pictures import to_pil
from pipelines.prior_requests import prompts_of
from pipelines.report.images import evenly
from pipelines.report.pictures import Picture, shown, strip, zoom_to
from pipelines.two_stage import TwoStagePipeline
from stage2_prior.sampling import SamplingConfig

TEMPERATURES = (0.5, 0.7, 0.85, 1.0, 1.15)
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 5.0)
MOST_CLASSES = 10
COLUMNS = 8
SIDE = 56  # pixels that small samples are shown at


class Setting(NamedTuple):
    label: str  # of the slider, such as `0.7`
    own: bool  # whether it is the model's own
    rows: list[tuple[str, Picture]]  # name of the class, and a strip of its samples


class Slider(NamedTuple):
    name: str  # `temperature` or `guidance`
    settings: list[Setting]
    start: int  # which one is shown first: the model's own


class Samples(NamedTuple):
    sliders: list[Slider]
    sampling: str  # the model's own settings, in words
    seed: int
    drawn: int  # at each setting
    num: int  # of `zellige generate`, which would draw these and others between them
    speed: float  # images per second
    classes: int  # that the prior knows
    codes: Codes  # of the samples at the model's own settings, n h w for each grid
    labels: list[int] | None


def draw(pipeline: TwoStagePipeline, seed: int, num: int, batch_size: int, say: Callable[[str], None]) -> Samples:
    """Up to `num` samples at each setting. Sample j of class c is sample j * classes + c of the seed, as `zellige
    generate` has it."""
    classes = pipeline.num_classes
    kept = evenly(MOST_CLASSES, classes) if classes else [0]
    each = max(1, min(COLUMNS, num // len(kept))) if classes else max(1, num)
    indices = [j * max(1, classes) + c for c in kept for j in range(each)]
    labels = [c for c in kept for _ in range(each)] if classes else None
    names = [pipeline.class_names[c] if pipeline.class_names else str(c) for c in kept] if classes else []
    own = pipeline.sampling
    wanted = {"temperature": sorted({*TEMPERATURES, own.temperature})}
    if (classes or pipeline.prior.reads_prompts) and pipeline.prior.knows_null_label:
        wanted["guidance"] = sorted({*GUIDANCES, own.guidance})
    settings = list(dict.fromkeys(with_value(own, name, value) for name, values in wanted.items() for value in values))
    settings.sort(key=lambda setting: setting != own)  # the model's own first
    say(f"{len(indices)} samples at each of {len(settings)} settings")
    rows: dict[SamplingConfig, list[tuple[str, Picture]]] = {}
    codes: Codes = ()
    began = time.perf_counter()
    for setting in with_progress(settings, "settings"):
        found = sample(pipeline, indices, labels, seed, setting, batch_size)
        codes = codes or found
        images = torch.cat(
            [pipeline.decode(part, precision=setting.decoding).cpu() for part in in_batches(found, batch_size)]
        )
        rows[setting] = rows_of(images, names, each, setting)
    seconds = time.perf_counter() - began
    sliders = [
        Slider(
            name,
            [
                Setting(f"{value:g}", value == getattr(own, name), rows[with_value(own, name, value)])
                for value in values
            ],
            values.index(getattr(own, name)),
        )
        for name, values in wanted.items()
    ]
    speed = len(indices) * len(settings) / max(1e-9, seconds)
    return Samples(sliders, in_words(own), seed, len(indices), max(indices) + 1, speed, classes, codes, labels)


def with_value(sampling: SamplingConfig, name: str, value: float) -> SamplingConfig:
    changed: dict[str, Any] = {name: value}
    return replace(sampling, **changed)


def sample(
    pipeline: TwoStagePipeline,
    indices: Sequence[int],
    labels: Sequence[int] | None,
    seed: int,
    sampling: SamplingConfig,
    batch_size: int,
) -> Codes:
    """Codes of samples, n h w for each grid, on the CPU."""
    parts = []
    for start in range(0, len(indices), batch_size):
        some = slice(start, start + batch_size)
        prompts = prompts_of(pipeline.prior, indices[some])
        found = pipeline.sample(indices[some], labels and labels[some], seed, sampling, prompts=prompts)
        parts.append(tuple(grid.cpu() for grid in found))
    return tuple(torch.cat(grids) for grids in zip(*parts, strict=True))


def in_batches(codes: Codes, batch_size: int) -> list[Codes]:
    return list(zip(*(grid.split(batch_size) for grid in codes), strict=True))


def rows_of(images: Tensor, names: Sequence[str], each: int, sampling: SamplingConfig) -> list[tuple[str, Picture]]:
    """Strips of images, n c H W: a row for each class, or rows of `COLUMNS` where there are none."""
    pictures = [shown(to_pil(image)) for image in images]
    zoom = zoom_to(min(pictures[0].size), SIDE)
    at = f"at temperature {sampling.temperature:g}, guidance {sampling.guidance:g}"
    length = each if names else COLUMNS
    parts = [pictures[i : i + length] for i in range(0, len(pictures), length)]
    if not names:
        return [("", Picture(strip(part), f"{len(part)} samples {at}", zoom)) for part in parts]
    return [
        (name, Picture(strip(part), f"{len(part)} samples of class {name} {at}", zoom))
        for name, part in zip(names, parts, strict=True)
    ]


def in_words(sampling: SamplingConfig) -> str:
    """`temperature 1, guidance 2`: what is not left to the prior."""
    plain = SamplingConfig()
    said = [f"temperature {sampling.temperature:g}", f"guidance {sampling.guidance:g}"]
    others = (
        "top_k",
        "top_p",
        "min_p",
        "guidance_schedule",
        "guidance_power",
        "guidance_layer",
        "steps",
        "order",
        "choice_temperature",
        "mask_schedule",
        "remask",
        "remask_rate",
        "remask_start",
        "remask_end",
        "remask_filled",
        "precision",
        "decoder_precision",
    )
    said += [f"{name} {getattr(sampling, name)}" for name in others if getattr(sampling, name) != getattr(plain, name)]
    return ", ".join(said)
