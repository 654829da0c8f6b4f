"""Codes of new images from a prior: drawn one after the other, or filled in many at a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, count
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from codes.spec import Codes
from common.computing import as_before, computing_in
from common.errors import UserError
from common.wording import an
from stage2_prior.condition import Condition
from stage2_prior.cuda_graph import RecordedDraw
from stage2_prior.drawing import Seed, draw, uniforms_of
from stage2_prior.in_parts import draw_in_parts
from stage2_prior.lookahead import Drawn, draw_ahead, looks_ahead, pace_of
from stage2_prior.masked_sampling import (
    CHOICE_STREAM,
    CODE_STREAM,
    SHARES,
    Fill,
    codes_per_step,
    cosine_share,
    filled,
    filling_by,
    padded,
    unmask,
)
from stage2_prior.priors.base import AutoregressivePrior, Prior
from stage2_prior.priors.masked import MaskedPrior
from stage2_prior.remasking import ReMasking, hidden_shares
from stage2_prior.sampling_config import SamplingConfig
from stage2_prior.stepping import (
    GroupStepper,
    GuidedStepper,
    GuidedWindowStepper,
    Stepper,
    WindowStepper,
    guided,
    walk,
)

Complete = Callable[[Codes], Codes]
"""(the first grids of codes) -> all grids: the same, and those that an autoencoder finds for some image after such a
beginning (`Autoencoder.completing`)."""


def sample_codes(
    prior: Prior,
    indices: Sequence[int],
    condition: Condition,
    seed: Seed,
    sampling: SamplingConfig,
    known: Codes | None = None,
    recorded: RecordedDraw | None = None,
    complete: Complete | None = None,
    tell_passes: Callable[[list[int]], object] | None = None,
) -> Codes:
    """Codes of samples `indices` of `seed`, one for all or one for each, each grid `b h w` on the prior's device;
    `condition` holds their labels.
    known: codes that are kept, one `b h w` for each grid, -1 where a code is to be drawn (inpainting). recorded: draws
    the codes of a prior that goes by an order as one CUDA graph, the same for all batches that are alike.

    complete: for codes that mean something only after those of the grids before, as scales and levels do. Where a
    known code stands in any grid but the first, the one that `complete` finds after what was chosen takes its place.
    An ordered prior goes on from it. A masked one, whose order is none of grids, has by then drawn beside the known
    ones. Grids of equal sides need none: whoever keeps a place keeps all its codes.

    tell_passes: is told how many passes through the prior each sample took, of a prior that goes by an order.

    A sample depends on its index, its label, the seed and the settings, not on the batch that it is drawn in.
    Raises UserError for labels that the prior does not have, for guidance it cannot give, and for a prior whose
    weights are not finite.
    """
    device = next(prior.parameters()).device
    condition = condition.to(device)
    check_request(prior, len(indices), condition, sampling)
    complete = None if complete is None else as_before(complete, device)
    kept = None if known is None else prior.sequence(tuple(grid.to(device) for grid in known), condition)  # b n
    if kept is None or len({(grid.height, grid.width) for grid in prior.code_spec.grids}) == 1:
        complete = None
    check_single_step(prior, sampling, kept)
    with computing_in(sampling.precision, device, remember_casts=recorded is None):
        if isinstance(prior, AutoregressivePrior):
            uniforms = uniforms_of(seed, indices, prior.code_spec.codes_per_image, device)
            passes: list[int] = []
            if prior.draws_in_any_order:
                condition, kept = with_order(prior, indices, condition, seed, kept)
            if prior.draws_in_any_order and in_groups(prior, sampling, kept):
                if not isinstance(sampling.lookahead, str) and sampling.lookahead > 1:
                    raise UserError(
                        f"got lookahead={sampling.lookahead} and several codes at a step, or codes that are kept, of a "
                        f"{prior.kind} prior, expected one code at a step, as windows guess them; leave lookahead out, "
                        "or steps and codes"
                    )
                if recorded is not None:
                    raise UserError(
                        f"got cuda_graph and several codes at a step, or codes that are kept, of {an(prior.kind)} "
                        "prior, expected one code at a step, as a graph holds it; leave cuda_graph out, or steps and "
                        "codes"
                    )
                told = partial(draw_in_groups, tell_passes=passes.extend)
                codes, finite = draw_in_parts(told, prior, condition, uniforms, sampling, kept)
            elif recorded is not None and complete is None:
                codes, finite = recorded(prior, condition, uniforms, sampling, kept)
            elif complete is None:
                ahead = partial(draw_looking_ahead, tell_passes=passes.extend)
                draw_part = ahead if looks_ahead(prior, sampling) else draw_in_order
                codes, finite = draw_in_parts(draw_part, prior, condition, uniforms, sampling, kept)
            else:
                codes, finite = draw_in_order(prior, condition, uniforms, sampling, kept, complete)
            check_finite(finite, sampling)
            if tell_passes is not None:
                tell_passes(passes or [prior.steps] * len(indices))
        else:
            assert isinstance(prior, MaskedPrior)
            codes, finite = fill_in(prior, indices, condition, seed, sampling, kept)
            check_finite(finite, sampling)
            if kept is not None and complete is not None:
                for number in range(1, len(prior.code_spec.grids)):
                    codes = torch.where(kept < 0, codes, completed(prior, condition, codes, number, complete))
    codes = prior.in_raster(codes, condition)
    return prior.grids_of(codes.clone())  # a tensor that may be changed, where that of inference mode may not


def completed(prior: Prior, condition: Condition, sequence: Tensor, number: int, complete: Complete) -> Tensor:
    """`complete` after the first `number` grids of a sequence b n."""
    return prior.sequence(complete(prior.grids_of(sequence)[:number]), condition)


def check_request(prior: Prior, batch: int, condition: Condition, sampling: SamplingConfig) -> None:
    """Raises UserError for a condition that is not the prior's and for settings that it cannot follow."""
    prior.check(batch, condition)
    condition.check_range(prior.num_classes)
    sampling.check_fits(prior)


