"""From logits to a choice: temperature, top-k, top-p and guidance; the same codes whatever the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from codes.spec import Codes
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.cuda_graph import RecordedDraw
from stage2_prior.masked_sampling import (
    Fill,
    InRandomOrder,
    MaskedPasses,
    SurestFirst,
    codes_per_step,
    cosine_share,
    linear_share,
    unmask,
)
from stage2_prior.priors.base import AutoregressivePrior, Prior
from stage2_prior.priors.masked import MaskedPrior
from stage2_prior.priors.maskgit import MaskGIT
from stage2_prior.stepping import GuidedStepper, Stepper, walk

CHOICE_TEMPERATURE = 4.5  # of MaskGIT, as published
CHOICE_STREAM = 2  # of the noise that decides which codes of a masked prior come first


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    temperature: float = 1.0  # divides the logits; 0 = always the most probable code
    top_k: int | None = None  # draw from the k most probable codes only; None = from all
    top_p: float = 1.0  # draw from the fewest codes that hold this share of the probability; 1 = from all
    min_p: float = 0.0  # draw only from codes at least this share as probable as the most probable one; 0 = from all
    guidance: float = 1.0  # logits move from the null label's (0) to the label's (1) and beyond; 1 costs nothing
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"  # how it rises from 1 to that value
    guidance_start: float = 0.0  # share of an image's steps before which there is none
    guidance_end: float = 1.0  # share of an image's steps after which there is none
    steps: int | None = None  # of a masked prior for an image; None = its own: 12 of maskgit, 64 of diffusion
    choice_temperature: float | None = None  # of maskgit: chance in which codes it keeps; None = 4.5, as published

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature}, expected 0 (greedy) or more; 1 samples as trained")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}, expected at least 1; leave it out to draw from all codes")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}, expected a share above 0 and up to 1; 1 draws from all codes")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p}, expected a share from 0 to 1; 0 draws from all codes")
        if not 0 <= self.guidance < math.inf:
            raise UserError(f"guidance={self.guidance}, expected 0 or more; 1 means no guidance")
        if not 0 <= self.guidance_start <= self.guidance_end <= 1:
            raise UserError(
                f"guidance_start={self.guidance_start} and guidance_end={self.guidance_end}, expected shares of the "
                "steps from 0 to 1, the start not after the end"
            )
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps={self.steps}, expected at least 1; leave it out for the prior's own number")
        if self.choice_temperature is not None and not 0 <= self.choice_temperature < math.inf:
            raise UserError(
                f"choice_temperature={self.choice_temperature}, expected 0 (always the surest codes) or more; 4.5 is "
                "usual"
            )

    def check_fits(self, prior: Prior) -> None:
        """Raises UserError for settings that mean nothing to this prior."""
        if self.steps is not None and not isinstance(prior, MaskedPrior):
            raise UserError(
                f"steps={self.steps} for a {prior.kind} prior, which draws its codes in an order of its own; leave "
                "steps out, or take a maskgit or diffusion prior"
            )
        if self.choice_temperature is not None and not isinstance(prior, MaskGIT):
            raise UserError(
                f"choice_temperature={self.choice_temperature} for a {prior.kind} prior, which does not choose among "
                "codes that it has drawn; leave choice_temperature out, or take a maskgit prior"
            )
        if self.guidance != 1 and not (prior.num_classes or prior.reads_prompts):
            raise UserError(
                "got guidance for a prior without classes, expected guidance=1: it has no label and no text to follow"
            )
        if self.guidance != 1 and not prior.knows_null_label:
            raise UserError(
                f"guidance={self.guidance}, expected 1: this prior was trained with label_dropout=0 and never saw "
                "the null label; train it with label_dropout=0.1"
            )

    def guidance_at(self, step: int, steps: int) -> float:
        """The weight of step `step` of `steps`, counted from 0. A schedule rises from 1 at the first step to `guidance`
        at the last: the first codes settle the layout, where exaggeration costs most variety (VAR, LlamaGen)."""
        progress = step / max(1, steps - 1)
        if not self.guidance_start <= progress <= self.guidance_end:
            return 1.0
        rises = {"constant": 1.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}
        return 1 + (self.guidance - 1) * rises[self.guidance_schedule]


def sample_codes(
    prior: Prior,
    indices: Sequence[int],
    condition: Condition,
    seed: int,
    sampling: SamplingConfig,
    known: Codes | None = None,
    recorded: RecordedDraw | None = None,
) -> Codes:
    """Codes of samples `indices` of `seed`, each grid `b h w` on the prior's device; `condition` holds their labels.
    known: codes that are kept, one `b h w` for each grid, -1 where a code is to be drawn (inpainting). recorded: draws
    the codes of a prior that goes by an order as one CUDA graph, the same for all batches that are alike.

    A sample depends on its index, its label, the seed and the settings, not on the batch that it is drawn in.
    Raises UserError for labels that the prior does not have, for guidance it cannot give, and for a prior whose
    weights are not finite.
    """
    device = next(prior.parameters()).device
    condition = condition.to(device)
    check_request(prior, len(indices), condition, sampling)
    kept = None if known is None else prior.sequence(tuple(grid.to(device) for grid in known), condition)  # b n
    if isinstance(prior, MaskedPrior):
        codes, finite = fill_in(prior, indices, condition, seed, sampling, kept)
    else:
        assert isinstance(prior, AutoregressivePrior)
        uniforms = uniforms_of(seed, indices, prior.code_spec.codes_per_image, device)
        codes, finite = (recorded or draw_in_order)(prior, condition, uniforms, sampling, kept)
    check_finite(finite, sampling)
    return prior.grids_of(codes.clone())  # a tensor that may be changed, where that of inference mode may not


def check_request(prior: Prior, batch: int, condition: Condition, sampling: SamplingConfig) -> None:
    """Raises UserError for a condition that is not the prior's and for settings that it cannot follow."""
    prior.check(batch, condition)
    condition.check_range(prior.num_classes)
    sampling.check_fits(prior)


