"""All figures of speed and memory again: runs the benchmarks one after the other and writes docs/benchmarks.md.

    make bench                                                # all of them, meant to take less than two hours
    python -m benchmarks.page --run --only sampling           # those whose title has this word
    python -m benchmarks.page --run --peers FOLDER            # and those beside other people's code, see below
    python -m benchmarks.page --run --device cuda             # those that know a device, into benchmarks_cuda.md
    python -m benchmarks.page                                 # the page anew from docs/benchmarks.json, in an instant

What a benchmark prints is kept in docs/benchmarks.json with its date, its machine and the commit, and the page is made
of that alone. A section that cannot run here keeps the figures that it had, with their date. A trained model and
images are made where they are missing, in --work. FOLDER holds clones of the code that users have:

    git clone https://github.com/rosinality/vq-vae-2-pytorch && git -C vq-vae-2-pytorch checkout ef5f67c
    git clone https://github.com/CompVis/taming-transformers && git -C taming-transformers checkout 3ba01b2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.codec.tables import TABLES_NAME

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "docs" / "benchmarks.json", ROOT / "docs" / "benchmarks.md"
LONGEST = 30 * 60  # seconds of one command


@dataclass(frozen=True)
class Section:
    """A command of `python -m benchmarks.NAME`, and what a reader should know of its table. {model}, {stage2},
    {images}, {photos}, {peers} and {work} stand for paths, {threads} for a number."""

    title: str
    command: str
    text: str
    threads: tuple[int, ...] = (1, 2)
    cuda: str | None = None  # what is added on a GPU; None: it is of the CPU alone
    bounds: str | None = None  # what is asked of it


BESIDE = (
    "Each beside the system of this toolkit that it would take the place of, the first row of its family: a training "
    "step and its use, {what}, as multiples of the first row's time, and what either takes of memory at its peak over "
    "what stays. Fresh weights, small sizes."
)
SECTIONS: tuple[Section, ...] = (
    Section(
        "Training steps, stage one",
        "stage1_step --peers {peers} --threads {threads}",
        "VQ-VAE-2 (128 pixels, batch 8) and VQ-GAN (width 32, 128 pixels, batch 4, without and with the discriminator "
        "and its adaptive weight) beside the open implementations, each as its own training script takes a step.",
        cuda="",
    ),
    Section(
        "Training steps, stage one, compiled",
        "stage1_step --peers {peers} --threads {threads} --compile --systems vqgan",
        "The same of VQ-GAN with `--train.compile true`, after the minute or two that compiling takes. "
        "taming-transformers has no such setting and is as before.",
    ),
    Section(
        "Training steps, stage two",
        "stage2_step --threads {threads}",
        "A transformer of 8 layers, width 256, 256 codes, batch 16, beside Hugging Face's GPT-2 of the same size.",
        cuda="",
    ),
    Section(
        "Quantizers",
        "quantizer",
        "16,384 vectors: a training step (forward, backward to the latents, the codebook's average) and encoding, "
        "beside `VectorQuantize` of vector-quantize-pytorch with the same settings. *Product* is the one matrix "
        "product that any exact search must do. Memory is the peak over what was there before.",
        threads=(2,),
    ),
    Section(
        "Sampling, transformers",
        "transformer_sampling --threads {threads}",
        "8 layers of width 256, vocabulary 1,024, 256 codes, top-k 100, beside Hugging Face's GPT-2 of the same "
        "size with `generate(use_cache=True)`. The last column is what a step that only reads the weights would "
        "allow.",
        cuda="--precision bf16",
    ),
    Section(
        "Exact lookahead",
        "lookahead --model {stage2} --threads {threads}",
        "The quickstart's prior with windows of several lengths: the same codes as step by step, in fewer passes.",
        cuda="",
    ),
    Section(
        "Generating",
        "generate_speed --model {model} --num 10000 --threads {threads}",
        "`zellige generate`, from the start of Python to its last line, against its parts alone. A single turn, "
        "which swings with what else the machine does.",
        threads=(2,),
    ),
    Section(
        "Encoding",
        "encode_speed --photos {photos} --threads {threads} --workers 1 --times 3",
        "`zellige encode` of 10,000 JPEG photos, from the start of Python to its last line, against decoding and the "
        "network alone, a core for the worker and a core for the network: as a share of the slower one, and of what "
        "the cores allow on which both must run. Without `--photos` these are made up: smooth noise of 500x375 pixels.",
        threads=(1,),
        bounds="Aimed at: 0.85 of the slower one.",
    ),
    Section(
        "Sampling, pixel by pixel",
        "pixel_sampling",
        "A grid of 16x16 codes of 512, in full forward passes of the same batch; a loop that computes everything "
        "anew for each code takes 256. Gated PixelCNN of 12 layers of width 128; PixelSNAIL of 2 blocks of 4 "
        "residual blocks, width 64, with attention.",
        threads=(2,),
    ),
    Section(
        "Systems of 2025 and 2026, priors in an order",
        "beside_standard --families priors --threads {threads}",
        BESIDE.format(what="a draw of four images"),
        threads=(1,),
    ),
    Section(
        "Systems of 2025 and 2026, other priors",
        "beside_standard --families masked scales --threads {threads}",
        BESIDE.format(what="a draw of four images"),
        threads=(1,),
    ),
    Section(
        "Systems of 2025 and 2026, autoencoders",
        "beside_standard --families cifar10 mnist --threads {threads}",
        BESIDE.format(what="16 images coded and decoded"),
        threads=(1,),
    ),
    Section(
        "Systems of 2025 and 2026, quantizers",
        "beside_standard --families quantizers --threads {threads}",
        BESIDE.format(what="16,384 latents looked up"),
        threads=(1,),
    ),
    Section(
        "The training loop",
        "training_loop",
        "`fit` beside a bare forward and backward pass and fused optimiser step on batches in memory: what checks, "
        "averages of weights, seeds and logs cost.",
        threads=(1,),
    ),
    Section(
        "Training of VAEs",
        "vae_training_speed --data {images} --steps 100 5 --turns 5",
        "The VAE of pythae's default layers (784-512-(16,16), 16-512-784), and an IWAE of it with 50 draws, on "
        "grey digits, batch 128, by turns with pythae's own trainer. Products of matrices, which both must "
        "compute, are half of our step of the VAE and four fifths of that of the IWAE. The IWAE's losses are of its "
        "first 30 steps, and pythae's is the weighted mean of log w, up to log 50 off the bound: they compare "
        "nothing.",
        threads=(1,),
    ),
    Section(
        "Hierarchies of latents",
        "vdvae_step",
        "Training steps of VD-VAE beside the published order of operations with the same weights.",
        threads=(1,),
    ),
    Section(
        "Hierarchies of latents, NVAE",
        "nvae_step",
        "Likewise of NVAE.",
        threads=(1,),
    ),
    Section(
        "Codes as files",
        "codec --model {model} --data {images} --images 200 --repeats 3",
        "Bits per code and images per second of `compress` and `decompress`, for the quickstart's model and "
        "digits. Mode `prior` computes in exact arithmetic, so that files decode on any machine.",
        threads=(2,),
    ),
    Section(
        "Frechet distance",
        "evaluation_speed --count 5000 --repeats 3",
        "FID from features of width 2,048 of each set, beside torchmetrics.",
        threads=(1,),
    ),
    Section(
        "Memory of activations",
        "recompute",
        "A training step with and without `train.checkpoint_activations`.",
        threads=(1,),
    ),
    Section(
        "Memory over time",
        "flat_memory",
        "Peak resident memory of the command line, of 1,000 images and of 20,000.",
        threads=(1,),
    ),
    Section(
        "Many images",
        "million --out {work}/million --small 10000 --large 100000",
        "`generate` with a model that costs nothing: what all else costs an image, on the clock and on the processor.",
        threads=(1,),
    ),
    Section(
        "Large folders",
        "kept_listing",
        "The second start on a folder of 100,000 files against the first.",
        threads=(1,),
    ),
)


# ---- running --------------------------------------------------------------------------------------------------------


def processor() -> str:
    """As the kernel calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine(device: str) -> str:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on = torch.cuda.get_device_name(device) if device != "cpu" else f"{cores} cores of {processor()}"
    return f"{on}, torch {torch.__version__.partition('+')[0]}"


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "not in git"


