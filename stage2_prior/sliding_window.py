"""Images larger than the training size from the same prior, by a sliding attention window (Esser et al. 2021,
arXiv:2012.09841, section 3.3).

A code is predicted from the codes of a window of the training grid's size around it, moved inward at the borders, as if
the window were the image: what lies farther away is not seen, and the code's place is its place in the window.

    . . . . . . .
    . v v v v . .      o = the code to be predicted, in the middle of a window of 3 x 4
    . v v o - . .      v = the codes of the window that it depends on
    . - - - - . .
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from codes.spec import Codes, CodeSpec, Grid
from common.computing import computing_in
from common.errors import UserError
from common.wording import an
from stage2_prior.condition import Condition
from stage2_prior.drawing import Seed, draw, uniforms_of
from stage2_prior.priors.base import AutoregressivePrior, Prior
from stage2_prior.sampling import check_finite, check_request
from stage2_prior.sampling_config import SamplingConfig
from stage2_prior.stepping import guided

WINDOWS_AT_ONCE = 64  # in one pass, over all samples


@dataclass(frozen=True)
class Place:
    """A place of the large grid, and the window that its code is predicted from."""

    row: int
    column: int
    top: int  # row where the window begins
    left: int  # column where it begins

    def in_window(self, window: Grid) -> int:
        """Its position in the window, in raster order."""
        return (self.row - self.top) * window.width + self.column - self.left


def places(grid: Grid, window: Grid) -> Iterator[list[Place]]:
    """All places of `grid`, those of a list at once. The first window of a row ends at column `window.width - 1`, so
    that the next row can follow that far behind: a large image takes its rows times the window's width passes, not as
    many as it has codes."""
    together = defaultdict(list)
    for row in range(grid.height):
        for column in range(grid.width):
            top = min(max(row - window.height // 2, 0), grid.height - window.height)
            left = min(max(column - window.width // 2, 0), grid.width - window.width)
            together[row * window.width + column].append(Place(row, column, top, left))
    return (together[turn] for turn in sorted(together))


def window_logits(prior: AutoregressivePrior, codes: Tensor, at: Sequence[Place], condition: Condition) -> Tensor:
    """Logits `b m k`, float32, of the codes at m places, from codes `b h w` of the large grid, int64. One pass over a
    window for each place."""
    window = prior.only_grid()
    views = [codes[:, p.top : p.top + window.height, p.left : p.left + window.width] for p in at]
    together = max(1, WINDOWS_AT_ONCE // len(codes))
    parts = []
    for start in range(0, len(at), together):
        here = at[start : start + together]
        windows = rearrange(views[start : start + together], "m b h w -> (m b) h w")
        logits = prior.logits((windows,), condition.map(partial(repeated, times=len(here))))
        for place, of_place in zip(here, logits.split(len(codes)), strict=True):
            parts.append(of_place[:, place.in_window(window)])
    return torch.stack(parts, dim=1).float()


def repeated(tensor: Tensor, times: int) -> Tensor:
    """`b ...` -> `times*b ...`, all of it and all of it again."""
    return tensor.repeat(times, *[1] * (tensor.ndim - 1))


@torch.inference_mode()
def sample_larger_codes(
    prior: Prior, spec: CodeSpec, indices: Sequence[int], condition: Condition, seed: Seed, sampling: SamplingConfig
) -> Codes:
    """As `stage2_prior.sampling.sample_codes`, for codes `spec` of an image at least as large as the prior's own.

    Raises UserError for a prior that does not walk one grid code by code, or is given codes, and for a grid smaller
    than its own.
    """
    window, grid = checked_window(prior, spec)
    assert isinstance(prior, AutoregressivePrior)
    device = next(prior.parameters()).device
    condition = condition.to(device)
    check_request(prior, len(indices), condition, sampling)
    doubled = None if sampling.guidance == 1 else prior.doubled_for_guidance(condition)
    uniforms = rearrange(uniforms_of(seed, indices, grid.size, device), "b (h w) -> b h w", w=grid.width)
    codes = torch.zeros(len(indices), grid.height, grid.width, dtype=torch.int64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    training = prior.training
    prior.eval()  # no dropout
    try:
        with computing_in(sampling.precision, device):
            for at in places(grid, window):
                if doubled is None:
                    logits = window_logits(prior, codes, at, condition)
                else:
                    steps = [place.row * grid.width + place.column for place in at]
                    guidance = torch.tensor([sampling.guidance_at(step, grid.size) for step in steps], device=device)
                    label, null = window_logits(prior, codes.repeat(2, 1, 1), at, doubled).chunk(2)
                    logits = guided(label, null, guidance[:, None])
                finite.logical_and_(logits.sum().isfinite())
                rows, columns = ([getattr(place, name) for place in at] for name in ("row", "column"))
                codes[:, rows, columns] = draw(logits, uniforms[:, rows, columns], sampling)
    finally:
        prior.train(training)
    check_finite(finite, sampling)
    return (codes,)


def checked_window(prior: Prior, spec: CodeSpec) -> tuple[Grid, Grid]:
    """The grid of the prior and the larger one of `spec`. Raises UserError."""
    if not isinstance(prior, AutoregressivePrior) or prior.steps != prior.code_spec.codes_per_image:
        raise UserError(
            f"{an(prior.kind)} prior draws images of its own size only, expected one that walks the codes one by one, "
            "such as transformer, for another size; leave the size out"
        )
    if getattr(prior.config, "order", ()):
        raise UserError(
            f"this {prior.kind} prior walks its codes in an order of its own, expected raster order for another size; "
            "leave the size out"
        )
    window = prior.only_grid()
    if prior.given:
        raise UserError(
            "this prior goes by given codes, which tell of an image of the training size; leave the size out"
        )
    if [grid.vocabulary for grid in spec.grids] != [window.vocabulary]:
        raise UserError(f"got codes of {spec.describe()}, expected one grid of {window.vocabulary} codes")
    grid = spec.grids[0]
    if grid.height < window.height or grid.width < window.width:
        raise UserError(
            f"an image of {spec.image_height}x{spec.image_width} is smaller than the {prior.code_spec.image_height}x"
            f"{prior.code_spec.image_width} that the prior was trained on, expected at least that; give a larger size"
        )
    return window, grid
