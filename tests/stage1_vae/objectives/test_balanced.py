from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import UserError
from images.datasets import DataConfig
from stage1_vae.binarise import NumberedImages
from stage1_vae.hierarchies.nvae import NVAE, NVAEConfig
from stage1_vae.likelihoods import BernoulliConfig
from stage1_vae.networks.batch_norm import batch_norms
from stage1_vae.objectives import Balanced, BalancedConfig, TrainingFacts, build_objective
from stage1_vae.objectives.balanced import alphas
from stage1_vae.objectives.spectral import SpectralNorms
from stage1_vae.task import VAETask
from stage1_vae.train import Stage1VAEConfig, train_vae
from tests.processes import Processes
from training.config import TrainConfig

TINY = NVAEConfig(
    channels=1, latents=1, scales=2, groups=2, encoder_width=2, decoder_width=2, blocks=1, preprocess_cells=1,
    postprocess_cells=1, encoder_cells=1, decoder_cells=1, likelihood=BernoulliConfig(),
)  # fmt: skip


def tiny() -> NVAE:
    torch.manual_seed(0)
    return NVAE(TINY, (8, 8))


def black_and_white(count: int) -> Tensor:
    return (torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5).float() * 2 - 1


def objective_of(model: NVAE, **settings: Any) -> Balanced:
    facts = TrainingFacts(8, 100, model.shape, tuple(model.generator_parameters()), regularised=model.regularised)
    built = build_objective(BalancedConfig(**settings), facts)
    assert isinstance(built, Balanced)
    return built


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if one is None else one for one in found]


# ---- the bound ------------------------------------------------------------------------------------------------------


