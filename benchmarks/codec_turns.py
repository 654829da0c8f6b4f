"""Mode prior of two builds, side by side: images per second and memory of this one in terms of another.

`python -m benchmarks.codec_turns --before FOLDER --model MODEL ... --count 64` compresses and decompresses the same
random images of the models' own size, by turns, in a process of each build: this one, and a checkout of another in
FOLDER. Prints a row for each model: the ratios of the images per second (above 1: this build is faster) and of the peak
memory, medians of the rounds. `--lanes N` are those of a build whose priors step in lanes; left out: its default.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


def worker(model: str, count: int, lanes: int | None) -> None:
    """Waits for a line before each round, and answers with seconds of both directions, bytes and peak memory in MB."""
    import torch

    from pipelines.codec.codec import Codec

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    codec = Codec.from_pretrained(model)
    spec, generator = codec.autoencoder.code_spec(), torch.Generator().manual_seed(0)
    shape = count, codec.autoencoder.channels, spec.image_height, spec.image_width
    images = torch.rand(shape, generator=generator) * 2 - 1
    settings = {} if lanes is None else {"lanes": lanes}
    codec.compress(images[:2], "prior", **settings)
    for _ in sys.stdin:
        begin = time.perf_counter()
        data = codec.compress(images, "prior", **settings).data
        middle = time.perf_counter()
        codec.decompress(data)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(middle - begin, time.perf_counter() - middle, len(data), memory, flush=True)


def measured(before: Path, model: str, count: int, rounds: int, lanes: int | None) -> dict[str, list[float]]:
    """Medians of each build."""
    processes = {}
    for name, tree in (("before", before), ("now", Path.cwd())):
        command = [sys.executable, __file__, "--model", model, "--count", str(count), "--worker"]
        command += ["--lanes", str(lanes)] if lanes and name == "before" else []
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        processes[name] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    found: dict[str, list[list[float]]] = {name: [] for name in processes}
    for _ in range(rounds):
        for name, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            found[name].append([float(number) for number in process.stdout.readline().split()])
    for process in processes.values():
        process.communicate()
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="checkout of another build")
    parser.add_argument("--model", nargs="+", required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lanes", type=int)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.model[0], arguments.count, arguments.lanes)
    print("| model | compress | decompress | memory | bytes, before and now |")
    print("|---|---:|---:|---:|---:|")
    for model in arguments.model:
        found = measured(arguments.before, model, arguments.count, arguments.rounds, arguments.lanes)
        (compress, decompress, size, memory), now = found["before"], found["now"]
        print(
            f"| {Path(model).name} | {compress / now[0]:.2f} | {decompress / now[1]:.2f} | {now[3] / memory:.2f} "
            f"| {size:.0f}, {now[2]:.0f} |",
            flush=True,
        )
    return None


if __name__ == "__main__":
    main()
