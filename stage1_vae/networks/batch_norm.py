"""Batch norm whose averages move once in a step: by what all its micro-batches showed, and not at all where the step
was skipped (Ioffe and Szegedy 2015, arXiv:1502.03167)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.distributed import moments_of_all, several_processes
from common.recompute import recomputing


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of `n c h w`, or of `n c`, by a micro-batch on all processes; eval mode uses running averages.

    A forward pass in training only notes what the batch was like. `take_noted`, once in a step, moves the averages, by
    the mean over the step's micro-batches: a step that was skipped leaves no trace.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, *, step: float = 0.1, eps: float = 1e-5) -> None:
        """step: of the averages, from 0 to 1."""
        super().__init__(channels, eps=eps)
        self.step = step
        self.noted: Tensor | None = None  # 2 c: sums of means and variances
        self.noted_count = 0

    def forward(self, x: Tensor, copies: int = 1) -> Tensor:
        """copies: how often each number stands in the batch that the averages are of."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if several_processes():
            return self.of_all(x, copies)
        found = self.running_mean.new_zeros(2, len(self.running_mean))
        result = F.batch_norm(x, found[0], found[1], self.weight, self.bias, True, 1.0, self.eps)
        self.note(found, x.numel() // x.shape[1], copies)
        return result

    def of_all(self, x: Tensor, copies: int) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            values = x.float()
            mean, variance, count = moments_of_all(values)
            unbiased = variance * (count / (count - 1))
            self.note(torch.stack([mean.flatten(), unbiased.flatten()]).detach(), count, copies)
            normalised = (values - mean) * (variance + self.eps).rsqrt()
            return (normalised * self.weight.view_as(mean) + self.bias.view_as(mean)).to(x.dtype)

    @torch.no_grad()
    def note(self, moments: Tensor, count: int | Tensor, copies: int) -> None:
        """moments: 2 c, the variance unbiased for `count` numbers."""
        if recomputing():
            return
        if copies > 1:  # autograd keeps what it was given
            moments = torch.stack([moments[0], moments[1] * ((count - 1) * copies / (count * copies - 1))])
        self.noted = moments if self.noted is None else self.noted + moments
        self.noted_count += 1

    @torch.no_grad()
    def take_noted(self, step: float | None = None) -> None:
        """Moves the averages by a step, from 0 to 1 and else its own, towards what was noted, and forgets that."""
        if self.noted is not None:
            mean, variance = self.noted / self.noted_count
            step = self.step if step is None else step
            self.running_mean.lerp_(mean, step)
            self.running_var.lerp_(variance, step)
            self.num_batches_tracked += 1
        self.forget_noted()

    def forget_noted(self) -> None:
        self.noted, self.noted_count = None, 0


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def take_all_noted(model: nn.Module) -> None:
    """After a step of the optimiser."""
    for norm in batch_norms(model):
        norm.take_noted()


def forget_all_noted(model: nn.Module) -> None:
    """After a skipped step."""
    for norm in batch_norms(model):
        norm.forget_noted()
