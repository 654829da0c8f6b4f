from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from common.errors import UserError
from pipelines.options import read_recipe
from stage1_vae.hierarchies.base import Normal, normal_kl
from stage1_vae.hierarchies.nvae import NVAE, NVAEConfig, normal
from stage1_vae.hierarchies.nvae_cells import Cell, Flow, raster_mask
from stage1_vae.likelihoods import BernoulliConfig
from stage1_vae.likelihoods.gaussian import log_density
from stage1_vae.models import build_model
from stage1_vae.networks.batch_norm import BatchNorm, batch_norms
from stage1_vae.objectives import Balanced, BalancedConfig, TrainingFacts
from stage1_vae.objectives.balanced import alphas, balance
from stage1_vae.objectives.spectral import SpectralNorms, normalised
from stage1_vae.objectives.terms import Terms, total_kl
from stage1_vae.train import Stage1VAEConfig
from tests.golden import GoldenVAE, golden_vae, part
from tests.stage1_vae.hierarchies.nvae_published import model_of, noise_of
from tests.stage1_vae.likelihoods.test_logistic_mixture import published_log_p

SMALL = NVAEConfig(
    channels=1, latents=1, scales=2, groups=2, encoder_width=2, decoder_width=4, blocks=1, preprocess_cells=1,
    postprocess_cells=1, encoder_cells=1, decoder_cells=1, likelihood=BernoulliConfig(),
)  # fmt: skip
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


# ---- without the golden files ---------------------------------------------------------------------------------------


