"""What `accelerate launch`, by its options or the user's default_config.yaml, asks of a training or another command.

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
    precision, backend = asked_precision(), asked_compiler()
    if precision not in ("no", config.precision):
        known = precision in ("bf16", "fp16")
        ours = f"give --train.precision {precision} too, which the run records, or " if known else ""
        raise UserError(
            f"accelerate launch asks for mixed precision {precision}, and train.precision is {config.precision}: {ours}"
            "start it with accelerate launch --mixed_precision no"
        )
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


def check_launcher_of_models() -> None:
    """Raises UserError where the launcher asks for what only trainings do: other commands compute in the type
    of the weights."""
    if (precision := asked_precision()) != "no":
        raise UserError(
            f"accelerate launch asks for mixed precision {precision}, which only trainings have: start this command "
            "with accelerate launch --mixed_precision no; to sample in bfloat16 give --precision bf16"
        )
    if (backend := asked_compiler()) != "no":
        raise UserError(
            f"accelerate launch asks for torch.compile by --dynamo_backend {backend}, which only trainings have: start "
            "this command with accelerate launch --dynamo_backend no"
        )


def asked_precision() -> str:
    """`no` where nothing is asked, which a launcher says too."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def asked_compiler() -> str:
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