def said(output: str) -> list[str]:
    """The tables of what a benchmark printed, each below the line that stands above it; all of its lines where there is
    none."""
    lines = [line.rstrip() for line in output.splitlines()]
    if not any(line.startswith("|") for line in lines):
        return [line for line in lines if line]
    kept: list[str] = []
    above = ""  # the line over the next table; a table ends at any line that is none of it, a blank one too
    for line, before in zip(lines, ["", *lines], strict=False):
        if line.startswith("|"):
            if not before.startswith("|"):
                kept += [*([""] if kept else []), *([above, ""] if above else [])]
            kept.append(line)
            above = ""
        elif line:
            above = line
    return kept


def run(section: Section, places: Mapping[str, str], device: str) -> dict[str, Any]:
    """What the page tells of it. Raises RuntimeError where a command prints nothing that could be told."""
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": machine(device),
        "runs": [],
    }
    begin = time.perf_counter()
    for threads in section.threads if device == "cpu" else (None,):
        arguments = section.command.format(**places, threads=threads or 1)
        if device != "cpu":
            arguments = f"{arguments} --device {device} {section.cuda}".rstrip()
        environment = dict(os.environ)
        if threads is not None:
            environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", *f"benchmarks.{arguments}".split()]
        print(f"{section.title}, {threads or device}: {shlex.join(command[1:])}", flush=True)
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONGEST, check=False
        )
        lines = said(done.stdout)
        # A missed bound is an exit code of 1 too.
        if done.returncode not in (0, 1) or not lines or "Traceback (most recent call last)" in done.stderr:
            raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
        found["runs"].append({"threads": threads, "lines": lines})
        print("\n".join(lines), flush=True)
    found["minutes"] = round((time.perf_counter() - begin) / 60, 1)
    return found


