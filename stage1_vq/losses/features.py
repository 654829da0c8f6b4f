"""Features of networks that are never trained: what perceptual losses compare and feature discriminators judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.processes import process_state
from stage1_vq.networks.backbone import channels_first


class FrozenNetwork(nn.Module):
    """Holds a network in eval mode that is neither trained, nor saved, nor listed among the weights of the module that
    uses it, but follows that module to its device. Gradients pass through it to its input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = (network.requires_grad_(False).eval(),)  # in a tuple, where nn.Module does not look for modules

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenNetwork:
        self._network[0]._apply(fn)
        super()._apply(fn, recurse)
        return self

    def forward(self, x: Tensor) -> Any:
        return self._network[0](x)


class TimmFeatures(nn.Module):
    """Feature maps of a frozen timm backbone (`features_only=True`), from fine to coarse."""

    def __init__(
        self, backbone: str, weights: str | None, download: bool, layers: tuple[int, ...] | None, where: str
    ) -> None:
        """backbone: a timm model's name; weights: a local file with its weights; download: whether timm may fetch them;
        layers: which of the backbone's feature maps, None for those that timm gives by default; where: the path of
        these options in the config, for error messages. Raises UserError."""
        super().__init__()
        network: Any = timm_backbone(backbone, weights, download, layers, where)
        self.channels: list[int] = network.feature_info.channels()
        settings = network.pretrained_cfg
        self.side: int | None = settings["input_size"][-1] if settings.get("fixed_input_size") else None
        self.network = FrozenNetwork(network)
        self.register_buffer("mean", torch.tensor(settings["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings["std"]).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: b c H W in [-1, 1], c 1 or 3. Returns maps b c' h' w'."""
        pixels = (as_colour(images).float() + 1) / 2
        if self.side is not None:  # a transformer whose positions are learned for one size
            pixels = F.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
        (backbone,) = self.network._network
        return [channels_first(features, backbone) for features in self.network((pixels - self.mean) / self.std)]


def timm_backbone(
    backbone: str, weights: str | None, download: bool, layers: tuple[int, ...] | None, where: str
) -> nn.Module:
    """A timm backbone that returns feature maps, with pretrained weights. Raises UserError when it cannot have them."""
    import timm

    if not timm.is_model(backbone):
        close = timm.list_models(f"*{backbone.split('.')[0].split('_')[0]}*")[:4]
        raise UserError(
            f"{where}.backbone={backbone} is not a model of timm; "
            f"{'did you mean one of ' + ', '.join(close) if close else 'see timm.list_models()'}?"
        )
    options: dict[str, Any] = {"features_only": True}
    if layers is not None:
        options["out_indices"] = layers
    if weights is None and not download:
        raise UserError(
            f"{where}.backbone={backbone} needs its pretrained weights: put the file that timm publishes "
            f"({timm_source(backbone)}; some 4 MB per million weights) on this machine and name it by {where}.weights, "
            f"or give {where}.download=true to fetch it once, or {where.split('.')[0]}.weight=0 to train without"
        )
    if weights is None:
        source, state = timm_source(backbone), process_state()
        if state.is_main_process:
            print(f"{where}: timm fetches the weights of {backbone} ({source}) unless it has them", flush=True)
        # The first process of all downloads, then the first of each further machine, which may not see its files.
        with state.main_process_first(), state.local_main_process_first():
            try:
                return timm.create_model(backbone, pretrained=True, **options)
            except Exception as error:  # whatever timm, the hub's client or the network raise
                raise UserError(
                    f"{where}.download=true, but the weights of {backbone} ({source}) could not be had "
                    f"({type(error).__name__}: {one_line(error)}); fetch the file on another machine and name it by "
                    f"{where}.weights, or give {where.split('.')[0]}.weight=0 to train without"
                ) from error
    file = Path(weights).expanduser()
    if not file.is_file():
        raise UserError(f"{where}.weights={weights}: there is no such file; give that of timm's {backbone}")
    # Without the name of its classifier timm asks for each weight; with it, a file of something else would pass.
    overlay = {"file": str(file), "classifier": None}
    try:
        return timm.create_model(backbone, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # whatever torch.load, safetensors and timm's converters raise for a wrong file
        raise UserError(
            f"{where}.weights={weights} does not hold the weights of timm's {backbone} ({one_line(error)}); give the "
            f"file of {timm_source(backbone)}, or another {where}.backbone"
        ) from error


def timm_source(backbone: str) -> str:
    """Where timm's weights of a backbone come from."""
    from timm.models import get_pretrained_cfg

    settings = get_pretrained_cfg(backbone)
    if settings is None:
        return "no published weights"
    return f"https://huggingface.co/{settings.hf_hub_id}" if settings.hf_hub_id else str(settings.url)


def one_line(error: Exception, length: int = 200) -> str:
    return " ".join(str(error).split())[:length]


def as_colour(images: Tensor) -> Tensor:
    """Grey images with three equal channels: pretrained networks know colour images only."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def check_channels(channels: int, what: str) -> None:
    """Raises UserError unless images are grey or colour."""
    if channels not in (1, 3):
        raise UserError(f"{what} sees grey and colour images, and data.channels is {channels}; give {what}.weight=0")
