"""Whole small runs of stage one with a discriminator: killed and continued, on two processes, with a rollback."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import UserError
from common.model_io import load_pretrained
from images.datasets import DataConfig
from stage1_vq.autoencoders import AUTOENCODERS, ViTVQGANConfig, VQGANConfig
from stage1_vq.losses.adversarial import AdversarialConfig, Adversary
from stage1_vq.losses.discriminators import DiscriminatorConfig, PatchGANConfig, StyleGANDiscriminatorConfig
from stage1_vq.losses.perceptual import TimmPerceptualConfig
from stage1_vq.quantizers import GumbelQuantizerConfig, NearestQuantizerConfig
from stage1_vq.train import Stage1Config, Stage1Task, companions, train_stage1
from tests.processes import Processes
from tests.stage1_vq.test_train import lines
from tests.stage1_vq.tiny import AUTOENCODER_ROWS, images_for, make_autoencoder
from tests.training.runs import assert_same_run
from training.loop import TrainConfig

QUANTIZER = NearestQuantizerConfig(codebook_size=16, dim=4, revive_after=4, kmeans_iterations=3)
MODEL = VQGANConfig(
    channels=1, width=8, multipliers=(1, 1, 1), residual_blocks=1, attention_levels=(), norm_groups=4, z_channels=8,
    quantizer=QUANTIZER,
)  # fmt: skip
ADVERSARIAL = AdversarialConfig(
    weight=0.5, start=0.25, warmup=0.1, ramp=0.2, learning_rate=1e-3, lecam_weight=0.01, r1_weight=0.1, r1_every=3,
    discriminator=PatchGANConfig(width=8, layers=1),
)  # fmt: skip


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An .npz of 60 images of 8x8 pixels: a bright square somewhere on a dark ground."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 60, (60, 8, 8), dtype=np.uint8)
    for image in images:
        top, left = generator.integers(0, 5, 2)
        image[top : top + 4, left : left + 4] = 230
    path = tmp_path_factory.mktemp("squares") / "squares.npz"
    np.savez(path, images=images)
    return str(path)


def make_config(path: str, adversarial: AdversarialConfig = ADVERSARIAL, **train: Any) -> Stage1Config:
    settings = {
        "steps": 20, "batch_size": 12, "learning_rate": 3e-3, "log_every": 4, "validate_every": 5, "ema_decay": 0.9,
        "preview_every": 0, "save_every": 4, "tracker": "none", "workers": 0,
    }  # fmt: skip
    data = DataConfig(path=path, image_size=8, channels=1, validation_count=20)
    return Stage1Config(model=MODEL, data=data, train=TrainConfig(**{**settings, **train}), adversarial=adversarial)


def test_the_log_follows_the_phase(squares, tmp_path):
    result = train_stage1(make_config(squares, log_every=1), tmp_path / "run")
    assert result.finished
    train = {line["step"]: line for line in lines(tmp_path / "run") if line["split"] == "train"}
    learning = {"discriminator_loss", "logits_real", "logits_fake", "lecam_penalty"}
    listening = {"adversarial_loss", "adversarial_weight"}
    for step in range(1, 21):  # a line describes the step before it: step 6 is number 5, the first with a discriminator
        assert (learning <= train[step].keys()) == (step >= 6), step
        assert (listening <= train[step].keys()) == (step >= 8), step
    assert train[20]["adversarial_weight"] > 0
    assert train[20]["discriminator_skipped_steps"] == 0
    assert train[20]["rollbacks"] == 0
    assert result.best_step == 20  # the last good weights, not those of the lowest mse
    assert not list((tmp_path / "run").rglob("*.tmp"))
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert "adversarial" not in json.dumps(config)


def test_weight_0_builds_nothing_and_leaves_the_config_as_it_was(squares):
    config = make_config(squares, AdversarialConfig())
    assert companions(config, (8, 8)) == (None, None)
    assert config.resolved().keys() == {"model", "data", "train"}
    assert make_config(squares).resolved()["adversarial"]["discriminator"]["kind"] == "patchgan"


def test_the_perceptual_distance_is_a_loss_and_a_validation_metric(squares, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), tmp_path / "test_resnet.pth")
    perceptual = TimmPerceptualConfig(weight=0.5, backbone="test_resnet", weights=str(tmp_path / "test_resnet.pth"))
    config = replace(make_config(squares, steps=10, log_every=1), perceptual=perceptual)
    result = train_stage1(config, tmp_path / "run")
    assert result.metrics.keys() == {"mse", "psnr", "perceptual"}
    train = [line for line in lines(tmp_path / "run") if line["split"] == "train"]
    assert train[-1]["perceptual_loss"] < train[0]["perceptual_loss"]
    assert not list((tmp_path / "run").rglob("perceptual*"))


@pytest.mark.parametrize("row", AUTOENCODER_ROWS)
def test_every_autoencoder_learns_from_a_discriminator(row):
    autoencoder = make_autoencoder(row)
    size = autoencoder.image_size
    always = replace(ADVERSARIAL, start=0.0, warmup=0.0, ramp=0.0)
    adversary = Adversary(always, autoencoder.channels, size, steps=10)
    task = Stage1Task(autoencoder, ImageStub(), 3, adversary=adversary)
    batch = {"images": torch.randint(256, (3, autoencoder.channels, *size), dtype=torch.uint8)}
    loss, figures, companion_losses, _ = task.step(autoencoder, batch, 0)
    loss.backward()
    assert all(weight.grad is None for weight in adversary.parameters())
    companion_losses["discriminator"].backward()
    assert all(weight.grad.isfinite().all() for weight in adversary.parameters())
    assert loss.isfinite()
    assert figures["adversarial_weight"] > 0
    # Balanced: at the last layer its gradient has half the norm of the other losses' gradient.
    output = autoencoder(images_for(autoencoder, 3))
    others = torch.stack(list(output.losses.values())).sum()
    gained, _ = adversary.losses(output.reconstruction, others, autoencoder.last_layer(), 0)
    norms = [
        torch.autograd.grad(loss, autoencoder.last_layer(), retain_graph=True)[0].norm()
        for loss in (others, gained["adversarial_loss"])
    ]
    assert float(norms[1] / norms[0]) == pytest.approx(0.5, rel=0.05)
    task.after_step(0)
    assert "perplexity" in task.health()


class ImageStub:
    """A task's validation images where nothing is validated."""

    def __len__(self) -> int:
        return 0

    def fetch(self, indices: Any, draws: Any) -> Any:
        raise NotImplementedError


