"""One step of a student as many of its teacher: where it begins, what it learns, whose codes it keeps; errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from common.model_io import load_pretrained
from common.starting import in_training
from images.datasets import image_datasets, to_float
from stage1_vq.autoencoders import AUTOENCODERS, FlowDecoder, FlowDecoderConfig
from stage1_vq.losses.distillation import DistillationConfig, Teacher
from stage1_vq.train import Stage1Config, Stage1Task, freeze_parts, train_stage1
from tests.stage1_vq.test_train import MODEL, lines, make_config, squares

__all__ = ["squares"]
FLOW = FlowDecoderConfig(
    width=8,
    multipliers=(1, 2),
    residual_blocks=1,
    transformer_blocks=1,
    heads=2,
    window=2,
    norm_groups=4,
    steps=4,
    tokenizer=MODEL,
)


@pytest.fixture(scope="module")
def runs(squares: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first`, an autoencoder, and `teacher`, a flow decoder on its codes."""
    folder = tmp_path_factory.mktemp("runs")
    train_stage1(make_config(squares), folder / "first")
    config = replace(make_config(squares), model=FLOW, start_from=str(folder / "first"), frozen=("tokenizer",))
    train_stage1(config, folder / "teacher")
    return folder


def distilled(squares: str, runs: Path, **train: Any) -> Stage1Config:
    return replace(
        make_config(squares, **train),
        model=replace(FLOW, steps=1),
        start_from=str(runs / "teacher"),
        frozen=("tokenizer",),
        distillation=DistillationConfig(teacher_steps=4),
    )


def model_of(run: Path) -> Any:
    return load_pretrained(run, AUTOENCODERS)


