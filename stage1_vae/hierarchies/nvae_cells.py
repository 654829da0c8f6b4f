"""What NVAE is built of: weight-normalised convolutions, batch norm with swish, residual cells with squeeze-excite, and
masked flows (Vahdat and Kautz 2020, arXiv:2007.03898, section 3.1 and appendix A; the public code decides details).

All modules have the names under which published checkpoints hold their weights. Where a cell doubles the resolution,
what commutes with it is computed before it, on a quarter of the places: a 1x1 convolution with either way to upsample,
and batch norm and swish with nearest neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vae.networks.batch_norm import BatchNorm

Scaling = Literal["down", "none", "up"]
"""Of a cell: half the resolution and twice the channels, the same, or the reverse."""

Primitive = Literal["res_bnswish", "mconv_e3k5g0", "mconv_e6k5g0"]
"""One residual branch, or a part of one, as the public code names them."""


def up_2x(x: Tensor) -> Tensor:
    """n c h w -> n c 2h 2w, by nearest neighbours."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def output_channels(channels: int, scaling: Scaling) -> int:
    return {"down": channels * 2, "none": channels, "up": channels // 2}[scaling]


# ---- convolutions ---------------------------------------------------------------------------------------------------


class Convolution(nn.Conv2d):
    """On a CPU it is computed channels last, a place in memory after the other, which is faster, and what is computed
    of its output stays so."""

    def applied_weight(self) -> Tensor:
        """What images are convolved with."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.applied_weight()
        if x.device.type == "cpu":
            x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
        return self._conv_forward(x, weight, self.bias)


class Conv2D(Convolution):
    """A convolution whose weights are, for each output channel, a direction times a length that is learned as its log
    (Salimans and Kingma 2016, arXiv:1602.07868)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, bias: bool = True):
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.log_weight_norm = nn.Parameter(self.start())

    def start(self, length: float = 1.0) -> Tensor:
        """o 1 1 1: logs of the lengths that the weights have, times a factor."""
        return (length * self.direction().detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-2).log()

    def direction(self) -> Tensor:
        return self.weight

    def applied_weight(self) -> Tensor:
        direction = self.direction()
        lengths = direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return direction * (self.log_weight_norm.exp() / (lengths + 1e-5))


class MaskedConv2D(Conv2D):
    """Of places before each in raster order, or after it where `mirrored`; of the place itself, channels before it, and
    its own unless `strictly`."""

    mask: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        mirrored: bool,
        strictly: bool,
        groups: int = 1,
        bias: bool = False,
        length: float = 1.0,
    ) -> None:
        """groups: 1, or as many as channels. length: of the weights at the start, as a share of what is usual."""
        nn.Conv2d.__init__(self, inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)
        mask = raster_mask(inputs, outputs, kernel, mirrored=mirrored, strictly=strictly, depthwise=groups > 1)
        self.register_buffer("mask", mask, persistent=False)
        self.log_weight_norm = nn.Parameter(self.start(length))

    def direction(self) -> Tensor:
        return self.weight * self.mask


def raster_mask(
    inputs: int, outputs: int, kernel: int, *, mirrored: bool, strictly: bool, depthwise: bool = False
) -> Tensor:
    """o i k k, of zeros and ones. Channels of the smaller side each stand for an equal share of those of the larger."""
    count = min(inputs, outputs)  # numbers of a place, of which each is made of those before it
    of_outputs, of_inputs = (torch.arange(side) * count // side for side in (outputs, inputs))
    centre = of_outputs[:, None] > of_inputs if strictly else of_outputs[:, None] >= of_inputs
    if depthwise:
        centre = torch.full((outputs, 1), not strictly)
    mask = torch.zeros(*centre.shape, kernel * kernel)
    middle = kernel * kernel // 2
    mask[..., :middle] = 1
    mask[..., middle] = centre.float()
    return (mask.flip(-1) if mirrored else mask).unflatten(-1, (kernel, kernel))


# ---- batch norm -----------------------------------------------------------------------------------------------------


STEP = 0.05  # of the running averages


class BatchNormSwish(BatchNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, step=STEP)

    def forward(self, x: Tensor, copies: int = 1) -> Tensor:
        return F.silu(super().forward(x, copies))


class NamedBatchNorm(nn.Module):
    """Batch norm under the name that checkpoints have."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = BatchNorm(channels, step=STEP)

    def forward(self, x: Tensor, copies: int = 1) -> Tensor:
        result: Tensor = self.bn(x, copies)
        return result


# ---- residual branches ----------------------------------------------------------------------------------------------


class BatchNormSwishConv(nn.Module):
    """Batch norm and swish, then a 3x3 convolution: n i h w -> n o h' w'."""

    def __init__(self, inputs: int, outputs: int, scaling: Scaling) -> None:
        super().__init__()
        self.up = scaling == "up"
        self.bn_act = BatchNormSwish(inputs)
        self.conv_0 = Conv2D(inputs, outputs, 3, stride=2 if scaling == "down" else 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn_act(x)
        result: Tensor = self.conv_0(up_2x(x) if self.up else x)
        return result


class MobileConv(nn.Module):
    """Wider by a factor, a depthwise 5x5 convolution, narrow again, with batch norm around each (Sandler et al. 2018,
    MobileNetV2, arXiv:1801.04381): n i h w -> n o h' w'."""

    def __init__(self, inputs: int, outputs: int, scaling: Scaling, factor: int) -> None:
        super().__init__()
        self.up = scaling == "up"
        wide, stride = inputs * factor, 2 if scaling == "down" else 1
        layers = [
            NamedBatchNorm(inputs),
            ConvBatchNormSwish(Convolution(inputs, wide, 1, bias=False)),
            ConvBatchNormSwish(Convolution(wide, wide, 5, stride, 2, groups=wide, bias=False)),
            Convolution(wide, outputs, 1, bias=False),
            NamedBatchNorm(outputs),
        ]
        # Checkpoints count the upsampling as the first layer.
        self.conv = nn.Sequential(*([nn.Identity()] if self.up else []), *layers)

    def forward(self, x: Tensor) -> Tensor:
        before, widened, deep, narrowed, after = list(self.conv)[-5:]
        copies = 4 if self.up else 1
        x = widened(before(x, copies), copies)
        result: Tensor = after(narrowed(deep(up_2x(x) if self.up else x)))
        return result


class ConvBatchNormSwish(nn.Module):
    def __init__(self, convolution: Convolution) -> None:
        super().__init__()
        self.conv = nn.ModuleList([convolution, BatchNormSwish(convolution.out_channels)])

    def forward(self, x: Tensor, copies: int = 1) -> Tensor:
        result: Tensor = self.conv[1](self.conv[0](x), copies)
        return result


BRANCHES: dict[Primitive, Callable[[int, int, Scaling], nn.Module]] = {
    "res_bnswish": BatchNormSwishConv,
    "mconv_e3k5g0": lambda inputs, outputs, scaling: MobileConv(inputs, outputs, scaling, 3),
    "mconv_e6k5g0": lambda inputs, outputs, scaling: MobileConv(inputs, outputs, scaling, 6),
}


# ---- cells ----------------------------------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    """A factor in (0, 1) for each channel of an image, told by the means of all channels (Hu et al. 2018,
    arXiv:1709.01507): n c h w -> n c 1 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.se = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.se(x.mean(dim=(2, 3)))
        return result[..., None, None]


class HalvingSkip(nn.Module):
    """Half the resolution and twice the channels: after swish, each place of a 2x2 block gives a quarter of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        quarter = channels // 2
        self.conv_1, self.conv_2, self.conv_3 = (Conv2D(channels, quarter, 1, stride=2) for _ in range(3))
        self.conv_4 = Conv2D(channels, 2 * channels - 3 * quarter, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        of_places = (self.conv_1(x), self.conv_2(x[..., 1:, 1:]), self.conv_3(x[..., 1:]), self.conv_4(x[..., 1:, :]))
        return torch.cat(of_places, dim=1)


class DoublingSkip(nn.Sequential):
    """Twice the resolution, linearly with the corners at the corners, and half the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Identity(), Conv2D(channels, channels // 2, 1, bias=False)
        )  # the first stands for the upsampling

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self[1](x), scale_factor=2, mode="bilinear", align_corners=True)


