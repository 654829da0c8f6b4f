"""Networks that see images as features: what distances of sets compare, and by which they stand or fall.

Every network here is given the 8-bit pixels, 0 to 255, and states how it treats them: size, filter, anti-aliasing, mean
and deviation. Two figures are comparable only where fingerprints, that is weights and treatment, are the same: resizing
alone can move FID by more than the difference of two papers (Parmar, Zhang and Zhu 2022, arXiv:2104.11222).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.files import sha256_of_file
from common.float32 import float32_island
from common.timm_models import DOWNLOAD, Asking, check_name, megabytes_of, pretrained, published_at
from common.wording import one_line
from metrics.inception import Inception

ASKING = Asking("features", "weights", "name another network")
TRIED = ((3, 64), (1, 64), (3, 32), (1, 32), (3, 28), (1, 28))  # channels and sides of a network's first image
FILTERS = ("bilinear", "bicubic")  # of those that timm names, what torch has with anti-aliasing


class Seen(NamedTuple):
    """Images as a network sees them."""

    features: Tensor  # b d, float32
    probabilities: Tensor | None  # b classes, float32, of a network that is a classifier


class UnseenShapeError(UserError):
    """The network takes images of another shape."""


class FeatureNetwork(nn.Module):
    """A network with its name, its treatment of images, and the fingerprint of both."""

    def __init__(self, name: str, network: nn.Module, treatment: dict[str, Any]) -> None:
        """network: `b c H W` in 0..255, uint8 or float32, to features `b d`, or to a pair of these and logits
        `b classes`; treatment: what it does with the images first, in words and numbers."""
        super().__init__()
        self.name = name
        self.network = network.eval().requires_grad_(False)
        self.treatment = treatment
        self.fingerprint = fingerprint(name, network, treatment)
        seen = self._first_look()
        self.width = seen.features.shape[1]
        self.classes = 0 if seen.probabilities is None else seen.probabilities.shape[1]

    def _first_look(self) -> Seen:
        """At a black image of a shape that the network takes. Raises UserError."""
        causes = []
        for channels, side in TRIED:
            try:
                return self.see(torch.zeros(1, channels, side, side, dtype=torch.uint8))
            except UnseenShapeError as error:
                causes.append(error.__cause__)
        sizes = ", ".join(f"{channels}x{side}x{side}" for channels, side in TRIED)
        raise UserError(
            f"features={self.name} takes no black image of uint8, {sizes} (of the first it says: "
            f"{one_line(causes[0], 150)}): let it scale and convert what it gets"
        ) from causes[0]

    def train(self, mode: bool = True) -> FeatureNetwork:
        """It never trains: a batch norm that did would see other features in other batches."""
        return super().train(False)

    def describe(self) -> dict[str, Any]:
        """What a figure has to state of it, as JSON values."""
        described = {"network": self.name, "fingerprint": self.fingerprint, "width": self.width}
        return {**described, **({"classes": self.classes} if self.classes else {}), **self.treatment}

    def forward(self, images: Tensor) -> Tensor:
        """Features, `b d` float32. images: as for `see`."""
        return self.see(images).features

    def probabilities(self, images: Tensor) -> Tensor | None:
        """Of classes, `b classes` float32; None where the network is no classifier. images: as for `see`."""
        return self.see(images).probabilities

    @torch.no_grad()
    def see(self, images: Tensor) -> Seen:
        """Both in one pass. What an image is seen as does not depend on its batch, beyond rounding.

        images: b c H W, c 1 or 3, on any device: uint8, as files hold them; or floats in [-1, 1] that are not rounded
        to 8 bits (`rounding` says which, for the label of the figure): they are clamped. Raises UserError.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(f"images of shape {tuple(images.shape)}, expected b c H W with 1 or 3 channels")
        if images.dtype != torch.uint8:
            images = (images.float().clamp(-1, 1) + 1) * 127.5
        device = next(self.network.parameters(), torch.empty(0)).device
        images = images.to(device)
        try:
            with exact(device.type):
                output = self.network(images)
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:  # whatever a person's network raises
            raise UnseenShapeError(
                f"features={self.name} cannot see images of shape {tuple(images.shape)} ({one_line(error, 200)}); let "
                "it take such images, b c H W in 0..255"
            ) from error
        features, logits = output if isinstance(output, tuple) else (output, None)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(
                f"features={self.name} gave {shape} for {len(images)} images, expected a tensor b d, one row an image"
            )
        return Seen(features.float(), None if logits is None else logits.float().softmax(dim=1))


def rounding(images: Tensor) -> str:
    """How images that a network is given have been rounded, for the label of a figure: reconstructions that were not
    have another rFID than the files made of them."""
    return "8 bits" if images.dtype == torch.uint8 else "none"


def open_features(name: str, weights: str | None = None, download: bool = False) -> FeatureNetwork:
    """`inception`, `timm:MODEL`, or `MODULE:FUNCTION`.

    inception: the network of FID, KID and the inception score, through torch-fidelity (metrics/inception.py).
    timm:MODEL: features before the classifier; the whole image is scaled to the network's size.
    MODULE:FUNCTION: a function without arguments of a Python module that can be imported from here. It returns a
    torch.nn.Module that is called with images b c H W in 0..255, c 1 or 3 as they have it, uint8 (or float32, where
    images are judged before they are rounded), treats them as it likes, and returns features b d, or a pair of features
    and logits b classes.

    weights: a local file with the weights of inception or of a timm model; download: whether they may be fetched, once,
    into a cache, where there is neither a file nor one in the cache. Raises UserError.
    """
    where, _, what = name.partition(":")
    if name == "inception":
        published = Inception(weights, download)
        return FeatureNetwork(name, published, published.treatment)
    if not what:
        raise UserError(f"features={name}, expected inception, timm:MODEL or MODULE:FUNCTION")
    if where == "timm":
        scaled = open_timm(what, weights, download)
        return FeatureNetwork(name, scaled, scaled.treatment)
    if weights is not None or download:
        raise UserError(f"weights and download are for inception and timm:MODEL; let {name} load its own weights")
    network, source = open_module(name, "features")
    return FeatureNetwork(name, network, {"resize": "its own", "source": source})


