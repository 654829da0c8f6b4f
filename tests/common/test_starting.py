"""Frozen parts of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.starting import freeze, in_training, stands_still
from tests.training.toy import ToyTask, toy_config, toy_fit, toy_task
from training.task import Batch, StepOutput


def test_frozen_parts_stay_in_eval_mode_and_the_others_do_not():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)), nn.BatchNorm1d(2))
    freeze(model, ["0"])
    in_training(model.eval())
    assert [module.training for module in model.modules()] == [True, False, False, False, True]
    assert not stands_still(model[1])
    x = torch.randn(8, 2) + 3
    assert torch.equal(model[0](x), model[0](x))  # no dropout
    model(x)
    assert (model[0][0].running_mean == 0).all()
    assert (model[1].running_mean != 0).any()
    assert [weight.requires_grad for weight in model.parameters()] == [False, False, True, True]


def test_a_training_leaves_them_there_also_after_a_validation(tmp_path: Path):
    class Watched(ToyTask):
        def __init__(self) -> None:
            super().__init__(toy_task().model)
            self.still = nn.Dropout()
            self.model.add_module("still", self.still)
            freeze(self.model, ["still"])
            self.modes: set[tuple[bool, bool]] = set()

        def step(self, model: Any, batch: Batch, step: int) -> StepOutput:
            self.modes.add((self.model.training, self.still.training))
            return super().step(model, batch, step)

    task = Watched()
    toy_fit(tmp_path / "run", toy_config(steps=4, validate_every=2), task)
    assert task.modes == {(True, False)}
