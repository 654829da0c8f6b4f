"""What of a training step waits for a GPU: the loop's one look at its figures does, and that for dead codes."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from images.datasets import DataConfig
from stage1_vq.autoencoders import VQVAEConfig
from stage1_vq.losses.adversarial import AdversarialConfig
from stage1_vq.losses.discriminators import PatchGANConfig
from stage1_vq.quantizers import NearestQuantizerConfig, build_quantizer
from stage1_vq.train import Stage1Config, train_stage1
from tests.imaginary_gpu import WAITED, OnTheDevice, imaginary_gpu
from tests.stage1_vq.tiny import QUANTIZER_ROWS
from training.loop import TrainConfig
from training.signals import StopRequest
from training.trainer import Trainer

WAITS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy", "nonzero", "unique")


def never_revived(config: Any) -> Any:
    """The config, whose codebooks do not look for dead codes, however deep inside they are."""
    changes: dict[str, Any] = {
        field.name: never_revived(value)
        for field in fields(config)
        if is_dataclass(value := getattr(config, field.name))
    }
    if getattr(config, "revive_after", 0):
        changes["revive_after"] = 0
    if getattr(config, "revive_below", 0):
        changes["revive_below"] = 0.0
    return replace(config, **changes)


def step_on_an_imaginary_gpu(config: Any) -> None:
    with imaginary_gpu():
        quantizer = build_quantizer(config).train()
        z = torch.zeros(3, quantizer.dim, 4, 4, requires_grad=True)
        with OnTheDevice():
            quantizer.begin_step(0)
            quantizer(z)
            quantizer.update()


@pytest.mark.parametrize("row", QUANTIZER_ROWS)
def test_a_step_of_a_quantizer_waits_for_nothing(row, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", torch.nn.init.normal_)  # which looks at its numbers
    step_on_an_imaginary_gpu(never_revived(QUANTIZER_ROWS[row]))


def test_a_step_that_looks_for_dead_codes_waits():
    with pytest.raises(WAITED):
        step_on_an_imaginary_gpu(NearestQuantizerConfig(codebook_size=16, dim=4, kmeans_iterations=0))


class Waits(TorchFunctionMode):
    """Counts what would make the host wait for a GPU: numbers of tensors that a program asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in WAITS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_of_the_loop_waits_once_and_once_more_for_the_number_of_dead_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain, counted = Trainer.step, list[Counter[str]]()

    def step(trainer: Trainer, stop: StopRequest) -> Any:
        with Waits() as waits:
            report = plain(trainer, stop)
        counted.append(waits.counts)
        return report

    monkeypatch.setattr(Trainer, "step", step)
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=images)
    quantizer = NearestQuantizerConfig(codebook_size=16, dim=4, kmeans_iterations=1, revive_after=50)
    config = Stage1Config(
        model=VQVAEConfig(channels=1, width=8, residual_width=8, residual_blocks=1, quantizer=quantizer),
        data=DataConfig(path=str(tmp_path / "noise.npz"), image_size=8, channels=1, validation_count=8),
        train=TrainConfig(
            steps=10, batch_size=8, accumulate=2, ema_decay=0.9, log_every=3, validate_every=0,
            preview_every=0, save_every=99, tracker="none", workers=0,
        ),
        adversarial=AdversarialConfig(
            weight=0.1, start=0.0, warmup=0.0, lecam_weight=0.1, r1_weight=1.0, rollback=False,
            discriminator=PatchGANConfig(layers=1, width=8),
        ),
    )  # fmt: skip
    train_stage1(config, tmp_path / "run")
    assert counted == 10 * [{"tolist": 1, "nonzero": 1}]
