"""Encoder and decoder of VQ-GAN (Esser et al. 2021, arXiv:2012.09841, appendix): the residual blocks, attention and
resampling of DDPM (Ho et al. 2020, arXiv:2006.11239), without noise levels and without connections across.

The submodules bear the names of the published weights (`down.2.block.0.conv1`), whence abbreviations such as
`nin_shortcut`. `z_q` in every signature is for norms that look at the code vectors (`SpatialNorm`); others ignore it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPSILON = 1e-6  # of the published norms; PyTorch's default is ten times that


# ---- norms ----------------------------------------------------------------------------------------------------------


class NormSwish(torch.autograd.Function):
    """swish(group_norm(x)), which keeps x alone for the backward pass and computes the norm there again: of three
    tensors that a norm, a swish and the convolution after them would keep, two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
        normed, mean, inverse_deviation = group_norm(x, weight, bias, groups)
        ctx.save_for_backward(x, weight, bias, mean, inverse_deviation)
        ctx.groups = groups
        return F.silu(normed, inplace=True).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, mean, inverse_deviation = ctx.saved_tensors
        normed, _, _ = group_norm(x, weight, bias, ctx.groups)
        grad_normed = torch.ops.aten.silu_backward(grad.float().contiguous(), normed)
        b, c, h, w = x.shape
        grads = torch.ops.aten.native_group_norm_backward(
            grad_normed,
            x.float().contiguous(),
            mean,
            inverse_deviation,
            weight.float(),
            b,
            c,
            h * w,
            ctx.groups,
            [True, True, True],
        )
        return grads[0].to(x.dtype), grads[1].to(weight.dtype), grads[2].to(bias.dtype), None


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The normed x, b c h w in float32, and mean and inverse deviation of each group."""
    b, c, h, w = x.shape
    return torch.native_group_norm(x.float().contiguous(), weight.float(), bias.float(), b, c, h * w, groups, EPSILON)


class Norm(nn.GroupNorm):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(groups, channels, eps=EPSILON)

    def forward(self, input: Tensor, z_q: Tensor | None = None) -> Tensor:
        return super().forward(input)

    def swish(self, x: Tensor, z_q: Tensor | None = None) -> Tensor:
        """swish(norm(x))."""
        return NormSwish.apply(x, self.weight, self.bias, self.num_groups)


class SpatialNorm(nn.Module):
    """A group norm whose scale and shift are linear in the code vector at each place (MoVQ, Zheng et al. 2022,
    arXiv:2209.09002, section 3.2)."""

    def __init__(self, channels: int, groups: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, channels, eps=EPSILON)
        self.conv_y = nn.Conv2d(latent_channels, channels, 1)
        self.conv_b = nn.Conv2d(latent_channels, channels, 1)

    def forward(self, x: Tensor, z_q: Tensor | None) -> Tensor:
        """x: b c H W; z_q: b d h w, where h divides H and w divides W."""
        assert z_q is not None
        h, w = z_q.shape[2:]
        normed = rearrange(self.norm_layer(x), "b c (h tall) (w wide) -> b c h tall w wide", h=h, w=w)
        # One code vector holds for a whole tile of x: broadcast, where the paper enlarges z_q to the size of x.
        scale, shift = (rearrange(conv(z_q), "b c h w -> b c h 1 w 1") for conv in (self.conv_y, self.conv_b))
        return rearrange(normed * scale + shift, "b c h tall w wide -> b c (h tall) (w wide)")

    def swish(self, x: Tensor, z_q: Tensor | None) -> Tensor:
        """swish(norm(x))."""
        return F.silu(self(x, z_q))


MakeNorm = Callable[[int], Norm | SpatialNorm]  # of so many channels


# ---- layers ---------------------------------------------------------------------------------------------------------


class ResnetBlock(nn.Module):
    """x + conv3x3(swish(norm(conv3x3(swish(norm(x)))))), with a 1x1 convolution of x where the width changes."""

    def __init__(self, channels_in: int, channels_out: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.norm1 = make_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = make_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, z_q: Tensor | None = None) -> Tensor:
        hidden = self.conv1(self.norm1.swish(x, z_q))
        return self.nin_shortcut(x) + self.conv2(self.norm2.swish(hidden, z_q))


class Attention(nn.Module):
    """x + attention with one head between all places of norm(x)."""

    def __init__(self, channels: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.norm = make_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, z_q: Tensor | None = None) -> Tensor:
        normed = self.norm(x, z_q)
        projections = (project(normed) for project in (self.q, self.k, self.v))
        q, k, v = (rearrange(projected, "b c h w -> b 1 (h w) c").contiguous() for projected in projections)
        attended = F.scaled_dot_product_attention(q, k, v)  # b 1 n c
        return x + self.proj_out(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Each place becomes four; then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# ---- levels: the layers between two changes of resolution -----------------------------------------------------------


class Level(nn.Module):
    """`blocks` residual blocks, each with attention after it if `attention`."""

    recompute = "parts"  # the finest level alone has most of all activations (common/recompute.py)

    def __init__(
        self, channels_in: int, channels_out: int, *, blocks: int, attention: bool, make_norm: MakeNorm
    ) -> None:
        super().__init__()
        widths = [channels_in] + blocks * [channels_out]
        self.block = nn.ModuleList(ResnetBlock(*pair, make_norm) for pair in pairwise(widths))
        self.attn = nn.ModuleList(Attention(channels_out, make_norm) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor, z_q: Tensor | None = None) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x, z_q)
            if len(self.attn):
                x = self.attn[number](x, z_q)
        return x


class DownLevel(Level):
    """A level of the encoder; all but the last halve the resolution at their end."""

    def __init__(self, channels_in: int, channels_out: int, *, last: bool, **settings: Any) -> None:
        super().__init__(channels_in, channels_out, **settings)
        self.downsample = nn.Identity() if last else Downsample(channels_out)

    def forward(self, x: Tensor, z_q: Tensor | None = None) -> Tensor:
        return self.downsample(super().forward(x, z_q))


class UpLevel(Level):
    """A level of the decoder; all but the last double the resolution at their end."""

    def __init__(self, channels_in: int, channels_out: int, *, last: bool, **settings: Any) -> None:
        super().__init__(channels_in, channels_out, **settings)
        self.upsample = nn.Identity() if last else Upsample(channels_out)

    def forward(self, x: Tensor, z_q: Tensor | None = None) -> Tensor:
        return self.upsample(super().forward(x, z_q))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, make_norm)
        self.attn_1 = Attention(channels, make_norm)
        self.block_2 = ResnetBlock(channels, channels, make_norm)

    def forward(self, x: Tensor, z_q: Tensor | None = None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, z_q), z_q), z_q)


# ---- encoder and decoder --------------------------------------------------------------------------------------------


class ResnetEncoder(nn.Module):
    """Images, b c H W, to features, b z_channels h w, at the resolution of the last level."""

    def __init__(
        self,
        *,
        channels: int,
        z_channels: int,
        width: int,
        multipliers: Sequence[int],
        residual_blocks: int,
        attention_levels: Sequence[int],
        norm_groups: int,
    ) -> None:
        """multipliers: of each level, fine to coarse, its width as a multiple of `width`; attention_levels: those with
        attention, 0 the finest (the middle has it always); residual_blocks: in each level."""
        super().__init__()
        make_norm: MakeNorm = partial(Norm, groups=norm_groups)
        widths = [width, *(width * multiplier for multiplier in multipliers)]
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(
                *pair,
                blocks=residual_blocks,
                attention=level in attention_levels,
                last=level == len(multipliers) - 1,
                make_norm=make_norm,
            )
            for level, pair in enumerate(pairwise(widths))
        )
        self.mid = Middle(widths[-1], make_norm)
        self.norm_out = Norm(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out.swish(self.mid(x)))


class ResnetDecoder(nn.Module):
    """Features, b z_channels h w, to images, b c H W. Its levels are those of the encoder, coarse to fine, each with
    one residual block more; `up` numbers them as `down` does."""

    def __init__(
        self,
        *,
        channels: int,
        z_channels: int,
        width: int,
        multipliers: Sequence[int],
        residual_blocks: int,
        attention_levels: Sequence[int],
        norm_groups: int,
        latent_channels: int | None = None,
    ) -> None:
        """latent_channels: width of z_q for spatial norms; None: ordinary norms. Others: see the encoder."""
        super().__init__()
        make_norm: MakeNorm = partial(Norm, groups=norm_groups)
        if latent_channels is not None:
            make_norm = partial(SpatialNorm, groups=norm_groups, latent_channels=latent_channels)
        widths = [*(width * multiplier for multiplier in multipliers), width * multipliers[-1]]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], make_norm)
        self.up = nn.ModuleList(
            UpLevel(
                coarse,
                fine,
                blocks=residual_blocks + 1,
                attention=level in attention_levels,
                last=level == 0,
                make_norm=make_norm,
            )
            for level, (fine, coarse) in enumerate(pairwise(widths))
        )
        self.norm_out = make_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, features: Tensor, z_q: Tensor | None = None) -> Tensor:
        return self.conv_out(self.trunk(features, z_q))

    def trunk(self, features: Tensor, z_q: Tensor | None = None) -> Tensor:
        """What `conv_out` makes the images of."""
        x = self.mid(self.conv_in(features), z_q)
        for level in reversed(self.up):
            x = level(x, z_q)
        return self.norm_out.swish(x, z_q)