# ---- networks of timm -----------------------------------------------------------------------------------------------


class TimmNetwork(nn.Module):
    """A network of timm that is given whole images at the size, mean and deviation that it was made for.

    timm's own evaluation cuts the borders of an image off (`crop_pct`), an eighth or so: right for a photo with the
    object in the middle, but what a generator does at the borders would not be judged.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any) -> None:
        super().__init__()
        from timm.data import resolve_model_data_config

        self.network = network
        settings = resolve_model_data_config(network)
        self.channels, *size = settings["input_size"]
        self.size = (int(size[0]), int(size[1]))
        self.filter = settings["interpolation"] if settings["interpolation"] in FILTERS else "bicubic"
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(settings[name]).view(1, -1, 1, 1), persistent=False)
        self.treatment = {
            "resize": f"{self.size[0]}x{self.size[1]}, the whole image, {self.filter}, anti-aliased, not rounded",
            "mean": [round(value, 6) for value in settings["mean"]],
            "std": [round(value, 6) for value in settings["std"]],
        }

    def prepare(self, images: Tensor) -> Tensor:
        """b c H W in 0..255 -> what the network takes."""
        if images.shape[1] != self.channels:
            images = images.float().mean(dim=1, keepdim=True).expand(-1, self.channels, -1, -1)
        pixels = images.float()
        if pixels.shape[2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode=self.filter, antialias=True, align_corners=False)
        return (pixels.clamp(0, 255) / 255 - self.mean) / self.std

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """b c H W in 0..255 -> features b d, and logits b classes of a classifier."""
        maps = self.network.forward_features(self.prepare(images))
        features = self.network.forward_head(maps, pre_logits=True)
        return features, self.network.forward_head(maps) if self.network.num_classes else None


def open_timm(name: str, weights: str | None, download: bool) -> TimmNetwork:
    """With as many classes as the weights have, none at all among them. Raises UserError."""
    import timm

    check_name(name, ASKING)
    source = DOWNLOAD if weights is None else weights
    if weights is None and not download:
        cached = in_cache(name)
        if cached is None:
            raise UserError(
                f"features=timm:{name} needs its pretrained weights: put the file that timm publishes "
                f"({published_at(name) or 'none of it'}) on this machine and name it by weights, or give download=true "
                "to fetch it once"
            )
        source = cached

    def create(**arguments: Any) -> Any:
        state = arguments.get("pretrained_cfg_overlay", {}).get("state_dict")
        if state is not None:  # of a file, which has the classes of whoever trained it, or none
            classifier = getattr(timm.get_pretrained_cfg(name), "classifier", None)
            head = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
            arguments["num_classes"] = 0 if head is None else len(head)
        return timm.create_model(name, **arguments)

    with torch.device("meta"):
        size = megabytes_of(timm.create_model(name))
    return TimmNetwork(pretrained(name, source, ASKING, create, size))


def in_cache(name: str) -> str | None:
    """Where an earlier download of timm's weights lies on this machine."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    published = timm.get_pretrained_cfg(name)
    if published is None or not published.hf_hub_id:
        return None
    found = try_to_load_from_cache(published.hf_hub_id, published.hf_hub_filename or "model.safetensors")
    return found if isinstance(found, str) else None


# ---- networks of a person's own -------------------------------------------------------------------------------------


def open_module(name: str, option: str) -> tuple[nn.Module, str]:
    """The network that a function of a person's Python module returns, and the SHA-256 of that module's file.

    name: MODULE:FUNCTION; option: where it was given, for messages. Raises UserError.
    """
    where, _, what = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it
    try:
        module = importlib.import_module(where)
        network: Any = getattr(module, what)()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{option}={name} cannot be had ({one_line(error, 200)}); expected MODULE:FUNCTION, such as networks:mnist "
            "for `def mnist()` in networks.py"
        ) from error
    finally:
        sys.path.pop(0)
    if not isinstance(network, nn.Module):
        raise UserError(f"{option}={name} returned {type(network).__name__}, expected a torch.nn.Module")
    file = getattr(module, "__file__", None)
    return network.eval(), sha256_of_file(Path(file)) if file else "built in"


# ---- what two figures must have in common ---------------------------------------------------------------------------


def fingerprint(name: str, network: nn.Module, treatment: dict[str, Any]) -> str:
    """SHA-256 of name, treatment and weights."""
    digest = hashlib.sha256(json.dumps([name, treatment], sort_keys=True).encode())
    for key, tensor in sorted(network.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{key} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def exact(device_type: str) -> Iterator[None]:
    """In it networks compute in float32 proper, convolutions of cuDNN too: in TF32, which PyTorch allows them by
    default, features have three digits, and other ones on other GPUs."""
    cudnn: Any = torch.backends.cudnn
    convolutions = cudnn.conv
    before = convolutions.fp32_precision
    with float32_island(device_type):
        convolutions.fp32_precision = "ieee"
        try:
            yield
        finally:
            convolutions.fp32_precision = before
