"""A prior drives the coder: encoder and decoder walk its codes in the same way, and only the chooser differs.

Both must have the same frequencies, whole numbers, wherever they compute: the walk is exact (stage2_prior/exact), and
so is the way from its logits to frequencies. So images are coded in batches of any size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codes.spec import Codes
from common.errors import UserError
from common.exact import SHARE_BITS, check_device, numerators_of_softmax
from common.wording import an
from pipelines.codec.entropy_coding import (
    LARGEST_VOCABULARY,
    TOTAL,
    DamagedPayloadError,
    Decoder,
    Encoder,
    weights_of,
)
from stage2_prior.condition import Condition
from stage2_prior.drawing import precise
from stage2_prior.exact import cache_bytes, exact_stepper
from stage2_prior.priors import AutoregressivePrior, Prior
from stage2_prior.stepping import walk

FEWEST, MOST = 8, 64  # images whose codes a prior walks together: fewer cost as much
BYTES = 1 << 30  # of what the prior keeps of them, and of the logits of a step
LOGIT_BYTES = 40  # what a logit takes on its way to a frequency


def check_can_code(prior: Prior | None) -> AutoregressivePrior:
    """Raises UserError unless this prior can drive a coder."""
    if prior is None:
        raise UserError("mode=prior, but this model has no prior; choose table or packed, or name an assembled model")
    if not isinstance(prior, AutoregressivePrior):
        raise UserError(
            f"mode=prior, but {an(prior.kind)} prior fills in codes in no fixed order and gives no probability of each "
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


def walks_in_raster(prior: AutoregressivePrior) -> bool:
    """Whether the first codes of its walk are the first ones in raster order, grid after grid."""
    numbers = torch.arange(prior.code_spec.codes_per_image, device=next(prior.parameters()).device)[None]
    return torch.equal(torch.cat([grid.flatten(1) for grid in prior.grids_of(numbers)], dim=1), numbers)


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


def ready_to_code(prior: AutoregressivePrior) -> AutoregressivePrior:
    """The prior, or where its device has no float64 a copy on the CPU. Raises UserError for weights that are not
    finite, and for a device whose float64 is not that of IEEE 754."""
    if not all(bool(tensor.isfinite().all()) for tensor in prior.state_dict().values() if tensor.is_floating_point()):
        raise UserError("the prior's weights are not finite: they are damaged; take an earlier checkpoint")
    device = next(prior.parameters()).device
    if precise(device) != torch.float64:
        return copy.deepcopy(prior).cpu()
    check_device(device)
    return prior


def images_at_once(prior: AutoregressivePrior) -> int:
    """As many images as code together fast and within BYTES, but not less than FEWEST."""
    grids = prior.code_spec.grids
    codes = max(grid.size for grid in grids) * -(-len(grids) // prior.steps)  # of a step: of a grid, or of several
    codes = 1 if prior.steps == prior.code_spec.codes_per_image else codes
    logits = LOGIT_BYTES * codes * max(grid.vocabulary for grid in grids)
    return max(FEWEST, min(MOST, BYTES // (cache_bytes(prior) + logits)))


def condition_of(prior: AutoregressivePrior, labels: Sequence[int | None]) -> Condition:
    """Each image's label, the null label where there is none, and no text."""
    numbers = torch.tensor([-1 if label is None else label for label in labels])
    return prior.condition_of(numbers.to(next(prior.parameters()).device))


def frequencies_of(logits: Tensor) -> np.ndarray:
    """Logits `b m k`, float64, as frequencies of the coder: int64, at least 1, each row with the sum TOTAL.

    In whole numbers: t = exp(logit - the largest) in units of 2**-30, T the sum of all t of a row. A code has
    1 + floor(t (TOTAL - k) / T), and what is left of TOTAL is given to the first of the largest. Raises UserError for
    logits that are not finite.
    """
    if not bool(logits.isfinite().all()):
        raise UserError("the prior's logits are not finite: its weights are damaged; take an earlier checkpoint")
    numerators = (numerators_of_softmax(logits) * 2.0**SHARE_BITS).long().flatten(0, 1).cpu().numpy()  # (b m) k
    spread = TOTAL - numerators.shape[1]
    counts = numerators * spread // numerators.sum(axis=1, keepdims=True)
    counts[np.arange(len(counts)), numerators.argmax(axis=1)] += spread - counts.sum(axis=1)
    return (counts + 1).reshape(logits.shape)


def encode_with_prior(prior: AutoregressivePrior, codes: Codes, labels: Sequence[int | None]) -> list[bytes]:
    """Payloads of images; codes: one b h w per grid, or of a single row its first codes alone. The prior: as
    `ready_to_code` gives it."""
    device, condition = next(prior.parameters()).device, condition_of(prior, labels)
    count = sum(grid[0].numel() for grid in codes)
    sequence = prior.sequence(filled_up(prior, codes, device), condition)[:, :count]
    symbols = sequence.cpu().numpy()
    encoders = [Encoder() for _ in labels]

    def choose(position: int, logits: Tensor) -> Tensor:
        here = slice(position, position + logits.shape[1])
        for encoder, own, weights in zip(encoders, symbols[:, here], weights_of(frequencies_of(logits)), strict=True):
            encoder.encode(own, weights)
        return sequence[:, here]

    walk(exact_stepper(prior, len(labels), condition), count, choose)
    return [encoder.finish() for encoder in encoders]


def filled_up(prior: AutoregressivePrior, codes: Codes, device: torch.device) -> Codes:
    """All codes of an image, on the device, of the first ones of its row: the others are 0. What a walk tells of a code
    does not depend on those after it."""
    missing = prior.code_spec.codes_per_image - sum(grid[0].numel() for grid in codes)
    return tuple(F.pad(grid.to(device), (0, missing)) for grid in codes)


def decode_with_prior(
    prior: AutoregressivePrior, payloads: Sequence[bytes], labels: Sequence[int | None], count: int | None = None
) -> Codes:
    """Inverse of `encode_with_prior`: one b h w per grid, on the CPU; count: of an image's codes, None for all. Bytes
    that fit no code give arbitrary codes: the caller compares checksums."""
    device, condition = next(prior.parameters()).device, condition_of(prior, labels)
    decoders: list[Decoder | None] = [Decoder(payload) for payload in payloads]

    def choose(position: int, logits: Tensor) -> Tensor:
        chosen = np.zeros(logits.shape[:2], np.int64)
        for row, weights in enumerate(weights_of(frequencies_of(logits))):
            if (decoder := decoders[row]) is None:
                continue
            try:
                chosen[row] = decoder.decode(weights)
            except DamagedPayloadError:
                decoders[row] = None  # the other images are not to suffer
        return torch.from_numpy(chosen).to(device)

    whole = prior.code_spec.codes_per_image
    count = whole if count is None else count
    sequence = walk(exact_stepper(prior, len(labels), condition), count, choose)
    if count < whole:  # the first ones of a single row
        return (sequence.cpu()[:, None],)
    return tuple(grid.cpu() for grid in prior.grids_of(sequence))
