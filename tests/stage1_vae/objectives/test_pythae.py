"""Losses and gradients of pythae through the public objectives. Where they say something else, the test says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stage1_vae.objectives.importance import combined_bound, importance_bound, normalised_weights
from stage1_vae.objectives.information import mmd
from stage1_vae.objectives.terms import sampled_kl
from stage1_vae.vae import VAE
from tests.stage1_vae.objectives.pythae import (
    Reference,
    assert_gradients,
    draws_of,
    images_of,
    model_of,
    reference,
)
from tests.stage1_vae.objectives.reference import objective


def assert_encoder_and_decoder(found: Reference, model: VAE, latents: Tensor) -> None:
    """latents: k b d; theirs and what they decode to are of each image's first draw."""
    posterior = model.posterior(images_of(found))
    found.assert_close(posterior.mean, "enc/embedding")
    if "enc/log_covariance" in found.outputs:
        found.assert_close(2 * posterior.log_scale, "enc/log_covariance")
    found.assert_close(latents[0], "z")
    found.assert_close((model.decoder.mean(latents[0]) + 1) / 2, "recon_x")


@pytest.mark.parametrize("variant", ["vae_mse", "vae_bce", "beta_mse", "beta_bce", "disentangled"])
def test_vae_beta_vae_and_capacity(variant: str):
    found = reference("pythae_vae", variant)
    model, images, config = model_of(found), images_of(found), found.config
    settings = {"beta": config.get("beta", 1.0)}
    if variant == "disentangled":  # their C grows by epochs, and without an epoch is that of the last but one
        settings |= {"capacity": config["C"], "capacity_steps": config["warmup_epoch"] + 1}
    calls = config.get("calls", [{}])
    for number, call in enumerate(calls):
        noise = draws_of(found.inputs[f"call{number}.eps0" if number else "eps0"])
        step = call.get("epoch", config.get("warmup_epoch", 0))
        loss, metrics, *_ = objective("elbo", **settings).loss(model, images, step, noise)
        prefix = f"call{number}/" if number else ""
        found.assert_close(loss, f"{prefix}loss")
        found.assert_close(-metrics["log_likelihood"], f"{prefix}recon_loss")
        if variant != "disentangled":
            found.assert_close(metrics["kl"], f"{prefix}reg_loss")
        if not number:
            assert_gradients(found, model, loss)
            assert_encoder_and_decoder(found, model, model(images, noise=noise).latents[0])


@pytest.mark.parametrize("variant", ["info_imq", "info_rbf", "info_scales", "wae_imq", "wae_rbf"])
def test_infovae_and_wae(variant: str, monkeypatch: pytest.MonkeyPatch):
    found = reference("pythae_mmd", variant)
    config, wae = found.config, variant.startswith("wae")
    # Their WAE has a squared error of any factor, without the half.
    model, images = model_of(found, config.get("reconstruction_loss_scale", 1.0) if wae else None), images_of(found)
    settings = {
        "kernel": config["kernel_choice"],
        "bandwidth": config.get("kernel_bandwidth", 1.0),
        "alpha": 1.0 if wae else config["alpha"],
        "discrepancy_weight": config["reg_weight"] if wae else config["lbd"],
        "deterministic": wae,
        **({"scales": tuple(config["scales"])} if config.get("scales") else {}),
    }
    noise = None if wae else draws_of(found.inputs["eps0"])
    prior = found.inputs["eps0" if wae else "eps1"]
    monkeypatch.setattr(model.prior, "sample", lambda count: prior)
    one = objective("info", **settings)
    loss, metrics, *_ = one.loss(model, images, 0, noise)
    found.assert_close(loss, "loss")
    found.assert_close(metrics["mmd"], "mmd_loss")
    found.assert_close(-metrics["log_likelihood"], "recon_loss")
    if not wae:
        found.assert_close(metrics["kl"], "reg_loss")
    assert_gradients(found, model, loss)
    latents = model(images, draws=0).latents[0] if wae else model(images, noise=noise).latents[0]
    assert_encoder_and_decoder(found, model, latents)
    found.assert_close(
        mmd(found.outputs["z"], prior, one.config.kernel, one.config.bandwidth, one.config.scales), "mmd_loss"
    )


@pytest.mark.parametrize("variant", ["iwae", "iwae_bce", "miwae", "ciwae", "piwae"])
def test_importance_weighted(variant: str):
    """Their losses are surrogates whose gradient alone is the bound's: sum of normalised weights times log weights.
    MIWAE and PIWAE average over number_samples bounds of number_gradient_estimates draws: the names are exchanged."""
    found = reference("pythae_iwae", variant)
    model, images, config = model_of(found), images_of(found), found.config
    noise = draws_of(found.inputs["eps0"])
    several = "number_gradient_estimates" in config
    settings = {
        "draws": config["number_gradient_estimates"] if several else config["number_samples"],
        "estimates": config["number_samples"] if several else 1,
        "elbo_share": config.get("beta", 0.0),
        "generator_over_all": variant == "piwae",
    }
    loss = objective("importance", **settings).loss(model, images, 0, noise).loss
    terms = model(images, noise=noise)
    log_weights, estimates, share = terms.log_weights, settings["estimates"], settings["elbo_share"]

    def surrogate(groups: int) -> Tensor:
        parts = log_weights.unflatten(0, (-1, groups))
        weighted = (normalised_weights(parts).detach() * parts).sum(0).mean(0)
        return -(weighted if not share else share * log_weights.mean(0) + (1 - share) * weighted).mean()

    if variant != "piwae":
        assert_gradients(found, model, loss)
        found.assert_close(surrogate(estimates), "loss")
    else:
        found.assert_close(surrogate(estimates), "encoder_loss")
        found.assert_close(surrogate(1), "decoder_loss")
        assert_gradients(found, model, -combined_bound(log_weights, estimates).mean(), "encoder_loss")
        assert_gradients(found, model, -importance_bound(log_weights).mean(), "decoder_loss")
        names = [name for name, _ in model.named_parameters()]
        ours = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        latents = config["latent_dim"]
        found.assert_close(ours["decoder.network.layers.layers.1.bias"], "grad_decoder_loss/decoder.layers.1.0.bias")
        found.assert_close(ours["decoder.network.layers.layers.0.bias"], "grad_decoder_loss/decoder.layers.0.0.bias")
        head = ours["encoder.layers.layers.1.bias"]
        found.assert_close(head[:latents], "grad_encoder_loss/encoder.embedding.bias")
        found.assert_close(head[latents:], "grad_encoder_loss/encoder.log_var.bias")
    of_draws = -terms.log_likelihood.mean(1)  # theirs are of each draw, or, of IWAE, their mean
    shape = found.outputs["recon_loss"].shape
    found.assert_close(of_draws.reshape(shape) if shape else of_draws.mean(), "recon_loss")
    kl = sampled_kl(terms.log_prior[0], terms.log_posterior[0]).sum(-1).mean()
    torch.testing.assert_close(kl, found.outputs["reg_loss"].mean(), rtol=1e-5, atol=1e-5)
    assert_encoder_and_decoder(found, model, terms.latents[0])
