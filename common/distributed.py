"""What all processes of a training run compute together, so that N processes hold the codebook of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.recompute import once_agreed


def several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_share(tensor: Tensor) -> bool:
    """Whether each process has a part of the tensor alone: whether it is a DTensor, whose module takes long to import
    and is there when one is."""
    return hasattr(tensor, "to_local")


def own_part(tensor: Any) -> Tensor:
    """Of a share the part that this process has, in the same memory; any other tensor itself."""
    return tensor.to_local() if is_share(tensor) else tensor


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Adds up each process's `tensor`, in place, and returns it: the same bits everywhere."""
    if several_processes():
        dist.all_reduce(tensor)
    return tensor


def mean_over_processes(tensor: Tensor) -> Tensor:
    """Averages each process's `tensor`, in place, and returns it: the same bits everywhere."""
    return sum_over_processes(tensor).div_(dist.get_world_size()) if several_processes() else tensor


def from_first_process(tensor: Tensor) -> Tensor:
    """Gives each process the first one's `tensor`, in place, and returns it."""
    if several_processes():
        dist.broadcast(tensor, 0)
    return tensor


def global_mean(tensor: Tensor) -> Tensor:
    """The mean of all processes' `tensor`; gradients pass to this process's own as if it were the mean.

    For what a loss needs of the whole batch before anything that is not linear, such as an entropy: the processes'
    gradients, averaged by DistributedDataParallel, are then those of one process with the whole batch.
    """
    if not several_processes():
        return tensor
    mean = once_agreed(lambda: sum_over_processes(tensor.detach().clone())) / dist.get_world_size()
    return tensor + (mean - tensor.detach())


def moments_of_all(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and (biased) variance of each channel over the images of all processes, 1 c 1 1 each, with gradients to all
    of them; and the number of values that each is of, a scalar. x: b c h w; or b c, of which they are 1 c."""
    others, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
    total = sum_of_all(torch.cat([x.sum(others), x.new_full((1,), x.numel() / x.shape[1])]))
    count = total[-1].detach()
    mean = (total[:-1] / count).view(shape)
    squares = sum_of_all((x - mean).square().sum(others))
    return mean, (squares / count).view(shape), count


def sum_of_all(tensor: Tensor) -> Tensor:
    return SumOverProcesses.apply(tensor) if several_processes() else tensor


class SumOverProcesses(torch.autograd.Function):
    """Adds up each process's tensor; the gradient is the sum of the gradients that all processes have for the sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        # A tensor of its own: autograd marks what is returned here as a result of this call.
        return once_agreed(lambda: sum_over_processes(tensor.detach().clone())).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return SumOverProcesses.apply(gradient.contiguous())  # itself, for the second derivatives of an R1 penalty


def draw_rows(parts: Sequence[Tensor], count: int) -> Tensor:
    """`count` different random rows from those of all processes, or all rows in random order where there are fewer.

    parts: n d each, one per micro-batch, as many on each process. Rows are numbered micro-batch by micro-batch and
    within one process by process, as the loop deals samples out: the same global batch gives the same rows however many
    processes share it. The numbers are drawn by PyTorch's global generator of the first process.
    """
    device, width = parts[0].device, parts[0].shape[1]
    sizes = torch.tensor([[len(part) for part in parts]], device=device)  # processes, micro-batches
    process = 0
    if several_processes():
        process = dist.get_rank()
        gathered = [torch.empty_like(sizes) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, sizes)
        sizes = torch.cat(gathered)
    ends = sizes.t().flatten().cumsum(0)  # micro-batches * processes
    first_rows = (ends - sizes.t().flatten()).view(len(parts), len(sizes))[:, process].tolist()

    numbers = from_first_process(torch.randperm(int(ends[-1]))[:count].to(device))
    rows = parts[0].new_zeros(len(numbers), width)
    for part, first in zip(parts, first_rows, strict=True):
        here = ((numbers >= first) & (numbers < first + len(part))).nonzero().squeeze(1)
        rows[here] = part[numbers[here] - first]
    return sum_over_processes(rows)


def rows_of_least(rows: Tensor, scores: Tensor) -> Tensor:
    """Of the rows of all processes, k d on each, those of the least score, k: of equal ones the first process's."""
    if not several_processes():
        return rows
    least = scores.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    rank = dist.get_rank()
    owners = torch.where(scores == least, rank, dist.get_world_size())
    dist.all_reduce(owners, op=dist.ReduceOp.MIN)
    return sum_over_processes(torch.where((owners == rank).unsqueeze(1), rows, 0))
