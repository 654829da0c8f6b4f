"""Training of a VAE and of an IWAE: ours and pythae's trainer, of the same network, images and loss, by turns.

    pip install --no-deps pythae pydantic
    OMP_NUM_THREADS=1 python -m benchmarks.vae_training_speed --data mnist

A VAE of pythae's default layers (784-512-(16,16), 16-512-784) learns from grey digits in [0, 1] by binary cross
entropy, in steps of 128 images by Adam. Ours is trained by `fit`, with the config of `train-vae`, without workers;
pythae's by `BaseTrainer` with its own loader. Both stand in one process and take turns: after every turn of our steps
comes one of as many steps of theirs, over the same images. A turn is all that happens from one step to the next:
sampling, fetching, the step, the checks, the progress bar; left out are validation, previews and checkpoints, and the
first turn of either. The ratio is that of the medians over the turns, once in wall-clock time and once in CPU time of
the process, which other work on the machine disturbs less. The losses are means over the last turn.

Memory is the peak of what a process of each holds during some steps, above what it held before the first of them.
With --precision bf16 ours computes products in bfloat16, which pythae's trainer has on no CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.memory import keep_freed_memory
from images.datasets import DataConfig, image_datasets, to_float
from stage1_vae.binarise import NumberedImages
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives import ELBOConfig, build_objective
from stage1_vae.objectives.base import TrainingFacts
from stage1_vae.objectives.importance import ImportanceConfig
from stage1_vae.task import VAETask
from stage1_vae.train import Stage1VAEConfig
from stage1_vae.vae import VAE, VAEConfig
from training.config import TrainConfig
from training.loop import fit
from training.task import Batch, StepOutput

LATENTS, HIDDEN, BATCH, LEARNING_RATE = 16, 512, 128, 1e-3
MEMORY_STEPS = 3


def config_of(path: str, draws: int, steps: int, precision: Any) -> Stage1VAEConfig:
    """draws: K of the IWAE; 1 is the VAE."""
    train = TrainConfig(
        steps=steps,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        max_grad_norm=0,
        precision=precision,
        validate_every=0,
        preview_every=0,
        save_every=10**9,
        tracker="none",
        workers=0,
    )
    network = DenseConfig(hidden=(HIDDEN,))
    return Stage1VAEConfig(
        model=VAEConfig(latents=LATENTS, encoder=network, decoder=network),
        data=DataConfig(path=path, image_size=28, channels=1, validation_count=0),
        objective=ELBOConfig() if draws == 1 else ImportanceConfig(draws=draws),
        train=train,
    )


class Ours:
    """Our side: the task, and the images that it is trained on."""

    def __init__(self, config: Stage1VAEConfig) -> None:
        images, held_out = image_datasets(config.data, config.train.seed)
        self.config = config
        self.images, self.held_out = NumberedImages(images, training=True), NumberedImages(held_out, training=False)
        torch.manual_seed(0)
        model = VAE(config.model, (28, 28))
        facts = TrainingFacts(len(self.images), config.train.steps, model.shape, tuple(model.generator_parameters()))
        self.task = VAETask(
            model, build_objective(config.objective, facts), self.held_out, batch_size=config.train.batch_size
        )

    def train(self, task: Any) -> None:
        with tempfile.TemporaryDirectory() as run:
            fit(task, self.images, self.held_out, self.config.train, Path(run), asdict(self.config))

    def pixels(self, count: int) -> Tensor:
        """count 1 28 28 in [0, 1]."""
        batch = self.images.fetch(range(count), range(count))
        return (to_float(batch["images"]) + 1) / 2


def peer_trainer(images: Tensor, draws: int, run: Path) -> Any:
    """pythae's trainer, ready for its first step; each call of its `train_step` sees all images once."""
    import pythae.models as models
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    settings = {"input_dim": (1, 28, 28), "latent_dim": LATENTS, "reconstruction_loss": "bce"}
    if draws == 1:
        model = models.VAE(models.VAEConfig(**settings))
    else:
        model = models.IWAE(models.IWAEConfig(**settings, number_samples=draws))
    config = BaseTrainerConfig(
        output_dir=str(run),
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=BATCH,
        no_cuda=True,
    )
    trainer = BaseTrainer(model, BaseDataset(images, torch.zeros(len(images))), training_config=config)
    trainer.prepare_training()
    return trainer


class Wrapped:
    """A task, in all that its heirs leave as it is."""

    def __init__(self, task: VAETask) -> None:
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


