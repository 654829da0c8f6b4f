"""Images per second of `zellige generate`, everything included, against those of its parts alone.

    python -m benchmarks.generate_speed --model runs/quickstart/model
    python -m benchmarks.generate_speed --model runs/quickstart/model --num 2000 --free 1000 --threads 1 --out /dev/shm

Two rows. A trained model: the command from the start of Python to its last line, against sampling and decoding the same
batches in a process that has the model and writes nothing (half of the images before the command, half after). And a
prior that costs nothing: drawing and decoding give smooth pictures of 256 pixels in RGB that are there, so that writing
PNGs is all there is; the command, from the start of Python, against two processes that encode and write the same
pictures, each half of them, from their first to their last. Files go to a new folder of `--out`, or of the system's for
temporary files; what making a file costs there meets all alike.
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
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from benchmarks.million import write_model
from common.memory import keep_freed_memory
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.generation.encoder import Form, Piece, work_through
from pipelines.generation.layout import Layout, batches
from pipelines.one_by_one import decode_each
from pipelines.pictures import to_pils
from pipelines.prior_requests import labels_of
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import VQVAE

SIDE, PICTURES, BATCH = 256, 64, 64
WRITERS = 2  # processes


def pictures() -> torch.Tensor:
    """Smooth shapes with a little noise, which pack about as photos do: PICTURES 3 SIDE SIDE in [-1, 1]."""
    chance = torch.Generator().manual_seed(0)
    coarse = torch.rand(PICTURES, 3, 16, 16, generator=chance) * 2 - 1
    smooth = interpolate(coarse, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    return (smooth + 0.02 * torch.randn(smooth.shape, generator=chance)).clamp(-1, 1)


def draw_alone(model: str, num: int) -> float:
    """Images per second of sampling and decoding, by batches as the command makes them, once it is warm."""
    pipeline = TwoStagePipeline.from_pretrained(model)

    layout = Layout("png")

    def draw(unit: range) -> None:
        for batch in batches(unit, BATCH):
            codes = pipeline.sample(batch, labels_of(pipeline.prior, batch, None), 0, pipeline.sampling)
            wanted = [place for place, number in enumerate(batch) if number in unit]
            decode_each(pipeline, codes, wanted, lambda place, picture: None, pipeline.sampling.decoding)

    draw(range(BATCH))
    begin = time.perf_counter()
    for unit in layout.units(range(num), num):
        draw(unit)
    return num / (time.perf_counter() - begin)


def write_alone(out: Path, part: range) -> float:
    """Seconds."""
    layout, ready = Layout("png"), to_pils(pictures())
    begin = time.perf_counter()
    for number in part:
        work_through(Piece(Form("png"), str(out), [layout.path(number)], [ready[number % PICTURES]]))
    return time.perf_counter() - begin


def generate_freely(model: str, out: str, num: int) -> None:
    """With a model that copies."""
    ready = pictures()

    def sample(self, indices, *arguments, **settings):
        return (torch.tensor(list(indices))[:, None, None] % PICTURES,)

    def decode(self, codes):
        numbers = codes[0].flatten().tolist()
        return ready[numbers[0]][None] if len(numbers) == 1 else ready[numbers]

    TwoStagePipeline.sample, VQVAE.decode = sample, decode  # type: ignore[method-assign, assignment]
    generate_files(GenerateConfig(model=model, out=out, num=num, device="cpu"))


def started(*words: object, threads: int | None, module: str = "benchmarks.generate_speed") -> subprocess.Popen[str]:
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def result(process: subprocess.Popen[str]) -> str:
    said = process.communicate()[0]
    if process.returncode:
        sys.exit(f"{process.args!r} ended with {process.returncode}")
    return said.splitlines()[-1]


def timed(num: int, *words: object, threads: int | None, module: str = "benchmarks.generate_speed") -> float:
    """Images per second of a process from its start to its end."""
    begin = time.perf_counter()
    result(started(*words, threads=threads, module=module))
    return num / (time.perf_counter() - begin)


def of_model(model: str, num: int, work: Path, threads: int | None) -> tuple[float, float]:
    """Images per second alone, and of the command."""
    half = max(1, num // 2)  # as many alone as by the command: shorter runs may have a faster clock
    before = float(result(started("--child", "draw", model, half, threads=threads)))
    words = ("generate", "--model", model, "--num", num, "--device", "cpu", "--out", work / "model")
    whole = timed(num, *words, threads=threads, module="zellige")
    after = float(result(started("--child", "draw", model, half, threads=threads)))
    return 2 / (1 / before + 1 / after), whole


def of_nothing(num: int, work: Path, threads: int | None) -> tuple[float, float]:
    """Images per second of two processes that only write, and of the command."""
    write_model(work / "nothing")
    whole = timed(num, "--child", "generate", work / "nothing", work / "free", num, threads=threads)
    parts = [range(writer, num, WRITERS) for writer in range(WRITERS)]
    processes = [started("--child", "write", work / "alone", *map(str, _ends(part)), threads=threads) for part in parts]
    return num / max(float(result(process)) for process in processes), whole


def _ends(part: range) -> tuple[int, int, int]:
    return part.start, part.stop, part.step


def child(kind: str, *words: str) -> None:
    keep_freed_memory()
    if kind == "draw":
        print(draw_alone(words[0], int(words[1])))
    elif kind == "write":
        print(write_alone(Path(words[0]), range(*map(int, words[1:]))))
    else:
        generate_freely(words[0], words[1], int(words[2]))
        print("done")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="of `zellige quickstart`; left out, the first row is")
    parser.add_argument("--num", type=int, default=10_000, help="images of the model")
    parser.add_argument("--free", type=int, default=10_000, help="images of the prior that costs nothing; 0: none")
    parser.add_argument("--times", type=int, default=1, help="turns, of which the medians are printed")
    parser.add_argument("--threads", type=int, help="of the model; left out, as torch has it")
    parser.add_argument("--out", type=Path, help="a folder on the disk to write to")
    asked = parser.parse_args(arguments)
    rows: dict[str, list[tuple[float, float]]] = {}
    for _ in range(asked.times):
        with tempfile.TemporaryDirectory(dir=asked.out) as work:
            if asked.model:
                row = of_model(asked.model, asked.num, Path(work), asked.threads)
                rows.setdefault(f"{asked.num:,} of the model, sampling and decoding alone", []).append(row)
            if asked.free:
                row = of_nothing(asked.free, Path(work), asked.threads)
                rows.setdefault(f"{asked.free:,} of 256 pixels, {WRITERS} processes that only write", []).append(row)
    print("| images | alone, a second | `zellige generate`, a second | ratio |\n|---|---|---|---|")
    for name, turns in rows.items():
        alone, whole = (statistics.median(values) for values in zip(*turns, strict=True))
        print(f"| {name} | {alone:.1f} | {whole:.1f} | {statistics.median(w / a for a, w in turns):.2f} |")
    print(json.dumps({"threads": asked.threads or torch.get_num_threads(), "times": asked.times}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