# ---- compiled -------------------------------------------------------------------------------------------------------

GRAPHS_ONLY = "aot_eager"  # forward and backward graphs as torch.compile cuts them, without the minutes of a compiler
COMPILED: dict[str, tuple[Any, DiscriminatorConfig]] = {
    "vqgan, patchgan": (MODEL, PatchGANConfig(width=8, layers=1)),
    "vit_vqgan, stylegan": (
        ViTVQGANConfig(channels=1, patch=4, width=8, blocks=1, heads=2, quantizer=replace(QUANTIZER, dim=8)),
        StyleGANDiscriminatorConfig(width=4, max_width=8),
    ),
}


def a_step(row: str, compiled: bool, step: int) -> tuple[dict[str, Tensor], int]:
    """The gradients of a step of both networks, and how many convolutions were passed backwards."""
    model_config, discriminator = COMPILED[row]
    always = replace(ADVERSARIAL, start=0.0, warmup=0.0, ramp=0.0, discriminator=discriminator)
    torch.manual_seed(0)
    model = AUTOENCODERS[model_config.kind](model_config, (8, 8))
    adversary = Adversary(always, 1, (8, 8), steps=10)
    task = Stage1Task(model, ImageStub(), 3, adversary=adversary)
    called = torch.compile(model, backend=GRAPHS_ONLY) if compiled else model
    if compiled:
        adversary.compile(backend=GRAPHS_ONLY)
    batch = {"images": torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8)}

    def pass_through() -> None:
        loss, _, companion_losses, _ = task.step(called, batch, step)
        for each in (*companion_losses.values(), loss):
            each.backward()
        task.discard_step()

    pass_through()  # compiles
    model.zero_grad()
    adversary.zero_grad()
    with torch.profiler.profile() as profile:
        pass_through()
    weights = [*model.named_parameters(), *adversary.named_parameters()]
    counts = {event.key: event.count for event in profile.key_averages()}
    return {name: weight.grad for name, weight in weights}, counts["aten::convolution_backward"]


@pytest.mark.parametrize("row", COMPILED)
@pytest.mark.parametrize("step", [0, 1])  # with the R1 penalty, and without
def test_a_compiled_step_has_one_backward_pass_of_the_decoder_and_eagers_gradients(row, step):
    plain, convolutions = a_step(row, compiled=False, step=step)
    compiled, compiled_convolutions = a_step(row, compiled=True, step=step)
    assert compiled_convolutions == convolutions
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_the_adaptive_weight_costs_two_passes_of_the_last_layer_and_none_of_anything_else():
    _, convolutions = a_step("vqgan, patchgan", compiled=False, step=1)
    model = AUTOENCODERS["vqgan"](MODEL, (8, 8))
    adversary = Adversary(ADVERSARIAL, 1, (8, 8), steps=10)
    of_model, of_discriminator = (
        sum(isinstance(module, nn.Conv2d) for module in network.modules()) for network in (model, adversary)
    )
    # The discriminator's for the autoencoder's sake, for images, and for reconstructions.
    assert convolutions == of_model + 2 + 3 * of_discriminator


# ---- killed and continued -------------------------------------------------------------------------------------------

# With such a weight, not balanced by gradients, reconstructions soon get worse: what a rollback is for.
RUINOUS = replace(
    ADVERSARIAL, weight=300.0, adaptive=False, start=0.5, ramp=0.0, learning_rate=1e-2,
    warn_ratio=1.05, rollback=True, rollback_patience=1,
)  # fmt: skip
RUINED: dict[str, Any] = {
    "steps": 40, "validate_every": 2, "learning_rate": 1e-2, "schedule": "constant", "ema_decay": 0.5,
}  # fmt: skip


