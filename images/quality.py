"""How far images are from others."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], peak to peak 2; at most 100."""
    return 10 * torch.log10(4 / mse.clamp(min=4e-10))
