"""Black-and-white images of grey ones, by the three ways of the papers, which give likelihoods that cannot be compared.

`threshold`: white from half on. `once`: white by chance, with the grey value as its probability, drawn once for each
image (Salakhutdinov and Murray 2008: what most figures on "binary MNIST" mean). `anew`: drawn again whenever a training
image is seen (Burda et al. 2015, arXiv:1509.00519); held-out images are as for `once`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from images.datasets import ImageDataset
from images.random_numbers import uniforms
from stage1_vae.holes import HolesConfig, with_holes
from training.data import Mixture
from training.task import Batch

Binarisation = Literal["none", "threshold", "once", "anew"]


@dataclass(frozen=True)
class Binarised:
    """How the images of a likelihood were made black and white, which all figures of it go by."""

    how: Binarisation
    seed: int = 0  # of the draws

    def __str__(self) -> str:
        if self.how == "none":
            return "images not binarised"
        if self.how == "threshold":
            return "binarised: white from half on"
        return f"binarised: drawn {self.how}, seed {self.seed}"


class NumberedImages:
    """training.task.Dataset over images, with "numbers", int64 b: where each stands in the whole source; "draws", int64
    b: the number of each draw in the run; and the images made black and white, 0 and 255, where that is asked for."""

    def __init__(
        self,
        images: ImageDataset,
        binarised: Binarisation = "none",
        seed: int = 0,
        *,
        training: bool,
        holes: HolesConfig | None = None,
    ):
        """seed: of the draws. training: whether `anew` draws again at every fetch. holes: which pixels are missing, of
        which a batch then has "holes", b H W bool; None: nothing."""
        self.holes = holes if holes is not None and holes.some else None
        self.images, self.binarised, self.seed, self.training = images, binarised, seed, training
        self.labels, self.class_names = images.labels, images.class_names
        self.mixture: Mixture | None = None  # of training: which images have a part of every batch to themselves

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        batch, found = self.images.fetch_found(indices, draws)  # others stand where some cannot be read
        return self.completed(batch, found, draws)

    def fetch_readable(self, indices: Sequence[int], draws: Sequence[int]) -> tuple[Batch, list[int]]:
        """As `fetch`, but what cannot be read is left out: the batch, and the indices of the images in it."""
        batch, found = self.images.fetch_readable(indices, draws)
        draw_of = dict(zip(indices, draws, strict=True))
        return self.completed(batch, found, [draw_of[index] for index in found]), found

    def completed(self, batch: Batch, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        """The batch of these images with all that it has besides."""
        batch = self.black_and_white(batch, indices, draws)
        return batch if self.holes is None else with_holes(batch, self.holes, self.images, indices, draws)

    def black_and_white(self, batch: Batch, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        """The batch of these images with their numbers, binarised where that is asked for."""
        numbers = self.images.indices[list(indices)]
        batch = {**batch, "numbers": torch.from_numpy(numbers), "draws": torch.tensor(draws)}
        if self.binarised == "none":
            return batch
        again = self.binarised == "anew" and self.training
        pixels = batch["images"].numpy()
        if self.binarised == "threshold" or again:
            black_and_white = binarise(pixels, self.binarised, self.seed + again, draws)
        else:
            black_and_white = drawn_white(pixels, self.chance(indices, draws))
        return {**batch, "images": torch.from_numpy(black_and_white)}

    def chance(self, indices: Sequence[int], draws: Sequence[int]) -> np.ndarray:
        """Of the one draw of each image, b c H W in [0, 1): it moves with the image's pixels, which are black or white
        wherever they are seen."""
        images, shape = self.images, self.images.shape_of(indices)
        still = chance_of(self.seed, images.indices[list(indices)].tolist(), (images.config.channels, *shape))
        if images.augment_seed is None or not len(still):
            return still
        planes = images.beyond_the_middle(list(still.transpose(0, 2, 3, 1)), indices)
        return np.stack(list(images.seen(planes, indices, draws))).transpose(0, 3, 1, 2)

    def fingerprint(self) -> str:
        holes = "" if self.holes is None else f" {self.holes}"
        return hashlib.sha256(f"{self.images.fingerprint()} {self.binarised} {self.seed}{holes}".encode()).hexdigest()


def binarise(pixels: np.ndarray, binarised: Binarisation, seed: int, numbers: Sequence[int]) -> np.ndarray:
    """Grey images b c H W, uint8, as images of 0 and 255. numbers: b, of which the chance is a function."""
    if binarised == "none":
        return pixels
    if binarised == "threshold":
        return (pixels >= 128).astype(np.uint8) * 255
    return drawn_white(pixels, chance_of(seed, numbers, pixels.shape[1:]))


def chance_of(seed: int, numbers: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """Of each image's pixels, b *shape in [0, 1), by its number alone."""
    return uniforms(seed, numbers, math.prod(shape)).reshape(-1, *shape)


def drawn_white(pixels: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Grey images as images of 0 and 255, white with the grey value as the probability."""
    return (chance * 255 < pixels).astype(np.uint8) * 255
