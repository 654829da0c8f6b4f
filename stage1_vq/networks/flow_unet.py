"""The network of a diffusion decoder in pixels: a U-Net whose middle is a transformer (Vallaeys et al. 2025, SSDD,
arXiv:2510.04961, section 3.2; U-ViT, Hoogeboom et al. 2023, arXiv:2301.11093).

What an image is decoded from comes in twice: code vectors, enlarged, lie beside the noisy image at the input, and with
the time they scale and shift the norms of all blocks, each of them in its own tile of the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage1_vq.networks.resnet import EPSILON, Norm, Upsample

PERIODS = 10_000  # of the slowest of the sines that tell the time, to the fastest
TIME_SCALE = 1000  # time runs from 0 to 1
SMALL = 0.1  # of the usual size, what ends a block begins with: at first a block changes little
MLP_RATIO = 4
STRIP = 1024  # places whose attention is computed at a time


class FlowFeatures(NamedTuple):
    """Of all layers but the last."""

    last: Tensor  # b width H W
    middle: Tensor  # b d h w, behind the transformer


def sines(t: Tensor, width: int) -> Tensor:
    """b float32 in [0, 1] -> b width: sines and cosines of many periods (Vaswani et al. 2017, arXiv:1706.03762)."""
    rates = torch.exp(-math.log(PERIODS) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = TIME_SCALE * t.float().unsqueeze(1) * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


def in_tiles(x: Tensor, values: Tensor) -> Tensor:
    """values, b c h w, at the places of x, b c' H W, whose sides are multiples of theirs: each holds for a tile."""
    tall, wide = x.shape[2] // values.shape[2], x.shape[3] // values.shape[3]
    if tall == wide == 1:
        return values
    spread = values[:, :, :, None, :, None].expand(-1, -1, -1, tall, -1, wide)
    return spread.reshape(*values.shape[:2], *x.shape[2:])


