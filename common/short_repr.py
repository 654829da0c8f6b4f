"""What an object is, on one screen: for people at a prompt, not for programs."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # configs are shown by commands that do without torch
    from torch import nn


def changes(config: Any) -> str:
    """A config by what of it is not its default, those of configs inside it alike:
    `TrainConfig(steps=200, precision='bf16')`."""
    said = []
    for field in fields(config):
        value = getattr(config, field.name)
        default: Any = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name != "kind" and not (type(value) is type(default) and value == default):
            said.append(f"{field.name}={changes(value) if is_dataclass(value) else repr(value)}")
    return f"{type(config).__name__}({', '.join(said)})"


def weights_of(*models: nn.Module) -> str:
    """`1,234 parameters, float32 on cpu`; of a model in several types, all of them."""
    parameters = [weight for model in models for weight in model.parameters()]
    types = sorted({str(weight.dtype).removeprefix("torch.") for weight in parameters})
    devices = sorted({str(weight.device) for weight in parameters})
    count = sum(weight.numel() for weight in parameters)
    return f"{count:,} parameters, {' and '.join(types)} on {' and '.join(devices)}" if parameters else "no parameters"
