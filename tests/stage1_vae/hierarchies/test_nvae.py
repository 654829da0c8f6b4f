from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stage1_vae.hierarchies.base import normal_kl
from stage1_vae.hierarchies.nvae import NVAE, normal
from stage1_vae.hierarchies.nvae_cells import raster_mask
from stage1_vae.likelihoods.gaussian import log_density
from stage1_vae.objectives import Balanced, BalancedConfig, TrainingFacts
from stage1_vae.objectives.balanced import alphas, balance
from stage1_vae.objectives.spectral import SpectralNorms, normalised
from stage1_vae.objectives.terms import Terms, total_kl
from tests.golden import GoldenVAE, golden_vae, part
from tests.stage1_vae.hierarchies.nvae_published import model_of, noise_of
from tests.stage1_vae.likelihoods.test_logistic_mixture import published_log_p

FILES = ["nvae_dmol", "nvae_iaf", "nvae_normal"]


class Said:
    """What networks put out in a pass: parameters of posteriors and of priors, top first, and of the likelihood."""

    def __init__(self, model: NVAE) -> None:
        self.posteriors: list[Tensor] = []
        self.priors: list[Tensor] = []
        self.outputs: Tensor
        for sampler in model.enc_sampler:
            sampler.register_forward_hook(lambda *given: self.posteriors.append(given[-1]))
        for sampler in model.dec_sampler:
            sampler.register_forward_hook(lambda *given: self.priors.append(given[-1]))
        model.image_conditional.register_forward_hook(lambda *given: setattr(self, "outputs", given[-1]))


def published_log_likelihood(model: NVAE, outputs: Tensor, images: Tensor) -> Tensor:
    """b: by the likelihoods of the public code, which are not ours where they are not sound."""
    if model.config.likelihood.kind == "bernoulli":
        return model.likelihood.log_prob(outputs[..., 2:-2, 2:-2], images)
    if model.config.likelihood.kind == "logistic_mixture":
        return published_log_p(model.likelihood.parts(outputs), images, 1 / 255, math.log(2 / 255), 0.99).sum((1, 2))
    mean, raw = (5 * (part / 5).tanh() for part in outputs.chunk(2, dim=1))
    return log_density(images, mean, (raw.exp() + 0.01).log()).sum((1, 2, 3))


def run(golden: GoldenVAE, model: NVAE, prefix: str) -> tuple[Terms, Said, Tensor]:
    images = golden.inputs["x"] * 2 - 1
    padding = model.config.padding
    images = images[..., padding : images.shape[-2] - padding, padding : images.shape[-1] - padding]
    said = Said(model)
    terms = model(images, noise=noise_of(golden, prefix, model))
    return terms, said, images


@pytest.mark.parametrize("name", FILES)
def test_golden_pass(name: str):
    golden = golden_vae(name)
    model = model_of(golden).eval()
    with torch.no_grad():
        terms, said, images = run(golden, model, "eval")
    golden.check("eval/logits", said.outputs)
    for place, said_of_posterior in enumerate(said.posteriors):
        golden.check(f"eval/q_param/{place}", said_of_posterior)
        golden.check(f"eval/z/{place}", terms.latents[place][0])
        by_channel = terms.kl[place].unflatten(1, model.group_shapes[place]).sum((2, 3)).mean(0)
        golden.check(f"eval/kl_diag/{place}", by_channel)
    for place, said_of_prior in enumerate(said.priors):
        golden.check(f"eval/p_param/{place + 1}", said_of_prior)
    golden.check("eval/kl_all", torch.stack([group.sum(-1) for group in terms.kl], dim=1))
    log_q = torch.stack([group[0].sum(-1) for group in terms.log_posterior]).sum(0)
    log_p = torch.stack([group[0].sum(-1) for group in terms.log_prior]).sum(0)
    golden.check("eval/log_q", log_q)
    golden.check("eval/log_p", log_p)
    log_likelihood = published_log_likelihood(model, said.outputs, images)
    golden.check("eval/recon_loss", -log_likelihood)
    golden.check("eval/nelbo", total_kl(terms) - log_likelihood)
    golden.check("eval/log_iw", log_likelihood - log_q + log_p)


@pytest.mark.parametrize("name", FILES)
def test_golden_samples(name: str):
    golden = golden_vae(name)
    model = model_of(golden).eval()
    for number, temperature in enumerate(golden.config["temps"]):
        noise = model.split(noise_of(golden, f"sample{number}", model)[0])
        with torch.no_grad():
            said = Said(model)
            model.generate(len(noise[0]), lambda place, prior: prior.at_temperature(temperature).draw(noise[place]))  # noqa: B023
        golden.check(f"sample{number}/logits", said.outputs)


