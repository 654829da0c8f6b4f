"""Networks of timm by name, and their weights from a download or a file; each mistake told in the words of who asks."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from common.errors import UserError
from common.processes import process_state
from common.wording import one_line

DOWNLOAD = "download"  # in the place of a file: a person's consent to fetch it


class Asking(NamedTuple):
    """The fields of the config that asks for a network, for messages."""

    name: str  # such as `model.backbone`
    file: str  # such as `model.backbone_pretrained`
    otherwise: str  # what to give to do without pretrained weights


def pretrained(name: str, source: str, asking: Asking, create: Callable[..., Any], megabytes: float) -> Any:
    """The network with its weights. create: as timm.create_model, the name and all else given; source: `download`, or
    a file: safetensors, or a state dict by torch.save; megabytes: of the weights, for the announcement of a download.
    Raises UserError."""
    state = process_state()
    # The first process of all downloads, then the first of each further machine, which may not see its files.
    with state.main_process_first(), state.local_main_process_first():
        if source == DOWNLOAD:
            return downloaded(name, asking, create, megabytes)
        return from_file(name, Path(source).expanduser(), asking, create)


def downloaded(name: str, asking: Asking, create: Callable[..., Any], megabytes: float) -> Any:
    origin = published_at(name)
    if origin is None:
        raise UserError(
            f"timm offers no weights for {asking.name}={name}: give {asking.file} the path of a file with "
            f"them, or {asking.otherwise}"
        )
    if process_state().is_main_process:
        print(f"{name}: weights of {origin}, {megabytes:.0f} MB or more, downloaded at first use", flush=True)
    try:
        return create(pretrained=True)
    except Exception as error:  # whatever timm, the hub's client or the network raise
        raise UserError(
            f"the weights of {asking.name}={name} could not be downloaded from {origin} ({reason(error)}); "
            f"download them elsewhere and give {asking.file} the path of the file, or {asking.otherwise}"
        ) from error


def from_file(name: str, path: Path, asking: Asking, create: Callable[..., Any]) -> Any:
    from timm.models import load_state_dict

    if not path.is_file():
        raise UserError(
            f"{asking.file}={path}: there is no such file; give one with the weights of {name}, of "
            f"{published_at(name) or 'a training of yours'}, or {asking.otherwise}"
        )
    try:
        # Told of a classifier to replace, timm would let a file of something else pass.
        overlay = {"state_dict": load_state_dict(str(path), weights_only=True), "classifier": None}
        return create(pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # whatever torch.load, safetensors and timm's converters raise for a wrong file
        raise UserError(
            f"{path} cannot be read as weights of {asking.name}={name} ({reason(error)}); give a "
            ".safetensors file, or a state dict saved by torch.save, of that very network by "
            f"{asking.file}, or {asking.otherwise}"
        ) from error


def check_name(name: str, asking: Asking) -> None:
    """Raises UserError for a name that timm does not know."""
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        meant = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() names them all"
        raise UserError(f"{asking.name}={name} is no network of timm {timm.__version__}; {meant}")


def published_at(name: str) -> str | None:
    """Where timm's weights of a network come from, if there are any."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None:
        return None
    return f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else str(config.url or "") or None


def megabytes_of(network: nn.Module) -> float:
    """Of its weights in float32."""
    return sum(weight.numel() for weight in network.parameters()) * 4 / 1e6


def reason(error: Exception) -> str:
    """What went wrong outside of our hands: `OSError: no such file`."""
    return one_line(f"{type(error).__name__}: {error}", 200)
