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

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage1_vq.networks.group_norm import NormSwish, NormSwishConvolution

FOLDED_FROM = 256  # places of a map: with fewer, to sum the taps takes longer than it spares
EPSILON = 1e-6  # of the published norms; PyTorch's default is ten times that


# ---- norms ----------------------------------------------------------------------------------------------------------


class Norm(nn.GroupNorm):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(groups, channels, eps=EPSILON)

    def forward(self, input: Tensor, z_q: Tensor | None = None) -> Tensor:
        return super().forward(input)

    def swish(self, x: Tensor, z_q: Tensor | None = None) -> Tensor:
        """swish(norm(x))."""
        return NormSwish.apply(x, self.weight, self.bias, self.num_groups, self.eps)

    def swish_convolution(self, x: Tensor, convolution: nn.Conv2d, z_q: Tensor | None = None) -> Tensor:
        """convolution(swish(norm(x))); the convolution has a bias, stride 1, and keeps the size."""
        own = self.weight, self.bias, self.num_groups, self.eps
        return NormSwishConvolution.apply(x, *own, convolution.weight, convolution.bias)


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

    def swish_convolution(self, x: Tensor, convolution: nn.Conv2d, z_q: Tensor | None) -> Tensor:
        """convolution(swish(norm(x)))."""
        return convolution(self.swish(x, z_q))


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
        hidden = self.norm1.swish_convolution(x, self.conv1, z_q)
        return self.nin_shortcut(x) + self.norm2.swish_convolution(hidden, self.conv2, z_q)


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
        if x.shape[2] * x.shape[3] < FOLDED_FROM:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return F.conv_transpose2d(x, folded(self.conv.weight), self.conv.bias, stride=2, padding=1)


def folded(kernel: Tensor) -> Tensor:
    """Of a 3x3 convolution, o i 3 3, behind nearest neighbours the transposed convolution of stride 2, i o 4 4, that is
    both of them in one: where several of its taps see the same place, their sum. 16 products for 4 places of the
    output, where the convolution has 36, and no enlarged map."""
    kernel = kernel.flip(2, 3).transpose(0, 1)
    rows = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))
    return F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))


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
        multipliers: Sequence[float],
        residual_blocks: int,
        attention_levels: Sequence[int],
        norm_groups: int,
    ) -> None:
        """multipliers: of each level, fine to coarse, its width as a multiple of `width`; attention_levels: those with
        attention, 0 the finest (the middle has it always); residual_blocks: in each level."""
        super().__init__()
        make_norm: MakeNorm = partial(Norm, groups=norm_groups)
        widths = [width, *(round(width * multiplier) for multiplier in multipliers)]
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
        return self.norm_out.swish_convolution(self.mid(x), self.conv_out)


class ResnetDecoder(nn.Module):
    """Features, b z_channels h w, to images, b c H W. Its levels are those of the encoder, coarse to fine, each with
    one residual block more; `up` numbers them as `down` does."""

    def __init__(
        self,
        *,
        channels: int,
        z_channels: int,
        width: int,
        multipliers: Sequence[float],
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
        widths = [round(width * multiplier) for multiplier in (*multipliers, multipliers[-1])]
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
