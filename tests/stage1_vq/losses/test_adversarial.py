from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
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
    DiscriminatorConfig,
    FeatureDiscriminatorConfig,
    PatchGANConfig,
    StyleGANDiscriminatorConfig,
)
from tests.golden import golden
from tests.processes import Processes
from training.optimizers import Learner

SIDE, STEPS = 16, 100
PATCHES = PatchGANConfig(width=4, layers=2, norm="group")  # no statistics of the batch
ALWAYS = AdversarialConfig(
    weight=0.8, start=0.0, warmup=0.0, ramp=0.0, adaptive=False, learning_rate=1e-3, discriminator=PATCHES
)


def make_adversary(**changes: Any) -> Adversary:
    torch.manual_seed(0)
    return Adversary(replace(ALWAYS, **changes), 3, (SIDE, SIDE), STEPS)


def images(b: int = 4, seed: int = 1) -> Tensor:
    return torch.rand(b, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Player:
    """An adversary that learns as the loop lets it."""

    def __init__(self, adversary: Adversary) -> None:
        self.adversary = adversary
        self.learner = Learner(adversary, adversary.optimizer, adversary.learning_rate)

    def learn(self, pairs: list[tuple[Tensor, Tensor]], step: int) -> dict[str, Tensor]:
        """pairs: reconstructions and images of each micro-batch. Returns the figures of the last one."""
        for fake, real in pairs:
            losses, figures = self.adversary.observe(fake, real, step)
            for loss in losses.values():
                (loss / len(pairs)).backward()
        if self.learner.has_gradients():
            self.learner.average()
            self.learner.clip(None)
            self.learner.move(step)
            self.learner.forget()
        self.adversary.update()
        return figures


def state(adversary: Adversary) -> dict[str, Tensor]:
    return copy.deepcopy(adversary.state_dict())


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=tolerance, atol=tolerance, msg=name)


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


# ---- the phase ------------------------------------------------------------------------------------------------------


def test_the_phase_is_given_as_shares_of_the_training():
    adversary = make_adversary(weight=0.5, start=0.2, warmup=0.1, ramp=0.4)
    learning, weights = [], []
    for step in range(STEPS):
        now = adversary.now(step)
        learning.append(now.learning)
        weights.append(now.weight)
    assert learning == [step >= 20 for step in range(STEPS)]
    assert weights[:30] == [0.0] * 30
    assert 0 < weights[30] < weights[31] < weights[69] < weights[70] == 0.5
    assert weights[30] == pytest.approx(0.5 / 41)
    assert set(weights[70:]) == {0.5}


def test_nothing_is_computed_before_the_discriminator_learns_and_it_learns_alone_first():
    adversary = make_adversary(start=0.01, warmup=0.01)
    last_layer = nn.Parameter(torch.ones(3, 1, 1, 1))
    calls = []
    adversary.discriminator.register_forward_hook(lambda *_: calls.append(None))
    for step, expected in enumerate([(0, 0), (2, 0), (1, 1)]):  # passes of the discriminator, and for the generator
        fake = images(seed=2) * last_layer.view(1, 3, 1, 1)
        calls.clear()
        losses, figures = adversary.losses(fake, fake.mean(), last_layer, step)
        assert (len(calls), len(losses), len(figures)) == (expected[1],) * 3, step
        calls.clear()
        adversary.observe(fake.detach(), images(), step)
        assert len(calls) == expected[0], step


def test_the_generators_pass_leaves_no_gradient_in_the_discriminator():
    adversary = make_adversary(adaptive=True)
    last_layer = nn.Parameter(torch.ones(3))
    fake = images() * last_layer.view(1, 3, 1, 1)
    losses, _ = adversary.losses(fake, fake.square().mean(), last_layer, 0)
    losses["adversarial_loss"].backward()
    assert last_layer.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in adversary.discriminator.parameters())
    assert all(weight.requires_grad for weight in adversary.discriminator.parameters())


