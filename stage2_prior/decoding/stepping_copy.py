"""A network as steps of few rows want it, where its blocks stay modules: the same ones, with other linear layers."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from stage2_prior.decoding.engine import Product

Network = TypeVar("Network", bound=nn.Module)


class FewRows(nn.Module):
    """A linear layer over few rows: `... in` -> `... out`."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.product = Product(linear.weight.detach(), None if linear.bias is None else linear.bias.detach(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.product.joined(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def stepping_copy(network: Network, dtype: torch.dtype) -> Network:
    """The network in eval mode and in `dtype`: on a CPU a copy whose linear layers are `FewRows`, elsewhere itself
    where nothing has to change."""
    weights = list(network.parameters())
    if weights[0].device.type == "cpu":
        linear = {id(part): FewRows(part, dtype) for part in network.modules() if type(part) is nn.Linear}
        return copy.deepcopy(network, linear).to(dtype).eval()  # what the memo knows is not copied
    same = all(weight.dtype == dtype for weight in weights) and not network.training
    return network if same else copy.deepcopy(network).to(dtype).eval()
