from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from stage1_vq.losses.adversarial import (
    AdversarialConfig,
    Adversary,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    passed_to,
    r1_penalty,
)
from stage1_vq.losses.discriminators import (
    FeatureDiscriminatorConfig,
    PatchGANConfig,
)
from tests.golden import golden
from tests.stage1_vq.losses.player import (
    ALWAYS,
    SIDE,
    STEPS,
    images,
    make_adversary,
)

# ---- as published ---------------------------------------------------------------------------------------------------


def published(factor: float = 1.0) -> tuple[Adversary, nn.Parameter, Any]:
    file = golden("taming_ganloss")
    patches = PatchGANConfig(width=file.config["disc_ndf"], layers=file.config["disc_num_layers"])
    config = AdversarialConfig(
        weight=file.config["disc_weight"], start=file.config["disc_start"] / STEPS, warmup=0.0, ramp=0.0,
        discriminator=patches, discriminator_factor=factor * file.config["disc_factor"],
    )  # fmt: skip
    adversary = Adversary(config, 3, (SIDE, SIDE), STEPS)
    adversary.discriminator.load_state_dict(
        {name.removeprefix("discriminator."): weight for name, weight in file.weights.items()}
    )
    return adversary, nn.Parameter(file.inputs["last_layer"]), file


def test_the_generators_loss_and_its_adaptive_weight_agree_with_the_published_ones():
    adversary, last_layer, (config, _, inputs, outputs) = published()

    def passes(step: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
        reconstruction = F.conv2d(inputs["features"], last_layer, padding=1)
        nll = (inputs["x"] - reconstruction).abs().mean()
        losses, figures = adversary.losses(reconstruction, nll, last_layer, step)
        return losses, figures, nll, reconstruction

    losses, figures, nll, reconstruction = passes(config["disc_start"])
    total = nll + losses["adversarial_loss"] + config["codebook_weight"] * config["codebook_loss"]
    found = {
        "recon": reconstruction,
        "g/nll_loss": nll,
        "g/d_weight": figures["adversarial_weight"],
        "g/g_loss": losses["adversarial_loss"] / figures["adversarial_weight"],
        "g/total_loss": total,
        "g/grad_last_layer": torch.autograd.grad(total, last_layer)[0],
    }
    assert passes(config["disc_start"] - 1)[:2] == ({}, {})  # before the start there is nothing to add
    for name, value in found.items():
        torch.testing.assert_close(value, outputs[name], rtol=1e-5, atol=1e-5, msg=name, check_dtype=False)


def test_the_discriminators_pass_agrees_with_the_published_one():
    adversary, _, (config, _, inputs, outputs) = published()
    assert adversary.observe(outputs["recon"], inputs["x"], config["disc_start"] - 1) == ({}, {})
    losses, figures = adversary.observe(outputs["recon"], inputs["x"], config["disc_start"])
    losses["discriminator"].backward()
    names = {"discriminator_loss": "d/disc_loss", "logits_real": "d/logits_real", "logits_fake": "d/logits_fake"}
    for ours, theirs in names.items():
        torch.testing.assert_close(figures[ours], outputs[theirs], rtol=1e-5, atol=1e-5, msg=ours)
    gradient = adversary.discriminator.main[0].weight.grad
    expected = outputs["d/grad/discriminator.main.0.weight"]
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_disc_factor_multiplies_the_losses_of_both_sides_as_published(factor):
    adversary, last_layer, (config, _, inputs, outputs) = published(factor)
    step = config["disc_start"]
    reconstruction = F.conv2d(inputs["features"], last_layer, padding=1)
    nll = (inputs["x"] - reconstruction).abs().mean()
    losses, _ = adversary.losses(reconstruction, nll, last_layer, step)
    # loss = nll + d_weight * disc_factor * g_loss + ...; d_loss = disc_factor * disc_loss(...)
    expected = factor * outputs["g/d_weight"] * outputs["g/g_loss"]
    torch.testing.assert_close(losses["adversarial_loss"], expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    own, _ = adversary.observe(outputs["recon"], inputs["x"], step)
    torch.testing.assert_close(own["discriminator"], factor * outputs["d/disc_loss"], rtol=1e-5, atol=1e-5)
    own["discriminator"].backward()
    gradient = adversary.discriminator.main[0].weight.grad
    expected = factor * outputs["d/grad/discriminator.main.0.weight"]
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_before_the_start_the_published_disc_factor_is_0_on_both_sides():
    adversary, last_layer, (config, _, inputs, outputs) = published()
    codebook = config["codebook_weight"] * config["codebook_loss"]
    assert float(outputs["g_before/disc_factor"]) == float(outputs["d_before/disc_loss"]) == 0
    torch.testing.assert_close(outputs["g_before/total_loss"], outputs["g_before/nll_loss"] + codebook)
    before = config["disc_start"] - 1
    reconstruction = F.conv2d(inputs["features"], last_layer, padding=1)
    assert adversary.losses(reconstruction, reconstruction.mean(), last_layer, before) == ({}, {})
    assert adversary.observe(outputs["recon"], inputs["x"], before) == ({}, {})


def test_hinge_and_vanilla_losses_agree_with_the_published_ones():
    _, _, inputs, outputs = golden("taming_ganloss")
    for kind in ("hinge", "vanilla"):
        found = discriminator_loss(kind, inputs["logits_real"], inputs["logits_fake"])
        torch.testing.assert_close(found, outputs[kind], rtol=1e-5, atol=1e-5)


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_non_saturating_losses_are_cross_entropies():
    real, fake = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    cross_entropy = F.binary_cross_entropy_with_logits
    expected = cross_entropy(real, torch.ones_like(real)) + cross_entropy(fake, torch.zeros_like(fake))
    torch.testing.assert_close(discriminator_loss("non-saturating", real, fake), expected)
    torch.testing.assert_close(generator_loss("non-saturating", fake), cross_entropy(fake, torch.ones_like(fake)))


def test_the_adaptive_weight_balances_gradients_at_the_last_layer():
    last_layer = nn.Parameter(torch.randn(3, 4))
    features = torch.randn(10, 4)
    out = features @ last_layer.t()
    loss, adversarial = out.square().mean(), 0.1 * out.sin().mean()
    weight = adaptive_weight(loss, adversarial, last_layer)
    (one,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
    (other,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    torch.testing.assert_close(weight, one.norm() / (other.norm() + 1e-4))
    assert not weight.requires_grad
    assert float(adaptive_weight(1e6 * loss, 0 * adversarial, last_layer)) == 1e4
    loss.backward()  # the graph is still there


def test_the_r1_penalty_is_half_the_squared_gradient_of_each_image():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 1, 3))
    pictures = images(3).requires_grad_()
    found = r1_penalty(network(pictures), pictures)
    slow = []
    for picture in images(3):
        one = picture.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(one[None]).mean(), one)
        slow.append(0.5 * gradient.square().sum())
    torch.testing.assert_close(found, torch.stack(slow).mean())
    found.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in (network[0].weight, network[2].weight))