def check_single_step(prior: Prior, sampling: SamplingConfig, known: Tensor | None) -> None:
    """Raises UserError for a guidance that is to rise in a single step: there it is none. That of a prior that
    `draws_in_any_order` rises with the codes that are known, some of which may be so beforehand."""
    rises = sampling.guidance != 1 and sampling.guidance_schedule != "constant"
    if sampling.steps == 1 and rises and (known is None or not prior.draws_in_any_order):
        raise UserError(
            f"steps=1 with guidance_schedule={sampling.guidance_schedule}, which rises from none at the first step: a "
            "single one would have no guidance; give guidance_schedule=constant, or more steps"
        )


def check_finite(finite: Tensor, sampling: SamplingConfig) -> None:
    """Raises UserError unless all logits were finite: a bool scalar."""
    if not bool(finite):
        half = sampling.precision == "fp16"
        short = " the prior exceeds the range of float16, which bf16 would not, or" if half else ""
        raise UserError(
            f"the prior's logits are not finite:{short} guidance={sampling.guidance} is too large for it, or its "
            "weights are damaged; lower the guidance, or take an earlier checkpoint"
        )


def stepper_of(prior: AutoregressivePrior, batch: int, condition: Condition, sampling: SamplingConfig) -> Stepper:
    """With guidance, if that is asked for."""
    if sampling.guidance == 1:
        return prior.stepper(batch, condition)
    weights = [sampling.guidance_at(step, prior.steps) for step in range(prior.steps)]
    if sampling.guidance_layer:
        return prior.stepper_guided_inside(batch, condition, weights, sampling.guidance_layer)
    doubled = prior.stepper(2 * batch, prior.doubled_for_guidance(condition))
    return (GuidedWindowStepper if prior.takes_windows else GuidedStepper)(doubled, weights)


def draw_looking_ahead(
    prior: AutoregressivePrior,
    condition: Condition,
    uniforms: Tensor,
    sampling: SamplingConfig,
    known: Tensor | None,
    *,
    tell_passes: Callable[[list[int]], object],
) -> tuple[Tensor, Tensor]:
    """As `draw_in_order`, by windows where they are faster; tell_passes: as for `sample_codes`. Where a draw lay on the
    edge of rounding, or logits were not finite, be it after a wrong guess, the steps have the last word."""
    batch, begin = len(uniforms), time.perf_counter()
    pace = pace_of(prior, batch, sampling, known is not None) if sampling.lookahead == "auto" else None
    length = sampling.lookahead if pace is None else pace.length()
    assert isinstance(length, int)
    passes = [0] * batch
    drawn: Drawn | None = None
    if length > 1:
        stepper = cast(WindowStepper, stepper_of(prior, batch, condition, sampling))
        drawn = draw_ahead(prior, stepper, uniforms, sampling, known, length)
        passes = drawn.passes.tolist()
    if drawn is None or not bool(drawn.finite & drawn.sure):
        codes, finite = draw_in_order(prior, condition, uniforms, sampling, known)
        passes = [number + prior.steps for number in passes]
    else:
        codes, finite = drawn.codes, drawn.finite
    if pace is not None:
        if pace.other is not None:
            finite.item()  # the time of a batch is known when it is done
        pace.note(length, time.perf_counter() - begin)
    tell_passes(passes)
    return codes, finite


