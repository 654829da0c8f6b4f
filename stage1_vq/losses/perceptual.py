"""Perceptual losses: how far apart two images are in the features of a pretrained network, which stays as it is.

`lpips`: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
(arXiv:1801.03924), with the VGG16 features and the learned linear weights that VQ-GAN trained with.
`timm`: the same distance without learned weights, in the features of any timm backbone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.processes import process_state
from common.wording import one_line
from stage1_vq.losses.features import FrozenFeatures, FrozenNetwork, as_colour, check_channels

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG_SIZE = "528 MB"
VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_LAYERS = (4, 9, 16, 23, 30)  # the last ReLU of each of the five resolutions lies before these layers
SMALLEST_SIDE = 16  # pixels: VGG16 halves an image four times before its last features


@dataclass(frozen=True, kw_only=True)
class LPIPSConfig:
    """Learned perceptual image patch similarity, on VGG16."""

    kind: Literal["lpips"] = "lpips"
    weight: float = 0.0  # of the loss; 0 builds and computes nothing, the VQ-GAN paper has 1
    weights: str | None = None  # torchvision's VGG16 file; None: the one in torch's cache, if it is there
    download: bool = False  # fetch that file into the cache, once, where it is not there: 528 MB
    linear_weights: str | None = None  # LPIPS' own small file vgg.pth; None: the copy that torchmetrics ships

    def __post_init__(self) -> None:
        check_weight(self.weight)


@dataclass(frozen=True, kw_only=True)
class TimmPerceptualConfig:
    """Distance in the normalised features of a timm backbone."""

    kind: Literal["timm"] = "timm"
    weight: float = 0.0  # of the loss; 0 builds and computes nothing
    backbone: str = "resnet50.a1_in1k"  # any timm model that knows features_only=True
    weights: str | None = None  # a local file with the backbone's weights
    download: bool = False  # let timm fetch the weights once
    layers: tuple[int, ...] | None = None  # which of its feature maps; None: those that timm gives by default

    def __post_init__(self) -> None:
        check_weight(self.weight)


PerceptualConfig = LPIPSConfig | TimmPerceptualConfig


def check_weight(weight: float) -> None:
    if weight < 0:
        raise UserError(f"perceptual.weight={weight}, expected 0 (off) or more")


class LPIPS(nn.Module):
    """Distance of images: squared differences of VGG16's features, made unit length at each position, weighted by
    channel, averaged over positions and added over five layers."""

    shift: Tensor
    scale: Tensor

    def __init__(self, config: LPIPSConfig) -> None:
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        with torch.device("meta"):
            layers = make_layers(cfgs["D"])[: VGG_LAYERS[-1]]
        layers.load_state_dict(vgg_weights(config, layers.state_dict()), assign=True)
        cuts = (0, *VGG_LAYERS)
        slices = [layers[start:stop] for start, stop in pairwise(cuts)]
        self.slices = nn.ModuleList(FrozenNetwork(part) for part in slices)
        for number, weights in enumerate(linear_weights(config)):
            self.register_buffer(f"linear{number}", weights, persistent=False)
        # ImageNet's mean and standard deviation, for pixels in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        x = (as_colour(images) - self.shift) / self.scale
        maps = []
        for part in self.slices:
            x = part(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """b c H W each, in [-1, 1]; returns b. Gradients reach `images` only."""
        linear = [self.get_buffer(f"linear{number}") for number in range(len(VGG_LAYERS))]
        return sum_of_distances(self.features, images, targets, linear)


class TimmPerceptual(nn.Module):
    """The mean over a backbone's feature maps of the squared distance of unit feature vectors."""

    def __init__(self, config: TimmPerceptualConfig) -> None:
        super().__init__()
        self.features = FrozenFeatures(config.backbone, config.weights, config.download, config.layers, "perceptual")

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """b c H W each, in [-1, 1]; returns b. Gradients reach `images` only."""
        weights = [torch.ones(1, width, 1, 1, device=images.device) for width in self.features.channels]
        return sum_of_distances(self.features, images, targets, weights) / len(weights)


