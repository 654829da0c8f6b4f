"""Any network of timm with `features_only=True` as an encoder: its features at one stride, and a 1x1 convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.renaming import name_as_own
from common.timm_models import Asking, check_name, reason
from stage1_vq.networks.timm_features import TimmFeatures, channels_first, create

ASKING = Asking("model.backbone", "model.backbone_pretrained", "null to train it from scratch")


class TimmBackbone(nn.Module):
    """Images, b c H W in [-1, 1] -> b width_out h w.

    Weights are fresh until `load_pretrained`. Batch norms keep the statistics that they have, also in training: an
    image's codes must not depend on its batch, nor a step on how it is split over processes. Fresh ones start from mean
    0 and variance 1, so without pretrained weights take a backbone with layer or group norms, such as a ConvNeXt.
    """

    def __init__(self, name: str, *, channels: int, stride: int, width_out: int) -> None:
        """name: as timm has it. Raises UserError for an unknown name, a network without features, or one without any at
        this stride."""
        super().__init__()
        check_name(name, ASKING)
        offered = strides_of(name, channels)
        if stride not in offered:
            strides = ", ".join(str(each) for each in sorted(set(offered)))
            raise UserError(
                f"model.backbone={name} has no features of stride {stride}, which the decoder undoes; it has them at "
                f"{strides}: change the decoder's stride, or take another backbone"
            )
        self.level = max(level for level, reduction in enumerate(offered) if reduction == stride)  # the deepest
        self.network = TimmFeatures(name, (self.level,), ASKING, channels)
        name_as_own(self, "network")
        unused = unused_weights(name, channels, self.level, stride)
        for weight_name, weight in self.network.features.named_parameters():
            weight.requires_grad_(weight_name not in unused)
        self.output = nn.Conv2d(self.network.widths[0], width_out, 1)

    def forward(self, images: Tensor) -> Tensor:
        (features,) = self.network(images)
        return self.output(features)

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def load_pretrained(self, source: str) -> None:
        """See `TimmFeatures`."""
        self.network.load_pretrained(source)


def strides_of(name: str, channels: int) -> list[int]:
    """The stride of each level of features, fine to coarse. Raises UserError for a network without features."""
    try:
        with torch.device("meta"):
            return [level["reduction"] for level in create(name, in_chans=channels).feature_info.info]
    except Exception as error:
        raise UserError(
            f"model.backbone={name} cannot be an encoder, as timm gives no features of it ({reason(error)}); take a "
            "network with features_only, such as convnext_tiny or resnet50"
        ) from error


def unused_weights(name: str, channels: int, level: int, stride: int) -> set[str]:
    """Names of the weights that the features of a level do not depend on: some networks compute all levels anyway.
    Raises UserError for a network that does not take images of any size."""
    try:
        with torch.device("meta"), torch.enable_grad():
            network = create(name, in_chans=channels, out_indices=(level,)).eval()
            (features,) = network(torch.zeros(1, channels, 2 * stride, 3 * stride))
            features = channels_first(features, network)
            if tuple(features.shape[2:]) != (2, 3):
                raise ValueError(f"{2 * stride}x{3 * stride} pixels became features of {tuple(features.shape)}")
            features.sum().backward()
    except Exception as error:
        raise UserError(
            f"model.backbone={name} cannot be an encoder, as it does not take images of any size "
            f"({reason(error)}); take a convolutional network, such as convnext_tiny or resnet50"
        ) from error
    return {weight for weight, tensor in network.named_parameters() if tensor.grad is None}
