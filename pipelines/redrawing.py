"""What images are changed by: which places of their codes are drawn anew, and what the others become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from codes.spec import Codes, CodeSpec
from common.errors import UserError
from pipelines.known_codes import codes_at, codes_but_a_share, random_places
from pipelines.prior_requests import Labels, labels_of
from stage2_prior.drawing import noise
from stage2_prior.priors import Prior
from stage2_prior.sampling import Complete
from stage2_prior.sampling_config import SamplingConfig


def random_order(codes: Codes, seed: int, first_index: int) -> Tensor:
    """A random number for each code, `b n`, of another stream than those the codes are drawn with."""
    indices = range(first_index, first_index + len(codes[0]))
    return noise(seed, indices, sum(grid[0].numel() for grid in codes), stream=1)


def codes_between(
    of_first: Complete, of_second: Complete, steps: int, redrawn: float, seed: int
) -> tuple[Codes, Complete]:
    """The codes of `steps` images on the way from one to another, -1 where they are drawn, and what completes them.
    of_first, of_second: of either image, `steps` times. redrawn: as for `TwoStagePipeline.interpolate`."""
    alone = tuple(grid[:1] for grid in of_first(()))
    order = random_order(alone, seed, 0)
    stages = [random_places(alone, step / (steps - 1), order) for step in range(steps)]
    passed = tuple(torch.cat(grids) for grids in zip(*stages, strict=True))  # steps h w: the second's places

    def complete(beginning: Codes) -> Codes:
        return codes_at(passed, of_second(beginning), of_first(beginning))

    known = complete(())
    if steps > 2:
        between = tuple(grid[1:-1] for grid in known)
        between = codes_but_a_share(between, redrawn, random_order(between, seed, 1))
        known = tuple(torch.cat([k[:1], b, k[-1:]]) for k, b in zip(known, between, strict=True))
    return known, complete


def labels_of_redrawn(
    prior: Prior, indices: Sequence[int], labels: Labels, prompted: bool, sampling: SamplingConfig
) -> tuple[list[int] | None, SamplingConfig]:
    """The class of each image, and the settings that go with it: without labels any class, and no guidance, unless a
    prompt is followed. Raises UserError for a prior that never saw the null label."""
    if labels is not None or not prior.num_classes:
        return labels_of(prior, indices, labels), sampling
    if not prior.knows_null_label:
        raise UserError(
            "this prior was trained with label_dropout=0 and must be told a class; give a label, one of the "
            f"{prior.num_classes} from 0 to {prior.num_classes - 1}"
        )
    return [prior.num_classes] * len(indices), sampling if prompted else replace(sampling, guidance=1.0)


def check_size(images: Tensor, spec: CodeSpec) -> None:
    """Raises UserError unless images, b c H W, are of exactly the size that a model makes."""
    if tuple(images.shape[1:]) != (spec.image_channels, spec.image_height, spec.image_width):
        raise UserError(
            f"got images of {'x'.join(map(str, images.shape[1:]))}, expected {spec.image_channels}x"
            f"{spec.image_height}x{spec.image_width}, the size that this model makes; resize and crop them to it"
        )
