"""Images per second of `zellige encode` of JPEG photos, everything included, against decoding and the network alone.

    python -m benchmarks.encode_speed --photos imagenet_samples
    python -m benchmarks.encode_speed --photos imagenet_samples --count 1000 --threads 1 --workers 1

The photos of a folder are linked into another one until they are `--count`, and encoded at 128 pixels by a VQ-VAE of
width 48 with fresh weights, which takes about as long as to decode a photo of some hundred pixels. Decoding alone reads
the same batches by the same workers and leaves them; the network alone encodes as many batches from memory, each with
its copy to float; both once they are warm. The command is timed from the start of Python to its last line, with the
listing, the checksums of all photos and the index. The ratio is to the slower of the two, and to what both allow who
share the cores: where workers and threads are more than these, an image costs its decoding and its pass one after the
other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

from common.machine import cores
from common.memory import keep_freed_memory
from images.datasets import DataConfig, image_datasets, to_float
from images.encoding import Piece, PieceReader
from stage1_vq.autoencoders import VQVAE, VQVAEConfig
from stage1_vq.quantizers import NearestQuantizerConfig

SIDE, BATCH = 128, 64


def link_photos(photos: Path, out: Path, count: int) -> Path:
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        sys.exit(f"{photos} holds no JPEG files")
    for number in range(count):
        folder = out / f"copy{number // len(files):02d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:06d}.jpg").symlink_to(files[number % len(files)].resolve())
    return out


def write_model(folder: Path) -> Path:
    torch.manual_seed(0)
    quantizer = NearestQuantizerConfig(codebook_size=256, dim=64)
    VQVAE(VQVAEConfig(width=48, residual_width=24, quantizer=quantizer), (SIDE, SIDE)).eval().save_pretrained(folder)
    return folder


def decoding(photos: Path, count: int, workers: int) -> float:
    """Images per second after the first batches."""
    data, _ = image_datasets(DataConfig(path=str(photos), image_size=SIDE, validation_share=0.0), 0)
    piece, seen, begin = Piece("train", data, 0, min(count, len(data)), 0), 0, 0.0
    with closing(PieceReader([piece], BATCH, workers, torch.device("cpu"))) as reader:
        for number, (images, _) in enumerate(reader.batches(piece, tqdm(disable=True))):
            if number == 2 * workers + 1:
                begin = time.perf_counter()
            elif begin:
                seen += len(images)
    return seen / (time.perf_counter() - begin)


@torch.inference_mode()
def network(model: Path, count: int) -> float:
    autoencoder = VQVAE.from_pretrained(model).eval()
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    autoencoder.encode(to_float(images))
    begin = time.perf_counter()
    for _ in range(0, count, BATCH):
        autoencoder.encode(to_float(images))
    return -(-count // BATCH) * BATCH / (time.perf_counter() - begin)


def run(*words: object, threads: int | None) -> tuple[float, str]:
    """Seconds of a process, and its last line."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    begin = time.perf_counter()
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return time.perf_counter() - begin, done.stdout.splitlines()[-1]


def together(reading: float, computing: float, workers: int, threads: int) -> float:
    """Images per second of both at once on the cores of this machine, if nothing else costs anything."""
    seconds = min(workers, cores()) / reading + min(threads, cores()) / computing  # of cores, for an image
    return min(reading, computing, cores() / seconds)


def measure(photos: Path, model: Path, out: Path, asked: argparse.Namespace) -> tuple[float, float, float]:
    """Images per second of decoding, of the network, and of the command."""
    own, some = "benchmarks.encode_speed", min(asked.count, 2000)
    reading = float(run(own, "--child", "decode", photos, some, asked.workers, threads=asked.threads)[1])
    computing = float(run(own, "--child", "network", model, some, threads=asked.threads)[1])
    words = ("zellige", "encode", "--model", model, "--data.path", photos, "--out", out, "--device", "cpu")
    seconds, _ = run(*words, "--workers", asked.workers, threads=asked.threads)
    return reading, computing, asked.count / seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--times", type=int, default=1, help="turns, of which the medians are printed")
    parser.add_argument("--threads", type=int, help="of the network; left out, as torch has it")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        photos, model = link_photos(asked.photos, work / "photos", asked.count), write_model(work / "model")
        turns = [measure(photos, model, work / f"codes{turn}", asked) for turn in range(asked.times)]
    reading, computing, whole = (statistics.median(values) for values in zip(*turns, strict=True))
    threads = asked.threads or torch.get_num_threads()
    ratio = statistics.median(w / min(r, c) for r, c, w in turns)
    of_cores = statistics.median(w / together(r, c, asked.workers, threads) for r, c, w in turns)
    print(
        "| photos | decoding alone, a second | network alone, a second | `zellige encode`, a second | of the slower "
        "| of both on the same cores |"
    )
    print("|---|---|---|---|---|---|")
    print(f"| {asked.count:,} | {reading:.1f} | {computing:.1f} | {whole:.1f} | {ratio:.2f} | {of_cores:.2f} |")
    print(json.dumps({"threads": threads, "workers": asked.workers, "times": asked.times}))


if __name__ == "__main__":
    if sys.argv[1:3] == ["--child", "decode"]:
        keep_freed_memory()
        print(decoding(Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])))
    elif sys.argv[1:3] == ["--child", "network"]:
        keep_freed_memory()
        print(network(Path(sys.argv[3]), int(sys.argv[4])))
    else:
        main()
