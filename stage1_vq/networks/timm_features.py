"""Feature maps of networks of timm, for encoders that learn and for losses whose networks never do: sizes and
normalisation."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from common.model_size import of_known_size
from common.timm_models import Asking, check_name, megabytes_of, pretrained


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

        def build(**arguments: Any) -> Any:
            return create(self.name, **arguments, **self.settings)

        loaded = pretrained(self.name, source, self.asking, build, megabytes_of(self.features))
        self.features.load_state_dict(loaded.state_dict())


@of_known_size()
def create(name: str, **settings: Any) -> Any:
    """The features of a network. One that is made for a single size of images is asked to take others: vision
    transformers by positions that are interpolated, networks with windows by padding. Raises what timm raises."""
    import timm

    published = timm.get_pretrained_cfg(name)
    fixed = published is not None and published.fixed_input_size
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
