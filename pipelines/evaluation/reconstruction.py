"""What stage one keeps of test images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from images.datasets import to_uint8
from metrics.features import FeatureNetwork
from metrics.frechet import frechet_distance
from metrics.in_training import frechet_name
from metrics.lpips import LPIPS
from metrics.similarity import LPIPS_SIDE, SSIM_WINDOW, lpips, ms_ssim, psnr, ssim
from pipelines.evaluation.gathering import Values, one_thread, statistics_of
from pipelines.evaluation.worth import frechet_is_refused, notes_of_frechet

MEANS = ("psnr", "ssim", "ms_ssim", "lpips")


class Reconstruction:
    """Figures of reconstructions beside their originals."""

    title = "reconstruction"

    def __init__(
        self, network: FeatureNetwork | None = None, perceptual: LPIPS | None = None, *, unrounded: bool = False
    ) -> None:
        """network: whose features are compared; None: none are. perceptual: for LPIPS; unrounded: features of images
        that are not rounded to 8 bits are compared too."""
        self.network, self.perceptual, self.unrounded = network, perceptual, unrounded

    def measure(self, images: Tensor, decoded: Tensor) -> dict[str, Tensor]:
        """images, decoded: b c H W in [-1, 1]."""
        similarities = {
            "psnr": psnr((decoded - images).square().mean(dim=(1, 2, 3))),
            "ssim": ssim(decoded, images),
            "ms_ssim": ms_ssim(decoded, images),
            "lpips": None if self.perceptual is None else lpips(self.perceptual, decoded, images),
        }
        found = {name: value.double() for name, value in similarities.items() if value is not None}
        if self.network is not None:
            found["features"] = self.network(to_uint8(images))
            found["features of decoded"] = self.network(to_uint8(decoded))
            if self.unrounded:
                found["features of unrounded"] = self.network(decoded)
        return found

    def figures(self, values: Values) -> dict[str, Any]:
        """Means over the images: PSNR in dB, SSIM and MS-SSIM where they are large enough, and LPIPS; and the Frechet
        distance of reconstructions to the images, of 8 bits as files are, and not rounded."""
        found: dict[str, Any] = {name: float(values[name].mean()) for name in MEANS if name in values}
        if self.network is not None and not self.refuses(values):
            name = f"r{frechet_name(self.network)}"
            with one_thread():
                real = statistics_of(values["features"])
                for key, features in ((name, "features of decoded"), (f"{name}_unrounded", "features of unrounded")):
                    if features in values:
                        found[key] = frechet_distance(statistics_of(values[features]), real)
        return found

    def refuses(self, values: Values) -> bool:
        assert self.network is not None
        count = len(values["features"])
        return frechet_is_refused(count, count, self.network.width)

    def labels(self, values: Values) -> dict[str, str]:
        """What stands beside the figures."""
        if self.network is None:
            return {}
        name, of = f"r{frechet_name(self.network)}", f"{len(values['features']):,} reconstructions"
        return {name: f"{of}, rounded to 8 bits", f"{name}_unrounded": f"{of}, not rounded"}

    def notes(self, values: Values) -> list[str]:
        left_out = (
            ("ssim", True, f"its windows of {SSIM_WINDOW}x{SSIM_WINDOW} pixels are larger than the images"),
            ("lpips", self.perceptual is not None, f"VGG16 asks for sides of {LPIPS_SIDE} pixels"),
        )
        found = [f"note: {name} is left out: {why}" for name, asked, why in left_out if asked and name not in values]
        if self.network is not None:
            count = len(values["features"])
            found += notes_of_frechet(f"r{frechet_name(self.network)}", count, count, self.network.width)
        return found
