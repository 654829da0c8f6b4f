"""How near an image is to another: PSNR, SSIM, MS-SSIM, LPIPS, each for every pair by itself."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.float32 import float32_island
from metrics.lpips import LPIPS
from metrics.lpips import SMALLEST_SIDE as LPIPS_SIDE

SSIM_WINDOW = 11  # pixels along each side
BORDER = SSIM_WINDOW // 2
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of MS-SSIM, from fine to coarse
MS_SSIM_SIDE = SSIM_WINDOW * 2 ** (len(SCALES) - 1)  # pixels: at the coarsest scale there is still a window


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], peak to peak 2; at most 100."""
    return 10 * torch.log10(4 / mse.clamp(min=4e-10))


def decibels(original: np.ndarray, reconstruction: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio of 8-bit images; None where they are equal."""
    error = np.mean((original.astype(np.float64) - reconstruction.astype(np.float64)) ** 2)
    return None if error == 0 else float(10 * np.log10(255**2 / error))


class Similarity(NamedTuple):
    """Of images, around every pixel, b c H W each."""

    ssim: Tensor
    contrast: Tensor  # and structure: SSIM without its luminance


def similarity(decoded: Tensor, images: Tensor) -> Similarity:
    """Windows of 11x11, with Gaussian weights of standard deviation 1.5, around every pixel, the image mirrored at its
    border. images, decoded: b c H W in [-1, 1], sides of 11 at least."""
    distances = torch.arange(SSIM_WINDOW, dtype=torch.float32, device=images.device) - BORDER
    weights = torch.softmax(-(distances**2) / (2 * 1.5**2), dim=0)
    x, y = (F.pad(pixels.float(), 4 * [BORDER], mode="reflect") for pixels in (decoded, images))
    b, c = x.shape[:2]
    each = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2).unsqueeze(1)
    with float32_island(images.device.type):
        means = F.conv2d(F.conv2d(each, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = means.view(5, b, c, *means.shape[2:])
    variance_x, variance_y = mean_xx - mean_x**2, mean_yy - mean_y**2
    for_luminance, for_contrast = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # constants of the paper; pixels span 2
    luminance = (2 * mean_x * mean_y + for_luminance) / (mean_x**2 + mean_y**2 + for_luminance)
    contrast = (2 * (mean_xy - mean_x * mean_y) + for_contrast) / (variance_x + variance_y + for_contrast)
    return Similarity(luminance * contrast, contrast)


def ssim(decoded: Tensor, images: Tensor) -> Tensor | None:
    """Structural similarity of each image, `b`, at most 1, for images `b c H W` in [-1, 1] (Wang et al. 2004), as
    torchmetrics has it where it is told data_range=2: left out, that is the range of the values in the batch, and an
    image's figure depends on its neighbours. None for images smaller than a window."""
    if min(images.shape[-2:]) < SSIM_WINDOW:
        return None
    return similarity(decoded, images).ssim.mean(dim=(1, 2, 3))


def ms_ssim(decoded: Tensor, images: Tensor) -> Tensor | None:
    """Structural similarity at five scales (Wang, Simoncelli and Bovik 2003) of each image, `b`, 0 to 1, for images
    `b c H W` in [-1, 1]: contrast and structure at all of them, luminance at the coarsest. As torchmetrics has it:
    mirrored at the border, contrasts averaged without it, means below 0 taken for 0. None for images with a side below
    176 pixels, whose coarsest scale is smaller than a window."""
    if min(images.shape[-2:]) < MS_SSIM_SIDE:
        return None
    x, y = decoded.float(), images.float()
    product = torch.ones(len(x), device=x.device)
    for scale, exponent in enumerate(SCALES):
        found = similarity(x, y)
        last = scale == len(SCALES) - 1
        seen = found.ssim if last else found.contrast[..., BORDER:-BORDER, BORDER:-BORDER]
        product = product * seen.mean(dim=(1, 2, 3)).relu() ** exponent
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return product


@torch.no_grad()
def lpips(network: LPIPS, decoded: Tensor, images: Tensor) -> Tensor | None:
    """Perceptual distance of each image, `b`, 0 for equal ones, for images `b c H W` in [-1, 1], c 1 or 3, on VGG16:
    figures on AlexNet, the default of the package lpips and of torchmetrics, are others. None below 16 pixels."""
    if min(images.shape[-2:]) < LPIPS_SIDE:
        return None
    with float32_island(images.device.type):
        return network(decoded.float(), images.float())