def sum_of_distances(features: Any, images: Tensor, targets: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Over layers, of the mean over positions of weighted squared differences of unit feature vectors: b, float32.
    weights: 1 c 1 1 of each layer."""
    with torch.no_grad():
        expected = features(targets)
    distances = []
    for found, wanted, weight in zip(features(images), expected, weights, strict=True):
        difference = (unit_length(found) - unit_length(wanted)).square()
        distances.append((difference * weight).sum(1).mean((1, 2)))
    return torch.stack(distances).sum(0)


def unit_length(features: Tensor) -> Tensor:
    """Vectors along axis 1, of length 1; those of all zeros stay so, with a finite gradient."""
    features = features.float()
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


class PerceptualLoss(nn.Module):
    """A perceptual distance and its weight in the training loss."""

    def __init__(self, config: PerceptualConfig, channels: int, image_size: tuple[int, int]) -> None:
        """channels, image_size (H, W): of the images. Raises UserError, without weights one that says which file is
        missing."""
        super().__init__()
        check_channels(channels, "perceptual")
        if isinstance(config, LPIPSConfig) and min(image_size) < SMALLEST_SIDE:
            raise UserError(
                f"perceptual.kind=lpips needs images of at least {SMALLEST_SIDE}x{SMALLEST_SIDE} pixels, got "
                f"{image_size[0]}x{image_size[1]}; train on larger ones, or give perceptual.kind=timm "
                "or perceptual.weight=0"
            )
        self.weight = config.weight
        self.distance = LPIPS(config) if isinstance(config, LPIPSConfig) else TimmPerceptual(config)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The distance, not weighted, of each image: b, float32. Gradients reach `images` only."""
        return self.distance(images, targets)


# ---- weights from files ---------------------------------------------------------------------------------------------


def vgg_weights(config: LPIPSConfig, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of VGG16's convolutions, by the names of torchvision's `features`; expected: tensors of those names and shapes.
    Raises UserError."""
    path = Path(config.weights).expanduser() if config.weights is not None else vgg_cache()
    if config.weights is None and config.download:
        # The first process of all downloads, then the first of each further machine, which may not see its files.
        state = process_state()
        with state.main_process_first(), state.local_main_process_first():
            if not path.is_file():
                fetch_vgg()
    if not path.is_file():
        missing = "is not there" if config.weights is not None else "is not in torch's cache"
        raise UserError(
            f"perceptual.kind=lpips needs torchvision's VGG16, and {path} {missing}: put {VGG_URL} ({VGG_SIZE}) "
            "there or name it by perceptual.weights, or give perceptual.download=true to fetch it once, or "
            "perceptual.weight=0 to train without a perceptual loss"
        )
    found = read_state(path, "torchvision's VGG16", "perceptual.weights")
    names = {short: f"features.{short}" for short in expected}
    if any(name not in found or found[name].shape != expected[short].shape for short, name in names.items()):
        raise UserError(
            f"{path} does not hold torchvision's VGG16 (13 convolutions named features.0.weight and so on): give "
            f"{VGG_URL} by perceptual.weights, or perceptual.weight=0 to train without a perceptual loss"
        )
    return {short: found[name].float() for short, name in names.items()}


def vgg_cache() -> Path:
    """Where torch keeps the file after a download."""
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG_URL.rsplit("/", 1)[1]


def fetch_vgg() -> None:
    """Downloads VGG16 into torch's cache, and checks its hash. Raises UserError."""
    print(f"perceptual: fetching VGG16, {VGG_SIZE}, from {VGG_URL} into {vgg_cache()}", flush=True)
    vgg_cache().parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(VGG_URL, str(vgg_cache()), hash_prefix="397923af")
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"perceptual.download=true, but {VGG_URL} ({VGG_SIZE}) could not be fetched ({one_line(error, 200)}): put "
            f"the file at {vgg_cache()}, or name it by perceptual.weights, or give perceptual.weight=0 to train without"
        ) from error


def linear_weights(config: LPIPSConfig) -> list[Tensor]:
    """LPIPS' weight of each channel of each layer: 1 c 1 1. Raises UserError."""
    if config.linear_weights is not None:
        path = Path(config.linear_weights).expanduser()
    else:
        package = find_spec("torchmetrics")
        if package is None or package.origin is None:
            raise UserError(
                "perceptual.kind=lpips needs the linear weights of LPIPS, which torchmetrics ships: pip install "
                "'zellige[eval]', or name the file vgg.pth (7 KB, richzhang/PerceptualSimilarity, lpips/weights/v0.1) "
                "by perceptual.linear_weights, or give perceptual.weight=0 to train without a perceptual loss"
            )
        path = Path(package.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    state = read_state(path, "the linear weights of LPIPS", "perceptual.linear_weights")
    names = [f"lin{number}.model.1.weight" for number in range(len(VGG_LAYERS))]
    expected = [(1, width, 1, 1) for width in VGG_WIDTHS]
    if [tuple(state[name].shape) if name in state else None for name in names] != expected:
        raise UserError(
            f"{path} does not hold the linear weights of LPIPS for VGG16 (lin0.model.1.weight and so on): give the "
            "file vgg.pth of richzhang/PerceptualSimilarity, lpips/weights/v0.1, by perceptual.linear_weights"
        )
    return [state[name].float() for name in names]


def read_state(path: Path, what: str, option: str) -> dict[str, Tensor]:
    """A state dict from a file of torch.save, which is read as data only. Raises UserError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{option}={path}: there is no such file; it should be {what}") from error
    except Exception as error:  # on bytes that are no pickle the unpickler trips over anything
        raise UserError(
            f"{path} is damaged or no weights file ({one_line(error, 200)}), expected {what}; fetch it again, or name "
            f"another by {option}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds other things than named tensors, expected {what}; name another by {option}")
    return state
