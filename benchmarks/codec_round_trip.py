"""Does `decompress(compress(x))` give `decode(encode(x))`, bit for bit, in every mode?

    python -m benchmarks.codec_round_trip --model runs/quickstart/model --data mnist --split test --images 10000
    python -m benchmarks.codec_round_trip --model MODEL --data PHOTOS --images 1000 --longest 256

Without `--longest` images are cut to the model's size, with it they keep their shapes, scaled down to so many pixels at
most: a prior then codes those of its own size, and tables the others. Prints a Markdown table; fails if one pixel of
one image differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.codec import modes_of, read_images
from benchmarks.rate_distortion import to_tensor
from images.files import open_upright
from images.listing import list_images
from pipelines.any_size import reconstruct
from pipelines.codec.archive import Mode, read_archive
from pipelines.codec.codec import Codec, grouped

BATCH = 64


def batches(codec: Codec, args: argparse.Namespace) -> Iterator[Tensor]:
    """Images of one size each, b c H W."""
    if args.longest is None:
        yield from read_images(codec, args.data, args.split, args.images).split(BATCH)
        return
    folder, photos = Path(args.data), []
    for name in list_images(folder)[: args.images]:
        photo = open_upright(folder / os.fsdecode(name), codec.autoencoder.channels)
        photo.thumbnail((args.longest, args.longest))
        photos.append(photo)
    for same in grouped(photos, lambda photo: photo.size).values():
        for start in range(0, len(same), BATCH):
            yield torch.stack([to_tensor(photo) for photo in same[start : start + BATCH]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="assembled model, or an autoencoder")
    parser.add_argument("--data", required=True, help="folder of images, .npz file or a name such as mnist")
    parser.add_argument("--split", default="train", help="train or test")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--longest", type=int, default=None, help="pixels of the longer side; for a folder")
    args = parser.parse_args()
    codec = Codec.from_pretrained(args.model)
    modes, begin = modes_of(codec), time.perf_counter()
    counts = {mode: Counter[str]() for mode in modes}
    sizes = set()
    for images in tqdm(batches(codec, args), unit="batch"):
        sizes.add(images.shape[2:])
        expected = reconstruct(codec.autoencoder, images)
        for mode in modes:
            data = codec.compress(images, mode).data
            decoded = torch.stack(codec.decompress(data))
            equal = (decoded == expected).flatten(1).all(dim=1)
            used = Counter(Mode(entry.mode).name for entry in read_archive(data).entries)
            counts[mode].update(images=len(images), equal=int(equal.sum()), bytes=len(data), **used)
    minutes = (time.perf_counter() - begin) / 60
    print(f"{args.model}, {codec.environment}; images of {len(sizes)} sizes; {minutes:.1f} minutes\n")
    print("| mode asked for | images | equal bit for bit | in modes | bytes, in archives |\n|---|---:|---:|---|---:|")
    for mode, count in counts.items():
        used_modes = ", ".join(f"{name} {count[name]}" for name in Mode.__members__ if count[name])
        print(f"| {mode} | {count['images']} | {count['equal']} | {used_modes} | {count['bytes']} |")
    sys.exit(not sizes or any(count["equal"] != count["images"] for count in counts.values()))


if __name__ == "__main__":
    main()
