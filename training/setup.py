"""What a run is made on: its device and processes, and the model as they hold it."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from itertools import chain
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.compatibility import forget_accelerator_settings
from common.computing import check_device
from common.distributed import from_first_process
from common.errors import UserError
from common.model_io import PretrainedModel
from common.processes import process_state
from common.recompute import blocks_of
from training.config import TrainConfig
from training.launcher import check_launcher, shards_left_to_us
from training.optimizers import Learner, OptimizerSettings
from training.schedules import learning_rate


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Device, processes and precision. Raises UserError when the machine lacks what `config` asks for."""
    if config.tracker != "none" and find_spec(config.tracker) is None:
        raise UserError(f"train.tracker={config.tracker} is not installed: pip install {config.tracker}, or give none")
    check_launcher(config)
    forget_accelerator_settings()  # of a run before this one: the quickstart trains twice
    process_state(timeout_minutes=config.timeout_minutes)
    try:
        with shards_left_to_us():
            accelerator = Accelerator(
                mixed_precision="no" if config.precision == "tf32" else config.precision,
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=config.accumulate, sync_with_dataloader=False
                ),
            )
    except ValueError as error:
        raise UserError(f"train.precision={config.precision} does not work on this machine: {error}") from error
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("train.precision=fp16 needs a GPU, and there is none: use bf16 or no")
    if config.precision == "tf32":
        check_device(accelerator.device, "tf32")
    return accelerator


def recomputed_blocks(model: PretrainedModel) -> list[nn.Module]:
    """Raises UserError where there is nothing to recompute."""
    blocks = blocks_of(model)
    if not blocks:
        raise UserError(
            "train.checkpoint_activations=true for a model without blocks whose activations could be recomputed, such "
            "as one of a few plain layers: leave it out; train.accumulate takes less memory, too"
        )
    return blocks


def wrap(model: PretrainedModel, accelerator: Accelerator, config: TrainConfig) -> nn.Module:
    """The model as a step calls it. It shares its weights with `model`, which itself stays as it is:
    Accelerator.prepare would patch its forward for good."""
    wrapped: nn.Module = model
    if accelerator.num_processes > 1:
        # Said of weights of one channel, the stride of whose axis counts for nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # Tasks reduce their statistics, so buffers are equal on all processes: sending them would only cost time.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the argument's successor is not in every supported release
            wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    return compiled(wrapped, config)


def make_learner(model: nn.Module, config: TrainConfig) -> Learner:
    """Of the model's weights as they are now: shares of them have another."""
    settings = OptimizerSettings(
        kind=config.optimizer,
        betas=config.betas,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )

    def schedule(step: int) -> float:
        return learning_rate(
            step,
            peak=config.learning_rate,
            warmup_steps=config.warmup_steps,
            steps=config.steps,
            schedule=config.schedule,
            final_factor=config.final_learning_rate,
        )

    return Learner(model, settings, schedule)


def make_equal(model: nn.Module) -> None:
    """Gives all processes the first one's weights and buffers, as DistributedDataParallel does by itself."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            from_first_process(tensor.detach())


def compiled(model: nn.Module, config: TrainConfig) -> nn.Module:
    """`model`, compiled if the config says so."""
    return cast(nn.Module, torch.compile(model)) if config.compile else model


def find_data_parallel(model: nn.Module, log_every: int) -> DistributedDataParallel | None:
    """The wrapper that lets processes exchange gradients, told to time a step in every log line; None where there is
    none."""
    found = next((part for part in model.modules() if isinstance(part, DistributedDataParallel)), None)
    if found is not None:
        found._set_ddp_runtime_logging_sample_rate(log_every)
    return found


def communication_seconds(wrapper: DistributedDataParallel | None, late: float) -> float | None:
    """For how long a backward pass waits for the exchange of gradients after all its own work, slower processes
    included, in the last step that DistributedDataParallel has timed (it does so by events, without waiting for the
    device); None where it has timed none. late: by how many seconds another process began, as it waited for data."""
    told = {} if wrapper is None else wrapper._get_ddp_logging_data()
    names = ("backward_comm_time", "backward_compute_comm_overlap_time")
    if any(name not in told for name in names):
        return None
    exchange, beside_work = (int(told[name]) for name in names)  # nanoseconds
    return max((exchange - beside_work) / 1e9 - late, 0.0)