def check_finite(finite: Tensor, sampling: SamplingConfig) -> None:
    """Raises UserError unless all logits were finite: a bool scalar."""
    if not bool(finite):
        raise UserError(
            f"the prior's logits are not finite: guidance={sampling.guidance} is too large for it, or its weights are "
            "damaged; lower the guidance, or take an earlier checkpoint"
        )


def draw_in_order(
    prior: AutoregressivePrior, condition: Condition, uniforms: Tensor, sampling: SamplingConfig, known: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes `b n`, each drawn given those before it by its uniform number of `uniforms` (b n), and whether all logits
    were finite: a scalar, to be looked at in the end. Nothing in here waits for the device or copies to it. known:
    `b n`, -1 where a code is to be drawn."""
    batch, device = len(uniforms), uniforms.device
    stepper: Stepper
    if sampling.guidance == 1:
        stepper = prior.stepper(batch, condition)
    else:
        doubled = prior.stepper(2 * batch, prior.doubled_for_guidance(condition))
        stepper = GuidedStepper(doubled, [sampling.guidance_at(step, prior.steps) for step in range(prior.steps)])
    total = torch.zeros((), device=device)  # of all logits: one that is not finite makes it so

    def choose(position: int, logits: Tensor) -> Tensor:
        total.add_(logits.sum())
        here = slice(position, position + logits.shape[1])
        codes = draw(logits, uniforms[:, here], sampling)
        return codes if known is None else torch.where(known[:, here] < 0, codes, known[:, here])

    codes = walk(stepper, prior.code_spec.codes_per_image, choose)
    return codes, total.isfinite()


def fill_in(
    prior: MaskedPrior,
    indices: Sequence[int],
    condition: Condition,
    seed: int,
    sampling: SamplingConfig,
    known: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Codes `b n` and whether all logits were finite, of a prior that fills in hidden codes, many at a step. The steps
    are spread over the codes that are to be drawn, which may be more for one sample than for another."""
    batch, device, positions = len(indices), next(prior.parameters()).device, prior.code_spec.codes_per_image
    finite = torch.ones((), dtype=torch.bool, device=device)
    start = torch.full((batch, positions), -1, device=device) if known is None else known
    hidden = [positions] * batch if known is None else (known < 0).sum(dim=1).tolist()
    share = cosine_share if isinstance(prior, MaskGIT) else linear_share
    counts = [codes_per_step(number, sampling.steps or prior.sampling_steps, share) for number in hidden]
    steps = max(map(len, counts), default=0)
    if steps == 0:
        return start, finite

    fill: Fill
    choose = partial(draw, sampling=sampling)
    if isinstance(prior, MaskGIT):
        uniforms, chances = (
            uniforms_of(seed, indices, steps * positions, device, stream).unflatten(1, (steps, positions))
            for stream in (0, CHOICE_STREAM)
        )
        temperature = CHOICE_TEMPERATURE if sampling.choice_temperature is None else sampling.choice_temperature
        fill = SurestFirst(counts, uniforms, chances, temperature, choose)
    else:
        uniforms, chances = (uniforms_of(seed, indices, positions, device, stream) for stream in (0, CHOICE_STREAM))
        fill = InRandomOrder(counts, uniforms, chances, start >= 0, choose)
    guidance = [[sampling.guidance_at(step, len(row)) for step in range(len(row))] for row in counts]
    passes = MaskedPasses(prior, condition, None if sampling.guidance == 1 else guidance, known is not None)
    no_codes = prior.no_codes()

    def logits_of(step: int, sequence: Tensor) -> Tensor:
        # Logits that are not finite draw numbers which are no codes: they are refused in the end, not looked up.
        logits = passes(step, torch.minimum(sequence, prior.masks - 1))
        finite.logical_and_(logits.sum().isfinite())
        return logits if no_codes is None else logits.masked_fill(no_codes, -math.inf)

    training = prior.training
    prior.eval()  # no dropout
    try:
        return unmask(start, steps, logits_of, fill), finite
    finally:
        prior.train(training)


def draw(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> Tensor:
    """Codes `b m`, int64, from logits `b m k` and uniform numbers `b m`."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return inverse_cdf(probabilities(logits.flatten(0, 1), sampling), uniforms.flatten()).view(uniforms.shape)


def uniforms_of(seed: int, indices: Sequence[int], numbers: int, device: torch.device, stream: int = 0) -> Tensor:
    """`noise` on the device, `b n`, in the most precise type that it has."""
    exact = precise(device)
    # Rounded to float32 a number could become 1, beyond the last code.
    return noise(seed, indices, numbers, stream).to(exact).clamp(max=1 - torch.finfo(exact).eps / 2).to(device)


def noise(seed: int, indices: Sequence[int], positions: int, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), `b n` float64: row j is a function of the seed and `indices[j]` alone, through the
    counter-based generator Philox (Salmon et al. 2011), which NumPy keeps the same from version to version. Codes are
    drawn with stream 0; other decisions about the same samples take numbers of other streams. Raises UserError for a
    seed or an index that is not in [0, 2**64)."""
    for name, number in [("seed", seed), *(("sample index", index) for index in indices)]:
        if not 0 <= number < 2**64:
            raise UserError(f"{name}={number}, expected 0 to {2**64 - 1}")
    start = [0, 0, 0, stream]
    rows = [
        np.random.Generator(np.random.Philox(counter=start, key=np.array([seed, index], dtype=np.uint64))).random(
            positions
        )
        for index in indices
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, positions, dtype=torch.float64)


def probabilities(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """The distribution `b k` that `sampling` draws from: temperature, then top-k, top-p and min-p. Float64 where the
    device has it. Codes as probable as the last one admitted are admitted too, so that the choice between equals does
    not depend on how a sort breaks the tie. Temperature 0 is one-hot."""
    scaled = logits.to(precise(logits.device))
    if sampling.temperature == 0:
        return torch.zeros_like(scaled).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    if sampling.temperature != 1:
        # The largest first becomes 0: a tiny temperature must not turn it into an infinity.
        scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / sampling.temperature
    candidates = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if candidates < logits.shape[-1]:
        last = logits.topk(candidates, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(logits < last, -math.inf)
    shares = scaled.softmax(dim=-1)
    if sampling.top_p < 1:
        shares = within_top_p(shares, candidates, sampling.top_p)
    if sampling.min_p > 0:
        floor = sampling.min_p * shares.amax(dim=-1, keepdim=True)
        shares = shares.masked_fill(shares < floor, 0.0)
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return shares


def within_top_p(shares: Tensor, candidates: int, top_p: float) -> Tensor:
    """The fewest codes that hold `top_p` of the probability, `b k`; at most `candidates` have any."""
    descending = shares.topk(candidates, dim=-1).values
    before = descending.cumsum(dim=-1) - descending  # probability of all codes more probable than this one
    last = descending.masked_fill(before >= top_p, math.inf).amin(dim=-1, keepdim=True)
    shares = shares.masked_fill(shares < last, 0.0)
    return shares / shares.sum(dim=-1, keepdim=True)


def inverse_cdf(shares: Tensor, uniforms: Tensor) -> Tensor:
    """Codes, int64 `b`: those in whose slices of [0, 1) the uniform numbers `b` fall, when the codes' shares `b k` are
    laid side by side in the order of the codebook. Rounding errors of the logits move the borders of the slices by
    about as much, so a choice changes only where a number falls that close to a border."""
    cumulative = shares.cumsum(dim=-1)
    # Times the last entry, which rounding leaves next to 1: so no number can fall beyond the last code.
    targets = uniforms[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    return chosen.clamp_(max=shares.shape[-1] - 1)  # only shares that are not finite lead beyond


def precise(device: torch.device) -> torch.dtype:
    """Float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
