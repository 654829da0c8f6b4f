"""What the training loop costs beside a bare forward + backward + fused optimiser step of the same network.

    python -m benchmarks.training_loop
    python -m benchmarks.training_loop --images cifar10/train --recipe cifar10_vqvae --steps 100

The first prints a Markdown table. For each recipe `fit` trains as `zellige train-stage1` or `train-stage2` would, on
samples in memory, and after every block of its steps a block of bare steps of an equal network runs on the same
samples, already batched. So both take turns in one process, and a block of the loop is all that happens from one step
to the next: sampling, fetching, seeding, clipping, averaging of weights, the check for finite numbers, log lines,
progress bar, tracker. Left out are validation, previews and checkpoints, which a bare loop does not have. Blocks are
short, so that what else the machine does meets neighbours alike: the ratio is the median over pairs of a block of the
loop and the bare one after it, ± the standard error of that median; the quartiles are those of the pairs' ratios. A
bare step is the task's forward pass and loss, backward, the optimiser, and the codebook's update.

The second trains on a folder of images and prints the share of the time that training waited for them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codes.spec import CodeSpec, Grid
from pipelines.options import read_recipe
from stage1_vq.autoencoders import AUTOENCODERS
from stage1_vq.train import Stage1Config, Stage1Task, train_stage1
from stage2_prior.priors import PRIORS
from stage2_prior.train import Stage2Config, Stage2Task
from training.config import TrainConfig
from training.loop import fit
from training.optimizers import OptimizerSettings, make_optimizer
from training.task import Batch

BOUND = 1.05  # the loop may take so much of the bare time
RECIPES = (("stage1", "mnist_quickstart"), ("stage1", "cifar10_vqvae_short"), ("stage2", "mnist_quickstart"))
SAMPLES = 4096  # in memory
CLASSES = 10
GRID = Grid("codes", 7, 7, 128)  # what the quickstart's autoencoder makes


class InMemory:
    """A training.task.Dataset of samples that are ready: an image or a grid of codes, and a label."""

    def __init__(self, samples: Tensor, name: str) -> None:
        self.samples, self.name = samples, name
        self.labels = torch.arange(len(samples)) % CLASSES

    def __len__(self) -> int:
        return len(self.samples)

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        samples = self.samples[chosen]
        return {self.name: (samples,) if self.name == "codes" else samples, "labels": self.labels[chosen]}


class WithBareBlocks:
    """A task in whose run a block of bare steps follows every `block` steps of the loop; times both."""

    def __init__(self, task: Stage1Task | Stage2Task, data: InMemory, config: TrainConfig, block: int) -> None:
        self.task, self.block, self.config = task, block, config
        self.bare = copy.deepcopy(task)
        self.batches = [data.fetch(range(i, i + config.batch_size), ()) for i in range(0, 8 * config.batch_size, 64)]
        settings = OptimizerSettings(betas=config.betas, weight_decay=config.weight_decay)
        self.optimizer = make_optimizer(list(self.bare.model.parameters()), settings, config.learning_rate)
        self.steps = 0
        self.loop_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def start(self, model: torch.nn.Module, batches: Sequence[Batch]) -> None:
        self.task.start(model, batches)
        self.bare.start(self.bare.model, batches)
        self.begin = time.perf_counter()

    def after_step(self, step: int) -> None:
        self.task.after_step(step)
        self.steps += 1
        if self.steps % self.block == 0:
            self.loop_seconds.append(time.perf_counter() - self.begin)
            begin = time.perf_counter()
            for number in range(self.block):
                self.bare_step(self.batches[number % len(self.batches)], step)
            self.begin = time.perf_counter()
            self.bare_seconds.append(self.begin - begin)

    def bare_step(self, batch: Batch, step: int) -> None:
        self.bare.step(self.bare.model, batch, step).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.bare.after_step(step)


def stage1(recipe: str) -> tuple[Stage1Task, InMemory, TrainConfig]:
    config, _ = read_recipe("train-stage1", Stage1Config, "stage1", ["--config", recipe])
    H, W = config.data.height, config.data.width
    data = InMemory(torch.randint(256, (SAMPLES, config.data.channels, H, W), dtype=torch.uint8), "images")
    task = Stage1Task(AUTOENCODERS[config.model.kind](config.model, (H, W)), data, SAMPLES // config.train.batch_size)
    return task, data, config.train


def stage2(recipe: str) -> tuple[Stage2Task, InMemory, TrainConfig]:
    config, _ = read_recipe("train-stage2", Stage2Config, "stage2", ["--config", recipe])
    data = InMemory(torch.randint(GRID.vocabulary, (SAMPLES, GRID.height, GRID.width)), "codes")
    prior = PRIORS[config.model.kind](config.model, CodeSpec((GRID,), 28, 28, 1), CLASSES)
    return Stage2Task(prior, config.label_dropout), data, config.train


def compare(stage: str, recipe: str, blocks: int, block_seconds: float) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    task, data, config = stage1(recipe) if stage == "stage1" else stage2(recipe)
    probe = WithBareBlocks(task, data, config, block=1)
    probe.bare.start(probe.bare.model, probe.batches[:1])
    probe.bare_step(probe.batches[0], 0)
    begin = time.perf_counter()
    for batch in probe.batches[1:4]:
        probe.bare_step(batch, 0)
    block = max(1, round(block_seconds / ((time.perf_counter() - begin) / 3)))

    timed = WithBareBlocks(task, data, config, block)
    config = replace(config, steps=block * (blocks + 1), validate_every=0, preview_every=0, save_every=10**9, workers=0)
    with tempfile.TemporaryDirectory() as run, contextlib.redirect_stdout(io.StringIO()):
        result = fit(timed, data, InMemory(data.samples[:0], data.name), config, Path(run), asdict(config))
    # The first block of either holds what is done once; the last one of the loop would hold the final checkpoint.
    loops, bares = timed.loop_seconds[1:], timed.bare_seconds[1:]
    loop, bare = statistics.median(loops), statistics.median(bares)
    lower, ratio, upper = statistics.quantiles((a / b for a, b in zip(loops, bares, strict=True)), n=4)
    # The median of n numbers strays by 1.25 standard deviations / sqrt(n); the quartiles lie 1.35 of them apart.
    error = 1.25 * (upper - lower) / 1.35 / math.sqrt(len(loops))
    waiting = result.waiting_share * (sum(timed.loop_seconds) + sum(timed.bare_seconds)) / sum(timed.loop_seconds)
    images = block * config.batch_size
    spread = f"{ratio:.3f} ± {error:.3f} | {lower:.3f} to {upper:.3f}"
    figures = f"{images / bare:,.0f} | {images / loop:,.0f} | {spread} | {BOUND} | {waiting:.1%}"
    return f"| {stage}, {recipe} | {figures} |"


def waiting_for(images: Path, recipe: str, steps: int, workers: int) -> str:
    """How long a recipe waits for a folder of images."""
    arguments = ["--config", recipe, "--data.path", str(images), "--train.workers", str(workers)]
    config, _ = read_recipe("train-stage1", Stage1Config, "stage1", arguments)
    train = replace(config.train, steps=steps, validate_every=0, preview_every=0, log_every=10, tracker="none")
    with tempfile.TemporaryDirectory() as run:
        result = train_stage1(replace(config, train=train), Path(run))
    return (
        f"{recipe} on {images}: {result.images_per_second:,.0f} images/s, "
        f"waiting for data {result.waiting_share:.1%} of the time ({workers} workers, {steps} steps)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=100, help="of the loop and of bare steps each, by turns")
    parser.add_argument("--block_seconds", type=float, default=0.25, help="that a block should take")
    parser.add_argument("--images", type=Path, help="a folder of images: state how long training waits for it")
    parser.add_argument("--recipe", default="cifar10_vqvae_short", help="that trains on --images")
    parser.add_argument("--steps", type=int, default=200, help="of training on --images")
    parser.add_argument("--workers", type=int, default=1, help="that load --images")
    arguments = parser.parse_args()
    if arguments.images is not None:
        print(waiting_for(arguments.images, arguments.recipe, arguments.steps, arguments.workers))
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| recipe | bare, images/s | loop, images/s | loop / bare | quartiles | bound | waiting for data |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for stage, recipe in RECIPES:
        print(compare(stage, recipe, arguments.blocks, arguments.block_seconds), flush=True)


if __name__ == "__main__":
    main()
