"""Group norms with what follows them in residual networks, for which less is kept than PyTorch keeps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Normed(NamedTuple):
    values: Tensor  # b c h w, float32
    mean: Tensor  # b g, of each group
    inverse_deviation: Tensor  # b g


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> Normed:
    """Of x, b c h w, in float32."""
    b, c, h, w = x.shape
    values = x.float().contiguous()
    return Normed(*torch.native_group_norm(values, weight.float(), bias.float(), b, c, h * w, groups, epsilon))


class NormSwish(torch.autograd.Function):
    """swish(group_norm(x)), which keeps x alone for the backward pass and computes the norm there again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> Tensor:
        normed = group_norm(x, weight, bias, groups, epsilon)
        ctx.save_for_backward(x, weight, bias, normed.mean, normed.inverse_deviation)
        ctx.settings = groups, epsilon
        return F.silu(normed.values, inplace=True).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse_deviation = ctx.saved_tensors
        normed = group_norm(x, weight, bias, *ctx.settings).values
        return *norm_swish_backward(grad, normed, x, weight, bias, mean, inverse_deviation), None, None


class NormSwishConvolution(torch.autograd.Function):
    """convolution(swish(group_norm(x))), of stride 1 and the same size. It keeps x alone for the backward pass: of
    three maps that the three would keep, one. The norm, which the backward pass of the swish needs anyway, is computed
    there again, and the swish, which that of the convolution needs, costs a look at each number."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        epsilon: float,
        kernel: Tensor,
        kernel_bias: Tensor,
    ) -> Tensor:
        normed = group_norm(x, weight, bias, groups, epsilon)
        ctx.save_for_backward(x, weight, bias, normed.mean, normed.inverse_deviation, kernel)
        ctx.settings = groups, epsilon
        activation = F.silu(normed.values, inplace=True).to(x.dtype)
        return F.conv2d(activation, kernel, kernel_bias, padding=kernel.shape[2] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse_deviation, kernel = ctx.saved_tensors
        padding, learns = kernel.shape[2] // 2, any(ctx.needs_input_grad[5:])
        normed = group_norm(x, weight, bias, *ctx.settings).values
        of_activation, of_kernel, of_bias = torch.ops.aten.convolution_backward(
            grad,
            F.silu(normed).to(grad.dtype),
            kernel.to(grad.dtype),
            [len(kernel)],
            [1, 1],
            [padding, padding],
            [1, 1],
            False,
            [0, 0],
            1,
            [True, learns, learns],
        )
        grads = norm_swish_backward(of_activation, normed, x, weight, bias, mean, inverse_deviation)
        if not learns:
            return *grads, None, None, None, None
        return *grads, None, None, of_kernel.to(kernel.dtype), of_bias.to(kernel.dtype)


def norm_swish_backward(
    grad: Tensor, normed: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_deviation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, given that of swish(normed) and what `group_norm` returned."""
    b, c, h, w = x.shape
    of_normed = torch.ops.aten.silu_backward(grad.float().contiguous(), normed)
    of_x, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
        of_normed,
        x.float().contiguous(),
        mean,
        inverse_deviation,
        weight.float(),
        b,
        c,
        h * w,
        mean.shape[1],
        [True, True, True],
    )
    return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(bias.dtype)
