"""What a demo draws with a prior: new images, and images of which a part is drawn anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from pipelines.image_folders import to_images
from pipelines.image_input import fit
from pipelines.masks import PARTS, rectangle, scaled_mask
from pipelines.one_by_one import decode_each
from pipelines.pictures import to_pil
from pipelines.prior_requests import labels_of, prompts_of
from pipelines.two_stage import TwoStagePipeline
from stage2_prior.priors import Prior
from stage2_prior.sampling_config import SamplingConfig

LARGEST_SEED = 2**53 - 1  # numbers of a page are JavaScript's, which count exactly up to here
CANVAS = 448  # pixels at least of the longer side of what is painted on
PAINTED = "what I paint"


class Shown(NamedTuple):
    """Pictures with a line below each."""

    pictures: list[Image.Image]
    captions: list[str]

    def pairs(self) -> list[tuple[Image.Image, str]]:
        return list(zip(self.pictures, self.captions, strict=True))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a visitor wants of the prior."""

    sampling: SamplingConfig
    label: int | None = None
    prompt: str | None = None
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """Of the pipeline's methods."""
        return {"labels": self.label, "prompts": self.prompt, "seed": self.seed, "sampling": self.sampling}


def asked_of(pipeline: TwoStagePipeline, values: Mapping[str, Any]) -> Asked:
    """What the widgets say, by their names: label, prompt, seed, and settings of sampling; those that are left out or
    empty are the model's own. A top_k of 0 draws from all codes. Raises UserError."""
    known = {field.name for field in fields(SamplingConfig)}
    given = {name: value for name, value in values.items() if name in known and value is not None}
    own, most = pipeline.sampling, max(grid.vocabulary for grid in pipeline.prior.code_spec.grids)
    for name in ("top_k", "steps", "guidance_layer"):
        if name in given:
            given[name] = int(given[name])
    if given.get("top_k") == 0:
        given["top_k"] = None if own.top_k is None else most  # as many as there are: what a command line can say
    for name, usual in (
        ("steps", usual_steps(pipeline.prior)),
        ("choice_temperature", own.choice_temperature_for(pipeline.prior)),
    ):
        if name in given and given[name] == usual and getattr(own, name) is None:
            del given[name]
    sampling = replace(own, **given)
    sampling.check_fits(pipeline.prior)
    prompt = (values.get("prompt") or "").strip() or None
    return Asked(sampling=sampling, label=values.get("label"), prompt=prompt, seed=checked_seed(values.get("seed")))


def usual_steps(prior: Prior) -> int | None:
    """Those of an image, unless one says; None for a prior that goes by an order of its own."""
    return prior.code_spec.codes_per_image if prior.draws_in_any_order else prior.sampling_steps


def checked_seed(seed: float | None) -> int:
    """Raises UserError."""
    if seed is None or not 0 <= seed <= LARGEST_SEED or seed != int(seed):
        raise UserError(f"seed={seed}, expected a whole number from 0 to {LARGEST_SEED}; another number, other images")
    return int(seed)


def changed_settings(pipeline: TwoStagePipeline, sampling: SamplingConfig) -> dict[str, Any]:
    """Those that are not the model's own."""
    own = asdict(pipeline.sampling)
    return {name: value for name, value in asdict(sampling).items() if value != own[name]}


def generate(pipeline: TwoStagePipeline, asked: Asked, count: int) -> Shown:
    """Samples 0 to `count` - 1 of the seed: up to 64 of them are the files of `zellige generate`. Raises UserError."""
    indices = range(count)
    labels = labels_of(pipeline.prior, indices, asked.label)
    prompts = prompts_of(pipeline.prior, indices, asked.prompt)
    codes = pipeline.sample(indices, labels, asked.seed, asked.sampling, prompts=prompts)
    pictures = decode_each(pipeline, codes, range(count), lambda _, picture: picture, asked.sampling.decoding, prompts)
    classes = [""] * count if labels is None else [f", {class_title(pipeline, label)}" for label in labels]
    return Shown(pictures, [f"seed {asked.seed}, image {i}{classes[i]}" for i in indices])