def some_images(b: int = 5) -> torch.Tensor:
    return torch.rand(b, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_flow_decoder_has_the_codes_of_the_model_that_it_began_with(runs: Path):
    first, teacher, images = model_of(runs / "first"), model_of(runs / "teacher"), some_images()
    assert isinstance(teacher, FlowDecoder)
    theirs = teacher.state_dict()
    for name, tensor in first.state_dict().items():
        if not name.startswith("decoder."):
            assert torch.equal(tensor, theirs[name]), name
    assert torch.equal(first.encode(images)[0], teacher.encode(images)[0])
    assert teacher.codes_fingerprint() == first.fingerprint()  # shards and priors of the first go on with it


def test_the_student_begins_as_one_step_of_eulers_method_of_its_teacher(runs: Path):
    teacher, images = model_of(runs / "teacher"), some_images()
    student = FlowDecoder(replace(FLOW, steps=1), (8, 8))
    student.load_state_dict(teacher.state_dict())
    lesson = Teacher(DistillationConfig(teacher_steps=4), str(runs / "teacher"))(images)
    with torch.no_grad():
        z_q = teacher.quantizer.codes_to_latents(teacher.encode(images))
        slow, times = lesson.noise, (1, 9 / 16, 1 / 4, 1 / 16, 0)
        for now, then in pairwise(times):
            slow = slow + (now - then) * teacher.decoder(slow, torch.full((5,), float(now)), z_q)
        euler = lesson.noise + teacher.decoder(lesson.noise, torch.ones(5), z_q)
        student.tokenizer.eval()
        output = student.train()(images, *lesson)
    torch.testing.assert_close(lesson.target, slow)
    torch.testing.assert_close(output.reconstruction, euler)
    torch.testing.assert_close(output.losses["distillation_loss"], F.mse_loss(euler, slow))
    student.eval()
    teacher.decode_in_steps(1)
    torch.testing.assert_close(student.decode(student.encode(images)), teacher.decode(teacher.encode(images)))


def test_noise_of_each_lesson_is_drawn_anew_and_the_teacher_stays_as_it_is(runs: Path):
    teacher, images = Teacher(DistillationConfig(teacher_steps=2), str(runs / "teacher")).train(), some_images()
    assert not teacher.model.training
    assert not any(weight.requires_grad for weight in teacher.parameters())
    one, other = teacher(images), teacher(images)
    assert (one.noise - other.noise).abs().min() > 0
    assert (one.target - other.target).abs().max() > 0


class AbsoluteError(nn.Module):
    """In the place of a perceptual loss that needs weights; it keeps what it was given."""

    weight = 0.5

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.given = images.detach(), targets
        return (images - targets).abs().mean((1, 2, 3))


def test_a_perceptual_loss_compares_with_the_teachers_image_and_its_gradient_adds_up(squares: str, runs: Path):
    config = distilled(squares, runs)
    student = FlowDecoder(replace(FLOW, steps=1), (8, 8))
    student.load_state_dict(model_of(runs / "teacher").state_dict())
    freeze_parts(student, config.frozen)
    in_training(student)
    data = image_datasets(config.data, seed=0)[1]
    batch, weight = data.fetch(range(6), range(6)), student.decoder.conv_out.weight
    teacher, perceptual = Teacher(config.distillation, str(runs / "teacher")), AbsoluteError()
    gradients = {}
    for name, beside in (("both", perceptual), ("flow", None)):
        task = Stage1Task(student, data, 4, perceptual=beside, teacher=teacher)  # type: ignore[arg-type]
        assert task.companions["teacher"].module is teacher
        torch.manual_seed(0)
        loss, metrics, _, _ = task.step(student, batch, 0)
        assert set(metrics) >= {"distillation_loss", *(["perceptual_loss"] if beside else [])}
        (gradients[name],) = torch.autograd.grad(loss, [weight])
    torch.manual_seed(0)
    lesson = teacher(to_float(batch["images"]))
    assert torch.equal(perceptual.given[1], lesson.target)
    reached = student(to_float(batch["images"]), *lesson).reconstruction
    torch.testing.assert_close(perceptual.given[0], reached)
    (of_distance,) = torch.autograd.grad(0.5 * (reached - lesson.target).abs().mean(), [weight])
    torch.testing.assert_close(gradients["both"], gradients["flow"] + of_distance)
    assert of_distance.abs().sum() > 0


def test_a_run_brings_one_step_nearer_to_what_the_teacher_makes(squares: str, runs: Path, tmp_path: Path):
    config = distilled(squares, runs, steps=60, validate_every=0, save_every=60, learning_rate=2e-3)
    train_stage1(config, tmp_path / "student")
    student, teacher = model_of(tmp_path / "student"), model_of(runs / "teacher")
    assert student.config.steps == 1
    assert student.codes_fingerprint() == teacher.codes_fingerprint()
    codes = teacher.encode(some_images(20))
    wanted = teacher.decode(codes)
    teacher.decode_in_steps(1)
    before, after = ((model.decode(codes) - wanted).square().mean() for model in (teacher, student))
    assert after < 0.7 * before
    assert "distillation_loss" in lines(tmp_path / "student")[0]
    facts = json.loads((tmp_path / "student" / "run.json").read_text())["data"]
    assert facts["distillation.teacher"] == model_of(runs / "teacher").fingerprint()


def test_a_run_goes_on_with_its_teacher_alone(squares: str, runs: Path, tmp_path: Path):
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    config = distilled(squares, folder)
    train_stage1(config, tmp_path / "student")
    longer = replace(config, train=replace(config.train, steps=14))
    other = replace(make_config(squares), model=FLOW, start_from=str(runs / "first"), frozen=("tokenizer",))
    shutil.rmtree(folder / "teacher")
    with pytest.raises(UserError, match="there is no folder"):
        train_stage1(longer, tmp_path / "student")
    train_stage1(replace(other, train=replace(other.train, seed=1)), folder / "teacher")
    with pytest.raises(UserError, match=r"distillation\.teacher"):
        train_stage1(longer, tmp_path / "student")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": MODEL}, "teacher_steps=4 with model.kind=vqvae, expected flow_decoder"),
        ({"model": FLOW}, "teacher_steps=4 with model.steps=4, expected 1: .* --model.steps 1"),
        ({"frozen": ()}, r"teacher_steps=4 with frozen=\[\], expected tokenizer among them"),
    ],
)
def test_what_cannot_be_distilled_is_refused(squares: str, runs: Path, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(distilled(squares, runs), **changes)


def test_without_a_teacher_nothing_is_distilled(squares: str, runs: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"teacher_steps=4 without a teacher: .* --from MODEL"):
        train_stage1(replace(distilled(squares, runs), start_from=None), tmp_path / "run")


@pytest.mark.parametrize("steps", [-1, 1])
def test_a_teacher_of_one_step_is_refused(steps: int):
    with pytest.raises(UserError, match=f"distillation.teacher_steps={steps}, expected 0"):
        DistillationConfig(teacher_steps=steps)


def test_another_model_is_no_teacher(runs: Path):
    with pytest.raises(UserError, match="holds a model of kind 'vqvae', expected one of: flow_decoder"):
        Teacher(DistillationConfig(teacher_steps=2), str(runs / "first"))
