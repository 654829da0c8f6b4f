"""Mode prior of version 1 of the format, which is only read: the prior's own steps, in float32.

Their rounding depends on device, processor, threads and versions of libraries, and on the number of rows of a batch,
*lanes*, and the row, which stand in the file. What was rounded otherwise gives other codes, which have not the checksum
of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from codes.spec import Codes
from common.errors import UserError
from pipelines.codec.archive import Entry
from pipelines.codec.entropy_coding import DamagedPayloadError, Decoder, frequencies, weights_of
from stage2_prior.priors import AutoregressivePrior
from stage2_prior.stepping import walk


def decode(prior: AutoregressivePrior, entries: Sequence[Entry], lanes: int) -> Codes:
    """One b h w per grid, on the CPU. Bytes that fit no code give arbitrary codes: the caller compares checksums."""
    codes: dict[int, Codes] = {}
    for places in in_lanes(range(len(entries)), lambda i: entries[i].lane):
        read = decode_batch(prior, [entries[i] for i in places], lanes)
        codes |= {i: tuple(grid[row : row + 1] for grid in read) for row, i in enumerate(places)}
    return tuple(torch.cat(grids) for grids in zip(*(codes[i] for i in range(len(entries))), strict=True))


def decode_batch(prior: AutoregressivePrior, entries: Sequence[Entry], lanes: int) -> Codes:
    """Of entries of which no two have the same lane; lanes without one hold zeros."""
    device = next(prior.parameters()).device
    own = [entry.lane for entry in entries]
    labels = torch.full((lanes,), -1)
    for entry in entries:
        labels[entry.lane] = -1 if entry.label is None else entry.label
    condition = prior.condition_of(labels.to(device))
    decoders: list[Decoder | None] = [Decoder(entry.payload) for entry in entries]

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

    with torch.autocast(device.type, enabled=False):
        sequence = walk(prior.stepper(lanes, condition), prior.code_spec.codes_per_image, choose)
    return tuple(grid[own].cpu() for grid in prior.grids_of(sequence))


def weights_for(logits: Tensor) -> np.ndarray:
    """`b m k` for the coder. Raises UserError for logits that are not finite."""
    shares = logits.detach().cpu().double().softmax(dim=-1).numpy()
    if not np.isfinite(shares).all():
        raise UserError("the prior's logits are not finite: its weights are damaged; take an earlier checkpoint")
    return weights_of(frequencies(shares.reshape(-1, shares.shape[-1]))).reshape(shares.shape)


def in_lanes(items: Iterable[int], lane_of: Callable[[int], int]) -> list[list[int]]:
    """Items as batches, in none of which two have the same lane."""
    batches: list[list[int]] = []
    used: dict[int, int] = {}
    for item in items:
        number = used[lane_of(item)] = used.get(lane_of(item), -1) + 1
        if number == len(batches):
            batches.append([])
        batches[number].append(item)
    return batches
