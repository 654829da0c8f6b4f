"""What stage one keeps of test images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metrics.similarity import SSIM_WINDOW, psnr, ssim
from pipelines.evaluation.gathering import Values


class Reconstruction:
    """Figures of reconstructions beside their originals."""

    title = "reconstruction"

    def measure(self, images: Tensor, decoded: Tensor) -> dict[str, Tensor]:
        """images, decoded: b c H W in [-1, 1]."""
        found = {"psnr": psnr((decoded - images).square().mean(dim=(1, 2, 3)))}
        if (similarity := ssim(decoded, images)) is not None:
            found["ssim"] = similarity
        return {name: value.double() for name, value in found.items()}

    def figures(self, values: Values) -> dict[str, Any]:
        """Means over the images: PSNR in dB, and SSIM where they are large enough."""
        return {name: float(values[name].mean()) for name in ("psnr", "ssim") if name in values}

    def notes(self, values: Values) -> list[str]:
        if "ssim" not in values:
            return [
                f"note: ssim is left out: its windows of {SSIM_WINDOW}x{SSIM_WINDOW} pixels are larger than the images"
            ]
        return []
