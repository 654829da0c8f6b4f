"""Is an encoding that was killed three times the one that was not, and does its memory stay flat?

    python -m benchmarks.encode_and_kill --model runs/cifar10 --images cifar10/train --held_out cifar10/test

Runs `zellige encode` on two folders of images once in peace and once killed with SIGKILL at random moments and
continued by the same command, compares the results byte for byte, and lets `zellige codes verify` read them. Then
encodes a tenth of the images and states the peak memory of both runs, that of the largest process, and the images per
second beside the plain forward pass on images in memory.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from codes.shards import CodeDataset
from common.model_io import load_pretrained
from images.listing import list_images
from stage1_vq.autoencoders import AUTOENCODERS

ZELLIGE = [sys.executable, "-m", "pipelines"]
BATCH = 64


class Ended(NamedTuple):
    code: int
    seconds: float
    megabytes: float  # at the peak, of the largest process


def run(command: list[str], kill_when: int | None = None, folder: Path | None = None) -> Ended:
    """Runs a command to its end, or kills it a moment after `folder` holds so many shards."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    if kill_when is not None and folder is not None:
        while len(list(folder.glob("codes-*"))) < kill_when:
            if process.poll() is not None:
                raise SystemExit(f"ended by itself with exit code {process.returncode}: {' '.join(command)}")
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.2))
        os.killpg(process.pid, signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # wait4 has taken it from Popen
    return Ended(process.returncode, time.perf_counter() - begin, usage.ru_maxrss / 1024)


def encode(args: argparse.Namespace, images: Path, held_out: Path, out: Path) -> list[str]:
    options = {"--data.path": images, "--data.validation_path": held_out}
    options |= {"--shard_size": args.shard_size, "--workers": 1}
    pairs = [str(part) for option in options.items() for part in option]
    return [*ZELLIGE, "encode", "--model", args.model, "--out", str(out), *pairs]


@torch.inference_mode()
def forward_speed(model: str, batches: int = 40) -> float:
    """Images per second of the plain forward pass, in memory."""
    autoencoder = load_pretrained(model, AUTOENCODERS).eval()
    images = torch.rand(BATCH, autoencoder.channels, *autoencoder.image_size) * 2 - 1
    autoencoder.encode(images)
    begin = time.perf_counter()
    for _ in range(batches):
        autoencoder.encode(images)
    return BATCH * batches / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="stage-one run or model folder")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--held_out", type=Path, required=True, help="another")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--shard_size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    parts = {"train": args.images, "validation": args.held_out}
    images = {part: [os.fsdecode(name) for name in list_images(folder)] for part, folder in parts.items()}
    total = sum(map(len, images.values()))
    with tempfile.TemporaryDirectory() as temporary:
        peace, killed, few = (Path(temporary) / name for name in ("peace", "killed", "few"))
        whole = run(encode(args, args.images, args.held_out, peace))
        assert whole.code == 0, "encode failed"

        shards = len(CodeDataset(peace).index.shards)
        for kill in range(args.kills):
            ended = run(
                encode(args, args.images, args.held_out, killed),
                max(1, (kill + 1) * shards // (args.kills + 2)),
                killed,
            )
            there = len(list(killed.glob("codes-*")))
            print(f"killed with {there} of {shards} shards written, exit code {ended.code}", flush=True)
            assert not (killed / "index.json").exists()
        assert run(encode(args, args.images, args.held_out, killed)).code == 0
        files = sorted(path.name for path in peace.iterdir())
        assert files == sorted(path.name for path in killed.iterdir())
        different = [name for name in files if (peace / name).read_bytes() != (killed / name).read_bytes()]
        lost = doubled = 0
        for part, wanted in images.items():
            names = CodeDataset(killed, part).names()
            lost, doubled = lost + len(set(wanted) - set(names)), doubled + len(names) - len(set(names))
        verified = run([*ZELLIGE, "codes", "verify", "--codes", str(killed), "--model", args.model]).code == 0

        for part, wanted in images.items():
            for name in wanted[::10]:
                link = Path(temporary) / part / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((parts[part] / name).resolve())
        tenth = run(encode(args, Path(temporary) / "train", Path(temporary) / "validation", few))
        assert tenth.code == 0
        speed, bare = total / whole.seconds, forward_speed(args.model)
    print(f"{total} images, {shards} shards: {len(different)} of {len(files)} files differ from the run in peace")
    print(f"lost {lost}, doubled {doubled}; zellige codes verify: {'sound' if verified else 'NOT SOUND'}")
    print(f"peak memory: {tenth.megabytes:.0f} MB for a tenth of them, {whole.megabytes:.0f} MB for all")
    print(f"{speed:.0f} images/s, the program's start included; plain forward pass {bare:.0f} images/s")
    sys.exit(bool(different or lost or doubled or not verified))


if __name__ == "__main__":
    main()
