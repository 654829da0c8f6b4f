"""Posteriors inside published VAEs: their latents, losses and gradients from our parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_vae.networks.dense import DenseConfig, DenseLayers
from stage1_vae.posteriors.von_mises_fisher import kl_to_uniform
from tests.golden import GoldenVAE, golden_vae
from tests.stage1_vae.posteriors.test_von_mises_fisher import published_noise, published_reflection


def networks(reference: GoldenVAE, heads: tuple[str, str]) -> tuple[DenseLayers, DenseLayers]:
    """Encoder and decoder with the published weights; heads: of the encoder, whose outputs stand side by side."""
    weights = reference.weights
    config = DenseConfig(hidden=(reference.config["hidden"],))
    sizes = [len(weights[f"encoder.{head}.bias"]) for head in heads]
    encoder, decoder = DenseLayers(16, sum(sizes), config), DenseLayers(reference.config["latent_dim"], 16, config)
    for layer, names in (
        (encoder.layers[0], ["encoder.layers.0.0"]),
        (encoder.layers[1], [f"encoder.{head}" for head in heads]),
        (decoder.layers[0], ["decoder.layers.0.0"]),
        (decoder.layers[1], ["decoder.layers.1.0"]),
    ):
        layer.weight.data = torch.cat([weights[f"{name}.weight"] for name in names])
        layer.bias.data = torch.cat([weights[f"{name}.bias"] for name in names])
    return encoder, decoder


def check_loss(
    reference: GoldenVAE, networks: tuple[DenseLayers, DenseLayers], heads: tuple[str, str], latents: Tensor, kl: Tensor
) -> Tensor:
    """latents: b d; kl: b, its estimate. Compares what the decoder makes of them; their loss, the batch's mean."""
    encoder, decoder = networks
    images = reference.inputs["x"].flatten(1)
    logits = decoder(latents)
    if reference.config.get("reconstruction_loss") == "bce":
        reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(-1)
    else:
        reconstruction = 0.5 * (logits.sigmoid() - images).square().sum(-1)
    loss = (reconstruction + kl).mean()
    reference.check("z", latents)
    reference.check("recon_x", logits.sigmoid().view(-1, 1, 4, 4))
    reference.check("recon_loss", reconstruction.mean())
    reference.check("reg_loss", kl.mean())
    reference.check("loss", loss)
    loss.backward()
    sizes = [len(reference.weights[f"encoder.{head}.bias"]) for head in heads]
    for head, gradient in zip(heads, encoder.layers[1].bias.grad.split(sizes), strict=True):
        reference.check(f"grad_loss/encoder.{head}.bias", gradient)
    for place in range(2):
        reference.check(f"grad_loss/decoder.layers.{place}.0.bias", decoder.layers[place].bias.grad)
    return loss


@pytest.mark.parametrize("variant", ["svae", "svae_bce"])
def test_the_hyperspherical_vae(variant: str):
    """Theirs learns a concentration for each image, and leaves out the gradient of what its rejection keeps. Its mean
    directions and reflections are ours where the first number of the mean direction is negative."""
    reference = golden_vae("pythae_vamp_svae").variant(variant)
    heads = ("embedding", "log_concentration")
    encoder, decoder = networks(reference, heads)
    features = encoder(reference.inputs["x"].flatten(1))
    embedding, log_concentration = features[:, :-1], features[:, -1:]
    reference.check("enc/embedding", embedding)
    reference.check("enc/log_concentration", log_concentration)
    kappa = F.softplus(log_concentration) + 1
    noise = published_noise(reference.inputs, "", kappa)
    latents = published_reflection(noise, F.normalize(embedding, dim=-1))
    kl = kl_to_uniform(embedding.shape[-1], kappa)[:, 0].float()
    check_loss(reference, (encoder, decoder), heads, latents, kl)