class Modulation(nn.Module):
    """(1 + scale) x + shift, both linear in the condition at each place."""

    def __init__(self, condition: int, channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(condition, 2 * channels, 1)
        with torch.no_grad():
            self.projection.weight.mul_(SMALL)
        nn.init.zeros_(self.projection.get_parameter("bias"))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = (in_tiles(x, values) for values in self.projection(F.silu(condition)).chunk(2, 1))
        return torch.addcmul(x + shift, x, scale)


class ResidualBlock(nn.Module):
    """x + conv3x3(swish(modulated norm(conv3x3(swish(norm(x)))))), with a 1x1 convolution of x where the width
    changes."""

    def __init__(self, channels_in: int, channels_out: int, condition: int, groups: int) -> None:
        super().__init__()
        self.norm_1 = Norm(channels_in, groups)
        self.conv_1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm_2 = nn.GroupNorm(groups, channels_out, eps=EPSILON, affine=False)
        self.modulation = Modulation(condition, channels_out)
        self.conv_2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        with torch.no_grad():
            self.conv_2.weight.mul_(SMALL)
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.norm_1.swish_convolution(x, self.conv_1)
        hidden = F.silu(self.modulation(self.norm_2(hidden), condition))
        return self.shortcut(x) + self.conv_2(hidden)


class WindowAttention(nn.Module):
    """Attention of each place to those at most `window` rows and columns away, with a learned bias for each head and
    offset (Liu et al. 2021, arXiv:2103.14030)."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * width)
        self.bias = nn.Parameter(0.02 * torch.randn(heads, 2 * window + 1, 2 * window + 1))
        self.output = nn.Linear(width, width)
        with torch.no_grad():
            self.output.weight.mul_(SMALL)

    def forward(self, x: Tensor) -> Tensor:
        """b h w d. Strip after strip of rows, so that memory grows with the places and not with their square."""
        h, w = x.shape[1:3]
        q, k, v = rearrange(self.qkv(x), "b h w (three heads d) -> three b heads h w d", three=3, heads=self.heads)
        tall, attended = max(1, STRIP // w), []
        for first in range(0, h, tall):
            asking = range(first, min(h, first + tall))
            asked = range(max(0, first - self.window), min(h, asking.stop + self.window))
            mine, keys, values = (
                part[:, :, rows.start : rows.stop].flatten(2, 3) for part, rows in ((q, asking), (k, asked), (v, asked))
            )
            biases = self.biases(asking, asked, w).to(q.dtype)
            attended.append(F.scaled_dot_product_attention(mine, keys, values, biases))  # b heads (rows w) d
        return self.output(rearrange(torch.cat(attended, 2), "b heads (h w) d -> b h w (heads d)", h=h))

    def biases(self, asking: range, asked: range, w: int) -> Tensor:
        """heads (rows w) (rows w), of the place that asks and the one that is asked; -inf outside of the window."""
        device = self.bias.device
        columns = torch.arange(w, device=device)
        rows, others = (torch.arange(each.start, each.stop, device=device) for each in (asking, asked))
        shape = (len(asking), w, len(asked), w)
        down = (others - rows.unsqueeze(1))[:, None, :, None].expand(shape)
        across = (columns - columns.unsqueeze(1))[None, :, None, :].expand(shape)
        far = torch.maximum(down.abs(), across.abs()) > self.window
        offsets = [each.clamp(-self.window, self.window) + self.window for each in (down, across)]
        bias = self.bias[:, offsets[0], offsets[1]].masked_fill(far, -torch.inf)
        return bias.reshape(self.heads, len(asking) * w, len(asked) * w)


class TransformerBlock(nn.Module):
    """Attention in a window and a GEGLU MLP (Shazeer 2020, arXiv:2002.05202), each behind a modulated norm."""

    def __init__(self, width: int, heads: int, window: int, condition: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=EPSILON, elementwise_affine=False)
        self.modulation_1 = Modulation(condition, width)
        self.attention = WindowAttention(width, heads, window)
        self.norm_2 = nn.LayerNorm(width, eps=EPSILON, elementwise_affine=False)
        self.modulation_2 = Modulation(condition, width)
        self.inner = nn.Linear(width, 2 * MLP_RATIO * width)
        self.outer = nn.Linear(MLP_RATIO * width, width)
        with torch.no_grad():
            self.outer.weight.mul_(SMALL)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """b d h w."""
        x = x + places_first(self.attention(places_last(self.modulation_1(normed(self.norm_1, x), condition))))
        values, gates = self.inner(places_last(self.modulation_2(normed(self.norm_2, x), condition))).chunk(2, -1)
        return x + places_first(self.outer(values * F.gelu(gates)))


def places_last(x: Tensor) -> Tensor:
    return rearrange(x, "b d h w -> b h w d")


def places_first(x: Tensor) -> Tensor:
    return rearrange(x, "b h w d -> b d h w")


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    return places_first(norm(places_last(x)))


def blocks_of(level: nn.Module) -> Iterable[nn.Module]:
    assert isinstance(level, nn.ModuleList)
    return level


class FlowUNet(nn.Module):
    """A noisy image, b c H W, its time, b, and code vectors, b d h w with sides that divide those of the image's
    coarsest level -> velocity, b c H W.

    Down and up as in DDPM (Ho et al. 2020, arXiv:2006.11239): `residual_blocks` at each level, one more on the way up,
    and what each block and each halving made on the way down lies beside what a block on the way up is given.
    """

    def __init__(
        self,
        *,
        channels: int,
        latent_channels: int,
        width: int,
        multipliers: Sequence[int],
        residual_blocks: int,
        transformer_blocks: int,
        heads: int,
        window: int,
        norm_groups: int,
    ) -> None:
        """latent_channels: width of the code vectors; multipliers: of each level, fine to coarse, its width as a
        multiple of `width`; window: see WindowAttention."""
        super().__init__()
        self.width = width
        condition = 4 * width
        settings: dict[str, Any] = {"condition": condition, "groups": norm_groups}
        self.time = nn.Sequential(nn.Linear(width, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.latents = nn.Conv2d(latent_channels, condition, 3, padding=1)
        self.latents_in = nn.Conv2d(latent_channels, width, 1)
        self.conv_in = nn.Conv2d(channels + width, width, 3, padding=1)

        now, kept = width, [width]  # channels: of the map, and of those that the way up is given
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            if level:
                self.shrink.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
                kept.append(now)
            blocks = nn.ModuleList()
            for _ in range(residual_blocks):
                blocks.append(ResidualBlock(now, width * multiplier, **settings))
                now = width * multiplier
                kept.append(now)
            self.down.append(blocks)
        self.middle = nn.ModuleList(TransformerBlock(now, heads, window, condition) for _ in range(transformer_blocks))
        self.middle_width = now
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            blocks = nn.ModuleList()
            for _ in range(residual_blocks + 1):
                blocks.append(ResidualBlock(now + kept.pop(), width * multiplier, **settings))
                now = width * multiplier
            self.up.append(blocks)
            if level:
                self.grow.append(Upsample(now))
        self.norm_out = Norm(now, norm_groups)
        self.conv_out = nn.Conv2d(now, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, z_q: Tensor) -> Tensor:
        return self.last(self.trunk(x, t, z_q).last)

    def trunk(self, x: Tensor, t: Tensor, z_q: Tensor) -> FlowFeatures:
        """What the last layer makes the velocity of, and features of the middle."""
        time = self.time(sines(t, self.width).to(x.dtype))
        condition = self.latents(z_q) + time[:, :, None, None]
        x = self.conv_in(torch.cat([x, in_tiles(x, self.latents_in(z_q))], 1))
        kept = [x]
        for level, blocks in enumerate(self.down):
            if level:
                x = self.shrink[level - 1](x)
                kept.append(x)
            for block in blocks_of(blocks):
                x = block(x, condition)
                kept.append(x)
        for block in self.middle:
            x = block(x, condition)
        middle = x
        for number, blocks in enumerate(self.up):
            for block in blocks_of(blocks):
                x = block(torch.cat([x, kept.pop()], 1), condition)
            if number < len(self.grow):
                x = self.grow[number](x)
        return FlowFeatures(self.norm_out.swish(x), middle)

    def last(self, features: Tensor) -> Tensor:
        return self.conv_out(features)
