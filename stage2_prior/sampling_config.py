"""How codes are drawn from a prior: temperature, top-k, top-p, min-p, guidance and steps."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from common.errors import UserError
from common.precision import AnyPrecision, Precision, check_precision
from common.short_repr import changes

if TYPE_CHECKING:  # the options of commands are made of this class, and their help need not wait for torch
    from stage2_prior.priors.base import Prior


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    temperature: float = 1.0  # divides the logits; 0 = always the most probable code
    top_k: int | None = None  # draw from the k most probable codes only; None = from all
    top_p: float = 1.0  # draw from the fewest codes that hold this share of the probability; 1 = from all
    min_p: float = 0.0  # draw only from codes at least this share as probable as the most probable one; 0 = from all
    guidance: float = 1.0  # logits move from the null label's (0) to the label's (1) and beyond; 1 costs nothing
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"  # how it rises from 1 to that value
    guidance_power: float = 1.0  # of the share of steps that is done, by which it rises; 2.75 of RAR: late
    guidance_start: float = 0.0  # share of an image's steps before which there is none
    guidance_end: float = 1.0  # share of an image's steps after which there is none
    steps: int | None = None  # for an image; None = the prior's own: 12 of maskgit, 64 of diffusion, n codes of randar
    choice_temperature: float | None = None  # of maskgit: chance in which codes it keeps; None = 4.5, as published
    precision: Precision | None = None  # what the prior computes in, and the decoder; None = as their weights are
    decoder_precision: AnyPrecision | None = None  # of the decoder alone; None = as the prior, "no" = none
    lookahead: Literal["auto", "off"] | int = "auto"  # codes checked in one pass; auto = as many as are fastest

    __repr__ = changes

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
        if not 0 < self.guidance_power < math.inf:
            raise UserError(f"guidance_power={self.guidance_power}, expected above 0; 1 rises evenly, more rises late")
        if not 0 <= self.guidance_start <= self.guidance_end <= 1:
            raise UserError(
                f"guidance_start={self.guidance_start} and guidance_end={self.guidance_end}, expected shares of the "
                "steps from 0 to 1, the start not after the end"
            )
        check_precision("precision", self.precision)
        check_precision("decoder_precision", self.decoder_precision, get_args(AnyPrecision))
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps={self.steps}, expected at least 1; leave it out for the prior's own number")
        if self.choice_temperature is not None and not 0 <= self.choice_temperature < math.inf:
            raise UserError(
                f"choice_temperature={self.choice_temperature}, expected 0 (always the surest codes) or more; 4.5 is "
                "usual"
            )

        if not isinstance(self.lookahead, str) and self.lookahead < 1:
            raise UserError(f"lookahead={self.lookahead}, expected at least 1 code, auto, or off")

    @property
    def record(self) -> dict[str, Any]:
        """What samples depend on: not `lookahead`, which changes no code."""
        return {name: value for name, value in asdict(self).items() if name != "lookahead"}

    @property
    def decoding(self) -> Precision | None:
        """What a decoder computes in that makes images of the codes."""
        if self.decoder_precision is None:
            return self.precision
        return None if self.decoder_precision == "no" else self.decoder_precision

    def check_fits(self, prior: Prior) -> None:
        """Raises UserError for settings that mean nothing to this prior."""
        if self.steps is not None and prior.sampling_steps is None and not prior.draws_in_any_order:
            raise UserError(
                f"steps={self.steps} for a {prior.kind} prior, which draws its codes in an order of its own; leave "
                "steps out, or take a maskgit, diffusion or randar prior"
            )
        if self.choice_temperature is not None and prior.choice_temperature is None:
            raise UserError(
                f"choice_temperature={self.choice_temperature} for a {prior.kind} prior, which does not choose among "
                "codes that it has drawn; leave choice_temperature out, or take a maskgit prior"
            )
        if not isinstance(self.lookahead, str) and self.lookahead > 1 and not prior.takes_windows:
            raise UserError(
                f"lookahead={self.lookahead} for a {prior.kind} prior, which takes no windows of codes; leave it out, "
                "or take a transformer, mingpt, llamagen or randar prior"
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
        at the last: the first codes settle the layout, where exaggeration costs most variety (VAR, LlamaGen, RAR)."""
        progress = step / max(1, steps - 1)
        if not self.guidance_start <= progress <= self.guidance_end:
            return 1.0
        progress = progress**self.guidance_power
        rises = {"constant": 1.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}
        return 1 + (self.guidance - 1) * rises[self.guidance_schedule]