class Cell(nn.Module):
    """x plus a tenth of a residual, whose channels squeeze-excite weighs: n c h w -> n c' h' w'."""

    def __init__(
        self, channels: int, scaling: Scaling, primitives: tuple[Primitive, ...], squeeze_excite: bool
    ) -> None:
        super().__init__()
        skips = {"down": HalvingSkip, "none": lambda _: nn.Identity(), "up": DoublingSkip}
        self.skip = skips[scaling](channels)
        outputs = output_channels(channels, scaling)
        self._ops = nn.ModuleList(
            BRANCHES[primitive](outputs if place else channels, outputs, "none" if place else scaling)
            for place, primitive in enumerate(primitives)
        )
        self.se = SqueezeExcite(outputs) if squeeze_excite else None

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for branch in self._ops:
            residual = branch(residual)
        skip = self.skip(x)
        if self.se is None:
            return torch.add(skip, residual, alpha=0.1)
        return torch.addcmul(skip, residual, self.se(residual), value=0.1)


class EncoderCombiner(nn.Module):
    """What the encoder knows of the image, plus a linear function of what the decoder has drawn."""

    def __init__(self, encoder_channels: int, decoder_channels: int) -> None:
        super().__init__()
        self.conv = Conv2D(decoder_channels, encoder_channels, 1)

    def forward(self, encoded: Tensor, decoded: Tensor) -> Tensor:
        result: Tensor = encoded + self.conv(decoded)
        return result


class DecoderCombiner(nn.Module):
    """A linear function of what the decoder has and of a group's latents."""

    def __init__(self, channels: int, latents: int) -> None:
        super().__init__()
        self.conv = Conv2D(channels + latents, channels, 1)

    def forward(self, decoded: Tensor, latents: Tensor) -> Tensor:
        result: Tensor = self.conv(torch.cat([decoded, latents.to(decoded.dtype)], dim=1))
        return result


# ---- flows ----------------------------------------------------------------------------------------------------------


class Flow(nn.Module):
    """z <- z - mu(z), twice: mu of each number is of those before it, first in raster order and then in the mirrored
    one. The log-determinant is 0 (Kingma et al. 2016, arXiv:1606.04934, with shifts alone)."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.cell1, self.cell2 = Shift(latents, mirrored=False), Shift(latents, mirrored=True)

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = self.cell2(self.cell1(z))
        return result


class Shift(nn.Module):
    """z <- z - mu(z) in one order."""

    def __init__(self, latents: int, *, mirrored: bool) -> None:
        super().__init__()
        wide = 6 * latents
        layers = nn.Sequential(
            MaskedConv2D(latents, wide, 3, mirrored=mirrored, strictly=True),
            nn.ELU(),
            MaskedConv2D(wide, wide, 5, mirrored=mirrored, strictly=False, groups=wide),
            nn.ELU(),
        )
        last = MaskedConv2D(wide, latents, 1, mirrored=mirrored, strictly=False, bias=True, length=0.1)
        self.conv, self.mu = nn.ModuleDict({"convz": layers}), nn.ModuleDict({"conv_0": last})

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = z - self.mu["conv_0"](F.elu(self.conv["convz"](z)))
        return result