def train_until_killed(config: Stage1Config, run: Path, events: int) -> None:
    """Trains in a process that gets SIGKILL at its `events`-th flush or move of a file."""
    left = events

    def counted(function: Any) -> Any:
        def count(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return count

    os.replace, os.fsync, shutil.rmtree = counted(os.replace), counted(os.fsync), counted(shutil.rmtree)
    torch.set_num_threads(1)
    train_stage1(config, run)


def test_killed_and_continued_is_uninterrupted_bit_for_bit_also_across_a_rollback(
    processes: Processes, squares, tmp_path
):
    config = make_config(squares, RUINOUS, **RUINED)
    torch.set_num_threads(1)
    train_stage1(config, tmp_path / "whole")
    after_rollback = min(line["step"] for line in lines(tmp_path / "whole") if line.get("rollbacks"))
    reached = []  # step of the newest checkpoint at each kill, and at the end
    for events in (150, 250, 10_000):
        code = processes.start(train_until_killed, config, tmp_path / "cut", events).wait()
        reached.append(max(int(path.name[-8:]) for path in (tmp_path / "cut" / "checkpoints").glob("step_*")))
    assert code == 0
    assert 0 < reached[0] < after_rollback <= reached[1] < 40
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_rollback_takes_no_schedule_back(squares, tmp_path):
    gumbel = GumbelQuantizerConfig(codebook_size=16, dim=4, temperature_steps=40, kmeans_iterations=3)
    config = replace(make_config(squares, RUINOUS, **RUINED, log_every=1), model=replace(MODEL, quantizer=gumbel))
    train_stage1(config, tmp_path / "run")
    train = [line for line in lines(tmp_path / "run") if line["split"] == "train"]
    assert train[-1]["rollbacks"] >= 1
    for line in train:
        share = (1 + math.cos(math.pi * (line["step"] - 1) / 40)) / 2
        assert line["temperature"] == pytest.approx(0.0625 + 0.9375 * share, abs=1e-6), line["step"]


def test_a_run_begun_when_counters_were_tensors_continues(squares, tmp_path):
    config = make_config(squares, RUINOUS, **RUINED)
    train_stage1(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000040")
    for folder in (tmp_path / "cut" / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        guard, step = state.pop("guard"), state["progress"]["step"]
        former = {"step": step, "phase": guard["phase"], "updates": 1, "rollbacks": guard["rollbacks"]}
        tensors = load_file(folder / "discriminator.safetensors")
        save_file(
            {**tensors, **{name: torch.tensor(value) for name, value in former.items()}},
            folder / "discriminator.safetensors",
        )
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "manifest.json").write_text(json.dumps({"files": {}}))
    assert guard["rollbacks"] >= 1
    train_stage1(config, tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_rollback_is_said_and_halves_the_weight(squares, tmp_path, capsys):
    train_stage1(make_config(squares, RUINOUS, **RUINED, log_every=1), tmp_path / "run")
    said = capsys.readouterr().out
    assert "warning: reconstructions have got worse with the adversarial loss: mse" in said
    assert "rollback 1: weights and optimisers are those of step" in said
    weights = [line["adversarial_weight"] for line in lines(tmp_path / "run") if "adversarial_weight" in line]
    assert weights[0] == 300.0
    assert weights[-1] in (150.0, 75.0, 37.5)


# ---- two processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_both_optimisers(processes: Processes, squares, tmp_path):
    # Batch norm: its statistics must be those of all processes. Tolerance: sums in another order, and Adam adds to it.
    config = make_config(squares, replace(ADVERSARIAL, start=0.1), steps=12, log_every=1, validate_every=6)
    train_stage1(config, tmp_path / "one")
    processes.together(train_stage1, config, tmp_path / "two")
    one, two = (load_pretrained(tmp_path / name, AUTOENCODERS).state_dict() for name in ("one", "two"))
    differences = {name: float((two[name].float() - tensor.float()).abs().max()) for name, tensor in one.items()}
    # Attention does not depend on its keys' bias: rounding is all of its gradient, which Adam makes steps of.
    differing = {name: value for name, value in differences.items() if value > 2e-4 and not name.endswith("k.bias")}
    assert differing == {}
    for line, other in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert name == "split" or other[name] == pytest.approx(value, rel=1e-2, abs=1e-4), (name, line["step"])


# ---- what a user can get wrong --------------------------------------------------------------------------------------


def test_a_rollback_without_validations_is_refused(squares):
    with pytest.raises(UserError, match=r"adversarial.rollback=true with train.validate_every=0"):
        make_config(squares, replace(ADVERSARIAL, rollback=True), validate_every=0)


def test_a_discriminator_too_deep_for_the_images_is_refused_before_the_first_step(squares, tmp_path):
    config = make_config(squares, replace(ADVERSARIAL, discriminator=PatchGANConfig()))
    with pytest.raises(UserError, match=r"layers=3 leaves nothing of 8x8 images: give at most 1"):
        train_stage1(config, tmp_path / "run")
