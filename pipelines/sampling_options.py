"""Options that commands share: how a prior is sampled, and what is drawn from an assembled model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from common.errors import UserError
from common.precision import AnyPrecision, Precision
from stage2_prior.sampling_config import MaskSchedule, Order, ReMask, SamplingConfig

WAY = ("order", "choice_temperature", "remask", "remask_rate", "remask_start", "remask_end", "remask_filled")
"""Settings by which a masked prior fills in its codes, which mean something together."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Settings of sampling. Those that are left out are the model's own."""

    temperature: float | None = None  # divides the logits; left out, as all of sampling: as the model records
    top_k: int | None = None  # draw from the k most probable codes; as many as there are: from all
    top_p: float | None = None  # draw from the fewest codes that hold this share of the probability; 1: from all
    min_p: float | None = None  # draw only from codes at least this share as probable as the most probable; 0: from all
    guidance: float | None = None  # weight of the class or prompt against none; 1 is none
    guidance_schedule: Literal["constant", "linear", "cosine"] | None = None  # how it rises over an image's steps
    guidance_power: float | None = None  # of the share of steps done, by which it rises; above 1: late, as RAR's 2.75
    guidance_start: float | None = None  # share of an image's steps before which there is none
    guidance_end: float | None = None  # share of an image's steps after which there is none
    guidance_layer: int | None = None  # of infinity: guide what this layer puts out, 1 the last; 0: the logits
    steps: int | None = None  # for an image, of maskgit (12), diffusion (64), randar (its codes): fewer are faster
    order: Order | None = None  # in which a masked prior fills in its codes; left out: as it learned to
    choice_temperature: float | None = None  # of the orders confidence and entropy: chance in what stays; 0 is none
    mask_schedule: MaskSchedule | None = None  # how many codes of a masked prior are filled when
    remask: ReMask | None = None  # a masked prior takes codes back and draws them anew; its order is random then
    remask_rate: float | None = None  # how many it takes back, from 0 to 1; 0.05 is usual, of confidence 1
    remask_start: float | None = None  # share of an image's steps before which it takes none back
    remask_end: float | None = None  # share of an image's steps after which it takes none back
    remask_filled: float | None = None  # of remask loop: share of the codes that are filled while it goes on
    precision: AnyPrecision | None = None  # what prior and decoder compute in, faster on GPUs; no: as the weights are
    decoder_precision: AnyPrecision | None = None  # the decoder alone, as where fp16 overflows; left out: as the prior
    lookahead: Literal["auto", "off"] | int | None = None  # codes guessed and checked in one pass; never other codes

    def sampling(self, default: SamplingConfig, begun: Mapping[str, Any] | None = None) -> SamplingConfig:
        """`default`, with those that were given in their place. begun: what the folder records that the images go to,
        whose decoder precision holds where none is given: earlier builds decoded in float32, whatever the prior was
        in."""
        asked = {field.name: getattr(self, field.name) for field in fields(SamplingConfig)}
        if begun and self.decoder_precision is None:
            asked["decoder_precision"] = begun.get("decoder_precision")
        given = {name: value for name, value in asked.items() if value is not None}
        if self.precision == "no":
            given["precision"] = None
        # Another way than the model's, and nothing of that.
        if any(name in given and given[name] != getattr(default, name) for name in ("order", "remask")):
            default = replace(default, **{name: getattr(SamplingConfig(), name) for name in WAY})
        # A schedule that the model does not have, and not how late its own rises.
        if given.get("guidance_schedule", default.guidance_schedule) != default.guidance_schedule:
            default = replace(default, guidance_power=SamplingConfig().guidance_power)
        return replace(default, **given)


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(SamplingOptions):
    """What an assembled model is asked to draw."""

    label: int | str | None = None  # class to draw, by number or name; left out: any
    prompt: str | None = None  # text of all images, for a model that was trained on captions
    text_encoder: str | None = None  # folder or hub id of the text encoder; left out: as the model records
    seed: int = 0  # another number, other images
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed={self.seed}, expected 0 to {2**64 - 1}")


def chosen_precision(asked: AnyPrecision | None) -> Precision | None:
    """Of a VAE or a decoder alone, which record none of their own."""
    return None if asked == "no" else asked


def check_temperatures(temperature: float | None, temperatures: tuple[float, ...] | None) -> None:
    """Raises UserError where both are given."""
    if temperature is not None and temperatures is not None:
        raise UserError(
            f"got temperature={temperature} and temperatures={temperatures}, expected one of the two: one for all "
            "groups of latents, or one for each"
        )
