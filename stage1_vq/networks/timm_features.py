"""Feature maps of networks of timm, for encoders that learn and for losses whose networks never do: names, sizes,
normalisation, and weights from a download or a file, each mistake told in the words of the config that asks."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from common.errors import UserError
from common.processes import process_state
from common.wording import one_line

DOWNLOAD = "download"  # in the place of a file: a person's consent to fetch it


class Asking(NamedTuple):
    """The fields of the config that asks for a network, for messages."""

    name: str  # such as `model.backbone`
    file: str  # such as `model.backbone_pretrained`
    otherwise: str  # what to give to do without pretrained weights


class TimmFeatures(nn.Module):
    """Images, b c H W in [-1, 1] -> maps of features, b c' h' w' each, from fine to coarse.

    The images are shifted and scaled to the mean and deviation that the network was made for; where they have other
    than three channels, by those of all colours together. Weights are fresh until `load_pretrained`.
    """

    mean: Tensor  # c 1 1, of pixels in [-1, 1]
    deviation: Tensor  # c 1 1

    def __init__(self, name: str, levels: tuple[int, ...] | None, asking: Asking, channels: int = 3) -> None:
        """name: as timm has it, with or without a tag such as `.fb_in22k`; levels: which of the network's maps, None
        for those that timm gives by default. Raises UserError for an unknown name."""
        super().__init__()
        check_name(name, asking)
        self.name, self.asking = name, asking
        self.settings: dict[str, Any] = {"in_chans": channels}
        if levels is not None:
            self.settings["out_indices"] = levels
        self.features = create(name, **self.settings)
        made_for = self.features.pretrained_cfg
        for statistic, value in (
            ("mean", [2 * mean - 1 for mean in made_for["mean"]]),  # timm's are of pixels in [0, 1]
            ("deviation", [2 * deviation for deviation in made_for["std"]]),
        ):
            of_channels = value if len(value) == channels else [sum(value) / len(value)] * channels
            self.register_buffer(statistic, torch.tensor(of_channels).view(-1, 1, 1))

    @property
    def widths(self) -> list[int]:
        """Channels of each map."""
        return self.features.feature_info.channels()

    @property
    def fixed_side(self) -> int | None:
        """Of the images, where the network was made for one size alone."""
        made_for = self.features.pretrained_cfg
        return made_for["input_size"][-1] if made_for.get("fixed_input_size") else None

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.features((images - self.mean) / self.deviation)
        return [channels_first(features, self.features) for features in maps]

    def load_pretrained(self, source: str) -> None:
        """source: `download`, or a file: safetensors, or a state dict by torch.save. The first convolution is adapted
        where the images have other than three channels. Raises UserError."""
        state = process_state()
        # The first process of all downloads, then the first of each further machine, which may not see its files.
        with state.main_process_first(), state.local_main_process_first():
            loaded = self._downloaded() if source == DOWNLOAD else self._from_file(Path(source).expanduser())
        self.features.load_state_dict(loaded.state_dict())

    def _downloaded(self) -> nn.Module:
        origin, asking = published_at(self.name), self.asking
        if origin is None:
            raise UserError(
                f"timm offers no weights for {asking.name}={self.name}: give {asking.file} the path of a file with "
                f"them, or {asking.otherwise}"
            )
        megabytes = sum(weight.numel() for weight in self.features.parameters()) * 4 / 1e6
        if process_state().is_main_process:
            print(f"{self.name}: weights of {origin}, {megabytes:.0f} MB or more, downloaded at first use", flush=True)
        try:
            return create(self.name, pretrained=True, **self.settings)
        except Exception as error:  # whatever timm, the hub's client or the network raise
            raise UserError(
                f"the weights of {asking.name}={self.name} could not be downloaded from {origin} ({reason(error)}); "
                f"download them elsewhere and give {asking.file} the path of the file, or {asking.otherwise}"
            ) from error

    def _from_file(self, path: Path) -> nn.Module:
        from timm.models import load_state_dict

        asking = self.asking
        if not path.is_file():
            raise UserError(
                f"{asking.file}={path}: there is no such file; give one with the weights of {self.name}, of "
                f"{published_at(self.name) or 'a training of yours'}, or {asking.otherwise}"
            )
        try:
            # Told of a classifier to replace, timm would let a file of something else pass.
            overlay = {"state_dict": load_state_dict(str(path), weights_only=True), "classifier": None}
            return create(self.name, pretrained=True, pretrained_cfg_overlay=overlay, **self.settings)
        except Exception as error:  # whatever torch.load, safetensors and timm's converters raise for a wrong file
            raise UserError(
                f"{path} cannot be read as weights of {asking.name}={self.name} ({reason(error)}); give a "
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

    pretrained = timm.get_pretrained_cfg(name)
    if pretrained is None:
        return None
    return (
        f"https://huggingface.co/{pretrained.hf_hub_id}" if pretrained.hf_hub_id else str(pretrained.url or "") or None
    )


def create(name: str, **settings: Any) -> Any:
    """The features of a network. One that is made for a single size of images is asked to take others: vision
    transformers by positions that are interpolated, networks with windows by padding. Raises what timm raises."""
    import timm

    pretrained = timm.get_pretrained_cfg(name)
    fixed = pretrained is not None and pretrained.fixed_input_size
    adaptations: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})
    for adaptation in adaptations if fixed else ():
        try:
            return timm.create_model(name, features_only=True, **adaptation, **settings)
        except TypeError:  # it does not know this argument
            continue
    return timm.create_model(name, features_only=True, **settings)


def channels_first(features: Tensor, network: nn.Module) -> Tensor:
    """b d h w, also of networks that give b h w d."""
    from timm.layers import Format

    if getattr(network, "output_fmt", Format.NCHW) == Format.NHWC:
        return rearrange(features, "b h w d -> b d h w")
    return features


def reason(error: Exception) -> str:
    """What went wrong outside of our hands: `OSError: no such file`."""
    return one_line(f"{type(error).__name__}: {error}", 200)