@pytest.mark.parametrize("name", FILES)
def test_golden_training_step(name: str):
    """Loss, balance, regularisation, gradients and running averages of one step."""
    golden = golden_vae(name)
    config, model = golden.config, model_of(golden).train()
    terms, said, images = run(golden, model, "train")
    golden.check("train/logits", said.outputs)
    kl = torch.stack([group.sum(-1) for group in terms.kl])  # l b
    golden.check("train/kl_all", kl.T)
    alpha = alphas([math.prod(shape) for shape in model.group_shapes])
    golden.check("train/alpha_i", alpha)
    gamma = balance(kl, alpha) if config["kl_coeff"] < 1 else torch.ones_like(alpha)
    golden.check("train/kl_coeffs", gamma)
    balanced = config["kl_coeff"] * (gamma[:, None] * kl).sum(0)
    golden.check("train/balanced_kl", balanced)
    log_likelihood = published_log_likelihood(model, said.outputs, images)
    golden.check("train/recon_loss", -log_likelihood)
    loss = (balanced - log_likelihood).mean()
    golden.check("train/loss_no_reg", loss)

    found = model.regularised()
    norms = SpectralNorms(found.matrices)
    first = len(model.group_shapes)  # vectors come after the latents' noise: u, then v, of each shape
    for number in range(len(norms.places)):
        norms.get_buffer(f"left_{number}").copy_(normalised(golden.inputs[f"train/eps{first + 2 * number}"]))
    spectral = norms(found.matrices, 40)
    golden.check("train/norm_loss", spectral)
    scales = torch.stack([gain.abs().max() for gain in found.gains]).sum()
    golden.check("train/bn_loss", scales)
    loss = loss + config["wdn"] * (spectral + scales)
    golden.check("train/loss", loss)
    loss.backward()
    golden.check("train/norm_loss_second_call", norms(found.matrices, 4))
    gradients = part(golden.outputs, "train/grad/")
    for weight in gradients:
        golden.check(f"train/grad/{weight}", model.get_parameter(weight).grad)
    assert gradients
    model.after_step()
    for buffer in part(golden.outputs, "train/after/"):
        golden.check(f"train/after/{buffer}", model.get_buffer(buffer))


def test_golden_parts():
    golden = golden_vae("nvae_parts")
    inputs, config = golden.inputs, golden.config
    posterior, prior = normal(inputs["mu_q"], inputs["ls_q"]), normal(inputs["mu_p"], inputs["ls_p"])
    golden.check("dist/q_mu", posterior.mean)
    golden.check("dist/q_sigma", posterior.log_scale.exp())
    golden.check("dist/q_sigma_t", posterior.at_temperature(config["t"]).log_scale.exp())
    golden.check("dist/kl", normal_kl(posterior, prior))
    golden.check("dist/log_q", posterior.log_density(inputs["z"]))

    sizes = [4**scale for scale, count in enumerate(config["groups_per_scale"][::-1]) for _ in range(count)]
    alpha, kl = alphas(sizes), inputs["kl_all"].T
    golden.check("balancer/coeff_square", alpha)
    for weight in config["coeffs"]:
        gamma = balance(kl, alpha) if weight < 1 else torch.ones_like(alpha)
        golden.check(f"balancer/coeffs_{weight}", gamma)
        golden.check(f"balancer/kl_{weight}", weight * (gamma[:, None] * kl).sum(0))

    shares = {"warmup_share": config["total"] / 5000, "constant_share": config["const"] / 5000}
    objective = Balanced(
        BalancedConfig(**shares, smallest_weight=config["min_coeff"]), TrainingFacts(1, 5000, (1,), ())
    )
    golden.check("kl_coeff", torch.tensor([objective.weight(step) for step in config["steps"]]))

    for ending, mirrored in (("plain", False), ("mirror", True)):
        masks = {
            "z3": raster_mask(3, 18, 3, mirrored=mirrored, strictly=True),
            "dw5": raster_mask(18, 18, 5, mirrored=mirrored, strictly=False, depthwise=True),
            "k1": raster_mask(18, 3, 1, mirrored=mirrored, strictly=False),
        }
        for kind, mask in masks.items():
            golden.check(f"ar_mask/{kind}_{ending}", mask)
