"""Any network of timm with `features_only=True` as an encoder: its features at one stride, and a 1x1 convolution."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from common.errors import UserError
from common.processes import process_state

DOWNLOAD = "download"


class TimmBackbone(nn.Module):
    """Images, b c H W in [-1, 1] -> b width_out h w.

    The images are shifted and scaled to the mean and deviation that the backbone was made for. Weights are fresh until
    `load_pretrained`. Batch norms keep the statistics that they have, also in training: an image's codes must not
    depend on its batch, nor a step on how it is split over processes. Fresh ones start from mean 0 and variance 1, so
    without pretrained weights take a backbone with layer or group norms, such as a ConvNeXt.
    """

    mean: Tensor  # c 1 1, of pixels in [-1, 1]
    deviation: Tensor  # c 1 1

    def __init__(self, name: str, *, channels: int, stride: int, width_out: int) -> None:
        """name: as timm has it, with or without a tag such as `.fb_in22k`. Raises UserError for an unknown name, a
        network without features, or one without any at this stride."""
        super().__init__()
        self.name, self.channels = name, channels
        check_name(name)
        offered = strides_of(name, channels)
        if stride not in offered:
            strides = ", ".join(str(each) for each in sorted(set(offered)))
            raise UserError(
                f"model.backbone={name} has no features of stride {stride}, which the decoder undoes; it has them at "
                f"{strides}: change the decoder's stride, or take another backbone"
            )
        self.level = max(level for level, reduction in enumerate(offered) if reduction == stride)  # the deepest
        self.features = create(name, channels, out_indices=(self.level,))
        unused = unused_weights(name, channels, self.level, stride)
        for weight_name, weight in self.features.named_parameters():
            weight.requires_grad_(weight_name not in unused)
        self.output = nn.Conv2d(self.features.feature_info.channels()[0], width_out, 1)

        pretrained = self.features.pretrained_cfg
        for statistic, value in (
            ("mean", [2 * mean - 1 for mean in pretrained["mean"]]),  # timm's are of pixels in [0, 1]
            ("deviation", [2 * deviation for deviation in pretrained["std"]]),
        ):
            of_channels = value if len(value) == channels else [sum(value) / len(value)] * channels
            self.register_buffer(statistic, torch.tensor(of_channels).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        (features,) = self.features((images - self.mean) / self.deviation)
        return self.output(channels_first(features, self.features))

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def load_pretrained(self, source: str) -> None:
        """source: `download`, which is a person's consent, or a file: safetensors, or a state dict by torch.save. The
        first convolution is adapted where the images have other than three channels. Raises UserError."""
        state = process_state()
        # The first process of all downloads, then the first of each further machine, which may not see its files.
        with state.main_process_first(), state.local_main_process_first():
            loaded = self._downloaded() if source == DOWNLOAD else self._from_file(Path(source).expanduser())
        self.features.load_state_dict(loaded.state_dict())

    def _downloaded(self) -> nn.Module:
        config = self.features.pretrained_cfg
        origin = f"huggingface.co/{config['hf_hub_id']}" if config.get("hf_hub_id") else config.get("url")
        if not origin:
            raise UserError(
                f"timm offers no weights for model.backbone={self.name}: give model.backbone_pretrained the path of a "
                "file with them, or null to train it from scratch"
            )
        megabytes = sum(weight.numel() for weight in self.features.parameters()) * 4 / 1e6
        print(f"{self.name}: weights of {origin}, {megabytes:.0f} MB or more, downloaded at first use", flush=True)
        try:
            return create(self.name, self.channels, out_indices=(self.level,), pretrained=True)
        except Exception as error:
            raise UserError(
                f"the weights of model.backbone={self.name} could not be downloaded from {origin} "
                f"({one_line(error)}); download them elsewhere and give "
                "model.backbone_pretrained the path of the file, or null to train the backbone from scratch"
            ) from error

    def _from_file(self, path: Path) -> nn.Module:
        if not path.is_file():
            raise UserError(
                f"model.backbone_pretrained={path}: there is no such file; give one with the weights of {self.name}, "
                f"or {DOWNLOAD}, or null to train it from scratch"
            )
        from timm.models import load_state_dict

        try:
            # Told of a classifier to replace, timm would let a file of something else pass.
            overlay = {"state_dict": load_state_dict(str(path), weights_only=True), "classifier": None}
            return create(
                self.name, self.channels, out_indices=(self.level,), pretrained=True, pretrained_cfg_overlay=overlay
            )
        except Exception as error:
            raise UserError(
                f"{path} cannot be read as weights of model.backbone={self.name} ({one_line(error)}); "
                "give a .safetensors file, or a state dict saved by torch.save, of that very network"
            ) from error


def check_name(name: str) -> None:
    import timm  # here and below: seconds, which models without it need not wait for

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        meant = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() names them all"
        raise UserError(f"model.backbone={name} is no network of timm {timm.__version__}; {meant}")


def create(name: str, channels: int, **settings: Any) -> Any:
    """The features of a network. One that is made for a single size of images is asked to take others: vision
    transformers by positions that are interpolated, networks with windows by padding. Raises what timm raises."""
    import timm

    pretrained = timm.get_pretrained_cfg(name)
    fixed = pretrained is not None and pretrained.fixed_input_size
    adaptations: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})
    for adaptation in adaptations if fixed else ():
        try:
            return timm.create_model(name, features_only=True, in_chans=channels, **adaptation, **settings)
        except TypeError:  # it does not know this argument
            continue
    return timm.create_model(name, features_only=True, in_chans=channels, **settings)


def channels_first(features: Tensor, network: nn.Module) -> Tensor:
    """b d h w, also of networks that give b h w d."""
    if getattr(network, "output_fmt", "NCHW") == "NHWC":  # timm's own type of these is a str
        return rearrange(features, "b h w d -> b d h w")
    return features


def strides_of(name: str, channels: int) -> list[int]:
    """The stride of each level of features, fine to coarse. Raises UserError for a network without features."""
    try:
        with torch.device("meta"):
            return [level["reduction"] for level in create(name, channels).feature_info.info]
    except Exception as error:
        raise UserError(
            f"model.backbone={name} cannot be an encoder, as timm gives no features of it ({one_line(error)}); take a "
            "network with features_only, such as convnext_tiny or resnet50"
        ) from error


def unused_weights(name: str, channels: int, level: int, stride: int) -> set[str]:
    """Names of the weights that the features of a level do not depend on: some networks compute all levels anyway.
    Raises UserError for a network that does not take images of any size."""
    try:
        with torch.device("meta"), torch.enable_grad():
            network = create(name, channels, out_indices=(level,)).eval()
            (features,) = network(torch.zeros(1, channels, 2 * stride, 3 * stride))
            features = channels_first(features, network)
            if tuple(features.shape[2:]) != (2, 3):
                raise ValueError(f"{2 * stride}x{3 * stride} pixels became features of {tuple(features.shape)}")
            features.sum().backward()
    except Exception as error:
        raise UserError(
            f"model.backbone={name} cannot be an encoder, as it does not take images of any size "
            f"({one_line(error)}); take a convolutional network, such as convnext_tiny or resnet50"
        ) from error
    return {weight for weight, tensor in network.named_parameters() if tensor.grad is None}


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
