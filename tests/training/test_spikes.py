"""Steps that go wrong in small trainings: a loss that leaps up, and one that is no number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stage1_vq.autoencoders import AUTOENCODERS, VQVAEConfig
from stage1_vq.quantizers import NearestQuantizerConfig
from stage1_vq.train import Stage1Task
from tests.training.runs import metrics
from tests.training.toy import ToyData, ToyModel, ToyTask, toy_config, toy_fit
from training.loop import fit
from training.task import Batch, StepOutput


class Spiky(ToyTask):
    """The loss of some steps is a million times as large."""

    spikes: tuple[int, ...] = ()

    def step(self, model: nn.Module, batch: Any, step: int) -> Any:
        output = super().step(model, batch, step)
        return output._replace(loss=output.loss * (1e6 if step in self.spikes else 1))


def fit_spiky(run: Path, spikes: tuple[int, ...], **changes: Any) -> tuple[float, ToyTask]:
    """The loss of the last ten steps, and the task."""
    torch.manual_seed(0)
    task = Spiky(ToyModel())
    task.spikes = spikes
    settings = {"schedule": "constant", "learning_rate": 0.03, "max_grad_norm": 0.0, "ema_decay": 0.0}
    toy_fit(run, toy_config(steps=60, validate_every=0, save_every=60, **settings, **changes), task)
    return sum(line["loss"] for line in metrics(run, "train")[-5:]) / 5, task


def test_a_spike_that_is_skipped_harms_nothing_and_one_that_is_not_does(tmp_path: Path):
    calm, _ = fit_spiky(tmp_path / "calm", ())
    guarded, task = fit_spiky(tmp_path / "guarded", (20, 21, 40), skip_grad_norm=1000.0)
    harmed, _ = fit_spiky(tmp_path / "harmed", (20, 21, 40))
    assert task.discarded == 3
    assert guarded < 1.5 * calm
    # Adam's second moments remember a spike for a thousand steps, in which the weights all but stand still.
    assert harmed > 2 * guarded, (calm, guarded, harmed)


class Noise(ToyData):
    """Pictures of noise, 16x16 pixels."""

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        generator = torch.Generator().manual_seed(sum(indices))
        return {"images": torch.randint(256, (len(indices), 3, 16, 16), dtype=torch.uint8, generator=generator)}


class Poisoned(Stage1Task):
    """The loss of the second micro-batch of step 2 is no number."""

    states: list[dict[str, Tensor]]  # before each micro-batch

    def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
        self.states.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        output = super().step(model, batch, step)
        return output._replace(loss=output.loss * float("nan")) if len(self.states) == 6 else output


def test_a_step_of_nan_leaves_weights_codebook_and_its_statistics_as_they_were(tmp_path: Path):
    torch.manual_seed(0)
    quantizer = NearestQuantizerConfig(codebook_size=16, dim=4, revive_after=1, kmeans_iterations=2)
    config = VQVAEConfig(width=8, residual_width=4, residual_blocks=1, quantizer=quantizer)
    task = Poisoned(AUTOENCODERS["vqvae"](config, (16, 16)), Noise(0), 4)
    task.states = []
    run = toy_config(steps=4, accumulate=2, ema_decay=0.0, validate_every=0, checkpoint_activations=True)
    fit(task, Noise(32), Noise(0), run, tmp_path, {"train": asdict(run)})
    before, after = task.states[4], task.states[6]
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    later = task.model.state_dict()
    moved = [name for name in after if name.endswith(("encoder.0.weight", "codebook", "cluster_sizes"))]
    assert len(moved) == 3
    for name in moved:
        assert not torch.equal(after[name], later[name]), name
        assert later[name].isfinite().all()
