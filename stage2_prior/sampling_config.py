"""How codes are drawn from a prior: temperature, top-k, top-p, min-p, guidance, steps and the order of the codes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from common.errors import UserError
from common.precision import AnyPrecision, Precision, check_precision
from common.short_repr import changes
from common.wording import an

if TYPE_CHECKING:  # the options of commands are made of this class, and their help need not wait for torch
    from stage2_prior.priors.base import Prior

Order = Literal["confidence", "random", "halton", "entropy"]
MaskSchedule = Literal["cosine", "linear", "arccos"]
ReMask = Literal["off", "cap", "rescale", "confidence", "loop"]

CHOICE_TEMPERATURES = {"confidence": 4.5, "entropy": 0.0}
"""Of the orders that go by what the prior makes of a place, where a prior of another order is asked for them."""
REMASK_RATES = {"cap": 0.05, "rescale": 0.05, "confidence": 1.0, "loop": 0.05}
WHOLE, LOOP = (0.0, 1.0), (0.45, 0.95)  # shares of the steps in which codes are hidden again


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
    guidance_layer: int = 0  # of infinity, from the last layer as 1: guides its output; 0 = the logits
    steps: int | None = None  # for an image; None = the prior's own: 12 of maskgit, 64 of diffusion, n codes of randar
    order: Order | None = None  # in which a masked prior fills in its codes; None = its own (confidence, random)
    choice_temperature: float | None = None  # chance in the orders confidence (None = 4.5, as published), entropy (0)
    mask_schedule: MaskSchedule | None = None  # how many codes are filled when; None = its own (cosine, linear)
    remask: ReMask = "off"  # how a masked prior takes codes back and draws them anew (ReMDM); its order is random then
    remask_rate: float | None = None  # eta: how many it takes back; None = 0.05, of confidence 1
    remask_start: float | None = None  # share of an image's steps before which it takes none; None = 0, of loop 0.45
    remask_end: float | None = None  # share of the steps after which it takes none; None = 1, of loop 0.95
    remask_filled: float | None = None  # share of the codes that are filled while a loop goes on; None = 0.9
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
        if self.guidance_layer < 0:
            raise UserError(
                f"guidance_layer={self.guidance_layer}, expected 0 (the logits) or more: 1 is what the last layer puts "
                "out"
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
        self.check_filling()
        if not isinstance(self.lookahead, str) and self.lookahead < 1:
            raise UserError(f"lookahead={self.lookahead}, expected at least 1 code, auto, or off")

    def check_filling(self) -> None:
        """Raises UserError for ways to fill in codes that there are not."""
        for name, among in (("order", Order), ("mask_schedule", MaskSchedule), ("remask", ReMask)):
            value = getattr(self, name)
            if value is not None and value not in get_args(among):
                raise UserError(f"{name}={value}, expected one of {', '.join(get_args(among))}")
        if self.remask != "off" and self.order not in (None, "random"):
            raise UserError(
                f"got remask={self.remask} with order={self.order}, expected either: whoever takes codes back fills "
                "them in by chance; leave order out, or say remask off"
            )
        details = ("remask_rate", "remask_start", "remask_end", "remask_filled")
        given = [name for name in details if getattr(self, name) is not None]
        if given and self.remask == "off":
            raise UserError(
                f"got {given[0]}={getattr(self, given[0])} without remask, expected remask=cap, rescale, confidence or "
                f"loop beside it; or leave {given[0]} out"
            )
        if self.remask_filled is not None and self.remask != "loop":
            raise UserError(
                f"got remask_filled={self.remask_filled} with remask={self.remask}, expected remask=loop, which alone "
                "stops filling; leave it out"
            )
        if not 0 <= (self.remask_rate or 0) <= 1:
            raise UserError(f"remask_rate={self.remask_rate}, expected a share from 0 (none) to 1 (as many as can be)")
        start, end = self.remasked_steps
        if not 0 <= start <= end <= 1:
            raise UserError(
                f"remask_start={start} and remask_end={end}, expected shares of the steps from 0 to 1, the start not "
                "after the end"
            )
        if not 0 < self.loop_filled < 1:
            raise UserError(f"remask_filled={self.remask_filled}, expected a share between 0 and 1; 0.9 is usual")

    @property
    def remasked_steps(self) -> tuple[float, float]:
        """From which share of an image's steps on, up to which one, codes are taken back."""
        start, end = LOOP if self.remask == "loop" else WHOLE
        return (
            start if self.remask_start is None else self.remask_start,
            end if self.remask_end is None else self.remask_end,
        )

    @property
    def rate_of_remasking(self) -> float:
        return REMASK_RATES[self.remask] if self.remask_rate is None else self.remask_rate

    @property
    def loop_filled(self) -> float:
        return 0.9 if self.remask_filled is None else self.remask_filled

    def choice_temperature_for(self, prior: Prior) -> float | None:
        """Of the order that codes are filled in; None for one that makes no choice among what is drawn."""
        if self.remask != "off" or (self.order is not None and self.order not in CHOICE_TEMPERATURES):
            return None
        own = prior.choice_temperature
        if self.order is not None and self.order != prior.fill_order:
            own = CHOICE_TEMPERATURES[self.order]
        return own if own is None or self.choice_temperature is None else self.choice_temperature

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
                f"steps={self.steps} for {an(prior.kind)} prior, which draws its codes in an order of its own; leave "
                "steps out, or take a maskgit, diffusion or randar prior"
            )
        for name, default in (("order", None), ("mask_schedule", None), ("remask", "off")):
            if (value := getattr(self, name)) != default and prior.sampling_steps is None:
                raise UserError(
                    f"{name}={value} for {an(prior.kind)} prior, which draws its codes in an order of its own; leave "
                    f"{name} out, or take a maskgit or diffusion prior"
                )
        if self.choice_temperature is not None and self.choice_temperature_for(prior) is None:
            if self.remask != "off":
                how, instead = f" with remask={self.remask}", ", or say remask off"
            else:
                how = "" if self.order is None else f" with order={self.order}"
                other = "order=confidence or entropy" if prior.sampling_steps else "a maskgit prior"
                instead = f", or take {other}"
            raise UserError(
                f"choice_temperature={self.choice_temperature} for {an(prior.kind)} prior{how}, which does not choose "
                f"among codes that it has drawn; leave choice_temperature out{instead}"
            )
        if not isinstance(self.lookahead, str) and self.lookahead > 1 and not prior.takes_windows:
            raise UserError(
                f"lookahead={self.lookahead} for {an(prior.kind)} prior, which takes no windows of codes; leave it "
                "out, or take a transformer, mingpt, llamagen or randar prior"
            )
        if self.guidance_power != 1 and self.guidance_schedule == "constant":
            raise UserError(
                f"guidance_power={self.guidance_power} with guidance_schedule=constant, which does not rise; give "
                "guidance_schedule=linear or cosine too, or leave guidance_power out"
            )
        if self.guidance_layer > (layers := getattr(prior, "guided_layers", 0)):
            raise UserError(
                f"guidance_layer={self.guidance_layer} for {an(prior.kind)} prior, expected "
                f"{f'0 to {layers}' if layers else 'an infinity prior'}; leave it out to guide the logits"
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
