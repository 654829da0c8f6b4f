"""Time and memory of the systems of 2025 and 2026, each beside the one of this toolkit that it would take the place of.

    python -m benchmarks.beside_standard --threads 1
    python -m benchmarks.beside_standard --families priors --repeats 5

Four families, fresh weights, float32, all settings that are not named here being the defaults of each config:

* priors that walk in an order, 6 layers of width 192 over 16x16 codes of 1,024 and ten classes, beside `transformer`;
* priors that fill in hidden codes, in twelve steps, beside `maskgit`, and priors over scales beside `var`;
* autoencoders, each as its recipe has it, without discriminator and perceptual network, beside the VQ-GAN of CIFAR-10
  and the VQ-VAE of MNIST;
* quantizers of 1,024 codes, or as nearly as they can be, on 16,384 latents of 64 numbers, beside `nearest`.

Each has a process of its own, which first says what its second step, and its second images, took of memory over what
it held before, weights and moments; then all of a family take turns, and a time is the median of `--repeats`. Prints a
Markdown table: times as multiples of those of the family's first row, memory in MiB. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.quantizer_memory import status
from benchmarks.quantizers_compared import QUANTIZERS
from codes.spec import CodeSpec, Grid
from common.memory import keep_freed_memory
from pipelines.options import read_recipe
from stage1_vq.autoencoders import AUTOENCODERS
from stage1_vq.quantizers import build_quantizer
from stage1_vq.train import Stage1Config
from stage2_prior.condition import Condition
from stage2_prior.priors import (
    PRIORS,
    DiffusionConfig,
    HaltonMaskGITConfig,
    IBQGPTConfig,
    InfinityConfig,
    LlamaGenConfig,
    MaskGITConfig,
    MDMPrimeConfig,
    OpenMAGVIT2GPTConfig,
    RandARConfig,
    RARConfig,
    TiTokMaskGITConfig,
    TransformerConfig,
    VARConfig,
)
from stage2_prior.sampling import SamplingConfig, sample_codes

SIDE, VOCABULARY, CLASSES = 16, 1024, 10
TRAINED, DRAWN = 8, 4  # images of a training step of a prior, and of a draw
IMAGES = 16  # of a batch of an autoencoder
LATENTS = 16  # images of 32x32 latents for a quantizer
SIZE: dict[str, Any] = {"layers": 6, "width": 192, "heads": 6}

PLAIN = (Grid("codes", SIDE, SIDE, VOCABULARY),)
LARGE = (Grid("codes", SIDE, SIDE, 65_536),)
FACTORS = tuple(Grid(f"factor{number}", SIDE, SIDE, 32) for number in range(2))
SCALES = tuple(Grid(f"scale{side}", side, side, VOCABULARY) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))


class Of(NamedTuple):
    """A prior to build, and how it draws."""

    config: Any
    grids: tuple[Grid, ...] = PLAIN
    sampling: SamplingConfig = SamplingConfig()


PRIORS_IN_ORDER = {
    "transformer": Of(TransformerConfig(**SIZE)),
    "LlamaGen": Of(LlamaGenConfig(**SIZE)),
    "RAR": Of(RARConfig(**SIZE)),
    "RandAR": Of(RandARConfig(**SIZE)),
    "RandAR, 64 steps": Of(RandARConfig(**SIZE), sampling=SamplingConfig(steps=64)),
    "IBQ's transformer": Of(IBQGPTConfig(**SIZE)),
    "Open-MAGVIT2's transformer, two factors of 32": Of(OpenMAGVIT2GPTConfig(**SIZE), grids=FACTORS),
    "transformer, 65,536 codes": Of(TransformerConfig(**SIZE), grids=LARGE),
    "transformer, 65,536 codes, bitwise head": Of(TransformerConfig(**SIZE, bitwise=True), grids=LARGE),
}
TWELVE = SamplingConfig(steps=12)
MASKED_PRIORS = {
    "MaskGIT": Of(MaskGITConfig(**SIZE), sampling=TWELVE),
    "MaskGIT, Halton's order": Of(MaskGITConfig(**SIZE), sampling=replace(TWELVE, order="halton")),
    "MaskGIT, re-masking by rescale": Of(MaskGITConfig(**SIZE), sampling=replace(TWELVE, remask="rescale")),
    "Halton-MaskGIT's network": Of(HaltonMaskGITConfig(**SIZE), sampling=TWELVE),
    "TiTok's generator (BERT)": Of(TiTokMaskGITConfig(**SIZE, hidden_width=768), sampling=TWELVE),
    "diffusion": Of(DiffusionConfig(**SIZE), sampling=TWELVE),
    "MDM-Prime, two parts of a code": Of(MDMPrimeConfig(**SIZE), sampling=TWELVE),
}
PRIORS_OF_SCALES = {
    "VAR": Of(VARConfig(**SIZE), grids=SCALES),
    "Infinity, ten bits to a code": Of(InfinityConfig(**SIZE), grids=SCALES),
}
CIFAR10 = {
    "VQ-GAN": "cifar10_vqgan",
    "ViT-VQGAN": "cifar10_vit_vqgan",
    "MaskGIT's VQ-GAN": "cifar10_maskgit_vqgan",
    "Open-MAGVIT2's tokenizer": "cifar10_open_magvit2",
    "Infinity's tokenizer": "cifar10_infinity",
}
MNIST = {
    "VQ-VAE": "mnist_vqvae",
    "TiTok, nested tokens": "mnist_titok",
    "FlexTok": "mnist_flextok",
    "XQ-GAN's tokenizer": "mnist_xqgan",
    "flow decoder": "mnist_flow",
}


@dataclass(frozen=True)
class Works:
    """What is timed of a system. used: images made, read back or looked up."""

    network: nn.Module
    trained: Callable[[], None]
    used: Callable[[], object]


def stepped(network: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """A training step: loss, backward pass and fused AdamW."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True) if weights else None

    def step() -> None:
        network.train()
        loss().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def prior_works(asked: Of) -> Works:
    spec = CodeSpec(asked.grids, 8 * SIDE, 8 * SIDE)
    prior = PRIORS[asked.config.kind](asked.config, spec, CLASSES)
    generator = torch.Generator().manual_seed(0)
    codes = tuple(
        torch.randint(grid.vocabulary, (TRAINED, grid.height, grid.width), generator=generator) for grid in asked.grids
    )
    condition = Condition(torch.arange(TRAINED) % CLASSES)

    def drawn() -> object:
        prior.eval()
        return sample_codes(prior, range(DRAWN), Condition(torch.arange(DRAWN)), 0, asked.sampling)

    return Works(prior, stepped(prior, lambda: prior(codes, condition).loss.mean()), drawn)


