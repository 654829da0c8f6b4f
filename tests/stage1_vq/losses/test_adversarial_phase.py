from __future__ import annotations

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
from torch import Tensor, nn

from stage1_vq.losses.adversarial import (
    Adversary,
)
from stage1_vq.losses.discriminators import (
    DiscriminatorConfig,
    PatchGANConfig,
)
from tests.processes import Processes
from tests.stage1_vq.losses.player import (
    ALWAYS,
    DISCRIMINATORS,
    EVERYTHING,
    PATCHES,
    STEPS,
    Player,
    assert_equal_states,
    images,
    make_adversary,
    state,
)

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
