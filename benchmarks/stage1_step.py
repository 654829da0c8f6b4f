"""Training steps of stage one beside those of open implementations and of another build, by turns.

    git clone https://github.com/rosinality/vq-vae-2-pytorch peers/vq-vae-2-pytorch           # at ef5f67c
    git clone https://github.com/CompVis/taming-transformers peers/taming-transformers        # at 3ba01b2
    python -m benchmarks.stage1_step --peers peers --threads 1
    python -m benchmarks.stage1_step --before FOLDER --systems dvae vit_vqgan multiscale --threads 1
    python -m benchmarks.stage1_step --peers peers --systems vqgan --compile
    python -m benchmarks.stage1_step --peers peers --device cuda

A step of ours is `Trainer.step` itself: images from memory, forward pass, losses, backward pass, the norm of the
gradients, fused AdamW, codebook, and the reading of all figures. A step of a peer is what its own training script does
with a batch, with its own networks, losses and torch.optim.Adam. Networks and images are the same on both sides; the
table has the number of weights of each. With --before the other side is this file's step in a checkout of another
build, in a process of its own that waits for its turn.

`convolutions alone` is the time of our step's own convolutions and matrix products, forward and backward: each is timed
by itself, with the shapes, layouts and gradients that the step asks for. The other side's step over this is the ratio
at which nothing else would be left, with PyTorch's convolutions as they are. On a GPU, where an operation that is timed
by itself is mostly its start, these columns are left out.

taming-transformers needs neither pytorch_lightning nor omegaconf here: its parts are put together as its
`VQModel.training_step` does, and as pytorch_lightning 1.0.8 calls that: for each of its two optimisers once, with the
weights of the other one frozen. Its LPIPS, which would fetch weights, is left out on both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import medians
from common.memory import keep_freed_memory
from common.processes import process_state, use_device
from images.datasets import DataConfig
from pipelines.options import read_recipe
from stage1_vq.autoencoders import AUTOENCODERS
from stage1_vq.autoencoders.vqgan import VQGANConfig
from stage1_vq.autoencoders.vqvae2 import VQVAE2Config
from stage1_vq.losses.adversarial import AdversarialConfig
from stage1_vq.quantizers import NearestQuantizerConfig
from stage1_vq.train import Stage1Config, Stage1Task, companions
from training.config import TrainConfig
from training.signals import StopRequest
from training.task import Batch
from training.trainer import Trainer

SIDE = 128  # pixels of the systems that have a peer
RECIPES = {"dvae": "cifar10_dvae", "vit_vqgan": "cifar10_vit_vqgan", "multiscale": "cifar10_multiscale"}
SYSTEMS = ("vqvae2", "vqgan", "vqgan_adversarial", *RECIPES)
MEMORY_SYSTEM = "imagenet256_vqgan"

Step = Callable[[], object]


class InMemory:
    """A training.task.Dataset of images, n c H W of uint8."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        return {"images": self.images[torch.as_tensor(indices)]}


# ---- ours -----------------------------------------------------------------------------------------------------------


def config_of(system: str) -> Stage1Config:
    """The sizes and settings of the peers: no k-means, no revival, no bound of the gradient's norm."""
    train = TrainConfig(max_grad_norm=0.0, schedule="constant", workers=0, tracker="none")
    data = DataConfig(path="in memory", image_size=SIDE, channels=3)
    if system == "vqvae2":
        quantizer = NearestQuantizerConfig(codebook_size=512, dim=64, kmeans_iterations=0, revive_after=0)
        model = VQVAE2Config(residual_width=32, quantizer=quantizer)
        return Stage1Config(model=model, data=data, train=replace(train, batch_size=8))
    if system in ("vqgan", "vqgan_adversarial"):
        quantizer = NearestQuantizerConfig(
            codebook_size=1024,
            dim=256,
            codebook_update="gradient",
            init="uniform",
            kmeans_iterations=0,
            revive_after=0,
        )
        judged = AdversarialConfig(weight=0.8, start=0.0, warmup=0.0, ramp=0.0)
        return Stage1Config(
            model=VQGANConfig(width=32, quantizer=quantizer),
            data=data,
            train=replace(train, batch_size=4, betas=(0.5, 0.9)),
            adversarial=judged if system == "vqgan_adversarial" else AdversarialConfig(),
        )
    config, _ = read_recipe("train-stage1", Stage1Config, "stage1", ["--config", RECIPES[system]])
    return replace(config, train=replace(config.train, workers=0, tracker="none"))


