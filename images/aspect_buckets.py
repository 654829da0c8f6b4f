"""Aspect-ratio buckets: a few shapes of about one area, so that photos of mixed proportions are hardly cropped and yet
share batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from accelerate.utils import gather_object

from common.processes import process_state
from common.progress import progress_bar
from images.contract import ImageSource

Shape = tuple[int, int]
"""Height and width in pixels."""

THREADS = 16  # read headers: more than there are cores, as they wait for the disk
HEADERS = 512  # that a thread reads before it asks for more work


class Buckets(NamedTuple):
    shapes: tuple[Shape, ...]
    numbers: np.ndarray  # n, int64: the shape of each image of a source

    def describe(self, images: np.ndarray) -> str:
        """How many of these images of the source have each shape: `96x160 (12), 128x128 (40)`."""
        counts = np.bincount(self.numbers[images], minlength=len(self.shapes))
        named = (f"{height}x{width} ({count:,})" for (height, width), count in zip(self.shapes, counts, strict=True))
        return ", ".join(named)


def bucket_shapes(area: int, stride: int, count: int, limit: float) -> list[Shape]:
    """Up to `count` shapes of about `area` pixels, both sides multiples of `stride`, from the tallest to the widest.

    Their aspect ratios lie as evenly from 1:limit to limit:1 as the stride allows, on a logarithmic scale.
    """
    square = max(1, round(math.sqrt(area) / stride))
    fitting = {(square, square)}  # in units of the stride
    for short in range(1, square + 1):
        long = max(1, round(area / stride**2 / short))
        if long <= limit * short:
            fitting |= {(short, long), (long, short)}
    shapes = [(rows * stride, columns * stride) for rows, columns in sorted(fitting)]
    if len(shapes) > count:
        wanted = [math.log(limit) * (2 * i / (count - 1) - 1) for i in range(count)]
        shapes = list({min(shapes, key=lambda shape: abs(log_ratio(shape) - ratio)) for ratio in wanted})
    return sorted(shapes, key=log_ratio)


def log_ratio(shape: Shape) -> float:
    height, width = shape
    return math.log(width / height)


def nearest_shapes(sizes: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """The number of the shape whose aspect ratio is nearest to each image's: sizes n 2 (height, width) -> n, int64.

    A size of 0 0, that of a file which cannot be read, counts as a square.
    """
    heights, widths = np.maximum(sizes, 1).T
    ratios = np.log(widths / heights)  # n
    return np.abs(ratios[:, None] - np.array([log_ratio(shape) for shape in shapes])).argmin(1)


def shared_shapes(sizes: np.ndarray, shapes: Sequence[Shape], least: int) -> list[Shape]:
    """Those shapes that are nearest to at least `least` images each, once the images of the others have gone to the
    nearest that is left: the emptiest is given up first, but never the last one."""
    left = list(shapes)
    while len(left) > 1:
        counts = np.bincount(nearest_shapes(sizes, left), minlength=len(left))
        if counts.min() >= least:
            break
        del left[counts.argmin()]
    return left


def read_sizes(source: ImageSource) -> np.ndarray:
    """Height and width of every image, n 2, int64; 0 0 where a file cannot be read.

    Each process reads its share of the headers, and all get the same answer.
    """
    state = process_state()
    blocks = [range(first, min(first + HEADERS, len(source))) for first in range(0, len(source), HEADERS)]
    mine = blocks[state.process_index :: state.num_processes]
    with ThreadPoolExecutor(THREADS) as pool:
        read = pool.map(source.sizes, mine)
        found = []
        with progress_bar(
            sum(map(len, mine)), "images", shown=state.is_main_process, what="reading image sizes", delay=2
        ) as progress:
            for sizes_of_block in read:
                found.append(sizes_of_block)
                progress.update(len(sizes_of_block))
    sizes = np.empty((len(source), 2), dtype=np.int64)
    for process, parts in enumerate(gather_object([found])):
        for block, part in zip(blocks[process :: state.num_processes], parts, strict=True):
            sizes[block.start : block.stop] = part
    return sizes
