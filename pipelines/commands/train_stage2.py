"""`zellige train-stage2`: a prior learns which codes follow which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import UserError
from common.processes import use_device
from pipelines.options import read_recipe, split_device
from stage2_prior.train import Stage2Config, train_stage2


def prepare(arguments: Sequence[str]) -> Callable[[], str]:
    """Reads and checks the arguments; what it returns trains and tells in one line what was made. Raises UserError."""
    device, rest = split_device(arguments)
    config, run = read_recipe("train-stage2", Stage2Config, "stage2", rest)
    if not config.codes:
        raise UserError("codes is empty: expected a folder that `zellige encode` wrote; give --codes")
    codes, following = Path(config.codes), f"zellige assemble --stage1 RUN --stage2 {run} --out MODEL"

    def train() -> str:
        use_device(device)
        return train_stage2(config, codes, run).summary(following)

    return train
