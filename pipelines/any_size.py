"""Images of any size through an autoencoder, whose sides are multiples of its stride."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from codes.spec import Codes
from stage1_vq.autoencoders import Autoencoder


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Images as their codes tell them: b c H W in [-1, 1], any size -> the same shape, float32."""
    height, width = images.shape[-2:]
    return autoencoder.decode(encode_any_size(autoencoder, images)).float()[..., :height, :width]


@torch.no_grad()
def encode_any_size(autoencoder: Autoencoder, images: Tensor) -> Codes:
    """Codes of b c H W in [-1, 1], its last column and row repeated up to a multiple of the stride."""
    height, width = images.shape[-2:]
    device = next(autoencoder.parameters()).device
    padding = (0, -width % autoencoder.stride, 0, -height % autoencoder.stride)
    padded = F.pad(images.to(device), padding, mode="replicate")
    return autoencoder.encode(in_one_layout(padded))


def in_one_layout(images: Tensor) -> Tensor:
    """The images, always in the same layout: a convolution rounds otherwise when channels lie innermost, and one vector
    in 100,000 or so, between two codes, would fall to the other."""
    return images.clone(memory_format=torch.contiguous_format)
