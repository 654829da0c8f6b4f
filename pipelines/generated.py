"""Images that a pipeline has made, with their codes and classes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from codes.spec import Codes
from common.errors import UserError
from pipelines.pictures import save_png, to_pil


class Generated(NamedTuple):
    images: Tensor  # b c H W, float32 in [-1, 1]
    codes: Codes  # one b h w per grid, int64
    labels: Tensor | None  # b, int64; None for a prior without classes

    def pil(self) -> list[Image.Image]:
        """The images as PIL pictures, of mode "L" or "RGB"."""
        return [to_pil(image) for image in self.images]

    def save(self, folder: str | Path) -> list[Path]:
        """Writes 000000.png, 000001.png ... into a folder, which may hold other files, and returns their paths. Raises
        UserError, before anything is written, where one of them is there already."""
        paths = [Path(folder).expanduser() / f"{i:06d}.png" for i in range(len(self.images))]
        if (there := next((path for path in paths if path.exists()), None)) is not None:
            raise UserError(f"{there} is there already and is not replaced; name another folder, or delete it first")
        for picture, path in zip(self.pil(), paths, strict=True):
            save_png(picture, path)
        return paths
