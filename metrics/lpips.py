"""LPIPS: how far apart two images look to VGG16 (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as
a Perceptual Metric", arXiv:1801.03924), as a loss and as a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.processes import process_state
from common.wording import one_line

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG_SIZE = "528 MB"
VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_LAYERS = (4, 9, 16, 23, 30)  # the last ReLU of each of the five resolutions lies before these layers
SMALLEST_SIDE = 16  # pixels: VGG16 halves an image four times before its last features


class Words(NamedTuple):
    """What a person is told to set, for messages."""

    what: str = "lpips"  # that needs the weights
    weights: str = "weights"
    download: str = "download=true"
    linear_weights: str = "linear_weights"
    otherwise: str = "leave lpips out"


PLAIN = Words()


class LPIPS(nn.Module):
    """Distance of images: squared differences of VGG16's features, made unit length at each position, weighted by
    channel, averaged over positions and added over five layers."""

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        weights: str | None = None,
        download: bool = False,
        linear_weights: str | None = None,
        words: Words = PLAIN,
    ) -> None:
        """weights: torchvision's file of VGG16, None for the one in torch's cache; download: whether it may be fetched
        there, once; linear_weights: LPIPS' own small file vgg.pth, None for the copy that torchmetrics ships. Raises
        UserError."""
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        with torch.device("meta"):
            layers = make_layers(cfgs["D"])[: VGG_LAYERS[-1]]
        layers.load_state_dict(vgg_weights(weights, download, words, layers.state_dict()), assign=True)
        cuts = (0, *VGG_LAYERS)
        slices = [layers[start:stop] for start, stop in pairwise(cuts)]
        self.slices = nn.ModuleList(FrozenNetwork(part) for part in slices)
        for number, layer in enumerate(channel_weights(linear_weights, words)):
            self.register_buffer(f"linear{number}", layer, persistent=False)
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


def as_colour(images: Tensor) -> Tensor:
    """Grey images with three equal channels: pretrained networks know colour images only."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


# ---- weights from files ---------------------------------------------------------------------------------------------


def vgg_weights(weights: str | None, download: bool, words: Words, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of VGG16's convolutions, by the names of torchvision's `features`; expected: tensors of those names and shapes.
    Raises UserError."""
    path = Path(weights).expanduser() if weights is not None else vgg_cache()
    if weights is None and download:
        # The first process of all downloads, then the first of each further machine, which may not see its files.
        state = process_state()
        with state.main_process_first(), state.local_main_process_first():
            if not path.is_file():
                fetch_vgg(words)
    if not path.is_file():
        missing = "is not there" if weights is not None else "is not in torch's cache"
        raise UserError(
            f"{words.what} needs torchvision's VGG16, and {path} {missing}: put {VGG_URL} ({VGG_SIZE}) "
            f"there or name it by {words.weights}, or give {words.download} to fetch it once, or {words.otherwise}"
        )
    found = read_state(path, "torchvision's VGG16", words.weights)
    names = {short: f"features.{short}" for short in expected}
    if any(name not in found or found[name].shape != expected[short].shape for short, name in names.items()):
        raise UserError(
            f"{path} does not hold torchvision's VGG16 (13 convolutions named features.0.weight and so on): give "
            f"{VGG_URL} by {words.weights}, or {words.otherwise}"
        )
    return {short: found[name].float() for short, name in names.items()}


def vgg_cache() -> Path:
    """Where torch keeps the file after a download."""
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG_URL.rsplit("/", 1)[1]


def fetch_vgg(words: Words) -> None:
    """Downloads VGG16 into torch's cache, and checks its hash. Raises UserError."""
    print(f"lpips: fetching VGG16, {VGG_SIZE}, from {VGG_URL} into {vgg_cache()}", flush=True)
    vgg_cache().parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(VGG_URL, str(vgg_cache()), hash_prefix="397923af")
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{words.download}, but {VGG_URL} ({VGG_SIZE}) could not be fetched ({one_line(error, 200)}): put the file "
            f"at {vgg_cache()}, or name it by {words.weights}, or {words.otherwise}"
        ) from error


def channel_weights(linear_weights: str | None, words: Words) -> list[Tensor]:
    """LPIPS' weight of each channel of each layer: 1 c 1 1. Raises UserError."""
    if linear_weights is not None:
        path = Path(linear_weights).expanduser()
    else:
        package = find_spec("torchmetrics")
        if package is None or package.origin is None:
            raise UserError(
                f"{words.what} needs the linear weights of LPIPS, which torchmetrics ships: pip install "
                "'zellige[eval]', or name the file vgg.pth (7 KB, richzhang/PerceptualSimilarity, lpips/weights/v0.1) "
                f"by {words.linear_weights}, or {words.otherwise}"
            )
        path = Path(package.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    state = read_state(path, "the linear weights of LPIPS", words.linear_weights)
    names = [f"lin{number}.model.1.weight" for number in range(len(VGG_LAYERS))]
    expected = [(1, width, 1, 1) for width in VGG_WIDTHS]
    if [tuple(state[name].shape) if name in state else None for name in names] != expected:
        raise UserError(
            f"{path} does not hold the linear weights of LPIPS for VGG16 (lin0.model.1.weight and so on): give the "
            f"file vgg.pth of richzhang/PerceptualSimilarity, lpips/weights/v0.1, by {words.linear_weights}"
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
