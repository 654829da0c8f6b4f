"""What `accelerate launch`, by its options or the user's default_config.yaml, asks of a training.

It tells the processes that it starts by environment variables. A recipe says how to train, and config.yaml records it:
what the launcher asks for besides would be passed over, and is refused. That a model cannot be spread over processes is
said in common/processes.py, to all commands.
"""

from __future__ import annotations

import os

from common.errors import UserError
from training.config import TrainConfig


def check_launcher(config: TrainConfig) -> None:
    """Raises UserError where the launcher asks for what the config does not say."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()  # which is said also where nothing is asked
    if precision not in ("no", config.precision):
        known = precision in ("bf16", "fp16")
        ours = f"give --train.precision {precision} too, which the run records, or " if known else ""
        raise UserError(
            f"accelerate launch asks for mixed precision {precision}, and train.precision is {config.precision}: {ours}"
            "start it with accelerate launch --mixed_precision no"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise UserError(
            f"accelerate launch asks for torch.compile by --dynamo_backend {backend}, which here --train.compile true "
            "does: give that, and start it with accelerate launch --dynamo_backend no"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(config.accumulate)):
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps}, and train.accumulate is {config.accumulate}: give "
            f"--train.accumulate {steps}, or unset the variable"
        )
