"""The task over latents by itself, and whole small runs of it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from codes.latents import LatentDataset, LatentShardWriter, LatentSpec
from common.errors import UserError
from common.model_io import load_pretrained
from common.runs import stage_of_run
from stage2_prior.latents import (
    LATENT_PRIORS,
    GaussianMixtureConfig,
    LatentPriorModel,
    MaskedAutoregressiveFlow,
    MaskedAutoregressiveFlowConfig,
    SecondVAEConfig,
)
from stage2_prior.train_latents import Stage2LatentConfig, Stage2LatentTask, look_at, noise_of, train_latents
from training.loop import TrainConfig

CONFIGS: dict[str, Any] = {
    "gaussian_mixture": GaussianMixtureConfig(components=2, iterations=5),
    "masked_autoregressive_flow": MaskedAutoregressiveFlowConfig(layers=2, hidden=(16,)),
    "batch_norm": MaskedAutoregressiveFlowConfig(layers=2, hidden=(16,), batch_norm=True),
    "second_vae": SecondVAEConfig(hidden=(16,), draws=16),
}


def write_latents(folder: Path, *, scales: bool = True, seed: int = 0) -> Path:
    """Two clouds, far apart, of 960 training and 240 validation images."""
    writer = LatentShardWriter(
        folder, LatentSpec((3,), scales, 8, 8, 1), ["train", "validation"], class_names="ab", stage1_fingerprint="f00d"
    )
    generator = torch.Generator().manual_seed(seed)
    for number, count in enumerate((960, 240)):
        labels = torch.arange(count) % 2
        mean = torch.randn(count, 3, generator=generator) * 0.2 + (labels[:, None] * 2 - 1) * torch.tensor([5.0, 2, 0])
        latents = {"mean": mean, "log_scale": torch.full((count, 3), -1.0)}
        held = latents if scales else {"mean": mean}
        writer.write(number, held, labels, [f"{number}_{i}.png" for i in range(count)])
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents") / "latents")


def config(name: str = "masked_autoregressive_flow", train: dict[str, Any] | None = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "steps": 8, "batch_size": 16, "learning_rate": 1e-2, "log_every": 1000, "validate_every": 4,
        "preview_every": 0, "save_every": 4, "tracker": "none", "workers": 0,
    }  # fmt: skip
    return Stage2LatentConfig(model=CONFIGS[name], train=TrainConfig(**{**settings, **(train or {})}), **changes)


def prior_in(run: Path) -> LatentPriorModel:
    return load_pretrained(run / "model", LATENT_PRIORS)


# Steps, what is allowed above the entropy, and the share of draws that lie in a cloud; one Gaussian has 1.85 and 0.24,
# and a bound takes longer to come below that.
LEARNED: dict[str, tuple[Any, int, float, float]] = {
    "gaussian_mixture": (CONFIGS["gaussian_mixture"], 30, 0.5, 0.9),
    "masked_autoregressive_flow": (MaskedAutoregressiveFlowConfig(layers=4, hidden=(32,)), 300, 1.5, 0.5),
    "second_vae": (SecondVAEConfig(hidden=(32, 32), draws=64), 300, 3.2, 0.3),
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_run_learns_where_latents_lie(latents: Path, tmp_path: Path, name: str):
    model, steps, allowed, share = LEARNED[name]
    settings = config(name, {"steps": steps, "validate_every": 150, "save_every": 300, "batch_size": 64})
    result = train_latents(replace(settings, model=model), latents, tmp_path)
    assert set(result.metrics) == {"nll", "gain"}
    # draws of two clouds of variance 0.04 + exp(-2) in each of three dimensions
    entropy = math.log(2) + 1.5 * math.log(2 * math.pi * math.e * (0.04 + math.exp(-2)))
    assert result.best_value is not None
    assert entropy - 0.5 < result.best_value < entropy + allowed
    assert result.metrics["gain"] > 12
    prior = prior_in(tmp_path)
    assert (prior.stage1_fingerprint, prior.latent_spec.describe()) == ("f00d", "3 latents (8x8x1 images)")
    drawn = prior.sample(400, torch.Generator().manual_seed(0))
    near = ((drawn[:, 0].abs() - 5).abs() < 1.5).float().mean()
    assert near > share
    assert 0.3 < (drawn[:, 0] > 0).float().mean() < 0.7
    assert stage_of_run(tmp_path) == "stage two"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_goes_on_as_it_would_have(latents: Path, tmp_path: Path, name: str):
    """The first four steps alone, then the rest: the weights of eight at once, bit for bit."""
    train_latents(config(name), latents, tmp_path / "whole")
    train_latents(config(name), latents, tmp_path / "parts")
    last = Path("checkpoints", "step_00000008")
    shutil.rmtree(tmp_path / "parts" / last)
    train_latents(config(name), latents, tmp_path / "parts")
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "whole" / last / file).read_bytes() == (tmp_path / "parts" / last / file).read_bytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_are_one_batch(latents: Path, tmp_path: Path, name: str):
    """But for what is drawn, and for batch norm: so on means, and without either."""
    if name in ("batch_norm", "second_vae"):
        pytest.skip("each micro-batch has its own statistics or draws")
    train_latents(config(name, draws=False), latents, tmp_path / "one")
    train_latents(config(name, {"accumulate": 4}, draws=False), latents, tmp_path / "four")
    one, four = prior_in(tmp_path / "one").state_dict(), prior_in(tmp_path / "four").state_dict()
    for key in one:
        torch.testing.assert_close(one[key], four[key], atol=1e-4, rtol=1e-4)


def test_latents_are_standardised(latents: Path):
    data = LatentDataset(latents)
    batch = data.fetch(range(960), range(960))
    mean, variance, drawn = look_at(data, draws=True)
    torch.testing.assert_close(mean.float(), batch["mean"].mean(0))
    torch.testing.assert_close(variance.float(), batch["mean"].var(0, correction=0) + math.exp(-2))
    error = (drawn - batch["mean"]) / math.exp(-1)
    assert 0.8 < error.std() < 1.2
    mean_alone, variance_alone, means = look_at(data, draws=False)
    torch.testing.assert_close(mean_alone, mean)
    torch.testing.assert_close(variance_alone.float(), batch["mean"].var(0, correction=0))
    assert torch.equal(means, batch["mean"])


def test_steps_see_other_draws_and_validations_the_same(latents: Path):
    prior = MaskedAutoregressiveFlow(CONFIGS["masked_autoregressive_flow"], LatentDataset(latents).latent_spec)
    data, held_out = LatentDataset(latents), LatentDataset(latents, "validation")
    task = Stage2LatentTask(prior, data, held_out, draws=True)
    batch = held_out.fetch([3, 4, 5], [0, 0, 0])
    losses = [float(task.step(prior, batch, step).loss.detach()) for step in range(2)]
    assert losses[0] != losses[1]
    first, again = task.validate(prior, batch), task.validate(prior, held_out.fetch([5, 3], [0, 0]))
    torch.testing.assert_close(first["nll"][[2, 0]], again["nll"])
    drawn = batch["mean"] + batch["log_scale"].exp() * noise_of(batch)
    torch.testing.assert_close(first["nll"], -prior.log_density(drawn))
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(drawn).sum(1)
    torch.testing.assert_close(first["gain"], prior.log_density(drawn) - normal)
    of_means = Stage2LatentTask(prior, data, held_out, draws=False)
    torch.testing.assert_close(of_means.step(prior, batch, 0).loss, -prior.log_density(batch["mean"]).mean())
    torch.testing.assert_close(of_means.validate(prior, batch)["nll"], -prior.log_density(batch["mean"]))


def test_previews_show_held_out_latents_above_samples(latents: Path):
    shown: list[Any] = []
    prior = MaskedAutoregressiveFlow(CONFIGS["masked_autoregressive_flow"], LatentDataset(latents).latent_spec)
    held_out = LatentDataset(latents, "validation")

    def draw(rows: Any, names: Any) -> torch.Tensor:
        shown.append((rows, names))
        return torch.zeros(3, 4, 4)

    task = Stage2LatentTask(prior, LatentDataset(latents), held_out, True, draw)
    task.preview(prior)
    task.preview(prior)
    rows, names = shown[0]
    assert names[:2] == ["held out", "sampled"]
    assert rows[0].shape == rows[1].shape
    assert torch.equal(rows[0], held_out.fetch(*[[0, 2, 4, 6, 1, 3, 5, 7]] * 2)["mean"])
    assert all(torch.equal(*pair) for pair in zip(shown[0][0], shown[1][0], strict=True))
    assert Stage2LatentTask(prior, held_out, held_out, True).preview(prior) is None


def test_means_alone_are_no_draws(tmp_path: Path):
    write_latents(tmp_path / "means", scales=False)
    with pytest.raises(UserError, match=r"holds the means of posteriors alone, .* give --draws false"):
        train_latents(config(), tmp_path / "means", tmp_path / "run")
    train_latents(config(draws=False), tmp_path / "means", tmp_path / "run")


def test_other_latents_are_refused(latents: Path, tmp_path: Path):
    train_latents(config(), latents, tmp_path / "run")
    moved = shutil.copytree(latents, tmp_path / "moved")
    train_latents(config(train={"steps": 9}), moved, tmp_path / "run")  # the same ones in another place
    write_latents(tmp_path / "others", seed=1)
    with pytest.raises(UserError, match="codes"):
        train_latents(config(train={"steps": 9}), tmp_path / "others", tmp_path / "run")
    with pytest.raises(UserError, match="stage1_fingerprint is beef in the config and f00d in the latents"):
        train_latents(config(stage1_fingerprint="beef"), latents, tmp_path / "new")


def test_a_run_records_what_it_is(latents: Path, tmp_path: Path):
    train_latents(config(), latents, tmp_path)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["stage"] == "stage two"
    with pytest.raises(UserError, match="draws"):
        train_latents(config(draws=False), latents, tmp_path)


def test_no_training_latents(tmp_path: Path):
    writer = LatentShardWriter(tmp_path / "none", LatentSpec((3,), True, 8, 8, 1), ["validation"])
    writer.write(0, {"mean": torch.zeros(1, 3), "log_scale": torch.zeros(1, 3)}, torch.zeros(1), ["a"])
    writer.finish()
    with pytest.raises(UserError, match="holds no latents of training images"):
        train_latents(config(), tmp_path / "none", tmp_path / "run")


def test_every_field_of_a_model_changes_the_result(latents: Path, tmp_path: Path):
    changes: list[tuple[str, dict[str, Any]]] = [
        ("gaussian_mixture", {"components": 3}),
        ("gaussian_mixture", {"covariance": "diagonal"}),
        ("gaussian_mixture", {"iterations": 1}),
        ("gaussian_mixture", {"smallest_scale": 0.5}),
        ("masked_autoregressive_flow", {"layers": 3}),
        ("masked_autoregressive_flow", {"hidden": (8,)}),
        ("masked_autoregressive_flow", {"activation": "tanh"}),
        ("masked_autoregressive_flow", {"batch_norm": True}),
        ("second_vae", {"latents": 2}),
        ("second_vae", {"hidden": (8,)}),
        ("second_vae", {"activation": "silu"}),
        ("second_vae", {"draws": 2}),
    ]
    plain = {name: train_latents(config(name), latents, tmp_path / name).metrics["nll"] for name in LATENT_PRIORS}
    for number, (name, change) in enumerate(changes):
        changed = replace(config(name), model=replace(CONFIGS[name], **change))
        assert train_latents(changed, latents, tmp_path / str(number)).metrics["nll"] != plain[name], change