def test_the_discriminator_learns_to_tell_images_apart():
    player = Player(make_adversary(learning_rate=3e-3))
    for step in range(40):
        figures = player.learn([(images(8, seed=step) * 0.3, images(8, seed=1000 + step))], step)
    assert figures["logits_real"] > 0.5 > -0.5 > figures["logits_fake"]
    assert figures["discriminator_loss"] < 0.5


# ---- one step -------------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {"lecam_weight": 0.5, "r1_weight": 1.0, "r1_every": 2}
DISCRIMINATORS: dict[str, DiscriminatorConfig] = {
    "patchgan": PATCHES,
    "stylegan": StyleGANDiscriminatorConfig(width=4, max_width=8),
}


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_micro_batches_equal_one_batch(kind):
    whole, split = (Player(make_adversary(discriminator=DISCRIMINATORS[kind], **EVERYTHING)) for _ in range(2))
    for step in range(5):
        fake, real = images(6, seed=2 * step), images(6, seed=2 * step + 1)
        whole.learn([(fake, real)], step)
        split.learn(list(zip(fake.split(2), real.split(2), strict=True)), step)
    assert_equal_states(state(whole.adversary), state(split.adversary), tolerance=1e-4)


def test_a_discarded_step_leaves_no_trace():
    skipped, clean = make_adversary(**EVERYTHING), make_adversary(**EVERYTHING)
    skipped.observe(images(seed=7), images(seed=8), 0)
    skipped.discard()
    for adversary in (skipped, clean):
        Player(adversary).learn([(images(seed=2), images(seed=3))], 1)
    assert_equal_states(state(skipped), state(clean))


def test_logits_that_are_not_finite_leave_the_averages_alone():
    adversary = make_adversary(**EVERYTHING)
    adversary.observe(images(seed=4), images(seed=5) * torch.inf, 1)
    adversary.update()
    assert adversary.averages.isnan().all()  # still none
    adversary.observe(images(seed=2), images(seed=3), 0)
    adversary.update()
    before = adversary.averages.clone()
    assert before.isfinite().all()
    adversary.observe(images(seed=4), images(seed=5) * torch.inf, 1)
    adversary.update()
    assert torch.equal(adversary.averages, before)


def test_the_learning_rate_has_a_schedule_from_the_start_of_the_phase_which_no_rollback_takes_back():
    adversary = make_adversary(
        start=0.2, learning_rate=0.01, learning_rate_warmup=0.1, schedule="cosine", final_learning_rate=0.5
    )
    found = [adversary.learning_rate(step) for step in range(STEPS)]
    assert found[19:31] == pytest.approx([0.001, *(0.001 * number for number in range(1, 11)), 0.01])
    cosine = [0.01 * (0.75 + 0.25 * math.cos(math.pi * (step - 30) / 70)) for step in range(30, STEPS)]
    assert found[30:] == pytest.approx(cosine)
    adversary.rolled_back(step=60, rollbacks=1)
    assert [adversary.learning_rate(step) for step in range(STEPS)] == found
    assert {make_adversary(start=0.2).learning_rate(step) for step in range(STEPS)} == {1e-3}  # constant by default


def test_the_averages_of_lecam_start_at_the_first_logits_and_come_back_from_a_checkpoint():
    player = Player(make_adversary(lecam_weight=0.1, lecam_decay=0.9))
    expected = None
    for step in range(3):
        figures = player.learn([(images(seed=2 * step), images(seed=2 * step + 1))], step)
        logits = torch.stack([figures["logits_real"], figures["logits_fake"]])
        expected = logits if expected is None else 0.9 * expected + 0.1 * logits
        assert (figures["lecam_penalty"] > 0) == (step > 0)
    torch.testing.assert_close(player.adversary.averages, expected)
    restored = Player(make_adversary(lecam_weight=0.1, lecam_decay=0.9))
    restored.adversary.load_state_dict(state(player.adversary))
    restored.learner.load_state(player.learner.state())
    for one in (player, restored):
        one.learn([(images(seed=8), images(seed=9))], 3)
    assert_equal_states(state(restored.adversary), state(player.adversary))


