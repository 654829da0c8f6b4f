"""A prior drives the coder: encoder and decoder walk its stepper, and only the chooser differs.

Both must compute the same probabilities, bit for bit. A matrix product may round a row otherwise in a batch of another
size, or at another place in it, but never by what stands in the other rows. So the batch of the steps has a fixed
number of rows, *lanes*, whatever is coded; an image has its own lane, and lanes without an image hold zeros. Lanes and
lane stand in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from codes.spec import Codes
from common.errors import UserError
from pipelines.codec.entropy_coding import (
    LARGEST_VOCABULARY,
    DamagedPayloadError,
    Decoder,
    Encoder,
    frequencies,
    weights_of,
)
from stage2_prior.condition import Condition
from stage2_prior.priors import AutoregressivePrior, Prior
from stage2_prior.stepping import walk


class Told(NamedTuple):
    """What the prior is told of an image."""

    lane: int
    label: int | None  # None: the null label, or no classes


def check_can_code(prior: Prior | None) -> AutoregressivePrior:
    """Raises UserError unless this prior can drive a coder."""
    if prior is None:
        raise UserError("mode=prior, but this model has no prior; choose table or packed, or name an assembled model")
    if not isinstance(prior, AutoregressivePrior):
        raise UserError(
            f"mode=prior, but a {prior.kind} prior fills in codes in no fixed order and gives no probability of each "
            "after those before it, as coding needs; choose table"
        )
    if prior.given:
        raise UserError(
            "mode=prior, but this prior goes by other codes, which no file would hold; choose table, or name a model "
            "assembled of all its levels"
        )
    largest = max(grid.vocabulary for grid in prior.code_spec.grids)
    if largest > LARGEST_VOCABULARY:
        raise UserError(f"mode=prior, but a vocabulary of {largest} is over {LARGEST_VOCABULARY}; choose packed")
    return prior


def check_label(prior: AutoregressivePrior, label: int | None) -> None:
    """Raises UserError for a label that the prior does not have, or must have."""
    if label is None:
        if prior.num_classes and not prior.knows_null_label:
            raise UserError(
                "this prior was trained with label_dropout=0 and must be told a class; give a label, one of the "
                f"{prior.num_classes} from 0 to {prior.num_classes - 1}, or choose mode table"
            )
    elif prior.num_classes == 0:
        raise UserError("this model has no classes, so a label cannot be chosen; leave the label out")
    elif not 0 <= label < prior.num_classes:
        raise UserError(
            f"label {label} is out of range: this model knows the {prior.num_classes} classes 0 to "
            f"{prior.num_classes - 1}; choose one of them"
        )


def condition_of(prior: AutoregressivePrior, told: Sequence[Told], lanes: int) -> Condition:
    """Of all lanes: each image's label, the null label where there is none, and no text."""
    labels = torch.full((lanes,), -1)
    for lane, label in told:
        labels[lane] = -1 if label is None else label
    return prior.condition_of(labels.to(next(prior.parameters()).device))


def weights_for(logits: Tensor) -> np.ndarray:
    """`b m k` for the coder. Raises UserError for logits that are not finite."""
    shares = logits.detach().cpu().double().softmax(dim=-1).numpy()
    if not np.isfinite(shares).all():
        raise UserError("the prior's logits are not finite: its weights are damaged; take an earlier checkpoint")
    return weights_of(frequencies(shares.reshape(-1, shares.shape[-1]))).reshape(shares.shape)


def encode_with_prior(prior: AutoregressivePrior, codes: Codes, told: Sequence[Told], lanes: int) -> list[bytes]:
    """Payloads of images, of which no two have the same lane; codes: one b h w per grid."""
    device = next(prior.parameters()).device
    condition, own = condition_of(prior, told, lanes), [lane for lane, _ in told]
    padded = tuple(torch.zeros(lanes, *grid.shape[1:], dtype=torch.int64, device=device) for grid in codes)
    for grid, known in zip(padded, codes, strict=True):
        grid[own] = known.to(device)
    sequence = prior.sequence(padded, condition)
    symbols = sequence[own].cpu().numpy()
    encoders = [Encoder() for _ in told]

    def choose(position: int, logits: Tensor) -> Tensor:
        here = slice(position, position + logits.shape[1])
        for encoder, codes_here, weights in zip(encoders, symbols[:, here], weights_for(logits[own]), strict=True):
            encoder.encode(codes_here, weights)
        return sequence[:, here]

    walk_alike(prior, lanes, condition, choose)
    return [encoder.finish() for encoder in encoders]


def decode_with_prior(prior: AutoregressivePrior, payloads: Sequence[bytes], told: Sequence[Told], lanes: int) -> Codes:
    """Inverse of `encode_with_prior`: one b h w per grid, on the CPU. Bytes that fit no code give arbitrary codes: the
    caller compares checksums."""
    device = next(prior.parameters()).device
    condition, own = condition_of(prior, told, lanes), [lane for lane, _ in told]
    decoders: list[Decoder | None] = [Decoder(payload) for payload in payloads]

    def choose(position: int, logits: Tensor) -> Tensor:
        chosen = np.zeros((lanes, logits.shape[1]), np.int64)
        for number, (lane, weights) in enumerate(zip(own, weights_for(logits[own]), strict=True)):
            if (decoder := decoders[number]) is None:
                continue
            try:
                chosen[lane] = decoder.decode(weights)
            except DamagedPayloadError:
                decoders[number] = None  # the other images are not to suffer
        return torch.from_numpy(chosen).to(device)

    sequence = walk_alike(prior, lanes, condition, choose)
    return tuple(grid[own].cpu() for grid in prior.grids_of(sequence))


def walk_alike(
    prior: AutoregressivePrior, lanes: int, condition: Condition, choose: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """`walk` with what rounds the same each time: no autocast, whatever the caller has on."""
    kind = next(prior.parameters()).device.type
    with torch.autocast(kind, enabled=False):
        return walk(prior.stepper(lanes, condition), prior.code_spec.codes_per_image, choose)