def test_lecam_pulls_logits_to_the_average_of_the_other_kind_from_one_side():
    averages = torch.tensor([2.0, -1.0])
    real, fake = torch.tensor([3.0, -2.0]), torch.tensor([1.0, 4.0])
    expected = torch.tensor([4.0**2, 0.0]).mean() + torch.tensor([1.0, 0.0]).mean()
    torch.testing.assert_close(lecam_penalty(real, fake, averages), expected)


# ---- what a user can get wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"weight": -1.0}, "adversarial.weight=-1.0, expected 0"),
        ({"discriminator_factor": 0.0}, "adversarial.discriminator_factor=0.0, expected above 0"),
        ({"loss": "wgan"}, "adversarial.loss=wgan, expected hinge, vanilla or non-saturating"),
        ({"start": 1.0}, "adversarial.start=1.0, expected a share"),
        ({"start": 0.6, "warmup": 0.4}, "leave no training for the adversarial loss"),
        ({"betas": (0.5, 1.0)}, "adversarial.betas"),
        ({"learning_rate_warmup": 50}, "adversarial.learning_rate_warmup=50, expected a share"),
        ({"schedule": "linear"}, "adversarial.schedule=linear, expected cosine or constant"),
        ({"final_learning_rate": -1}, "adversarial.final_learning_rate=-1, expected 0 or more"),
        ({"weight_decay": -1}, "adversarial.weight_decay=-1, expected 0"),
        ({"max_grad_norm": -1}, "adversarial.max_grad_norm=-1, expected 0"),
        ({"warn_ratio": 1.0}, "adversarial.warn_ratio=1.0, expected above 1"),
        ({"r1_every": 0}, "adversarial.r1_every=0, expected at least 1"),
        (
            {"r1_weight": 1.0, "discriminator": FeatureDiscriminatorConfig()},
            "does not go with a discriminator of frozen",
        ),
    ],
)
def test_values_out_of_range_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        replace(ALWAYS, **changes)


# ---- what a step computes once --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "changes"),
    [("batch", {}), ("group", {"lecam_weight": 0.1, "loss": "vanilla"}), ("batch", {"r1_weight": 1.0, "r1_every": 1})],
)
def test_the_logits_that_the_autoencoder_heard_teach_the_discriminator_as_a_pass_of_its_own(norm, changes):
    found = []
    for reused in (True, False):
        adversary = make_adversary(discriminator=PatchGANConfig(width=4, layers=2, norm=norm), **changes)
        adversary.averages.copy_(torch.tensor([0.3, -0.2]))
        decoder = nn.Conv2d(3, 3, 1)
        nn.init.constant_(decoder.weight, 0.2)
        nn.init.zeros_(decoder.bias)
        fake, real = decoder(images(seed=2)), images()
        losses, _ = adversary.losses(fake, fake.square().mean(), decoder.weight, 1)
        if not reused:
            adversary.heard = None
        companions, figures = adversary.observe(fake, real, 1)
        for loss in (*companions.values(), *losses.values()):
            loss.backward()
        gradients = {name: weight.grad for name, weight in adversary.named_parameters()}
        found.append((gradients, decoder.weight.grad, figures))
    assert all(gradient.abs().max() > 0 for gradient in found[0][0].values() if gradient.ndim > 1)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_a_loss_passed_to_the_images_has_the_gradients_of_the_plain_one():
    torch.manual_seed(0)
    decoder, judge, x = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 2, 3), images()
    passes: list[int] = []
    judge.register_full_backward_hook(lambda *_: passes.append(1))
    gradients = []
    for passed in (False, True):
        reconstruction = decoder(x)
        loss = judge(reconstruction).square().mean()
        if passed:
            loss = passed_to(reconstruction, loss)
            passes.clear()
        (2 * loss + reconstruction.mean()).backward()
        gradients.append([weight.grad.clone() for weight in decoder.parameters()])
        decoder.zero_grad()
    assert not passes  # the network behind the images is not gone through again
    torch.testing.assert_close(gradients[1], gradients[0])