def test_the_r1_penalty_is_computed_every_so_many_steps():
    adversary = make_adversary(r1_weight=1.0, r1_every=3)
    seen = []
    for step in range(7):
        seen.append("r1_penalty" in adversary.observe(images(seed=2), images(seed=3), step)[1])
    assert seen == [True, False, False, True, False, False, True]


def test_bfloat16_autocast_trains_float32_weights_also_with_a_penalty():
    adversary = make_adversary(adaptive=True, **EVERYTHING)
    last_layer = nn.Parameter(torch.ones(3))
    with torch.autocast("cpu", torch.bfloat16):
        fake = images() * last_layer.view(1, 3, 1, 1)
        losses, _ = adversary.losses(fake, fake.square().mean(), last_layer, 0)
        own, figures = adversary.observe(fake.detach(), images(seed=3), 0)
    own["discriminator"].backward()
    adversary.update()
    values = [*losses.values(), *own.values(), *figures.values()]
    assert all(value.dtype == torch.float32 and value.isfinite() for value in values)
    assert all(weight.dtype == torch.float32 for weight in adversary.parameters())


# ---- judging validations --------------------------------------------------------------------------------------------


def listening(**changes: Any) -> Adversary:
    """An adversary whose phase begins at step 10."""
    return make_adversary(start=0.1, **changes)


def test_reconstructions_much_worse_than_the_best_are_told_with_remedies():
    adversary = listening(warn_ratio=1.5)
    assert adversary.judge({"mse": 0.02}, 0, 9).keep
    assert adversary.judge({"mse": 0.30}, 0, 10).keep  # after ten steps, numbers 0 to 9: nothing to blame it for yet
    assert adversary.judge({"mse": 0.029, "psnr": 1.0}, 0, 11) == (True, None, False)
    verdict = adversary.judge({"mse": 0.031}, 5, 11)
    assert (verdict.keep, verdict.roll_back) == (False, False)
    assert "mse 0.031 is 1.55 times its best, 0.02" in verdict.warning
    for remedy in ("adversarial.weight", "warmup", "lecam_weight", "r1_weight", "adversarial.rollback=true"):
        assert remedy in verdict.warning


def test_the_perceptual_distance_is_watched_too_and_better_ones_raise_the_bar():
    adversary = listening()
    assert adversary.judge({"mse": 0.02, "perceptual": 0.4}, 0, 40).keep
    assert adversary.judge({"mse": 0.02, "perceptual": 0.2}, 0, 40).keep
    assert "perceptual 0.35 is 1.75 times" in adversary.judge({"mse": 0.02, "perceptual": 0.35}, 0, 40).warning
    assert "mse is nan" in adversary.judge({"mse": float("nan"), "perceptual": 0.2}, 0, 40).warning


def test_anything_is_worse_than_a_perfect_reconstruction():
    adversary = listening()
    assert adversary.judge({"mse": 0.0}, 0, 40).keep
    assert "mse 0.1 is inf times its best, 0;" in adversary.judge({"mse": 0.1}, 0, 40).warning


def test_a_validation_that_is_not_finite_is_never_kept():
    adversary = listening()
    assert not adversary.judge({"mse": float("nan")}, 0, 40).keep
    assert adversary.judge({"mse": 0.1}, 0, 40).keep


def test_a_rollback_after_so_many_bad_validations_begins_the_phase_anew_at_half_the_weight():
    adversary = listening(weight=0.8, warmup=0.05, ramp=0.1, rollback=True, rollback_patience=2)
    adversary.judge({"mse": 0.02}, 0, 40)
    assert adversary.now(40).weight == 0.8
    assert not adversary.judge({"mse": 0.1}, 0, 40).roll_back
    assert adversary.judge({"mse": 0.1}, 1, 40).roll_back
    for rollbacks, weight in ((1, 0.4), (2, 0.2)):
        adversary.rolled_back(step=40, rollbacks=rollbacks)
        assert adversary.now(40) == (True, 0.0, False)  # the discriminator warms up again
        assert adversary.now(55).weight == pytest.approx(weight)
        restored = make_adversary()
        restored.load_state(json.loads(json.dumps(adversary.state())))
        assert restored.now(55) == adversary.now(55)


