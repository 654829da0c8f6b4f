"""Mode prior in many environments: every frequency, every payload and every code must be the same.

`python -m benchmarks.codec_environments --work /tmp/environments` makes a prior of each kind that walks its codes in an
order, draws images from it (1,000 of the first two kinds, 50 of the others), and then, in a process of its own for each
environment, computes all frequencies again, writes the payloads anew, and decodes those of the first environment. It
prints a row for each environment: of each kind how many images were refused, whose codes came back otherwise, and
whether the SHA-256 over the frequencies of each image and of its payload are those of the first row. The last row tells
what a code costs under the frequencies, how much more than under the prior in float32, and in payloads, which end on a
byte. `--python PATH` adds rows with another interpreter, such as one with another version of torch. Ends with an error
unless all are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pipelines.codec.prior_coding as prior_coding
from codes.spec import CodeSpec, Grid
from common.model_io import load_pretrained
from common.tensor_files import load_tensors, save_tensors
from pipelines.codec.entropy_coding import TOTAL
from stage2_prior.condition import Condition
from stage2_prior.priors import (
    PRIORS,
    AutoregressivePrior,
    HierarchicalConfig,
    InfinityConfig,
    LlamaGenConfig,
    MinGPTConfig,
    PixelCNNConfig,
    PixelSNAILConfig,
    RQTransformerConfig,
    TransformerConfig,
    VARConfig,
)
from stage2_prior.sampling import SamplingConfig, sample_codes

CLASSES = 10
ONE_GRID = CodeSpec((Grid("codes", 7, 7, 128),), 28, 28, 1)
PRIORS_TRIED: dict[str, tuple[Any, CodeSpec]] = {
    "transformer": (TransformerConfig(layers=4, width=128, heads=4), ONE_GRID),
    "pixelcnn": (PixelCNNConfig(layers=6, width=64, output_width=128), ONE_GRID),
    "pixelsnail": (PixelSNAILConfig(blocks=2, residual_blocks=2, width=64, residual_width=64, heads=4), ONE_GRID),
    "mingpt": (MinGPTConfig(layers=4, width=128, heads=4), ONE_GRID),
    "llamagen": (LlamaGenConfig(layers=4, width=128, heads=4), ONE_GRID),
    "rq_transformer": (
        RQTransformerConfig(layers=3, depth_layers=2, width=128, heads=4),
        CodeSpec(tuple(Grid(f"depth{n}", 7, 7, 128) for n in range(2)), 28, 28, 1),
    ),
    "var": (
        VARConfig(layers=4, width=128, heads=4),
        CodeSpec(tuple(Grid(f"scale{n}", n, n, 128) for n in (1, 2, 3, 5, 7)), 28, 28, 1),
    ),
    "infinity": (
        InfinityConfig(layers=4, width=128, heads=4),
        CodeSpec(tuple(Grid(f"scale{n}_bits{bits}", n, n, 64) for n in (1, 2, 3, 5, 7) for bits in (0, 1)), 28, 28, 1),
    ),
    "hierarchical": (
        HierarchicalConfig(
            top=PixelSNAILConfig(blocks=1, residual_blocks=2, width=64, residual_width=64, heads=4),
            bottom=TransformerConfig(layers=2, width=128, heads=4),
        ),
        CodeSpec((Grid("top", 4, 4, 128), Grid("bottom", 8, 8, 128)), 32, 32, 1),
    ),
}
ALONE = 50  # images that are tried one at a time
MANY = ("transformer", "pixelcnn")
ENVIRONMENTS: list[tuple[dict[str, str], int]] = [  # variables, and images at a time
    ({"OMP_NUM_THREADS": "2"}, 64),
    ({"OMP_NUM_THREADS": "1"}, 64),
    ({"OMP_NUM_THREADS": "1"}, 7),
    ({"OMP_NUM_THREADS": "2"}, 1),
    ({"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default"}, 64),
    ({"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2"}, 64),
    ({"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "avx2"}, 7),
    ({"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}, 64),
    ({"OMP_NUM_THREADS": "2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}, 64),
    ({"OMP_NUM_THREADS": "2", "MKL_CBWR": "COMPATIBLE"}, 64),
    ({"OMP_NUM_THREADS": "1", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, 64),
    ({"OMP_NUM_THREADS": "2", "MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "default"}, 7),
]
OF_ANOTHER: list[tuple[dict[str, str], int]] = [
    ({"OMP_NUM_THREADS": "2"}, 64),
    ({"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"}, 7),
]


def make_priors(work: Path, counts: dict[str, int]) -> None:
    """A model folder for each kind, and codes of images that were drawn from it, with their labels."""
    for kind in counts:
        config, spec = PRIORS_TRIED[kind]
        if (work / kind / "codes.safetensors").exists():
            continue
        torch.manual_seed(0)
        prior = PRIORS[kind](config, spec, CLASSES).eval()
        with torch.no_grad():  # no weight that is zero or one, and logits that are worth coding
            for parameter in prior.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        prior.save_pretrained(work / kind)
        labels = torch.arange(counts[kind]) % CLASSES
        parts = [
            sample_codes(prior, numbers.tolist(), Condition(labels[numbers]), 0, SamplingConfig())
            for numbers in torch.arange(counts[kind]).split(100)
        ]
        tensors = {f"grid{n}": torch.cat(grids) for n, grids in enumerate(zip(*parts, strict=True))}
        save_tensors({**tensors, "labels": labels}, work / kind / "codes.safetensors")


def codes_of(folder: Path) -> tuple[tuple[Tensor, ...], list[int]]:
    tensors = load_tensors(folder / "codes.safetensors")
    labels = tensors.pop("labels").tolist()
    return tuple(tensors[f"grid{n}"] for n in range(len(tensors))), labels


def try_kind(folder: Path, batch: int, reference: Path) -> dict[str, Any]:
    """All frequencies and payloads of the images in one environment, and what decoding those of `reference` gives; the
    first environment writes it."""
    prior = load_pretrained(folder, PRIORS)
    assert isinstance(prior, AutoregressivePrior)
    codes, labels = codes_of(folder)
    if batch == 1:  # takes as long for each as 64 together
        codes, labels = tuple(grid[:ALONE] for grid in codes), labels[:ALONE]
    digests = [hashlib.sha256() for _ in labels]  # of each image, so that batches do not matter
    rows: Sequence[int] = ()
    symbols = np.empty((0, 0), np.int64)  # of the rows, b n
    done, bits = 0, 0.0
    plain = prior_coding.frequencies_of

    def recorded(logits: Tensor) -> np.ndarray:
        nonlocal done, bits
        counts = plain(logits)
        here = symbols[:, done : done + counts.shape[1]]
        bits += float(np.log2(TOTAL / np.take_along_axis(counts, here[..., None], axis=2)).sum())
        done += counts.shape[1]
        for row, own in zip(rows, counts, strict=True):
            digests[row].update(own.tobytes())
        return counts

    payloads: list[bytes] = []
    prior_coding.frequencies_of = recorded
    for start in range(0, len(labels), batch):
        rows = range(start, min(start + batch, len(labels)))
        part = tuple(grid[rows.start : rows.stop] for grid in codes)
        symbols, done = prior.sequence(part, Condition(torch.tensor([labels[i] for i in rows]))).numpy(), 0
        payloads += prior_coding.encode_with_prior(prior, part, [labels[i] for i in rows])
    prior_coding.frequencies_of = plain
    with torch.no_grad():
        nll = sum(
            float(prior.nll(tuple(grid[own] for grid in codes), Condition(torch.tensor(labels)[own])).sum())
            for own in torch.arange(len(labels)).split(64)
        )
    if not reference.exists():
        reference.write_text(json.dumps([payload.hex() for payload in payloads]))
    given = [bytes.fromhex(payload) for payload in json.loads(reference.read_text())]
    wrong = 0
    for start in range(0, len(labels), batch):
        rows = range(start, min(start + batch, len(labels)))
        found = prior_coding.decode_with_prior(prior, [given[i] for i in rows], [labels[i] for i in rows])
        same = torch.stack(
            [(a == b[rows.start : rows.stop]).flatten(1).all(1) for a, b in zip(found, codes, strict=True)]
        )
        wrong += int((~same.all(dim=0)).sum())
    return {
        "wrong": wrong,
        "images": len(labels),
        "frequencies": [digest.hexdigest() for digest in digests],
        "above": bits / (nll / math.log(2)) - 1,
        "bits": bits / len(labels) / prior.code_spec.codes_per_image,
        "payload_bits": 8.0 * sum(map(len, payloads)) / len(labels) / prior.code_spec.codes_per_image,
        "payloads": [hashlib.sha256(payload).hexdigest() for payload in payloads],
    }


def work_in_environment(work: Path, batch: int, kinds: Sequence[str]) -> None:
    """The part that runs in each environment: prints JSON."""
    found = {kind: try_kind(work / kind, batch, work / kind / "payloads.json") for kind in kinds}
    where = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    print(json.dumps({"where": where, "found": found}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for priors, codes and payloads")
    parser.add_argument("--python", action="append", default=[], help="interpreter of further environments")
    parser.add_argument("--many", type=int, default=1000, help="images of the first two kinds")
    parser.add_argument("--few", type=int, default=50, help="images of the other kinds")
    parser.add_argument("--kinds", nargs="+", default=list(PRIORS_TRIED), choices=list(PRIORS_TRIED))
    parser.add_argument("--in_environment", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_environment:
        return work_in_environment(arguments.work, arguments.in_environment, arguments.kinds)

    make_priors(arguments.work, {k: arguments.many if k in MANY else arguments.few for k in arguments.kinds})
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {time.strftime('%Y-%m-%d')}")
    print("| environment | images at a time | " + " | ".join(arguments.kinds) + " |")
    print("|---|---|" + "---|" * len(arguments.kinds))
    first: dict[str, Any] | None = None
    failed = 0
    rows = [(sys.executable, *one) for one in ENVIRONMENTS]
    rows += [(python, *one) for python in arguments.python for one in OF_ANOTHER]
    for python, variables, batch in rows:
        command = [python, "-m", "benchmarks.codec_environments", "--work", str(arguments.work)]
        command += ["--in_environment", str(batch), "--kinds", *arguments.kinds]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{variables}: {done.stderr}")
        answer = json.loads(done.stdout.splitlines()[-1])
        first = first or answer
        cells = []
        for kind, own in answer["found"].items():
            same = [own[name] == first["found"][kind][name][: own["images"]] for name in ("frequencies", "payloads")]
            failed += own["wrong"] + same.count(False)
            cells.append(f"{own['wrong']} of {own['images']} refused, " + ("equal" if all(same) else "NOT EQUAL"))
        named = ", ".join(f"{name}={value}" for name, value in variables.items())
        print(f"| {answer['where']}; {named} | {batch} | " + " | ".join(cells) + " |", flush=True)
    assert first is not None
    rates = [
        f"{own['bits']:.4f}, {100 * own['above']:+.4f}%, {own['payload_bits']:.3f}" for own in first["found"].values()
    ]
    print(
        "| bits per code of the frequencies, above the float prior's NLL, of the payloads | | "
        + " | ".join(rates)
        + " |"
    )
    if failed:
        sys.exit(f"{failed} differences")
    return None


if __name__ == "__main__":
    main()
