"""Pictures that are computed by themselves, so that they depend neither on how many there are nor on the cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from PIL import Image

from codes.spec import Codes
from common.precision import Precision
from pipelines.latents.pipeline import LatentPipeline
from pipelines.pictures import to_pil
from pipelines.two_stage import TwoStagePipeline
from stage1_vae.model import Pixels

Result = TypeVar("Result")
Use = Callable[[int, Image.Image], Result]
"""What is done with a picture, given its position."""


def decode_each(
    pipeline: TwoStagePipeline, codes: Codes, count: int, use: Use[Result], precision: Precision | None = None
) -> list[Result]:
    """Decodes the first `count` samples of `codes`, one b h w per grid. precision: of the decoder. On a CPU each by
    itself and by one thread, several at a time: a convolution adds up in an order that depends on the number of
    threads."""
    if pipeline.device.type != "cpu":
        images = pipeline.decode(codes, precision=precision)[:count]
        with ThreadPoolExecutor() as pool:
            return list(pool.map(use, range(count), map(to_pil, images)))

    def decode(i: int) -> Result:
        return use(i, to_pil(pipeline.decode(tuple(grid[i : i + 1] for grid in codes), precision=precision)[0]))

    return by_one_thread_each(decode, count)


def sample_each(
    pipeline: LatentPipeline,
    indices: Sequence[int],
    seed: int,
    pixels: Pixels,
    use: Use[Result],
    labels: Sequence[int] | None = None,
    temperature: float | Sequence[float] = 1.0,
    precision: Precision | None = None,
) -> list[Result]:
    """Draws and decodes samples `indices` of `seed`, of the classes `labels` of a VAE that knows some. On a CPU each by
    itself and by one thread, several at a time: a matrix product adds up in an order that depends on the number of rows
    and threads."""
    if pipeline.device.type != "cpu":
        images = pipeline.sample(indices, seed, pixels, labels, temperature, precision).images
        with ThreadPoolExecutor() as pool:
            return list(pool.map(use, range(len(indices)), map(to_pil, images)))

    def sample(i: int) -> Result:
        label = None if labels is None else labels[i : i + 1]
        made = pipeline.sample(indices[i : i + 1], seed, pixels, label, temperature, precision)
        return use(i, to_pil(made.images[0]))

    return by_one_thread_each(sample, len(indices))


def by_one_thread_each(work: Callable[[int], Result], count: int) -> list[Result]:
    """`work` of 0 to `count` - 1, several at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, range(count)))
    finally:
        torch.set_num_threads(threads)
