"""Lossless files of a VAE beside its ELBO, PNG and WebP, and decoded in other environments.

`python -m benchmarks.lossless --model MODEL --data FOLDER_OR_NPZ --split test --out FOLDER` writes one archive of all
images, named `00007.png` and so on, prints a Markdown table of its bytes beside those of PNG
and lossless WebP and what of it is payload beside the ELBO, decodes it in processes of other thread counts, instruction
sets and settings of libraries, each of which must give back every pixel, and prints the images per second on this
process's threads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.lossless_peers import peer_bytes, read_images
from pipelines.codec.lossless import LosslessCodec
from pipelines.codec.lossless_archive import SEGMENT, open_lossless, read_lossless
from pipelines.codec.lossless_facts import figures_of

ENVIRONMENTS = [
    {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
    {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
]


def pixels_in(model: str, path: Path) -> np.ndarray:
    """All images of a file, uint8 n H W c."""
    codec = LosslessCodec.from_pretrained(model)
    with open_lossless(path) as file:
        file.check()
        found = dict(codec.images(file, range(file.count)))
    return np.stack([found[number] for number in range(len(found))])


def is_same_elsewhere(model: str, path: Path, pixels: Path, environment: dict[str, str]) -> bool:
    code = (
        "import sys, pathlib, numpy as np\n"
        "from benchmarks.lossless import pixels_in\n"
        "sys.exit(not np.array_equal(pixels_in(sys.argv[1], pathlib.Path(sys.argv[2])), np.load(sys.argv[3])))"
    )
    command = [sys.executable, "-c", code, model, str(path), str(pixels)]
    return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder of images, .npz file or a name of `data.path`")
    parser.add_argument("--split", default="train")
    parser.add_argument("--count", type=int, default=None)
    parser.add_argument("--out", required=True, help="folder for the archive")
    parser.add_argument("--peers", action="store_true", help="PNG and WebP too, which take minutes")
    parser.add_argument("--environments", type=int, default=len(ENVIRONMENTS), help="how many others decode it")
    options = parser.parse_args()
    codec = LosslessCodec.from_pretrained(options.model)
    images = read_images(options.data, options.split, options.count, codec.shape.channels)
    names = [f"{number:05}.png" for number in range(len(images))]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)

    begin = time.process_time(), time.perf_counter()
    starts = range(0, len(images), SEGMENT)
    data = codec.archive([codec.segment(images[i : i + SEGMENT], names[i : i + SEGMENT]) for i in starts])
    middle = time.process_time(), time.perf_counter()
    (out / "images.zlg").write_bytes(data)
    decoded = pixels_in(options.model, out / "images.zlg")
    end = time.process_time(), time.perf_counter()
    if not np.array_equal(decoded, images):
        raise SystemExit("the archive does not decode to the images")

    found = figures_of([read_lossless(data)])
    payload, bound = found.payload_bits / found.numbers, found.bound_bits_each
    print(f"{len(images)} images of {'x'.join(map(str, images.shape[1:]))}, {torch.get_num_threads()} threads\n")
    print("| file | bytes | bits per dimension | the archive's bytes in terms of it |\n|---|---|---|---|")
    rows = {"archive without loss": len(data), **(peer_bytes(images) if options.peers else {})}
    for name, taken in rows.items():
        print(f"| {name} | {taken:,} | {8 * taken / images.size:.4f} | {len(data) / taken:.3f} |")
    print(
        f"\npayload {payload:.4f} bits per dimension, ELBO {bound:.4f}: {payload / bound - 1:+.2%}; of it "
        f"{found.first_bits / found.payload_bits:.3%} were not got back by the first {found.first_images}; names "
        f"and checks take {1 - found.payload_bits / (8 * len(data)):.2%} of the file"
    )
    for what, before, after in (("compress, with the proof", begin, middle), ("decompress", middle, end)):
        rates = [len(images) / (late - early) for early, late in zip(before, after, strict=True)]
        print(f"{what}: {rates[0]:.0f} images for each second of a processor, {rates[1]:.0f} for each on the clock")
    np.save(out / "pixels.npy", images)
    for environment in ENVIRONMENTS[: options.environments]:
        same = is_same_elsewhere(options.model, out / "images.zlg", out / "pixels.npy", environment)
        print(f"{'the same' if same else 'OTHER PIXELS'} with {' '.join(f'{k}={v}' for k, v in environment.items())}")


if __name__ == "__main__":
    main()
