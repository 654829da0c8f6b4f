"""What `accelerate launch`, by its options or the user's default_config.yaml, asks of a training or another command.

It tells the processes that it starts by environment variables. A recipe says how to train, and config.yaml records it:
what the launcher asks for besides would be passed over, and is refused. How weights are spread over processes is the
launcher's to say, as their number is: FSDP2 is obeyed (training/sharding.py), and what else spreads a model is refused
in common/processes.py, to all commands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from accelerate.utils import parse_flag_from_env

from common.errors import UserError
from training.config import TrainConfig

FSDP_SETTINGS = {  # what is refused, in an expected value's place: a variable of the launcher, values that pass, advice
    "FSDP_VERSION": (("2",), "give --fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "give --fsdp_offload_params false, and more processes if memory is short"),
    "FSDP_STATE_DICT_TYPE": (
        ("sharded_state_dict",),
        "leave --fsdp_state_dict_type out: checkpoints are of shares, and run/model is whole in any case",
    ),
    "FSDP_AUTO_WRAP_POLICY": ((), "leave --fsdp_auto_wrap_policy out: a model knows its blocks"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ((), "leave --fsdp_transformer_layer_cls_to_wrap out: a model knows its blocks"),
    "FSDP_FORWARD_PREFETCH": (("false",), "give --fsdp_forward_prefetch false"),
    "FSDP_IGNORED_MODULES": ((), "leave --fsdp_ignored_modules out: a model knows what stays whole"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "give --fsdp_activation_checkpointing false"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "give --fsdp_activation_checkpointing_offload false"),
}
"""The launcher says all of them whenever it is asked for FSDP, those besides with values for FSDP1 or transformers."""


@dataclass(frozen=True)
class ShardsAsked:
    """FSDP2 as `accelerate launch --use_fsdp` asks for it."""

    reshard_after_forward: bool  # blocks are let go after the forward pass, and gathered again for the backward pass


def asked_shards() -> ShardsAsked | None:
    """None where each process is to hold the whole model. Raises UserError for settings that are not obeyed here."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    for variable, (passing, advice) in FSDP_SETTINGS.items():
        value = os.environ.get(variable, "1" if variable == "FSDP_VERSION" else "")
        if value not in ("", "None") and value.lower() not in passing:
            raise UserError(
                f"accelerate launch asks for FSDP with {variable}={value}, expected "
                f"{' or '.join(passing) if passing else 'none'}: {advice}"
            )
    return ShardsAsked(parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", default=True))


@contextmanager
def shards_left_to_us() -> Iterator[None]:
    """An Accelerator made inside knows of no FSDP: on a CPU it never does (1.15), and the same happens on GPUs then."""
    asked = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_FSDP"] = asked


def check_launcher(config: TrainConfig) -> None:
    """Raises UserError where the launcher asks for what the config does not say."""
    if asked_shards() is not None and config.precision == "fp16":
        raise UserError(
            "accelerate launch asks for FSDP, and train.precision is fp16, expected bf16 or no: the loss scale of "
            "float16 is not kept alike for shares of a gradient"
        )
    if asked_shards() is not None and config.compile:
        raise UserError(
            "accelerate launch asks for FSDP, and train.compile is true, expected false: nobody has measured that the "
            "two together compute the same; give --train.compile false, or start it with accelerate launch --multi_gpu"
        )
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
    of the weights, and each process has all of them."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise UserError(
            "accelerate launch asks for FSDP (ACCELERATE_USE_FSDP=true), which only trainings have: start this command "
            "with accelerate launch --multi_gpu or with torchrun, and each process holds the whole model"
        )
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