def test_a_checkpoint_with_counters_among_its_tensors_is_taken_up():
    adversary = make_adversary(weight=0.8, lecam_weight=0.1)
    Player(adversary).learn([(images(seed=2), images(seed=3))], 0)
    tensors = state(adversary)
    former = {
        "step": torch.tensor(48),
        "skipped": torch.tensor(1),
        "phase": torch.tensor([30, 35, 45]),
        "updates": torch.tensor(7),
        "rollbacks": torch.tensor(2),
    }
    restored = make_adversary(weight=0.8, lecam_weight=0.1)
    restored.load_state_dict({**tensors, **former})
    assert (restored.state()["phase"], restored.state()["rollbacks"]) == ([30, 35, 45], 2)
    assert_equal_states(state(restored), tensors)
    unused = {**tensors, **former, "updates": torch.tensor(0), "averages": torch.zeros(2)}
    restored.load_state_dict(unused)
    assert restored.averages.isnan().all()  # no average of nothing


# ---- two processes --------------------------------------------------------------------------------------------------

NORMS: dict[str, DiscriminatorConfig] = {
    "batch": PatchGANConfig(width=4, layers=2),
    "actnorm": PatchGANConfig(width=4, layers=2, norm="actnorm"),
    "group": PATCHES,
    "stylegan": DISCRIMINATORS["stylegan"],
}


def train(discriminator: DiscriminatorConfig, part: slice) -> dict[str, Tensor]:
    """State after some steps on this process's images, the generator's gradient, and the last weight of its loss."""
    player = Player(adversary := make_adversary(discriminator=discriminator, adaptive=True, **EVERYTHING))
    last_layer = nn.Parameter(torch.ones(3))
    found: dict[str, Tensor] = {}
    for step in range(4):
        fake = images(8, seed=2 * step)[part] * last_layer.view(1, 3, 1, 1)
        losses, figures = adversary.losses(fake, fake.square().mean(), last_layer, step)
        (gradient,) = torch.autograd.grad(losses["adversarial_loss"], last_layer)
        if dist.is_initialized():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        player.learn([(fake.detach(), images(8, seed=2 * step + 1)[part])], step)
        found[f"weight {step}"], found[f"gradient {step}"] = figures["adversarial_weight"], gradient
    return {**adversary.state_dict(), **found}


def process(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    half = slice(4 * rank, 4 * rank + 4)
    torch.save({name: train(config, half) for name, config in NORMS.items()}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def processes(process_server: Processes, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    process_server.together(process, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("norm", NORMS)
def test_two_processes_with_half_the_images_do_what_one_does(processes, norm):
    alone = train(NORMS[norm], slice(0, 8))
    for name, tensor in alone.items():
        assert torch.equal(processes[0][norm][name], processes[1][norm][name]), name
        torch.testing.assert_close(processes[0][norm][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_schedule_keeps_where_it_began_when_the_run_is_given_more_steps():
    config = replace(ALWAYS, start=0.3, warmup=0.0, ramp=0.0, learning_rate_warmup=0.1)
    before, longer = Adversary(config, 1, (32, 32), 1000), Adversary(config, 1, (32, 32), 2000)
    longer.load_state(json.loads(json.dumps(before.state())))
    rates = [before.learning_rate(step) for step in range(0, 1000, 50)]
    assert [longer.learning_rate(step) for step in range(0, 1000, 50)] == rates
    assert longer.learning_rate(500) == config.learning_rate  # not in another warm-up


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
