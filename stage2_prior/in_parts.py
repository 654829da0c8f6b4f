"""A large batch drawn in parts, one after the other, so that what its steppers keep of all places stays small."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stage2_prior.condition import Condition
from stage2_prior.cuda_graph import Draw
from stage2_prior.priors.base import AutoregressivePrior
from stage2_prior.sampling_config import SamplingConfig
from stage2_prior.stepping import step_dtype

CACHE = 2**29  # bytes of keys and values at a time
ROWS = 16  # samples, with and without their label, that are drawn together whatever they keep: fewer cost more each


def parts_of(prior: AutoregressivePrior, batch: int, guided: bool) -> Iterator[slice]:
    """Parts of a batch, as even as they go. A GPU, which needs many rows to be busy, takes the batch as one."""
    weight = next(prior.parameters())
    rows_each = 2 if guided else 1
    bytes_each = rows_each * prior.numbers_kept * step_dtype(weight).itemsize
    most = max(ROWS // rows_each, CACHE // max(1, bytes_each))
    parts = 1 if weight.device.type != "cpu" else max(1, -(-batch // most))
    return (slice(batch * part // parts, batch * (part + 1) // parts) for part in range(parts))


def draw_in_parts(
    draw: Draw,
    prior: AutoregressivePrior,
    condition: Condition,
    uniforms: Tensor,
    sampling: SamplingConfig,
    known: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `draw`, for a batch of any size."""

    def drawn(part: slice) -> tuple[Tensor, Tensor]:
        kept = None if known is None else known[part]
        return draw(prior, condition.map(lambda tensor: tensor[part]), uniforms[part], sampling, kept)

    parts = [drawn(part) for part in parts_of(prior, len(uniforms), sampling.guidance != 1)]
    return torch.cat([codes for codes, _ in parts]), torch.stack([finite for _, finite in parts]).all()
