"""The network of FID (Heusel et al. 2017, arXiv:1706.08500), KID and the inception score: TensorFlow's Inception of
2015-12-05 with its resizing, as torch-fidelity converted it (and pytorch-fid: the weights are the same)."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.foreign_weights import read_weights
from common.processes import process_state
from common.wording import one_line

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SIZE = "91 MB"
SIDE = 299  # pixels


class Inception(nn.Module):
    """Images to the 2,048 features before the classifier, and to logits without its bias: those of the inception score,
    whose first implementation left the bias out, and all others since then.

    Images are stretched to 299x299 by TensorFlow 1's bilinear filter: without anti-aliasing, each pixel's corner in
    place of its centre, as in every published FID. torchmetrics' default is another filter, and another number.
    """

    def __init__(self, weights: str | None, download: bool) -> None:
        """weights: torch-fidelity's file, or the same tensors as .safetensors; None: the one in torch's cache.
        download: whether it may be fetched into that cache. Raises UserError."""
        super().__init__()
        self.treatment = {
            "resize": f"{SIDE}x{SIDE}, the whole image, bilinear as in TensorFlow 1, not anti-aliased, not rounded",
            "mean": 128,
            "std": 128,
        }
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError(
                f"features=inception needs torch-fidelity ({one_line(error, 100)}): pip install 'zellige[eval]', or "
                "name a network of timm by features=timm:MODEL"
            ) from error
        path = find(weights, download)
        # torch-fidelity unpickles whatever its file holds, code too: it is given one with nothing but tensors.
        tensors_alone = io.BytesIO()
        torch.save(read_weights(path), tensors_alone)
        tensors_alone.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], tensors_alone)
        except RuntimeError as error:
            raise UserError(
                f"{path} does not hold the Inception of FID ({one_line(error, 150)}): torchvision's inception_v3 is "
                f"another network; give {URL} by weights"
            ) from error

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """b c H W in 0..255, c 1 or 3, uint8 or float32 -> features b 2048 and logits b 1008."""
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as stretch

        pixels = images.expand(-1, 3, -1, -1).float()
        pixels = stretch(pixels, size=(SIDE, SIDE), align_corners=False)
        maps = (pixels - 128) / 128
        # Its own forward takes 8-bit images alone; its layers stand in their order.
        for name, layer in self.network.named_children():
            if name != "fc":
                maps = layer(maps)
        features = maps.flatten(1)
        return features, features @ self.network.fc.weight.T


def find(weights: str | None, download: bool) -> Path:
    """The file with the weights, fetched if need be. Raises UserError."""
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(f"weights={weights}: there is no such file; give {URL} ({SIZE})")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    # The first process of all downloads, then the first of each further machine, which may not see its files.
    state = process_state()
    with state.main_process_first(), state.local_main_process_first():
        if not path.is_file() and download:
            fetch(path)
    if not path.is_file():
        raise UserError(
            f"features=inception needs its weights, and {path} is not there: put {URL} ({SIZE}) there or name it by "
            "weights, or give download=true to fetch it once, or name a network of timm by features=timm:MODEL"
        )
    return path


def fetch(path: Path) -> None:
    """Downloads the weights and checks the hash in their name. Raises UserError."""
    print(f"inception: fetching the weights, {SIZE}, from {URL} into {path}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=FILE.rpartition("-")[2].partition(".")[0])
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"download=true, but {URL} ({SIZE}) could not be fetched ({one_line(error, 200)}): put the file at {path}, "
            "or name it by weights, or name a network of timm by features=timm:MODEL"
        ) from error
