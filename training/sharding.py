"""FSDP2 (Zhao et al. 2023, arXiv:2304.11277): weights, gradients and moments of a model in shares, one a process.

`accelerate launch --use_fsdp` asks for it. What has shares are the blocks of a model, which are most of a large one
(`units_of`); each is gathered whole for its part of a pass, and let go again. What is outside of them stays whole on
each process, and its gradients are averaged as by DistributedDataParallel: embeddings, codebooks, first and last layers
are small, and are read by more than a call of their module.

PyTorch's `fully_shard` is called here, and not by `Accelerator.prepare`: that would give shares to all weights, and
does nothing on a CPU, where Accelerate 1.15 has no FSDP and says nothing of it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from common.compatibility import begin_shares
from common.errors import UserError
from common.model_io import PretrainedModel
from training.launcher import ShardsAsked
from training.task import Task

LISTS = (nn.ModuleList, nn.Sequential)


def units_of(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one by one: blocks of blocks, the innermost ones that stand in a list.

    A unit computes by a call alone, and nobody reads its weights otherwise while training. So single layers are none
    (a loss may look at the last one), nor is anything in a module whose `stays_whole` is true (a quantizer moves its
    vectors between steps), nor what shares a weight with another part of the model.
    """
    units: list[nn.Module] = []
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, in_list: bool) -> bool:
        """Whether there is a unit in it, or it is one."""
        if module in seen or getattr(module, "stays_whole", False):
            return False
        seen.add(module)
        children = list(module.children())
        inside = [visit(child, isinstance(module, LISTS)) for child in children]
        if any(inside):
            return True
        called = type(module).forward is not nn.Module.forward  # a ModuleList has none
        if in_list and children and called and any(weight.requires_grad for weight in module.parameters()):
            units.append(module)
        return units[-1:] == [module]

    visit(model, False)
    owners: dict[nn.Parameter, set[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        owners.setdefault(weight, set()).add(name)
    whole = {module for module in model.modules() if getattr(module, "stays_whole", False)}
    return [
        unit
        for unit in units
        if not whole.intersection(unit.modules()) and all(len(owners[weight]) == 1 for weight in unit.parameters())
    ]


def check_shares(task: Task) -> None:
    """Raises UserError for a task that needs whole weights in its steps, and for a model without units."""
    reader: str | None = getattr(task, "reads_weights", None)
    if reader is not None:
        raise UserError(
            f"accelerate launch asks for FSDP, and {reader} reads all weights in each step, expected none that does: "
            "start it with accelerate launch --multi_gpu or with torchrun, which give each process the whole model"
        )
    if not units_of(task.model):
        raise UserError(
            f"accelerate launch asks for FSDP, and a model of kind {task.model.kind} has no blocks whose weights "
            "processes could share, expected a stack of them: start it with accelerate launch --multi_gpu or with "
            "torchrun, which give each process the whole model"
        )


class Shares:
    """`model` with each process's share of its units in place of their weights, from now on."""

    def __init__(self, model: PretrainedModel, asked: ShardsAsked, device: torch.device, processes: int) -> None:
        units = units_of(model)
        self.at_rest = without_weights(model)
        self.mesh = init_device_mesh(device.type, (processes,))
        inside = {weight for unit in units for weight in unit.parameters()}
        outside = {weight for weight in model.parameters() if weight not in inside}
        for unit in units:
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=asked.reshard_after_forward)
        fully_shard(model, mesh=self.mesh, ignored_params=outside)  # the root of the others, with no share of its own
        assert isinstance(model, FSDPModule)
        begin_shares(model)
        # What writes into its output would drop a hook that gathers its share, and it has none.
        warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \({type(model).__name__}\) returned a view")
        self.root: FSDPModule = model

    def of(self, copied: nn.Module, model: nn.Module) -> None:
        """Gives `copied`, a model of the same weights, shares where `model` has them. It is not to be called."""
        for name, weight in list(model.named_parameters()):
            if isinstance(weight, DTensor):
                owner, _, own = name.rpartition(".")
                module = copied.get_submodule(owner)
                before = getattr(module, own)
                share = nn.Parameter(distributed_as(before.detach(), weight), requires_grad=before.requires_grad)
                setattr(module, own, share)

    def average_with(self, last: bool) -> None:
        """Whether processes exchange the gradients of shares in the next backward pass: after the `last` micro-batch
        of a step."""
        self.root.set_requires_gradient_sync(last)

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[PretrainedModel]:
        """A model of this process's own with all weights of `model`, while the block runs. All processes enter it
        together; inside, each does what it likes."""
        self.at_rest.load_state_dict(whole_tensors(model.state_dict()), assign=True)
        try:
            yield self.at_rest
        finally:
            drop_weights(self.at_rest)


def without_weights(model: PretrainedModel) -> PretrainedModel:
    """A copy of the model that keeps its buffers, and whose weights take no memory."""
    empty = {id(weight): nn.Parameter(torch.empty_like(weight, device="meta")) for weight in model.parameters()}
    return copy.deepcopy(model, dict(empty)).requires_grad_(False).eval()


def drop_weights(model: nn.Module) -> None:
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False))


@torch.no_grad()
def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor whole, in memory of its own. All processes call it together."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        for name, tensor in tensors.items()
    }


def shares_like(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's shares of `tensors`, which all have whole, where `like` has one of the same shape under the name,
    or under what follows a `/` in it; others as they are."""
    found = {name: like.get(name, like.get(name.partition("/")[2])) for name in tensors}
    return {
        name: tensor if (model := found[name]) is None or model.shape != tensor.shape else distributed_as(tensor, model)
        for name, tensor in tensors.items()
    }


def distributed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of `tensor`, which all have whole, where `like` is one; else the tensor itself."""
    if not isinstance(like, DTensor) or all(isinstance(placement, Replicate) for placement in like.placements):
        return tensor
    device = like.to_local().device
    share = distribute_tensor(tensor.to(device), like.device_mesh, like.placements, src_data_rank=None)
    return share.clone()  # else it is a view of the whole, and keeps that in memory
