"""Missing pixels of images, completed by a VAE that learned from images with holes: importance weights of its draws
(Mattei and Frellsen 2019, arXiv:1812.02633, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from common.wording import an
from stage1_vae.evaluation import draws_at_once, mixed, noise_of_draws
from stage1_vae.holes import seen_pixels
from stage1_vae.model import LikelihoodVAE
from stage1_vae.objectives.importance import normalised_weights
from stage1_vae.vae import VAE

CHOICE = 1  # sets the chance by which draws are chosen apart from that of their noise
BATCH = 64  # images whose latents of all draws are held


class Completed(NamedTuple):
    """Images without holes; seen pixels are as they were."""

    expected: Tensor  # b c H W: the mean of the missing pixels given the seen ones, which has the least squared error
    drawn: Tensor  # m b c H W: mean images of latents drawn given the seen pixels


def check_knows_holes(model: LikelihoodVAE) -> VAE:
    """Raises UserError for a model that was not made for images with holes."""
    if not isinstance(model, VAE) or not model.config.holes:
        raise UserError(
            f"this model is {an(model.kind)} of whole images, expected one that knows missing pixels: train one by "
            "`zellige train-vae --config mnist_holes`, or a recipe of yours with --model.holes true"
        )
    return model


@torch.inference_mode()
def complete(
    model: VAE, images: Tensor, *, draws: int = 500, drawn: int = 0, seed: int = 0, first: int = 0
) -> Completed:
    """Images b c H W in [-1, 1], nan where pixels are missing, completed by `draws` draws of q(z|x) of each.

    expected: sum_k v_k E[x|z_k], with v_k = w_k / sum w. drawn: that many z drawn with these probabilities, each as its
    mean image: sampling importance resampling. Noise is a function of the seed and of the image's number, which is
    `first` of the first one.
    """
    check_knows_holes(model)
    at_once = draws_at_once(model, images)
    parts = [
        complete_few(model, few, range(first + start, first + start + len(few)), draws, drawn, seed, at_once)
        for start, few in zip(range(0, len(images), BATCH), images.split(BATCH), strict=True)
    ]
    return Completed(torch.cat([part.expected for part in parts]), torch.cat([part.drawn for part in parts], dim=1))


def complete_few(
    model: VAE, images: Tensor, numbers: range, draws: int, drawn: int, seed: int, at_once: int
) -> Completed:
    noise = noise_of_draws(model.noise_source(images[:1]), numbers, range(draws), seed, images.device)
    chunks = noise.split(max(1, at_once // len(images)))
    found = [model(images, noise=chunk) for chunk in chunks]
    latents = torch.cat([terms.latents[0] for terms in found])  # k b *shape
    weights = normalised_weights(torch.cat([terms.log_weights for terms in found]).double())  # k b
    expected = torch.zeros_like(images)
    for part, weight in zip(latents.split(len(chunks[0])), weights.split(len(chunks[0])), strict=True):
        means = model.decode(part.flatten(0, 1)).unflatten(0, part.shape[:2])
        expected = expected + torch.einsum("kb,kbchw->bchw", weight.to(means.dtype), means)
    generator = torch.Generator()
    seeds = [mixed(seed, number, 0, CHOICE) for number in numbers]
    uniforms = torch.stack([torch.rand(drawn, generator=generator.manual_seed(each)) for each in seeds], dim=1)
    chosen = chosen_draws(weights, uniforms.to(images.device))  # m b
    kept = latents[chosen, torch.arange(len(images), device=images.device)]  # m b *shape
    pictures = images.new_zeros(0, *images.shape)
    if drawn:
        pictures = model.decode(kept.flatten(0, 1)).unflatten(0, kept.shape[:2])
    seen = seen_pixels(images)
    return Completed(torch.where(seen, images, expected), torch.where(seen, images, pictures))


def chosen_draws(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Numbers of draws, m b in [0, K), each with the probability of its weight, K b, by m b uniform numbers."""
    steps = weights.double().cumsum(dim=0).T.contiguous()  # b K
    found = torch.searchsorted(steps, (uniforms.double() * steps[:, -1]).T.contiguous(), right=True)
    return found.T.clamp(max=len(weights) - 1)
