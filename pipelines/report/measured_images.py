"""The test images of a subject, or why there are none."""

from __future__ import annotations

from torch import Tensor

from images.datasets import to_float
from pipelines.report.findings import Asked, Findings, Missing
from pipelines.report.images import Sets, Shown, image_sets, read_some
from stage1_vae.binarise import Binarised, NumberedImages


def images_to_measure(
    found: Findings, asked: Asked, size: tuple[int, int], channels: int, binarised: Binarised | None
) -> tuple[Sets, Shown | Missing]:
    sets = image_sets(found.subject, asked.data, size, channels, binarised)
    if sets.test is None:
        return sets, Missing(sets.test_title)
    title = f"{sets.test_title} ({sets.binarised})" if sets.binarised else sets.test_title
    return sets, read_some(sets.test, asked.num, title)


def held_out_of(sets: Sets, test: Shown | Missing | None) -> Tensor | None:
    """The test images, n c H W in [-1, 1], where there are some; of a VAE of black and white those that are so no
    more."""
    if not isinstance(test, Shown) or sets.test is None:
        return None
    plain = sets.test.images if isinstance(sets.test, NumberedImages) else sets.test
    return to_float(plain.fetch(test.numbers, test.numbers)["images"])