def autoencoder_works(recipe: str) -> Works:
    config, _ = read_recipe("train-stage1", Stage1Config, "stage1", ["--config", recipe])
    size = config.data.height, config.data.width
    model = AUTOENCODERS[config.model.kind](config.model, size)
    shape = IMAGES, config.data.channels, *size
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def loss() -> torch.Tensor:
        return torch.stack(list(model(images).losses.values())).sum()

    step = stepped(model, loss)

    def trained() -> None:
        step()
        model.update()

    @torch.inference_mode()
    def read_back() -> object:
        model.eval()
        return model.decode(model.encode(images))

    return Works(model, trained, read_back)


def quantizer_works(name: str) -> Works:
    quantizer = build_quantizer(QUANTIZERS[name])
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(LATENTS, quantizer.dim, 32, 32, generator=generator).requires_grad_()

    def loss() -> torch.Tensor:
        quantized = quantizer(z)
        return sum(quantized.losses.values(), quantized.z_q.square().mean())

    step = stepped(quantizer, loss)

    def trained() -> None:
        z.grad = None
        step()
        quantizer.update()

    @torch.inference_mode()
    def looked_up() -> object:
        quantizer.eval()
        return quantizer.codes(z)

    return Works(quantizer, trained, looked_up)


FAMILIES: dict[str, tuple[str, Mapping[str, Any], Callable[[Any], Works]]] = {
    "priors": ("priors in an order, a draw of 4", PRIORS_IN_ORDER, prior_works),
    "masked": ("masked priors, a draw of 4 in twelve steps", MASKED_PRIORS, prior_works),
    "scales": ("priors over scales, a draw of 4", PRIORS_OF_SCALES, prior_works),
    "cifar10": ("autoencoders of 32x32 pixels, 16 images coded and decoded", CIFAR10, autoencoder_works),
    "mnist": ("autoencoders of 28x28 pixels, 16 images coded and decoded", MNIST, autoencoder_works),
    "quantizers": ("quantizers, 16,384 latents looked up", {name: name for name in QUANTIZERS}, quantizer_works),
}


def memory_of(work: Callable[[], object]) -> float:
    """MiB at the peak of a second call over what is held before it: at the first one libraries allocate once."""
    work()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def work(family: str, name: str) -> None:
    """Answers with weights and two figures of memory, then each line, `train` or `use`, with seconds."""
    _, systems, build = FAMILIES[family]
    torch.manual_seed(0)
    works = build(systems[name])
    trained, used = memory_of(works.trained), memory_of(works.used)
    keep_freed_memory()
    print(sum(weight.numel() for weight in works.network.parameters()), trained, used, flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        (works.trained if line.strip() == "train" else works.used)()
        print(time.perf_counter() - begin, flush=True)


class System:
    """A process with one system."""

    def __init__(self, family: str, name: str, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.beside_standard", "--worker", family, name]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        self.weights, self.trained, self.used = map(float, self.answer().split())
        self.seconds: dict[str, list[float]] = {"train": [], "use": []}

    def answer(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit("a system's process has ended; its words stand above")
        return line

    def take_turn(self, what: str, *, counts: bool) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        seconds = float(self.answer())
        if counts:
            self.seconds[what].append(seconds)

    def times(self) -> dict[str, float]:
        return {what: statistics.median(found) for what, found in self.seconds.items()}


def rows(family: str, threads: int, repeats: int) -> list[str]:
    """The table's, of one family."""
    title, systems, _ = FAMILIES[family]
    started = {name: System(family, name, threads) for name in systems}
    for turn in range(repeats + 1):
        for system in started.values():
            for what in system.seconds:
                system.take_turn(what, counts=turn > 0)
    standard = next(iter(started.values())).times()
    found = [f"| **{title}** | | | | | |"]
    for name, system in started.items():
        ratios = {what: f"{seconds / standard[what]:.2f}" for what, seconds in system.times().items()}
        weights = f"{system.weights / 1e6:.2f}" if system.weights else "–"
        cells = name, weights, ratios["train"], f"{system.trained:.0f}", ratios["use"], f"{system.used:.0f}"
        found.append(f"| {' | '.join(cells)} |")
        system.process.communicate()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(*options.worker)
        return
    print("| system | million weights | training step | its memory, MiB | in use | its memory, MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for family in options.families:
        print("\n".join(rows(family, options.threads, options.repeats)), flush=True)


if __name__ == "__main__":
    main()