class ByTurns(Wrapped):
    """A task in whose run one turn of the peer follows every `steps` steps of the loop; times both."""

    def __init__(self, task: VAETask, peer: Any, steps: int, screen: Any) -> None:
        super().__init__(task)
        self.peer, self.steps, self.screen = peer, steps, screen
        self.done = 0
        self.recent: list[Tensor] = []
        self.losses: dict[str, float] = {}  # means over the steps of the last turn
        self.seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "pythae": []}  # wall clock, CPU

    def start(self, model: torch.nn.Module, batches: Sequence[Batch]) -> None:
        self.task.start(model, batches)
        self.begin = clocks()

    def step(self, model: torch.nn.Module, batch: Batch, step: int) -> StepOutput:
        output = self.task.step(model, batch, step)
        self.recent.append(output.loss.detach())
        return output

    def after_step(self, step: int) -> None:
        self.task.after_step(step)
        self.done += 1
        if self.done % self.steps == 0:
            self.count("ours")
            self.losses["ours"], self.recent = float(torch.stack(self.recent).mean()), []
            self.losses["pythae"] = self.peer.train_step(self.done // self.steps)
            self.count("pythae")
            wall = {name: values[-1][0] for name, values in self.seconds.items()}
            print(f"turn {self.done // self.steps}: {wall['ours']:.1f} and {wall['pythae']:.1f} s", file=self.screen)

    def count(self, name: str) -> None:
        now = clocks()
        self.seconds[name].append((now[0] - self.begin[0], now[1] - self.begin[1]))
        self.begin = clocks()


def name_of(draws: int) -> str:
    return "VAE" if draws == 1 else f"IWAE, K={draws}"


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def speed(path: str, draws: int, steps: int, turns: int, precision: Any) -> list[str]:
    """Rows of the table."""
    ours = Ours(config_of(path, draws, steps * (turns + 1), precision))
    with tempfile.TemporaryDirectory() as run, silent() as screen:
        peer = peer_trainer(ours.pixels(min(steps * BATCH, len(ours.images))), draws, Path(run))
        peer.callback_handler.on_epoch_begin(
            training_config=peer.training_config, epoch=1, train_loader=peer.train_loader, eval_loader=None
        )
        timed = ByTurns(ours.task, peer, len(peer.train_loader), screen)
        ours.train(timed)
    rows = []
    for clock, place in (("wall clock", 0), ("CPU", 1)):
        per_turn = {who: [turn[place] for turn in values[1:]] for who, values in timed.seconds.items()}
        own, theirs = (statistics.median(per_turn[who]) for who in ("ours", "pythae"))
        images = len(peer.train_loader.dataset)
        ratios = [b / a for a, b in zip(per_turn["ours"], per_turn["pythae"], strict=True)]
        rows.append(
            f"| {name_of(draws)}, {clock} | {images / own:,.0f} | {images / theirs:,.0f} | {theirs / own:.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} | {timed.losses['ours']:.1f} | {timed.losses['pythae']:.1f} |"
        )
    return rows


def peak_memory(path: str, draws: int, precision: str, who: str) -> int:
    """Bytes, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.vae_training_speed", "--data", path, "--memory_of", who]
    command += ["--draws", str(draws), "--precision", precision]
    # Every large tensor is a mapping of its own, which ends with it: what malloc keeps for later is not counted.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def own_peak_memory(path: str, draws: int, precision: Any, who: str) -> int:
    """Of this process, during MEMORY_STEPS steps of one side; Linux only."""
    ours = Ours(config_of(path, draws, MEMORY_STEPS, precision))
    with tempfile.TemporaryDirectory() as run, silent():
        if who == "ours":
            task = FromHere(ours.task)
            ours.train(task)
            return task.peak
        peer = peer_trainer(ours.pixels(MEMORY_STEPS * BATCH), draws, Path(run))
        peer.callback_handler.on_epoch_begin(
            training_config=peer.training_config, epoch=1, train_loader=peer.train_loader, eval_loader=None
        )
        before = fresh_peak()
        peer.train_step(1)
        return resident("VmHWM") - before


class FromHere(Wrapped):
    """A task that notes the peak of memory after each of its steps, above what was held before the first."""

    peak = 0

    def start(self, model: torch.nn.Module, batches: Sequence[Batch]) -> None:
        self.task.start(model, batches)
        self.before = fresh_peak()

    def after_step(self, step: int) -> None:
        self.peak = resident("VmHWM") - self.before
        self.task.after_step(step)


def fresh_peak() -> int:
    """Forgets the peak of memory so far; what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(name: str) -> int:
    """Bytes that the kernel tells of this process by that name."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def silent() -> Any:
    """Both trainers speak; gives a place that is still heard."""
    screen = sys.stderr
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield screen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="a set of 28x28 images")
    parser.add_argument("--draws", type=int, nargs="*", default=[1, 50], help="of each image's latents; 1: a VAE")
    parser.add_argument("--steps", type=int, nargs="*", default=[468, 20], help="of a turn, for each of --draws")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--precision", default="no", help="train.precision of ours; theirs has float32 only on a CPU")
    parser.add_argument("--memory_of", choices=("ours", "pythae"), help="print the peak of memory of one side alone")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.memory_of:
        print(own_peak_memory(args.data, args.draws[0], args.precision, args.memory_of))
        return
    keep_freed_memory()  # as commands do
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, precision {args.precision}\n")
    print("| | ours, images/s | pythae, images/s | ratio | of single turns | our last loss, nats | pythae's |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: |")
    for draws, steps in zip(args.draws, args.steps, strict=True):
        for row in speed(args.data, draws, steps, args.turns, args.precision):
            print(row, flush=True)
    print("\n| | ours, MB | pythae, MB | share |\n| --- | ---: | ---: | ---: |")
    for draws in args.draws:
        own, theirs = (peak_memory(args.data, draws, args.precision, who) for who in ("ours", "pythae"))
        print(f"| {name_of(draws)} | {own / 1e6:.0f} | {theirs / 1e6:.0f} | {own / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
