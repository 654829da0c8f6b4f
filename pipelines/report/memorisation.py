"""The training images nearest to samples: does a model draw, or does it remember?

A nearest image alone tells little, for some image is always near. So the same is asked of held-out images, which the
model cannot remember: samples that are much nearer to training images than those are copies (Meehan et al. 2020,
arXiv:2004.05675, compare the same distances).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from codes.shards import CodeDataset
from codes.spec import Codes
from images.datasets import ImageDataset, to_float
from pipelines.pictures import to_pil
from pipelines.report.images import BATCH, evenly
from pipelines.report.pictures import Picture, shown, zoom_to

PAIRS = 12  # that are shown: the samples nearest to training images
MOST_CODES = 200_000  # training images whose codes are compared
MOST_IMAGES = 5_000  # training images whose pixels are
SIDE = 96  # pixels that small images are shown at


class Pair(NamedTuple):
    sample: Picture
    training: Picture
    distance: str


class Memorisation(NamedTuple):
    by: str  # `codes` or `pixels`
    unit: str
    samples: int
    training: int
    training_title: str
    median: float
    held_out: int  # held-out images that are compared; 0: none
    held_out_median: float
    nearer: float  # share of samples that are nearer than the median held-out image
    copies: int  # samples that are exactly a training image
    pairs: list[Pair]


class Nearest(NamedTuple):
    distances: np.ndarray  # n
    indices: np.ndarray  # n


def by_codes(
    samples: Codes,
    images: Tensor,
    training: CodeDataset,
    held_out: CodeDataset | None,
    decode: Callable[[Codes], Tensor],
) -> Memorisation:
    """samples: n h w for each grid; images: n c H W, what they decode to. The distance is the share of codes that
    differ."""
    flat = flattened([grid.numpy() for grid in samples])
    found = nearest_codes(flat, training)
    real = None
    if held_out is not None and len(held_out):
        chosen = evenly(len(flat), len(held_out))
        real = nearest_codes(flattened([grid.numpy() for grid in held_out.fetch(chosen, chosen)["codes"]]), training)
    order = np.argsort(found.distances, kind="stable")[:PAIRS]
    indices = found.indices[order].tolist()
    decoded = decode(training.fetch(indices, indices)["codes"])
    pairs = [
        pair(images[place], decoded[row], f"{found.distances[place]:.0%} of the codes differ", indices[row])
        for row, place in enumerate(order.tolist())
    ]
    title = f"training images of {training.folder}"
    return summary("codes", "the share of codes that differ", found, real, min(MOST_CODES, len(training)), title, pairs)


def nearest_codes(wanted: np.ndarray, training: CodeDataset) -> Nearest:
    """wanted: n codes. Of equally near images the first."""
    best, where = np.full(len(wanted), np.inf), np.zeros(len(wanted), np.int64)
    first = 0
    for parts in training.stored():
        chunk = flattened([np.asarray(part) for part in parts])[: max(0, MOST_CODES - first)]
        if not len(chunk):
            break
        for place, codes in enumerate(wanted.astype(chunk.dtype)):
            differing = np.count_nonzero(chunk != codes, axis=1)
            index = int(differing.argmin())
            if differing[index] < best[place]:
                best[place], where[place] = differing[index], first + index
        first += len(chunk)
    return Nearest(best / wanted.shape[1], where)


def flattened(grids: Sequence[np.ndarray]) -> np.ndarray:
    """b h w for each grid as b n, of the smallest type that holds all."""
    kind = np.result_type(*grids)
    return np.concatenate([grid.reshape(len(grid), -1).astype(kind) for grid in grids], axis=1)


def by_pixels(
    images: Tensor,
    training: ImageDataset,
    training_title: str,
    held_out: Tensor | None,
) -> Memorisation:
    """images, held_out: n c H W in [-1, 1]. The distance is the root of the mean squared error, of 255 grey values."""
    chosen = evenly(MOST_IMAGES, len(training))
    wanted = images.flatten(1) if held_out is None else torch.cat([images, held_out]).flatten(1)
    both = nearest_pixels(wanted, training, chosen)
    found = Nearest(both.distances[: len(images)], both.indices[: len(images)])
    real = None if held_out is None else Nearest(both.distances[len(images) :], both.indices[len(images) :])
    order = np.argsort(found.distances, kind="stable")[:PAIRS].tolist()
    pairs = []
    for place in order:
        index = int(found.indices[place])
        image = to_float(training.fetch([index], [index])["images"])[0]
        pairs.append(pair(images[place], image, f"error {found.distances[place]:.1f} of 255", index))
    return summary(
        "pixels",
        "the root of the mean squared error, of 255 grey values",
        found,
        real,
        len(chosen),
        training_title,
        pairs,
    )


def nearest_pixels(wanted: Tensor, training: ImageDataset, chosen: Sequence[int]) -> Nearest:
    """wanted: n d, in [-1, 1]."""
    best = torch.full((len(wanted),), math.inf)
    where = torch.zeros(len(wanted), dtype=torch.int64)
    size = wanted.square().sum(1)
    for indices, batch in batches(training, chosen):
        distances = size[:, None] + batch.square().sum(1) - 2 * wanted @ batch.T  # n b
        lowest = distances.min(dim=1)
        better = lowest.values < best
        best = torch.where(better, lowest.values, best)
        where = torch.where(better, torch.tensor(indices)[lowest.indices], where)
    return Nearest((best.clamp(min=0) / wanted.shape[1]).sqrt().numpy() * 127.5, where.numpy())


def batches(training: ImageDataset, chosen: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
    for start in range(0, len(chosen), BATCH):
        indices = list(chosen[start : start + BATCH])
        batch, found = training.fetch_readable(indices, indices)
        if found:
            yield found, to_float(batch["images"]).flatten(1)


def pair(sample: Tensor, training: Tensor, distance: str, index: int) -> Pair:
    left, right = shown(to_pil(sample)), shown(to_pil(training))
    zoom = zoom_to(min(left.size), SIDE)
    return Pair(
        Picture(left, f"Sample, {distance}", zoom),
        Picture(right, f"Nearest training image, number {index}", zoom),
        distance,
    )


def summary(
    by: str, unit: str, found: Nearest, real: Nearest | None, training: int, title: str, pairs: list[Pair]
) -> Memorisation:
    median = float(np.median(found.distances))
    held_out = float(np.median(real.distances)) if real is not None else math.nan
    nearer = float((found.distances < held_out).mean()) if real is not None else math.nan
    return Memorisation(
        by, unit, len(found.distances), training, title, median,
        0 if real is None else len(real.distances), held_out, nearer, int((found.distances < 1e-6).sum()), pairs,
    )  # fmt: skip