def test_groups_are_balanced_by_how_much_they_tell_and_how_large_they_are():
    """The formula of appendix A once more, group by group, and a gradient in which gamma is a number."""
    model, images = tiny(), black_and_white(6)
    noise = torch.randn(1, 6, *model.shape)
    objective = objective_of(model, warmup_share=1.0, constant_share=0.0)
    output = objective.loss(model, images, 40, noise)
    terms = model(images, noise=noise)
    told = [float(group.detach().sum(-1).abs().mean()) + 0.01 for group in terms.kl]
    sizes, counts = [4, 16, 16], [1, 2, 2]  # 2x2 numbers in the first of the two scales, 4x4 in the second
    weights = [kl / (size / count) for kl, size, count in zip(told, sizes, counts, strict=True)]
    gamma = [3 * weight / sum(weights) for weight in weights]
    by_hand = -terms.log_likelihood.mean() + 0.4 * sum(
        factor * group.sum(-1).mean() for factor, group in zip(gamma, terms.kl, strict=True)
    )
    assert float(output.metrics["weight"]) == pytest.approx(0.4)
    torch.testing.assert_close(output.loss, by_hand)
    for ours, theirs in zip(gradients(output.loss, model), gradients(by_hand, model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert max(gamma) > 1.1  # else a balance that does nothing would pass


@pytest.mark.parametrize("step", [100, 40])
def test_from_the_end_of_the_warm_up_the_loss_is_the_bound(step: int):
    model, images = tiny().eval(), black_and_white(6)
    noise = torch.randn(1, 6, *model.shape)
    output = objective_of(model, warmup_share=0.3).loss(model, images, step, noise)
    torch.testing.assert_close(-output.loss.detach(), output.metrics["elbo"])


def test_the_smallest_group_weighs_one():
    assert alphas([16, 64, 64, 256, 256, 256, 256]).tolist() == [1, 2, 2, 4, 4, 4, 4]
    assert alphas([5]).tolist() == [1]


def test_the_coefficient_goes_from_its_start_geometrically_with_the_weight():
    model = tiny()
    objective = objective_of(
        model, warmup_share=1.0, constant_share=0.0, smallest_weight=0.0, regularisation=0.01, regularisation_start=1.0
    )
    found = [objective.coefficient(step) for step in (0, 50, 100)]
    assert found == pytest.approx([1.0, 0.1, 0.01])
    assert objective_of(model, regularisation=0.01).coefficient(0) == 0.01


# ---- regularisation -------------------------------------------------------------------------------------------------


def matrices(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (4, 4), (3, 5), (1, 6)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float32).requires_grad_() for shape in shapes]


def test_power_iteration_finds_the_largest_singular_values_and_their_gradients():
    torch.manual_seed(0)
    weights = matrices()
    norms = SpectralNorms(weights)
    found = norms(weights, 200)
    expected = torch.stack([torch.linalg.svdvals(weight)[0] for weight in weights]).sum()
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_vectors_follow_weights_that_move_a_little():
    """Four iterations from kept vectors are near where four from random ones are not."""
    torch.manual_seed(1)
    weights = [torch.randn(30, 40) for _ in range(3)]
    norms, new = SpectralNorms(weights), SpectralNorms(weights)
    norms(weights, 200)
    moved = [weight + 0.01 * torch.randn(30, 40) for weight in weights]
    exact = torch.stack([torch.linalg.svdvals(weight)[0] for weight in moved]).sum()
    assert abs(norms(moved, 4) / exact - 1) < 1e-3
    assert abs(new(moved, 4) / exact - 1) > 1e-2


def test_the_penalty_is_of_weights_as_images_meet_them():
    """Normalised, and the mean over micro-batches is that of one batch: the same vectors in all of a step."""
    model, images = tiny(), black_and_white(6)
    objective = objective_of(model, regularisation=0.5)
    facts = model.regularised()
    lengths = [
        module.log_weight_norm.exp().flatten() for module in model.modules() if hasattr(module, "log_weight_norm")
    ]
    assert len(facts.matrices) > len(lengths) > 10  # depthwise cells have no lengths that are learned
    stem = facts.matrices[0]
    torch.testing.assert_close(stem.norm(dim=1), model.stem.log_weight_norm.exp().flatten(), rtol=1e-3, atol=0)
    assert len(facts.gains) == len(batch_norms(model))

    whole = objective.loss(model, images, 0)
    before = {name: buffer.clone() for name, buffer in objective.norms.named_buffers()}
    part = objective.loss(model, images[:2], 0)
    assert all(torch.equal(buffer, before[name]) for name, buffer in objective.norms.named_buffers())
    assert torch.equal(whole.metrics["spectral_norms"], part.metrics["spectral_norms"])
    objective.loss(model, images, 1)
    assert any(not torch.equal(buffer, before[name]) for name, buffer in objective.norms.named_buffers())

    svd = torch.stack([torch.linalg.svdvals(matrix)[0] for matrix in model.regularised().matrices]).sum()
    gains = torch.stack([norm.weight.abs().max() for norm in batch_norms(model)]).sum()
    spectral, scales = objective.penalties(1)
    assert float((spectral / svd).detach()) == pytest.approx(1, abs=0.02)
    for ours, theirs in zip(gradients(scales, model), gradients(gains, model), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("parts", [2, 3])
def test_gradients_of_the_penalty_do_not_depend_on_micro_batches(parts: int):
    """Of a loss in which nothing but the penalty counts."""
    images = ((black_and_white(6) + 1) * 127.5).to(torch.uint8)

    class Nothing(nn.Module):
        def forward(self, *given: Any) -> Any:
            terms = model(*given)
            zero = 0 * terms.log_likelihood.detach()
            return terms._replace(log_likelihood=zero, exact_kl=tuple(0 * kl.detach() for kl in terms.exact_kl))

    found = []
    for count in (1, parts):
        model = tiny()
        torch.manual_seed(5)
        task = VAETask(
            model, objective_of(model, regularisation=0.5), NumberedImages.__new__(NumberedImages), batch_size=6
        )
        for some in torch.arange(6).chunk(count):
            (task.step(Nothing(), {"images": images[some], "draws": some}, 0).loss / count).backward()
        found.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_model_that_does_not_say_its_weights_is_refused():
    with pytest.raises(UserError, match=r"objective\.regularisation=0\.01, expected 0"):
        build_objective(BalancedConfig(regularisation=0.01), TrainingFacts(8, 100, (2,), ()))
    with pytest.raises(UserError, match=r"regularisation_start=1\.0, expected 0 where regularisation is 0"):
        BalancedConfig(regularisation_start=1.0)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    path = tmp_path_factory.mktemp("images") / "noise.npz"
    np.savez(path, images=pixels)
    return path


def run_config(pictures: Path, **train: Any) -> Stage1VAEConfig:
    settings = {"steps": 4, "batch_size": 6, "save_every": 2, "validate_every": 2, "preview_every": 0, "log_every": 1}
    return Stage1VAEConfig(
        model=TINY,
        data=DataConfig(path=str(pictures), image_size=8, channels=1, validation_count=6),
        train=TrainConfig(**{**settings, "workers": 0, "tracker": "none", "ema_decay": 0.9, **train}),
        objective=BalancedConfig(regularisation=0.01),
        binarised="once",
    )


def test_a_run_continues_bit_for_bit_with_the_vectors_that_it_kept(pictures: Path, tmp_path: Path):
    config = run_config(pictures, optimizer="adamax", accumulate=2)
    train_vae(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000004")
    shutil.rmtree(tmp_path / "cut" / "model")
    train_vae(config, tmp_path / "cut")
    whole, cut = (tmp_path / run / "checkpoints" / "step_00000004" for run in ("whole", "cut"))
    names = sorted(path.name for path in whole.iterdir())
    assert "spectral_norms.safetensors" in names
    assert names == sorted(path.name for path in cut.iterdir())
    assert [name for name in names if (whole / name).read_bytes() != (cut / name).read_bytes()] == []
    logged = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["spectral_norms"] > 0 for line in logged if line["split"] == "train")


@pytest.mark.slow
def test_two_processes_train_what_one_does(processes: Processes, pictures: Path, tmp_path: Path):
    """Batch norm, balance and averages are of the images of both."""
    # Of weights before a batch norm the gradient is rounding alone, by whose sign Adam would move.
    config = run_config(pictures, steps=3, max_grad_norm=0, optimizer="adamax")
    train_vae(config, tmp_path / "one")
    processes.together(train_vae, config, tmp_path / "two")
    one, two = (
        load_file(tmp_path / run / "checkpoints" / "step_00000003" / "model.safetensors") for run in ("one", "two")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_running_averages_move_once_a_step_and_not_by_a_step_that_is_skipped():
    model, images = tiny().train(), black_and_white(8)
    norm = batch_norms(model)[0]
    with torch.no_grad():
        for part in images.split(4):
            model(part)
        seen = [model.stem(part) for part in images.split(4)]
    assert torch.equal(norm.running_mean, torch.zeros(2))  # noted, not taken
    model.after_step()
    means = torch.stack([part.mean((0, 2, 3)) for part in seen]).mean(0)
    variances = torch.stack([part.var((0, 2, 3)) for part in seen]).mean(0)  # unbiased
    torch.testing.assert_close(norm.running_mean, 0.05 * means)
    torch.testing.assert_close(norm.running_var, 0.95 + 0.05 * variances)
    assert int(norm.num_batches_tracked) == 1
    kept = [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        model(images * torch.nan)
    model.discard_step()
    with torch.no_grad():
        model(images)
        model.discard_step()
    model.after_step()
    assert all(torch.equal(now, before) for now, before in zip(model.buffers(), kept, strict=True))
