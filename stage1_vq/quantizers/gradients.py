"""How gradients pass from code vectors to the latents that they stand for."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradient = Literal["straight-through", "rotation"]


class StraightThrough(torch.autograd.Function):
    """The code vectors, with the identity as gradient to z (van den Oord et al. 2017, section 3.2)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, nearest: Tensor) -> Tensor:
        return nearest.view_as(nearest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Rotation(torch.autograd.Function):
    """The code vectors e, seen as z rotated and scaled: e = |e|/|z| R z, with R and the scale held constant in the
    backward pass (Fifty et al. 2024, section 4). R = 1 - 2 r r^T + 2 e' z'^T, where z' and e' are z and e at length 1
    and r is z' + e' at length 1. Vectors lie along axis 1."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, nearest: Tensor) -> Tensor:
        ctx.save_for_backward(z, nearest)
        return nearest.view_as(nearest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, nearest = ctx.saved_tensors
        z_length = z.norm(dim=1, keepdim=True).clamp(min=1e-6)
        scale = nearest.norm(dim=1, keepdim=True) / z_length
        z_unit, e_unit = z / z_length, F.normalize(nearest, dim=1)
        r = F.normalize(z_unit + e_unit, dim=1)
        along_r = (r * grad).sum(1, keepdim=True)
        along_e = (e_unit * grad).sum(1, keepdim=True)
        return scale * (grad - 2 * along_r * r + 2 * along_e * z_unit), None


GRADIENTS: dict[Gradient, type[torch.autograd.Function]] = {
    "straight-through": StraightThrough,
    "rotation": Rotation,
}


def pass_gradient(how: Gradient, z: Tensor, nearest: Tensor) -> Tensor:
    """The code vectors, b d h w, with a gradient to z, of the same shape."""
    return GRADIENTS[how].apply(z, nearest)
