"""Every autoencoder, and every quantizer inside a VQ-VAE, learns eight pictures to a small error in seconds.

The pictures are made of flat tiles of a few colours, so that one code per tile is enough, whatever the codebook: what
is tested is that gradients, losses, codebook updates and schedules together lead there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_vq.autoencoders import AUTOENCODERS, Autoencoder, VQVAEConfig
from tests.stage1_vq.tiny import AUTOENCODER_ROWS, QUANTIZER_ROWS

SIDE, TILE = 16, 8  # pixels
NOISE = 0.05  # standard deviation: without any, the likelihood of a flat tile has no bound
STEPS, CHECK_EVERY, LEARNING_RATE = 400, 20, 5e-3
ERROR = 0.03  # mean squared, as a share of the variance of the pixels; the noise alone has 0.006


def pictures(channels: int) -> Tensor:
    """Eight pictures of 2x2 tiles, each in one of four colours, with a little noise: b c H W."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.tensor([[-0.8, -0.6, 0.7], [0.8, -0.7, -0.5], [0.1, 0.8, -0.8], [0.5, 0.2, 0.9]])[:, :channels]
    tiles = torch.randint(4, (8, SIDE // TILE, SIDE // TILE), generator=generator)
    flat = colours[tiles].permute(0, 3, 1, 2).repeat_interleave(TILE, 2).repeat_interleave(TILE, 3)
    return flat + NOISE * torch.randn(flat.shape, generator=generator)


def share_of_variance(model: Autoencoder, images: Tensor) -> float:
    """Of the pictures' pixels, that is missing in what their codes alone decode to."""
    model.eval()
    with torch.no_grad():
        error = (model.decode(model.encode(images)) - images).square().mean() / images.var()
    model.train()
    return float(error)


def error_after_training(config: Any, steps: int = STEPS) -> float:
    """As soon as it is small enough, or after so many steps."""
    torch.manual_seed(0)
    images = pictures(config.channels)
    model = AUTOENCODERS[config.kind](config, (SIDE, SIDE))
    with torch.no_grad():
        model.initialise([images])
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    error = float("inf")
    for step in range(1, steps + 1):
        model.begin_step(step - 1)
        loss = torch.stack(list(model(images).losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.update()
        if step % CHECK_EVERY == 0 and (error := share_of_variance(model, images)) < ERROR:
            break
    return error


# Of a model with nested tokens most steps see but a few: it learns the pictures too, in some thousands of them.
# TiTok in two stages learns the codes of another tokenizer before it sees pixels, and from nothing next to nothing.
# FlexTok's decoder knows these pictures by themselves, nearly always, however noisy they are, and is slow to ask the
# tokens: autoencoders/test_flextok.py has pictures that noise hides.
OF_ALL_CODES = [
    row
    for row, config in AUTOENCODER_ROWS.items()
    if getattr(config, "nested", None) is None and config.kind not in ("titok_two_stage", "flextok")
]


@pytest.mark.parametrize("row", OF_ALL_CODES)
def test_every_autoencoder_learns_eight_pictures(row):
    assert error_after_training(AUTOENCODER_ROWS[row]) < ERROR


SLOWER = {"ibq, other weights": 2000, "binary_mapper": 2000}  # steps; their codes are soft, or drawn, at first
# Whose bits may say 0.1 nats: too little for four colours.
OF_FEW_NATS = {"binary_mapper, no projection"}


@pytest.mark.parametrize("row", [row for row in QUANTIZER_ROWS if row not in OF_FEW_NATS])
def test_every_quantizer_learns_eight_pictures(row):
    config = VQVAEConfig(width=16, residual_width=16, residual_blocks=1, quantizer=QUANTIZER_ROWS[row])
    assert error_after_training(config, SLOWER.get(row, STEPS)) < ERROR


def test_a_model_that_does_not_learn_is_found_out():
    """The bound means something: pictures in their mean colour miss it by far, and so does a model without training."""
    images = pictures(3)
    assert ((images.mean((0, 2, 3), keepdim=True) - images).square().mean() / images.var()) > 10 * ERROR
    config = VQVAEConfig(width=16, residual_width=16, residual_blocks=1, quantizer=QUANTIZER_ROWS["nearest"])
    torch.manual_seed(0)
    assert share_of_variance(AUTOENCODERS["vqvae"](config, (SIDE, SIDE)), images) > 10 * ERROR