def random_images(config: Stage1Config, count: int) -> Tensor:
    """n c H W of uint8: smooth ones, as codes of noise would be."""
    data, generator = config.data, torch.Generator().manual_seed(0)
    coarse = torch.rand(count, data.channels, data.height // 4, data.width // 4, generator=generator)
    smooth = F.interpolate(coarse, size=(data.height, data.width), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


def our_trainer(config: Stage1Config, run: Path) -> Trainer:
    data = InMemory(random_images(config, 4 * config.train.batch_size))
    size = config.data.height, config.data.width
    torch.manual_seed(0)
    model = AUTOENCODERS[config.model.kind](config.model, size)
    task = Stage1Task(model, data, 1000, *companions(config, size))
    trainer = Trainer(task, data, data, config.train, run)
    trainer.open_run(asdict(config.train))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.start()
    return trainer


class OurStep:
    """With what a step costs that many steps share: a log line's figures are read once every `train.log_every`."""

    def __init__(self, system: str, run: Path, *, compiled: bool = False) -> None:
        config = config_of(system)
        self.trainer = our_trainer(replace(config, train=replace(config.train, compile=compiled)), run)
        self.stop = StopRequest()

    def __call__(self) -> float:
        loss = self.trainer.step(self.stop).loss
        if self.trainer.due(self.trainer.config.log_every):
            self.trainer.metrics_since_last_line()
        return loss

    def weights(self) -> int:
        """Of the networks that learn, and of what a codebook by moving average holds: the vectors alone."""
        task = self.trainer.task
        own = sum(weight.numel() for module in (task.model, *modules(task)) for weight in module.parameters())
        return own + sum(buffer.numel() for name, buffer in task.model.named_buffers() if name.endswith("codebook"))


def modules(task: Any) -> list[nn.Module]:
    return [companion.module for companion in task.companions.values()]


# ---- the peers ------------------------------------------------------------------------------------------------------


class PeerVQVAE2:
    """vq-vae-2-pytorch's `train_vqvae.train`."""

    def __init__(self, peers: Path, images: Tensor) -> None:
        sys.path.insert(0, str(peers / "vq-vae-2-pytorch"))
        import vqvae

        torch.manual_seed(0)
        self.images, self.model = images, vqvae.VQVAE().to(images.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-4)
        self.criterion = nn.MSELoss()

    def __call__(self) -> float:
        self.model.zero_grad()
        out, latent_loss = self.model(self.images)
        recon_loss = self.criterion(out, self.images)
        latent_loss = latent_loss.mean()
        (recon_loss + 0.25 * latent_loss).backward()
        self.optimizer.step()
        return recon_loss.item() + latent_loss.item()

    def weights(self) -> int:
        codebooks = [buffer.numel() for name, buffer in self.model.named_buffers() if name.endswith("embed")]
        return sum(weight.numel() for weight in self.model.parameters()) + sum(codebooks)


class PeerVQGAN:
    """taming-transformers' `VQModel`, and its loss where there is a discriminator."""

    def __init__(self, peers: Path, images: Tensor, *, adversarial: bool) -> None:
        sys.path.insert(0, str(peers / "taming-transformers"))
        from taming.modules.diffusionmodules.model import Decoder, Encoder
        from taming.modules.losses import vqperceptual
        from taming.modules.vqvae.quantize import VectorQuantizer2

        size = {"ch": 32, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "z_channels": 256, "dropout": 0.0}
        size |= {"in_channels": 3, "out_ch": 3, "resolution": SIDE, "attn_resolutions": [SIDE // 16]}
        torch.manual_seed(0)
        self.images = images
        with contextlib.redirect_stdout(io.StringIO()):
            parts = {
                "encoder": Encoder(**size, double_z=False),
                "decoder": Decoder(**size),
                "quantize": VectorQuantizer2(1024, 256, beta=0.25),
                "quant_conv": nn.Conv2d(256, 256, 1),
                "post_quant_conv": nn.Conv2d(256, 256, 1),
            }
            self.model: Any = nn.ModuleDict(parts)
            self.loss: Any = None
            if adversarial:
                vqperceptual.LPIPS = nn.Identity  # would fetch weights
                self.loss = vqperceptual.VQLPIPSWithDiscriminator(disc_start=0, disc_weight=0.8, perceptual_weight=0.0)
                self.loss.to(images.device)
        self.model.to(images.device)
        learning = [self.model, *([self.loss.discriminator] if adversarial else [])]
        self.weights_of = [list(network.parameters()) for network in learning]
        self.optimizers = [torch.optim.Adam(weights, lr=3e-4, betas=(0.5, 0.9)) for weights in self.weights_of]

    def forward(self) -> tuple[Tensor, Tensor]:
        model = self.model
        quantised, loss, _ = model["quantize"](model["quant_conv"](model["encoder"](self.images)))
        return model["decoder"](model["post_quant_conv"](quantised)), loss

    def __call__(self) -> float:
        total = 0.0
        for number, optimizer in enumerate(self.optimizers):
            for other, weights in enumerate(self.weights_of):
                for weight in weights:
                    weight.requires_grad_(other == number)
            reconstruction, codebook_loss = self.forward()
            if self.loss is None:
                loss = torch.abs(self.images - reconstruction).mean() + codebook_loss.mean()
            else:
                last = self.model["decoder"].conv_out.weight
                loss, log = self.loss(codebook_loss, self.images, reconstruction, number, 1, last_layer=last)
                total += sum(value.item() for value in log.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total

    def weights(self) -> int:
        return sum(weight.numel() for weights in self.weights_of for weight in weights)


def peer_of(system: str, peers: Path) -> Any:
    config = config_of(system)
    images = random_images(config, config.train.batch_size).to(process_state().device).float() / 127.5 - 1
    if system == "vqvae2":
        return PeerVQVAE2(peers, images)
    return PeerVQGAN(peers, images, adversarial=system == "vqgan_adversarial")


# ---- another build --------------------------------------------------------------------------------------------------


class OtherBuild:
    """This file's step of a system, in a process with the modules of another checkout."""

    def __init__(self, tree: Path, system: str, threads: int, device: str) -> None:
        code = f"import runpy, sys; sys.argv[0] = {__file__!r}; runpy.run_path({__file__!r}, run_name='__main__')"
        command = [sys.executable, "-c", code, "--worker", system, "--threads", str(threads), "--device", device]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, cwd=tree, stdin=pipe, stdout=pipe, text=True)
        self.number = int(self.answer())

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the other build's process has ended")
        return line

    def __call__(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def weights(self) -> int:
        return self.number

    def close(self) -> None:
        self.process.communicate()


def work(system: str) -> None:
    """What such a process does: a step for each line that it reads."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as run:
        step = OurStep(system, Path(run))
        print(step.weights(), flush=True)
        for _ in sys.stdin:
            loss = step()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            print(loss, flush=True)


# ---- convolutions and products alone --------------------------------------------------------------------------------

aten = torch.ops.aten
HEAVY = (
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
)


class Recorder(TorchDispatchMode):
    """The HEAVY operations inside, forward and backward: how often each comes, by all that decides its time."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[int, Step]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HEAVY:
            described = f"{func} {[shape_of(arg) for arg in args]}"
            count, again = self.found.get(described, (0, None))
            self.found[described] = count + 1, again or partial(func, *[alike(arg) for arg in args])
        return func(*args, **(kwargs or {}))


def shape_of(argument: Any) -> Any:
    return (argument.shape, argument.stride()) if isinstance(argument, Tensor) else argument


def alike(argument: Any) -> Any:
    """Another tensor of the same shape and layout; anything else itself."""
    if not isinstance(argument, Tensor):
        return argument
    return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype).normal_()


def seconds_of_heavy(step: Step, repeats: int) -> float:
    """Of one step's convolutions and matrix products, each timed by itself."""
    with Recorder() as recorder:
        step()
    times = medians({name: work for name, (_, work) in recorder.found.items()}, repeats)
    return sum(count * times[name] for name, (count, _) in recorder.found.items())


# ---- the table ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sides(system: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as run:
        found = {"ours": OurStep(system, Path(run), compiled=options.compile)}
        if options.before is not None:
            other = OtherBuild(options.before, system, options.threads, options.device)
            yield {**found, "theirs": other}
            other.close()
        else:
            yield {**found, "theirs": peer_of(system, options.peers)}


def row(system: str, options: argparse.Namespace) -> str:
    with sides(system, options) as steps:
        for step in steps.values():
            for _ in range(2):
                step()
        times = medians(steps, options.repeats)
        numbers = " / ".join(f"{step.weights():,}" for step in steps.values())
        alone = seconds_of_heavy(steps["ours"], max(3, options.repeats // 2)) if options.convolutions else None
    ours, theirs = times["ours"], times["theirs"]
    cells = [system, numbers, f"{1000 * ours:.0f}", f"{1000 * theirs:.0f}", f"{theirs / ours:.2f}"]
    if alone is not None:
        cells += [f"{1000 * alone:.0f}", f"{alone / ours:.0%}", f"{theirs / alone:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="a folder with checkouts of the peers, each by its name on GitHub")
    parser.add_argument("--before", type=Path, help="a checkout of another build, which takes the peers' place")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: those that the other side has")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of both sides")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="ours with train.compile; the other side is as it is")
    parser.add_argument("--convolutions", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = use_device(options.device).device
    options.convolutions &= device.type == "cpu" and not options.compile  # a compiled step hides them
    if options.worker is not None:
        work(options.worker)
        return
    if (options.peers is None) == (options.before is None):
        parser.error("give one of --peers and --before")
    systems = options.systems or (SYSTEMS if options.before is not None else SYSTEMS[:3])
    other = "before" if options.before is not None else "peer"
    where = f"{options.threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{where}, torch {torch.__version__}, medians of {options.repeats}\n")
    heads = ["step of", f"weights, ours / {other}", "ours, ms", f"{other}, ms", f"{other} / ours"]
    if options.convolutions:
        heads += ["convolutions alone, ms", "share of our step", f"{other} / convolutions alone"]
    print(f"| {' | '.join(heads)} |\n| --- | {' | '.join(['---:'] * (len(heads) - 1))} |")
    for system in systems:
        print(row(system, options), flush=True)


if __name__ == "__main__":
    main()
