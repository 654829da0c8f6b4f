"""Negative log-likelihood of codes under logits: the last and largest tensors of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

AT_ONCE = 2**19  # logits, which a processor's cache holds while they are gone through several times


def nll_of(logits: Tensor, codes: Tensor) -> Tensor:
    """Nats of each code, `...` float32: `F.cross_entropy` over the last axis of the logits, `... k` of any floating
    type. codes: int64 `...`. Besides the logits nothing of their size is kept or made: their gradient is written over
    them in the backward pass, so whoever hands them over has no use for them afterwards, and they lead to one backward
    pass (a second one raises PyTorch's error)."""
    rows, targets = logits.flatten(0, -2), codes.flatten()
    if torch.compiler.is_compiling():
        return F.cross_entropy(rows.float(), targets, reduction="none").view(codes.shape)
    return _NegativeLogLikelihood.apply(rows, targets).view(codes.shape)


def smoothed_nll_of(logits: Tensor, codes: Tensor, label_smoothing: float) -> Tensor:
    """The same of targets that give so much of their share to all codes alike, without writing over the logits."""
    rows = logits.flatten(0, -2).float()
    nll = F.cross_entropy(rows, codes.flatten(), reduction="none", label_smoothing=label_smoothing)
    return nll.view(codes.shape)


def parts(rows: Tensor) -> Iterator[slice]:
    height = max(1, AT_ONCE // rows.shape[1])
    return (slice(first, first + height) for first in range(0, len(rows), height))


class _NegativeLogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, codes: Tensor) -> Tensor:
        """logits: r k; codes: r."""
        chosen = logits.gather(1, codes[:, None])[:, 0].float()
        nll = torch.empty_like(chosen)
        for rows in parts(logits):
            shares = logits[rows].log_softmax(dim=1, dtype=torch.float32)
            torch.neg(shares.gather(1, codes[rows, None])[:, 0], out=nll[rows])
        ctx.save_for_backward(logits, codes, nll + chosen)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The share of each code, less 1 for the one that stands there."""
        logits, codes, normaliser = ctx.saved_tensors
        for rows in parts(logits):
            part = logits[rows]
            exact = part if part.dtype == torch.float32 else part.float()
            exact.sub_(normaliser[rows, None]).exp_()
            exact.scatter_add_(1, codes[rows, None], exact.new_full((), -1.0).expand(len(part), 1))
            exact.mul_(gradient[rows, None])
            if exact is not part:
                part.copy_(exact)
        return logits, None