def prepared(work: Path, peers: Path | None, photos: Path | None) -> dict[str, str]:
    """Paths for the commands: a trained quickstart and photos are made where they are missing."""
    work.mkdir(parents=True, exist_ok=True)
    quickstart = work / "quickstart"
    if not (quickstart / "model" / "model_index.json").exists():
        subprocess.run([sys.executable, "-m", "zellige", "quickstart", "--run", str(quickstart)], cwd=ROOT, check=True)
    if not (quickstart / "model" / TABLES_NAME).exists():
        parts = {"--model": quickstart / "model", "--codes": quickstart / "codes"}
        tables = [str(part) for pair in parts.items() for part in pair]
        subprocess.run([sys.executable, "-m", "zellige", "tables", *tables], cwd=ROOT, check=True)
    if photos is None and not (photos := work / "photos").exists():
        make_photos(photos, 1000)
    return {
        "model": str(quickstart / "model"),
        "stage2": str(quickstart / "stage2"),
        "images": "bundled-mnist",
        "photos": str(photos),
        "peers": str(peers),
        "work": str(work),
    }


def make_photos(folder: Path, count: int) -> None:
    """JPEG files of smooth noise, 500x375 pixels: all of them or none."""
    chance, temporary = np.random.default_rng(0), folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(chance.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(temporary / f"{number:04d}.jpg", quality=90)
    temporary.replace(folder)


# ---- the page -------------------------------------------------------------------------------------------------------

HEAD = """# Benchmarks

Speed and memory, ours and the peers' by turns in one process, medians. Ratios carry over to other machines; absolute
times do not. `make bench` repeats everything on this page and writes it anew
(`pip install -e ".[bench]"` has the peers that are packages; `--peers` in `benchmarks/page.py` says how to get the
others); `python -m benchmarks.page --run --device cuda --peers PEERS` writes those of training steps, sampling and
lookahead for a GPU. Float32 where nothing else is said. What models learn and how well: [results](results.md) and
[studies](studies.md).
"""


def page(record: Mapping[str, Any], sections: tuple[Section, ...] = SECTIONS) -> str:
    return "\n".join([HEAD, *(line for section in sections for line in told(section, record.get(section.title)))])


def told(section: Section, found: Mapping[str, Any] | None) -> Iterator[str]:
    yield f"## {section.title}\n"
    shown = section.command.format(
        model="MODEL", stage2="PRIOR", images="bundled-mnist", photos="PHOTOS", peers="PEERS", work="WORK", threads="1"
    )
    if found is None:
        yield wrapped(f"`python -m benchmarks.{shown}`: {section.text}") + "\n\nNot run yet.\n"
        return
    yield wrapped(f"`python -m benchmarks.{shown}`: {section.text}") + "\n"
    for one in found["runs"]:
        how = f"{'One thread' if one['threads'] == 1 else 'Two threads'}" if one["threads"] else "On the GPU"
        yield f"{how}, {found['machine']}, {found['date']}, commit {found['commit']}:\n"
        table = any(line.startswith("|") for line in one["lines"])
        yield "\n".join(one["lines"] if table else ["```text", *one["lines"], "```"]) + "\n"
    if section.bounds:
        yield wrapped(section.bounds) + "\n"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="the benchmarks too; else only the page, from what is kept")
    parser.add_argument("--only", help="sections whose title holds this")
    parser.add_argument("--peers", type=Path, help="folder of clones of other people's code")
    parser.add_argument("--photos", type=Path, help="folder of JPEG photos; left out: made-up ones")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="for a trained model and what is written")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    kept_in = RECORD if on_cpu else args.work / f"benchmarks_{args.device}.json"
    shown_in = PAGE if on_cpu else args.work / f"benchmarks_{args.device}.md"
    record = json.loads(kept_in.read_text(encoding="utf-8")) if kept_in.exists() else {}
    chosen = tuple(section for section in SECTIONS if on_cpu or section.cuda is not None)
    failed, begin = [], time.perf_counter()
    if args.run:
        places = prepared(args.work.resolve(), args.peers and args.peers.resolve(), args.photos)
        for section in chosen:
            if args.only and args.only.lower() not in section.title.lower():
                continue
            if "{peers}" in section.command and not args.peers:
                print(f"{section.title}: left out, as --peers names no clones", flush=True)
                continue
            try:
                record[section.title] = run(section, places, args.device)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failed.append(f"{section.title}: {error}")
                continue
            kept_in.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{(time.perf_counter() - begin) / 60:.0f} minutes")
    shown_in.write_text(page(record, chosen), encoding="utf-8")
    print(f"written: {shown_in}")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