def check_guidance(pipeline: TwoStagePipeline, asked: Asked) -> None:
    """Raises UserError for guidance that was asked for and has nothing to follow."""
    changed = asked.sampling.guidance not in (1, pipeline.sampling.guidance)
    if changed and pipeline.num_classes and asked.label is None and asked.prompt is None:
        raise UserError(f"guidance={asked.sampling.guidance:g} for any class, expected a class to follow; choose one")


def class_title(pipeline: TwoStagePipeline, label: int) -> str:
    names = pipeline.class_names
    return f"class {label}" if names is None or names[label] == str(label) else names[label]


def inpaint(pipeline: TwoStagePipeline, asked: Asked, picture: Image.Image, keep: Tensor, count: int) -> Shown:
    """`count` completions of a picture, scaled and cropped to the model's size, of which `keep`, H W bool of that size,
    stays; what stays comes first. Raises UserError."""
    check_guidance(pipeline, asked)
    image = as_seen(pipeline, picture)
    made = pipeline.inpaint(image.expand(count, -1, -1, -1), keep, **asked.settings).images
    kept = to_pil(image[0].where(keep, 0.0))
    return Shown([kept, *map(to_pil, made)], ["what stays", *numbered("completion", asked, count)])


def vary(pipeline: TwoStagePipeline, asked: Asked, picture: Image.Image, share: float, count: int) -> Shown:
    """A picture with a share of its codes drawn anew, after the picture itself. Raises UserError."""
    check_guidance(pipeline, asked)
    image = as_seen(pipeline, picture)
    made = pipeline.vary(image.expand(count, -1, -1, -1), share, **asked.settings).images
    return Shown([to_pil(image[0]), *map(to_pil, made)], ["original", *numbered("variation", asked, count)])


def interpolate(
    pipeline: TwoStagePipeline,
    asked: Asked,
    first: Image.Image,
    second: Image.Image,
    steps: int,
    redrawn: float,
) -> Shown:
    """A walk from one picture to another. Raises UserError."""
    check_guidance(pipeline, asked)
    start, end = (as_seen(pipeline, picture)[0] for picture in (first, second))
    made = pipeline.interpolate(start, end, steps, redrawn=redrawn, **asked.settings).images
    return Shown(list(map(to_pil, made)), [f"{step / (steps - 1):.0%}" for step in range(steps)])


def numbered(what: str, asked: Asked, count: int) -> list[str]:
    return [f"{what} {number}, seed {asked.seed}" for number in range(count)]


def as_seen(pipeline: TwoStagePipeline, picture: Image.Image) -> Tensor:
    """1 c H W of the model's size: the middle of the picture."""
    spec = pipeline.prior.code_spec
    return to_images(fit(picture, spec.image_height, spec.image_width))


def canvas_of(picture: Image.Image, height: int, width: int) -> Image.Image:
    """What the model sees of a picture, its `height` x `width` pixels, each as a square large enough to paint on."""
    zoom = max(1, -(-CANVAS // max(height, width)))
    return fit(picture, height, width).resize((width * zoom, height * zoom), Image.Resampling.NEAREST).convert("RGB")


def keep_of(part: str, layers: Sequence[Image.Image], height: int, width: int) -> Tensor:
    """`H W` bool at the model's size: a named part of the image, or, where `part` is PAINTED, all that is painted on no
    layer; a layer is of any size, and opaque where something is painted. Raises UserError where nothing stays, or all.
    """
    if part in PARTS:
        return rectangle(height, width, part)
    painted = torch.zeros(height, width, dtype=torch.bool)
    for layer in layers:
        alpha = torch.from_numpy(np.array(layer.convert("RGBA").getchannel("A")))
        painted |= ~scaled_mask(alpha == 0, height, width)
    if not bool(painted.any()):
        raise UserError("nothing is painted; paint over what should be drawn anew, or choose a part that stays")
    if bool(painted.all()):
        raise UserError("all of the image is painted; leave some of it, or go to Generate, which draws whole images")
    return ~painted
