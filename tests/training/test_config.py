from __future__ import annotations

import math

import pytest

from common.errors import UserError
from training.config import TrainConfig


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "train.steps=0, expected at least 1"),
        ({"log_every": 0}, "train.log_every=0, expected at least 1"),
        ({"workers": -1}, "train.workers=-1, expected at least 0"),
        ({"weight_decay": math.nan}, "train.weight_decay=nan, expected at least 0"),
        ({"learning_rate": 0.0}, "train.learning_rate=0.0, expected above 0"),
        ({"ema_decay": 1.0}, "train.ema_decay=1.0, expected from 0 to below 1"),
        ({"keep_every": -1}, "train.keep_every=-1, expected at least 0"),
        ({"save_minutes": math.nan}, "train.save_minutes=nan, expected at least 0"),
        ({"timeout_minutes": 0}, "train.timeout_minutes=0, expected above 0 and at most 10080, a week: 60 is usual"),
        ({"timeout_minutes": math.inf}, "train.timeout_minutes=inf, expected above 0"),
        ({"precision": "fp8"}, "train.precision=fp8, expected no, bf16, fp16 or tf32"),
        ({"betas": (0.9, 1.5)}, r"train.betas=\(0.9, 1.5\), expected from 0 to below 1"),
        ({"batch_size": 10, "accumulate": 4}, "train.batch_size=10 cannot be split .* choose a multiple"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(changes, sentence: str):
    with pytest.raises(UserError, match=sentence):
        TrainConfig(**changes)


def test_defaults_are_valid():
    TrainConfig()