def scrambled(module: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for weight in module.parameters():
        weight.data += 0.3 * torch.randn(weight.shape)
    return module


@pytest.mark.parametrize("training", [True, False])
def test_cells_that_double_the_resolution_may_wait_with_it(training: bool):
    """Against the order of the paper, upsampling first: outputs, gradients, and the averages of batch norm."""
    cell = scrambled(Cell(6, "up", ("mconv_e3k5g0",), squeeze_excite=True)).train(training)
    slow = copy.deepcopy(cell)
    branch, skip = slow._ops[0], slow.skip

    def upsampled_first(x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        for layer in list(branch.conv)[1:]:
            x = layer(x)
        return x

    x = torch.randn(3, 6, 4, 4, requires_grad=True)
    residual = upsampled_first(x)
    larger = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    expected = skip[1](larger) + 0.1 * residual * slow.se(residual)
    found = cell(x)
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found.sin().sum(), [x, *cell.parameters()])
    theirs = torch.autograd.grad(expected.sin().sum(), [x, *slow.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    for one, other in zip(cell.modules(), slow.modules(), strict=True):
        if isinstance(one, BatchNorm):
            one.take_noted(1.0)
            other.take_noted(1.0)
            torch.testing.assert_close(one.running_var, other.running_var)
            torch.testing.assert_close(one.running_mean, other.running_mean)


def test_a_flow_moves_each_number_by_those_before_it_alone():
    """Hence its log-determinant is 0. Twice: in raster order, then from the end."""
    flow = scrambled(Flow(2))
    z = torch.randn(1, 2, 3, 3)
    in_order = [movedim(jacobian(cell, z)) for cell in (flow.cell1, flow.cell2)]
    torch.testing.assert_close(in_order[0].diag(), torch.ones(18))
    assert not in_order[0].triu(1).any()
    assert in_order[0].tril(-1).any()
    mirrored = in_order[1].unflatten(0, (9, 2)).unflatten(2, (9, 2)).flip(0, 2).flatten(0, 1).flatten(1)
    torch.testing.assert_close(mirrored.diag(), torch.ones(18))
    assert not mirrored.triu(1).any()
    assert mirrored.tril(-1).any()
    assert abs(float(torch.linalg.slogdet(movedim(jacobian(flow, z)))[1])) < 1e-4


def movedim(of_maps: Tensor) -> Tensor:
    """1 c h w 1 c h w -> numbers by numbers, in the order of places and, of one place, channels."""
    return of_maps[0, :, :, :, 0].permute(1, 2, 0, 4, 5, 3).reshape(18, 18)


def test_a_flow_is_part_of_the_density():
    """log q of a draw is that of the Gaussian before the flow, and the KL the difference of the two densities."""
    model = scrambled(NVAE(replace(SMALL, flows=2), (4, 4))).eval()
    images = torch.rand(3, 1, 4, 4).round() * 2 - 1
    with torch.no_grad():
        noise = torch.randn(1, 3, *model.shape)
        terms = model(images, noise=noise)
        assert terms.exact_kl == (None,) * len(model.group_shapes)
        plain = -0.5 * noise[0].square() - 0.5 * math.log(2 * math.pi)
        for place, (part_of_noise, log_q) in enumerate(zip(model.split(plain), terms.log_posterior, strict=True)):
            log_scale = part_of_noise.flatten(1) - log_q[0]
            assert (log_scale.exp() > 0.01).all(), place  # the floor
            assert (log_scale.exp() < math.exp(5) + 0.02).all(), place
        before = [flow.register_forward_pre_hook(lambda *given: seen.append(given[1][0])) for flow in model.nf_cells]
        seen: list[Tensor] = []
        model(images, noise=noise)
        assert len(seen) == len(before) == 2 * len(model.group_shapes)
        assert not torch.equal(seen[0], terms.latents[0][0])


def test_padding_is_black_and_cut_off_again():
    model = NVAE(replace(SMALL, padding=2), (28, 28)).eval()
    seen: list[Tensor] = []
    model.stem.register_forward_pre_hook(lambda *given: seen.append(given[1][0]))
    outputs = model.generate(2, lambda _, prior: prior.mean)
    assert outputs.shape == (2, 1, 28, 28)
    model.features(torch.ones(1, 1, 28, 28))
    assert seen[0].shape == (1, 1, 32, 32)
    assert (seen[0][..., 2:30, 2:30] == 1).all()
    assert seen[0].sum() == 28**2 - (32**2 - 28**2)


def test_the_first_prior_is_a_little_wider_than_standard():
    """Its floor is added, and a temperature multiplies both."""
    model = NVAE(SMALL, (4, 4))
    seen: list[Normal] = []
    model.generate(2, lambda _, prior: seen.append(prior) or prior.mean)
    torch.testing.assert_close(seen[0].log_scale.exp(), torch.full_like(seen[0].mean, 1.01))
    torch.testing.assert_close(seen[0].at_temperature(0.5).log_scale.exp(), torch.full_like(seen[0].mean, 0.505))
    assert not seen[0].mean.any()


def test_averages_fit_a_temperature():
    """Those of what the decoder computes of cold samples: other ones, and the encoder's as they were."""
    model = scrambled(NVAE(SMALL, (4, 4))).eval()
    before = [norm.running_var.clone() for norm in batch_norms(model)]
    model.fit_averages(0.5, batches=4, count=8, generator=torch.Generator().manual_seed(0))
    moved = [not torch.equal(norm.running_var, old) for norm, old in zip(batch_norms(model), before, strict=True)]
    of_decoder = {id(module) for part in (model.dec_tower, model.post_process) for module in part.modules()}
    assert moved == [id(norm) in of_decoder for norm in batch_norms(model)]
    assert not model.training
    cold = model.draw_latents(64, torch.Generator().manual_seed(1), temperatures=0.5)
    found: list[Tensor] = []
    model.post_process[0].register_forward_pre_hook(lambda *given: found.append(given[1][0]))
    model.pixels(cold, "mean")
    first = next(module for module in model.post_process[0].modules() if isinstance(module, BatchNorm))
    torch.testing.assert_close(first.running_mean, found[0].mean((0, 2, 3)), rtol=0.3, atol=0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 1, "scales": 1}, "at least 2 in all"),
        ({"encoder_width": 1}, "encoder_width=1, expected at least 2"),
        ({"cells": "res_elu"}, "cells=res_elu, expected one of res_mbconv"),
        ({"latents": 0}, "latents=0, expected at least 1"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)


def test_sizes_that_cannot_be_halved_are_refused():
    with pytest.raises(UserError, match=r"cannot halve 28x28 pixels .* 3 times, .* multiples of 8: give another"):
        NVAE(replace(SMALL, scales=3), (28, 28))


@pytest.mark.parametrize(
    "recipe", ["nvae_mnist", "nvae_mnist_full", "nvae_cifar10", "nvae_cifar10_full", "nvae_celeba64_full"]
)
def test_recipes_build(recipe: str):
    config, _ = read_recipe("train-vae", Stage1VAEConfig, "vae", ["--config", recipe, "--data.path", "somewhere"])
    with torch.device("meta"):
        model = build_model(config.model, (config.data.height, config.data.width), None)
    assert len(model.group_shapes) == sum(config.model.groups_of_scales)
    assert config.train.optimizer == "adamax"