def draw_in_order(
    prior: AutoregressivePrior,
    condition: Condition,
    uniforms: Tensor,
    sampling: SamplingConfig,
    known: Tensor | None,
    complete: Complete | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes `b n`, each drawn given those before it by its uniform number of `uniforms` (b n), and whether all logits
    were finite: a scalar, to be looked at in the end. Nothing in here waits for the device or copies to it. known:
    `b n`, -1 where a code is to be drawn. complete: as for `sample_codes`, of a prior that goes grid after grid."""
    stepper, device = stepper_of(prior, len(uniforms), condition, sampling), uniforms.device
    total = torch.zeros((), device=device)  # of all logits: one that is not finite makes it so

    grids_before = dict(zip(accumulate(grid.size for grid in prior.code_spec.grids), count(1), strict=False))
    chosen: list[Tensor] = []

    def choose(position: int, logits: Tensor) -> Tensor:
        nonlocal known
        if known is not None and complete is not None and position in grids_before:
            so_far = torch.cat([*chosen, known[:, position:]], dim=1)
            found = completed(prior, condition, so_far, grids_before[position], complete)
            known = torch.where(known < 0, known, found)
        total.add_(logits.sum())
        here = slice(position, position + logits.shape[1])
        codes = draw(logits, uniforms[:, here], sampling)
        if known is not None:
            codes = torch.where(known[:, here] < 0, codes, known[:, here])
        chosen.append(codes)
        return codes

    codes = walk(stepper, prior.code_spec.codes_per_image, choose)
    return codes, total.isfinite()


def with_order(
    prior: AutoregressivePrior, indices: Sequence[int], condition: Condition, seed: Seed, known: Tensor | None
) -> tuple[Condition, Tensor | None]:
    """The condition with an order for each sample, of chance, but codes that are known come first, in raster order; and
    the known codes, b n, in it."""
    device, positions = next(prior.parameters()).device, prior.code_spec.codes_per_image
    numbers = uniforms_of(seed, indices, positions, device, CHOICE_STREAM)
    if known is not None:
        raster = torch.arange(positions, device=device) - positions
        numbers = torch.where(known < 0, numbers, raster.to(numbers))
    order = numbers.argsort(dim=1)
    return replace(condition, order=order), None if known is None else known.gather(1, order)


def in_groups(prior: AutoregressivePrior, sampling: SamplingConfig, known: Tensor | None) -> bool:
    """Whether it is worth telling several codes together: those of a step, or all that are known beforehand."""
    return known is not None or (sampling.steps is not None and sampling.steps < prior.code_spec.codes_per_image)


def draw_in_groups(
    prior: AutoregressivePrior,
    condition: Condition,
    uniforms: Tensor,
    sampling: SamplingConfig,
    known: Tensor | None,
    *,
    tell_passes: Callable[[list[int]], object],
) -> tuple[Tensor, Tensor]:
    """As `draw_in_order`, but the codes of a step are drawn together, given those of the steps before, few at first and
    many at last (Pang et al. 2024, arXiv:2412.01827, section 3.3). The known codes, which come first in the order of
    `condition`, take no steps, and these are spread over the codes that are to be drawn."""
    (batch, positions), device = uniforms.shape, uniforms.device
    start = torch.full((batch, positions), -1, device=device) if known is None else known
    hidden = (start < 0).sum(dim=1).tolist()
    counts = [codes_per_step(number, sampling.steps or positions, cosine_share) for number in hidden]
    guided_too = sampling.guidance != 1
    stepper = cast(
        GroupStepper,
        prior.stepper(2 * batch, prior.doubled_for_guidance(condition))
        if guided_too
        else prior.stepper(batch, condition),
    )
    seen, done = [-1] * batch, [positions - number for number in hidden]
    codes = F.pad(start, (0, 1))  # with room for what is drawn beyond the last place
    uniforms = F.pad(uniforms, (0, 1))
    finite = torch.ones((), dtype=torch.bool, device=device)
    copies = 2 if guided_too else 1
    for step in range(max(map(len, counts), default=0)):
        now = [row[step] if step < len(row) else 0 for row in counts]
        logits = stepper.group(codes[:, :-1].repeat(copies, 1), seen * copies, done * copies, max(now))
        if guided_too:  # it rises with the codes that are known
            weights = torch.tensor([sampling.guidance_at(number, positions) for number in done], device=device)
            label, null = logits.chunk(2)
            logits = guided(label, null, weights[:, None, None])
        first = torch.tensor(done, device=device)[:, None]
        places = first + torch.arange(max(now), device=device)  # b m, in the order
        chosen = places < first + torch.tensor(now, device=device)[:, None]
        finite.logical_and_((logits.sum(dim=-1).isfinite() | ~chosen).all())
        places = places.clamp(max=positions)
        codes = filled(codes, places, draw(logits, uniforms.gather(1, places), sampling), chosen)
        seen, done = done, [before + more for before, more in zip(done, now, strict=True)]
    tell_passes([len(row) for row in counts])
    return codes[:, :-1], finite


def fill_in(
    prior: MaskedPrior,
    indices: Sequence[int],
    condition: Condition,
    seed: Seed,
    sampling: SamplingConfig,
    known: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Codes `b n` and whether all logits were finite, of a prior that fills in hidden codes, many at a step. The steps
    are spread over the codes that are to be drawn, which may be more for one sample than for another; where codes are
    taken back, there may be more steps than codes."""
    batch, device, positions = len(indices), next(prior.parameters()).device, prior.code_spec.codes_per_image
    finite = torch.ones((), dtype=torch.bool, device=device)
    start = torch.full((batch, positions), -1, device=device) if known is None else known
    hidden = [positions] * batch if known is None else (known < 0).sum(dim=1).tolist()
    asked = sampling.steps or prior.sampling_steps
    share = prior.hidden_share if sampling.mask_schedule is None else SHARES[sampling.mask_schedule]
    # A prior that fills in parts of codes does so in its own way alone.
    parts = prior.parts_per_code if sampling.order is None and sampling.remask == "off" else 1
    counts = [codes_per_step(number * parts, asked, share) for number in hidden]
    lengths = [len(row) for row in counts]
    if sampling.remask != "off":
        lengths = [asked if number else 0 for number in hidden]
    steps = max(lengths, default=0)
    if steps == 0:
        return start, finite

    def uniforms(numbers: int, stream: int) -> Tensor:
        return uniforms_of(seed, indices, numbers, device, stream)

    drawn, choice_temperature = partial(draw, sampling=sampling), sampling.choice_temperature_for(prior)
    fill: Fill
    if sampling.remask != "off":
        codes, noise = (
            uniforms(steps * positions, stream).unflatten(1, (steps, positions))
            for stream in (CODE_STREAM, CHOICE_STREAM)
        )
        fill = ReMasking(hidden_shares(steps, share, sampling), sampling, codes, noise, start >= 0, drawn)
    elif sampling.order is None:
        fill = prior.filling(counts, start >= 0, uniforms, drawn, choice_temperature)
    else:
        grids = prior.code_spec.grids
        fill = filling_by(sampling.order, counts, start >= 0, grids, uniforms, drawn, choice_temperature or 0.0)
    guidance = [[sampling.guidance_at(step, length) for step in range(length)] for length in lengths]
    passes = MaskedPasses(prior, condition, None if sampling.guidance == 1 else guidance, known is not None)

    def logits_of(step: int, sequence: Tensor) -> Tensor:
        # Logits that are not finite draw numbers which are no codes: they are refused in the end, not looked up.
        logits = passes(step, torch.minimum(sequence, prior.masks - 1))
        finite.logical_and_(logits.sum().isfinite())
        no_codes = prior.no_codes(sequence)
        return logits if no_codes is None else logits.masked_fill(no_codes, -math.inf)

    training = prior.training
    prior.eval()  # no dropout
    try:
        return unmask(start, steps, logits_of, fill), finite
    finally:
        prior.train(training)


class MaskedPasses:
    """Logits `b n k`, float32, of a sequence at each step: one pass of the prior, or with guidance one of the labels
    and one of the null label. One pass of both, as steppers do it, costs more on a CPU, whose caches it overflows.

    The null label takes no pass at steps without guidance. At a first step that knows no code, one sample stands for
    all.
    """

    def __init__(
        self, prior: MaskedPrior, condition: Condition, guidance: Sequence[Sequence[float]] | None, anything_known: bool
    ):
        """guidance: of the steps of each sample, fewer for some; None for none at all. anything_known: there are codes
        in the sequence of the first step."""
        self.prior = prior
        self.condition = condition
        self.null = None if guidance is None else prior.unconditional(condition)
        self.weights = padded([[weight - 1 for weight in row] for row in guidance or []]).to(prior.masks.device) + 1
        self.guided = (self.weights != 1).any(dim=0).tolist()  # of each step
        self.alike_at_first = not anything_known and condition.codes is None

    def __call__(self, step: int, sequence: Tensor) -> Tensor:
        logits = self.prior.masked_logits(sequence, self.condition).float()
        if self.null is None or not self.guided[step]:
            return logits
        null = self.null
        if step == 0 and self.alike_at_first:
            sequence, null = sequence[:1], null.map(lambda tensor: tensor[:1])
        unguided = self.prior.masked_logits(sequence, null).float()
        return guided(logits, unguided, self.weights[:, step, None, None])
