"""Figures of samples that a run of stage two logs: how far what is decoded of drawn codes or latents is from what is
decoded of those of held-out images. That is the prior's own part: the decoder is the same on both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from common.errors import UserError
from metrics.in_training import Comparison, frechet_name, network_of, note_on
from training.config import TrainConfig

Judge = Callable[[int, Callable[[int], Any], Callable[[int], Any]], dict[str, float]]


def judge_of_samples(
    config: TrainConfig, decode: Callable[[Any], Tensor] | None, held_out: int
) -> tuple[Judge | None, tuple[str, ...]]:
    """What `train_stage2` and `train_latents` are given for `train.evaluate_every`: the judge, and notes. decode: codes
    or latents to b c H W in [-1, 1]; None without a decoder; held_out: images. Raises UserError."""
    network = network_of(config)
    if network is None:
        return None, ()
    if decode is None:
        raise UserError(
            f"train.evaluate_every={config.evaluate_every} without a decoder, expected both: samples are judged as "
            "images; give --decoder, the run or model folder of stage one"
        )
    count = min(config.evaluate_images, held_out)
    if count < 2:
        raise UserError(
            f"train.evaluate_every with {held_out} held-out images, expected 2 or more: encode with more of them, or "
            "leave it out"
        )
    comparison: Comparison | None = None
    name = f"{frechet_name(network)}_to_decoded"

    def judge(batches: int, real: Callable[[int], Any], drawn: Callable[[int], Any]) -> dict[str, float]:
        nonlocal comparison
        comparison = comparison or Comparison(network, batches)
        return {name: comparison(lambda i: decode(real(i)), lambda i: decode(drawn(i)))}

    return judge, (note_on(network, count),)
