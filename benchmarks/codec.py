"""What codes cost as files, and how long coding takes, for a model and images of its own size.

`python -m benchmarks.codec --model MODEL --data mnist --split test --images 1000` prints two Markdown tables. The
first: bits per code of each mode, of all payloads together, beside the information under the tables and the prior, and
the bytes of a file of one image that are not payload. The second: images per second of `compress` and `decompress` at
batch 1 and 64 (lanes too), and the share of that time that the networks and the coder take; the rest is padding,
checksums and bytes. Mode prior compresses with its verification, that is two walks of the prior. Medians of the runs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

import pipelines.codec.codec as codec_module
import pipelines.codec.prior_coding as prior_coding
from common.errors import UserError
from images.datasets import to_float
from images.sources import open_source
from pipelines.any_size import encode_any_size
from pipelines.codec.archive import read_archive
from pipelines.codec.codec import Codec
from pipelines.codec.entropy_coding import Decoder, Encoder
from pipelines.codec.prior_coding import condition_of
from pipelines.codec.tables import CodeTables
from stage2_prior.priors import AutoregressivePrior

BATCHES = (1, 64)


class Clock:
    """Seconds in functions that were wrapped, but for those of a clock inside them."""

    def __init__(self, inner: Clock | None = None):
        self.seconds, self.depth, self.inner = 0.0, 0, inner

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **settings: Any) -> Any:
            if self.depth:
                return function(*args, **settings)
            before, self.depth = self.inner.seconds if self.inner else 0.0, 1
            begin = time.perf_counter()
            try:
                return function(*args, **settings)
            finally:
                self.seconds += time.perf_counter() - begin - (self.inner.seconds - before if self.inner else 0.0)
                self.depth = 0

        return run


def wrap() -> tuple[Clock, Clock]:
    """Clocks of the coder and of the networks."""
    coder = Clock()
    network = Clock(coder)
    parts = [
        (Encoder, "encode"),
        (Encoder, "finish"),
        (Decoder, "decode"),
        (CodeTables, "encode"),
        (CodeTables, "decode"),
    ]
    parts += [(prior_coding, "frequencies_of"), (codec_module, "pack"), (codec_module, "unpack")]
    for place, name in parts:
        setattr(place, name, coder.timed(getattr(place, name)))
    for place, name in [(codec_module, "encode_any_size"), (Codec, "pixels"), (prior_coding, "walk")]:
        setattr(place, name, network.timed(getattr(place, name)))
    return coder, network


def read_images(codec: Codec, data: str, split: Any, count: int) -> Tensor:
    """b c H W, of the size that the model was trained on."""
    source = open_source(data, split, Path("data"))
    height, width = codec.autoencoder.image_size
    pixels = []
    for index in range(min(count, len(source))):
        image = source.read(index, height, width, codec.autoencoder.channels)
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        pixels.append(image[top : top + height, left : left + width])
    return to_float(rearrange(torch.from_numpy(np.stack(pixels)), "b h w c -> b c h w"))


@torch.no_grad()
def nll_bits(codec: Codec, images: Tensor) -> float:
    """Bits of all codes under the prior, which is told nothing."""
    prior = codec.prior
    assert isinstance(prior, AutoregressivePrior)
    total = 0.0
    for part in images.split(64):
        codes = encode_any_size(codec.autoencoder, part)
        total += float(prior.nll(codes, condition_of(prior, [None] * len(part))).double().sum())
    return total / math.log(2)


@torch.no_grad()
def table_bits(codec: Codec, images: Tensor) -> float:
    """Bits of all codes under the tables."""
    total = 0.0
    assert codec.tables is not None
    for part in images.split(64):
        codes = encode_any_size(codec.autoencoder, part)
        for grid, own in zip(codes, codec.tables.grids.values(), strict=True):
            total += float(own.bits(grid.cpu().numpy()).sum())
    return total


def modes_of(codec: Codec) -> list[Any]:
    modes: list[Any] = []
    for mode in ("packed", "table", "prior"):
        try:
            codec.check_mode(mode, [None])
            modes.append(mode)
        except UserError as error:
            print(f"without {mode}: {error}")
    return modes


def print_sizes(codec: Codec, images: Tensor, modes: list[Any]) -> None:
    codes = codec.spec_of(*images.shape[2:]).codes_per_image * len(images)
    print("\n| | bits per code | head and checks of one image, bytes |\n|---|---:|---:|")
    for mode in modes:
        compressed = codec.compress(images, mode)
        payloads = sum(entry.bits for entry in read_archive(compressed.data).entries)
        one = codec.compress(images[:1], mode).data
        head = len(one) - -(-read_archive(one).entries[0].bits // 8)
        print(f"| {mode} | {payloads / codes:.4f} | {head} |", flush=True)
        for note in compressed.notes:
            print(f"{mode}: {note}")
    if "table" in modes:
        print(f"| entropy under the table | {table_bits(codec, images) / codes:.4f} | |")
    if "prior" in modes:
        print(f"| NLL of the prior | {nll_bits(codec, images) / codes:.4f} | |")


def print_speed(codec: Codec, images: Tensor, modes: list[Any], repeats: int) -> None:
    coder, network = wrap()
    print("\n| mode | batch | compress, images/s | networks | coder | decompress, images/s | networks | coder |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for mode in modes:
        for batch in BATCHES:
            part = images[:batch]
            data = codec.compress(part, mode).data
            cells = [mode, str(len(part))]
            works: list[Callable[[], object]] = [
                lambda part=part, mode=mode, batch=batch: codec.compress(part, mode),
                lambda data=data: codec.decompress(data),
            ]
            for work in works:
                work()
                runs = []
                for _ in range(repeats):
                    coder.seconds = network.seconds = 0.0
                    begin = time.perf_counter()
                    work()
                    runs.append((time.perf_counter() - begin, network.seconds, coder.seconds))
                took, in_network, in_coder = (statistics.median(column) for column in zip(*runs, strict=True))
                cells += [f"{len(part) / took:.1f}", f"{in_network / took:.0%}", f"{in_coder / took:.0%}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="assembled model, or an autoencoder")
    parser.add_argument("--data", required=True, help="folder of images, .npz file or a name such as mnist")
    parser.add_argument("--split", default="train", help="train or test")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each that count")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch; default: its own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    codec = Codec.from_pretrained(args.model).to(args.device)
    images = read_images(codec, args.data, args.split, args.images)
    spec = codec.spec_of(*images.shape[2:])
    print(f"{args.model}, {spec.describe()}, {len(images)} images of {args.data} {args.split}")
    print(f"{codec.environment}, {torch.get_num_threads()} threads; medians of {args.repeats}")
    modes = modes_of(codec)
    print_sizes(codec, images, modes)
    print_speed(codec, images, modes, args.repeats)


if __name__ == "__main__":
    main()
