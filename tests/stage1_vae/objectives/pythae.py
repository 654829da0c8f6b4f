"""Small models of pythae 0.1.2 (clementchadebec/benchmark_VAE at 6419e21558) as ours, from the files of reference
outputs in `shared/golden_vae`. Its images lie in [0, 1]."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stage1_vae.likelihoods import Bernoulli, BernoulliConfig, Likelihood
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.vae import VAE, VAEConfig
from tests.golden import golden_vae


class Reference(NamedTuple):
    """One variant of a file."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def loss(self, name: str = "loss", call: int = 0) -> Tensor:
        return self.outputs[f"call{call}/{name}" if call else name]

    def assert_close(self, found: Tensor, name: str) -> None:
        torch.testing.assert_close(found, self.outputs[name], rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}")


def reference(name: str, variant: str) -> Reference:
    return Reference(*golden_vae(name).variant(variant)[:4])


class UnitSquares(Likelihood):
    """What pythae calls mse: -factor |x - mean|^2 with a sigmoid before the mean, in [0, 1]; for factor 1/2 a Gaussian
    of variance 1 there, and so 4 in [-1, 1], without its constant."""

    discrete = False

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__(None, 1)
        self.outputs, self.factor = 1, factor

    def log_prob(self, outputs: Tensor, images: Tensor) -> Tensor:
        return -self.factor * (outputs.sigmoid() - (images + 1) / 2).square().sum(dim=(-3, -2, -1))

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid() * 2 - 1


class ScaledBernoulli(Bernoulli):
    """Of the adversarial autoencoder, which weighs its likelihood."""

    factor = 1.0

    def log_prob(self, outputs: Tensor, images: Tensor) -> Tensor:
        return self.factor * super().log_prob(outputs, images)


def model_of(found: Reference, factor: float | None = None) -> VAE:
    """The VAE of these weights. factor: of the squared error, or of the likelihood of binary images."""
    config, weights = found.config, found.weights
    small = DenseConfig(hidden=(config["hidden"],))
    channels, *size = config["input_dim"]
    model = VAE(VAEConfig(latents=config["latent_dim"], channels=channels, encoder=small, decoder=small), tuple(size))
    if config.get("reconstruction_loss") == "bce":
        likelihood: Likelihood = ScaledBernoulli(BernoulliConfig(), channels)
        likelihood.factor = 1.0 if factor is None else factor
    else:
        likelihood = UnitSquares(0.5 if factor is None else factor)
    model.decoder.likelihood = likelihood
    heads = [name for name in ("embedding", "log_var") if f"encoder.{name}.weight" in weights]
    for kind in ("weight", "bias"):
        last = torch.cat([weights[f"encoder.{name}.{kind}"] for name in heads])
        if len(heads) == 1:  # a deterministic autoencoder
            last = torch.cat([last, torch.zeros_like(last)])
        for layer, value in (
            (model.encoder.layers.layers[0], weights[f"encoder.layers.0.0.{kind}"]),
            (model.encoder.layers.layers[1], last),
            (model.decoder.network.layers.layers[0], weights[f"decoder.layers.0.0.{kind}"]),
            (model.decoder.network.layers.layers[1], weights[f"decoder.layers.1.0.{kind}"]),
        ):
            getattr(layer, kind).data.copy_(value)
    return model


def images_of(found: Reference) -> Tensor:
    return found.inputs["x"] * 2 - 1


def draws_of(noise: Tensor) -> Tensor:
    """The original's noise, b ... d, as ours: k b d."""
    return noise.flatten(1, -2).transpose(0, 1) if noise.ndim > 2 else noise.unsqueeze(0)


def assert_gradients(found: Reference, model: VAE, loss: Tensor, of: str = "loss") -> None:
    """Gradients of a loss at biases, under the original's names."""
    latents, biases = found.config["latent_dim"], dict(model.named_parameters())
    names = {
        "decoder.layers.0.0.bias": "decoder.network.layers.layers.0.bias",
        "decoder.layers.1.0.bias": "decoder.network.layers.layers.1.bias",
        "encoder.embedding.bias": "encoder.layers.layers.1.bias",
        "encoder.log_var.bias": "encoder.layers.layers.1.bias",
    }
    compared = 0
    for theirs, ours in names.items():
        if f"grad_{of}/{theirs}" not in found.outputs:
            continue
        (gradient,) = torch.autograd.grad(loss, biases[ours], retain_graph=True, allow_unused=True)
        gradient = torch.zeros_like(biases[ours]) if gradient is None else gradient
        part = {"encoder.embedding.bias": slice(latents), "encoder.log_var.bias": slice(latents, None)}
        found.assert_close(gradient[part.get(theirs, slice(None))], f"grad_{of}/{theirs}")
        compared += 1
    assert compared
