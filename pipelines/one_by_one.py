"""Pictures that are computed by themselves, so that they depend neither on how many there are nor on the cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from PIL import Image

from codes.spec import Codes
from common.precision import Precision
from pipelines.any_size import decoded
from pipelines.latents.pipeline import LatentPipeline
from pipelines.pictures import to_pil, to_pils
from pipelines.two_stage import TwoStagePipeline
from stage1_vae.model import Pixels

IN_A_ROW = 4  # pictures that a thread is given at a time

Result = TypeVar("Result")
Use = Callable[[int, Image.Image], Result]
"""What is done with a picture, given its position."""


def decode_each(
    pipeline: TwoStagePipeline,
    codes: Codes,
    places: Sequence[int],
    use: Use[Result],
    precision: Precision | None = None,
    prompts: Sequence[str] | None = None,
) -> list[Result]:
    """Decodes the samples at `places` of `codes`, one b h w per grid. precision: of the decoder; prompts: b, for one
    that reads captions. On a CPU each by
    itself and by one thread, several at a time: a convolution adds up in an order that depends on the number of
    threads."""
    text = pipeline.captions.of(prompts)  # before there are threads
    if pipeline.device.type != "cpu":
        pictures = to_pils(decoded(pipeline.autoencoder, codes, precision, text)[list(places)])
        return list(map(use, places, pictures))

    def decode(place: int) -> Result:
        alone = tuple(grid[place : place + 1] for grid in codes)
        own = None if text is None else text[place : place + 1]
        return use(place, to_pil(decoded(pipeline.autoencoder, alone, precision, own)[0]))

    return by_one_thread_each(decode, places)


def sample_each(
    pipeline: LatentPipeline,
    indices: Sequence[int],
    seed: int | Sequence[int],
    pixels: Pixels,
    use: Use[Result],
    labels: Sequence[int] | None = None,
    temperature: float | Sequence[float] = 1.0,
    precision: Precision | None = None,
    places: Sequence[int] | None = None,
) -> list[Result]:
    """Draws and decodes samples `indices` of `seed`, one for all or one for each, of the classes `labels` of a VAE that
    knows some; places: which of them are wanted, None for all. On a CPU each by itself and by one thread, several at a
    time: a matrix product adds up in an order that depends on the number of rows and threads."""
    chosen = range(len(indices)) if places is None else places
    if pipeline.device.type != "cpu":
        images = pipeline.sample(indices, seed, pixels, labels, temperature, precision).images
        return list(map(use, chosen, to_pils(images[list(chosen)])))

    def sample(i: int) -> Result:
        label = None if labels is None else labels[i : i + 1]
        own = seed[i : i + 1] if isinstance(seed, Sequence) else seed
        made = pipeline.sample(indices[i : i + 1], own, pixels, label, temperature, precision)
        return use(i, to_pil(made.images[0]))

    return by_one_thread_each(sample, chosen)


def by_one_thread_each(work: Callable[[int], Result], places: Sequence[int]) -> list[Result]:
    """`work` of each of `places`, several at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Some in a row: of small images, handing each to a thread would cost as much as its file.
    parts = [places[start : start + IN_A_ROW] for start in range(0, len(places), IN_A_ROW)]

    def of_part(part: Sequence[int]) -> list[Result]:
        return [work(place) for place in part]

    try:
        if threads == 1:
            return of_part(places)
        with ThreadPoolExecutor(threads) as pool:
            return [result for part in pool.map(of_part, parts) for result in part]
    finally:
        torch.set_num_threads(threads)
