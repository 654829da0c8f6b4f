"""Do more processes train what one does, of each family of models, with weights whole (DDP) and in shares (FSDP2)?

    python -m benchmarks.processes [--only vqgan --only var] [--steps 6]

Trains a small model of each family on the CPU (gloo) with a batch of 12 and prints the largest difference of any
weight, average and buffer after the last step, as a part of the largest one:

    2 parts     one process with the batch in two micro-batches, of one with it in one: what another order of sums does
    DDP         two processes with half the batch each, of one process
    FSDP2       two processes with shares of the weights, of two with DDP
    DDP -> n    half the steps on two processes, the others on n, of one process
    FSDP2 -> n  likewise; on three with shares again, on one with the weights whole
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from images.datasets import DataConfig
from images.encoding import EncodeConfig, EncodeDataConfig
from stage1_vae.decoders import PixelCNNDecoderConfig
from stage1_vae.encode import encode
from stage1_vae.hierarchies.deep_latent_gaussian import DeepLatentGaussianConfig
from stage1_vae.hierarchies.markov import MarkovConfig
from stage1_vae.hierarchies.nvae import NVAEConfig
from stage1_vae.hierarchies.vdvae import VDVAEConfig
from stage1_vae.labels.m1m2 import M1M2Config
from stage1_vae.labels.m2 import M2Config
from stage1_vae.likelihoods import BernoulliConfig
from stage1_vae.modalities.multimodal import MultimodalConfig
from stage1_vae.networks.convolutional import ConvolutionalConfig
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives import ELBOConfig, SemiSupervisedConfig, SubsampledConfig
from stage1_vae.sequences.data import SequenceDataConfig
from stage1_vae.sequences.decoders import RecurrentConfig
from stage1_vae.sequences.sequence_vae import SequenceVAEConfig
from stage1_vae.sequences.train import Stage1SequenceConfig, train_sequence
from stage1_vae.tables.counts import CountsConfig
from stage1_vae.tables.data import TableConfig
from stage1_vae.tables.miwae import MIWAEConfig
from stage1_vae.tables.train import Stage1TableConfig, train_table
from stage1_vae.train import Stage1VAEConfig, train_vae
from stage1_vae.vae import VAE, VAEConfig
from stage1_vq.autoencoders import DVAEConfig, ViTVQGANConfig, VQGANConfig, VQVAE2Config, VQVAEConfig
from stage1_vq.losses.adversarial import AdversarialConfig
from stage1_vq.losses.discriminators import PatchGANConfig
from stage1_vq.quantizers import GumbelQuantizerConfig, MultiscaleQuantizerConfig, NearestQuantizerConfig
from stage1_vq.train import Stage1Config, train_stage1
from stage2_prior.latents import (
    GaussianMixtureConfig,
    LatentPriorModelConfig,
    MaskedAutoregressiveFlowConfig,
    SecondVAEConfig,
)
from stage2_prior.priors import (
    PRIORS,
    DiffusionConfig,
    HierarchicalConfig,
    InfinityConfig,
    LlamaGenConfig,
    MaskGITConfig,
    MinGPTConfig,
    PixelCNNConfig,
    PixelSNAILConfig,
    PriorConfig,
    RQTransformerConfig,
    TransformerConfig,
    VARConfig,
)
from stage2_prior.train import Stage2Task
from stage2_prior.train_latents import Stage2LatentConfig, train_latents
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.loop import fit
from training.task import Batch

BATCH = 12
SIDE = 16  # pixels

NEAREST = NearestQuantizerConfig(codebook_size=16, dim=6, revive_after=2, kmeans_iterations=3)
GRADIENT = NearestQuantizerConfig(
    codebook_size=16, dim=16, lookup_dim=4, l2_normalise=True, codebook_update="gradient", revive_after=2
)
GUMBEL = GumbelQuantizerConfig(codebook_size=16, dim=64, embedding_dim=16, temperature_steps=200, kl_weight=0.005)
SMALL = {"width": 8, "residual_width": 4, "residual_blocks": 1, "channels": 1}
GAN = VQGANConfig(
    channels=1, width=8, multipliers=(1, 2, 2), residual_blocks=1, attention_levels=(2,), norm_groups=4, z_channels=6,
    quantizer=NEAREST,
)  # fmt: skip
ADVERSARIAL = AdversarialConfig(
    weight=0.5, start=0.0, warmup=0.0, ramp=0.0, discriminator=PatchGANConfig(width=8, layers=1)
)

AUTOENCODERS: dict[str, tuple[Any, AdversarialConfig]] = {
    "vqvae": (VQVAEConfig(**SMALL, quantizer=NEAREST), AdversarialConfig()),
    "vqvae, multiscale": (
        VQVAEConfig(**SMALL, quantizer=MultiscaleQuantizerConfig(scales=(1, 2, 4), codebook_size=16, dim=6, phis=2)),
        AdversarialConfig(),
    ),
    "vqvae2": (VQVAE2Config(**SMALL, quantizer=NEAREST), AdversarialConfig()),
    "vqgan": (GAN, AdversarialConfig()),
    "vqgan, adversary": (GAN, ADVERSARIAL),
    "dvae": (DVAEConfig(channels=1, width=16, groups=3, blocks=1, quantizer=GUMBEL), AdversarialConfig()),
    "vit_vqgan": (
        ViTVQGANConfig(channels=1, patch=4, width=16, blocks=2, heads=2, quantizer=GRADIENT), AdversarialConfig()
    ),
}  # fmt: skip

GRID = CodeSpec((Grid("codes", 3, 5, 11),), 12, 20, 3)
LEVELS = CodeSpec((Grid("level0", 2, 2, 7), Grid("level1", 2, 4, 11), Grid("level2", 4, 4, 9)), 16, 16, 3)
DEPTHS = CodeSpec(tuple(Grid(f"depth{i}", 2, 3, k) for i, k in enumerate((11, 7, 9))), 8, 12, 3)
SCALES = CodeSpec(tuple(Grid(f"scale{i}", i, 2 * i - 1, 11) for i in (1, 2, 3)), 12, 20, 3)
BITS = CodeSpec(tuple(Grid(f"scale{i}_bits{n}", i, 2 * i - 1, 4) for i in (1, 2, 3) for n in (0, 1)), 12, 20, 3)
NARROW = PixelCNNConfig(layers=3, width=16, first_kernel_size=3, kernel_size=3, output_width=24)
PRIORS_OF: dict[str, tuple[PriorConfig, CodeSpec]] = {
    "transformer": (TransformerConfig(layers=2, width=32, heads=4), GRID),
    "pixelcnn": (PixelCNNConfig(layers=4, width=16, first_kernel_size=5, kernel_size=3, output_width=24), GRID),
    "pixelsnail": (
        PixelSNAILConfig(blocks=2, residual_blocks=2, width=16, residual_width=12, heads=4, output_blocks=1, dropout=0),
        GRID,
    ),
    "mingpt": (MinGPTConfig(layers=2, width=24, heads=3), GRID),
    "llamagen": (LlamaGenConfig(layers=2, width=24, heads=3, hidden_width=32), GRID),
    "rq_transformer": (RQTransformerConfig(layers=2, depth_layers=1, width=32, heads=4), DEPTHS),
    "var": (VARConfig(layers=2, width=32, heads=2), SCALES),
    "infinity": (InfinityConfig(layers=2, width=32, heads=2), BITS),
    "hierarchical": (
        HierarchicalConfig(
            top=NARROW,
            middle=TransformerConfig(layers=1, width=16, heads=2),
            bottom=TransformerConfig(layers=1, width=24, heads=2),
        ),
        LEVELS,
    ),
    "maskgit": (MaskGITConfig(layers=2, width=32, heads=4), GRID),
    "diffusion": (DiffusionConfig(layers=2, width=32, heads=4), GRID),
}

DENSE = DenseConfig(hidden=(16, 16))
CONVOLUTIONAL = ConvolutionalConfig(widths=(8, 16), residual_blocks=1)
LADDER = {"latents": (4, 3, 2), "hidden": (12, 8, 6)}
CELLS = {"blocks": 1, "preprocess_cells": 1, "postprocess_cells": 1, "encoder_cells": 1, "decoder_cells": 1}
VAES: dict[str, dict[str, Any]] = {
    "vae": {"model": VAEConfig(latents=4, encoder=DENSE, decoder=DENSE)},
    "vae, convolutional": {"model": VAEConfig(latents=4, encoder=CONVOLUTIONAL, decoder=CONVOLUTIONAL)},
    "vae, pixelcnn": {
        "model": VAEConfig(
            latents=4,
            encoder=DENSE,
            decoder=PixelCNNDecoderConfig(layers=2, width=4, output_width=4, features=2, network=DENSE),
        )
    },
    "markov": {"model": MarkovConfig(**LADDER)},
    "ladder": {"model": MarkovConfig(**LADDER, inference="top_down", batch_norm=True, variance="softplus")},
    "deep_latent_gaussian": {"model": DeepLatentGaussianConfig(**LADDER, activation="tanh")},
    "vdvae": {
        "model": VDVAEConfig(
            channels=1, width=8, latents=2, encoder_layers="16x1,16d2,8x1,8d8,1x1", decoder_layers="1x1,8m1,8x1,16m8",
            likelihood=BernoulliConfig(),
        )
    },
    "nvae": {
        "model": NVAEConfig(
            channels=1, latents=1, scales=2, groups=2, **CELLS, encoder_width=4, decoder_width=4,
            likelihood=BernoulliConfig(),
        )
    },
    "m2": {
        "model": M2Config(classes=2, classifier=DENSE, encoder=DENSE, decoder=DENSE, latents=3),
        "objective": SemiSupervisedConfig(),
    },
    "multimodal": {"model": MultimodalConfig(classes=2, channels=1, latents=4), "objective": SubsampledConfig()},
}  # fmt: skip

M1 = VAEConfig(latents=4, encoder=DENSE, decoder=DENSE)  # whose latents others model
PRIORS_OF_LATENTS: dict[str, LatentPriorModelConfig] = {
    "gaussian_mixture": GaussianMixtureConfig(components=3, iterations=5),
    "masked_autoregressive_flow": MaskedAutoregressiveFlowConfig(layers=2, hidden=(8,)),
    "flow, batch norm": MaskedAutoregressiveFlowConfig(layers=2, hidden=(8,), batch_norm=True),
    "second_vae": SecondVAEConfig(hidden=(8,), draws=4),
}
TABLES: dict[str, Any] = {
    "miwae": MIWAEConfig(latents=2, hidden=(8,)),
    "counts": CountsConfig(latents=2, hidden=8, dropout=0, norm="layer"),
    "counts, batch norm": CountsConfig(latents=2, hidden=8, dropout=0),
}
SEQUENCES: dict[str, SequenceVAEConfig] = {
    "sequences": SequenceVAEConfig(latents=3, encoder_hidden=8, decoder=RecurrentConfig(hidden=8)),
}

FAMILIES = [*AUTOENCODERS, *PRIORS_OF, *PRIORS_OF_LATENTS, *VAES, "m1m2", *TABLES, *SEQUENCES]


class RandomCodes:
    """Codes of a few images, in which each code follows from the one before it more often than not."""

    def __init__(self, spec: CodeSpec, count: int):
        chance = np.random.default_rng(count)
        self.codes = [
            torch.from_numpy(chance.integers(0, 2, (count, grid.height, grid.width)).cumsum(-1) % grid.vocabulary)
            for grid in spec.grids
        ]
        self.labels = torch.arange(count) % 3

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        chosen = list(indices)
        return {"codes": tuple(codes[chosen] for codes in self.codes), "labels": self.labels[chosen]}


def train(family: str, folder: Path, run: Path, changes: dict[str, Any]) -> None:
    """Trains the model of a family in this process, alone or as one of several."""
    defaults: dict[str, Any] = {
        "steps": 6, "batch_size": BATCH, "learning_rate": 1e-3, "schedule": "constant", "ema_decay": 0.9,
        "validate_every": 0, "preview_every": 0, "save_every": 1000, "log_every": 3, "tracker": "none", "workers": 0,
    }  # fmt: skip
    config = TrainConfig(**{**defaults, **changes})
    data = DataConfig(path=str(folder / "images.npz"), image_size=SIDE, channels=1, validation_count=BATCH)
    if family in AUTOENCODERS:
        model, adversarial = AUTOENCODERS[family]
        train_stage1(Stage1Config(model=model, data=data, train=config, adversarial=adversarial), run)
    elif family in VAES:
        train_vae(Stage1VAEConfig(data=data, train=config, binarised="once", **VAES[family]), run)
    elif family == "m1m2":
        m1m2 = M1M2Config(m1=str(folder / "m1"), classes=2, latents=3, classifier=DENSE, encoder=DENSE, decoder=DENSE)
        objective = SemiSupervisedConfig()
        train_vae(Stage1VAEConfig(data=data, train=config, model=m1m2, objective=objective), run)
    elif family in PRIORS_OF_LATENTS:
        train_latents(Stage2LatentConfig(model=PRIORS_OF_LATENTS[family], train=config), folder / "latents", run)
    elif family in TABLES:
        table = TableConfig(path=str(folder / "table.csv"))
        train_table(Stage1TableConfig(model=TABLES[family], table=table, train=config, objective=ELBOConfig()), run)
    elif family in SEQUENCES:
        lines = SequenceDataConfig(path=str(folder / "lines.txt"), validation_count=BATCH)
        train_sequence(Stage1SequenceConfig(model=SEQUENCES[family], sequences=lines, train=config), run)
    else:
        prior, spec = PRIORS_OF[family]
        torch.manual_seed(0)
        task = Stage2Task(PRIORS[prior.kind](prior, spec, 3), label_dropout=0.3)
        fit(task, RandomCodes(spec, 60), RandomCodes(spec, 13), config, run, {"train": asdict(config)})


def images(folder: Path) -> None:
    """Images of two classes, a bright half left or right, under blocks of grey values that have nothing to do with each
    other: latents lie far apart, so that rounding decides between no two codes."""
    chance = np.random.default_rng(0)
    count, labels = 60 + BATCH, np.arange(60 + BATCH) % 2
    blocks = chance.integers(0, 120, (count, SIDE // 2, SIDE // 2)).repeat(2, 1).repeat(2, 2)
    pixels = blocks + chance.integers(0, 60, (count, SIDE, SIDE))
    for i, label in enumerate(labels):
        pixels[i, :, SIDE // 2 * label : SIDE // 2 * (label + 1)] += 75
    np.savez(folder / "images.npz", images=pixels[..., None].astype(np.uint8), labels=labels)


def other_data(folder: Path) -> None:
    """A VAE and the latents of these images, a table of counts, and lines of text."""
    torch.manual_seed(0)
    VAE(M1, (SIDE, SIDE)).save_pretrained(folder / "m1")
    encode(
        EncodeConfig(
            model=str(folder / "m1"),
            out=str(folder / "latents"),
            device="cpu",
            data=EncodeDataConfig(path=str(folder / "images.npz"), validation_share=0.2),
            workers=0,
        )
    )
    chance = np.random.default_rng(1)
    counts = 1 + chance.poisson(chance.gamma(2, 3, (60 + BATCH, 1)) * chance.gamma(2, 1, (1, 5)))
    np.savetxt(folder / "table.csv", counts, "%d", ",", header="a,b,c,d,e", comments="")
    words = [" ".join(chance.choice(["zellige", "tile", "of", "clay"], 4)) for _ in range(60 + BATCH)]
    (folder / "lines.txt").write_text("\n".join(words))


# ---- processes ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]


class Job(NamedTuple):
    """A training that some processes do together."""

    train: Callable[[Path, dict[str, Any]], Any]  # given the next two
    run: Path
    changes: dict[str, Any]  # of its TrainConfig
    shares: bool = False  # as `accelerate launch --use_fsdp --fsdp_version 2` would ask for


def one_of(rank: int, count: int, port: int, jobs: Sequence[Job]) -> None:
    """One of `count` processes, as torchrun or accelerate launch would start it. What is refused with shares
    leaves the sentence in the place of its run."""
    if count > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", FSDP_VERSION="2",
        )  # fmt: skip
    torch.set_num_threads(1)
    for job in jobs:
        os.environ["ACCELERATE_USE_FSDP"] = str(job.shares)
        try:
            job.train(job.run, job.changes)
        except UserError as error:
            if not job.shares:
                raise
            if rank == 0:
                shutil.rmtree(job.run, ignore_errors=True)
                job.run.write_text(str(error))
    if dist.is_initialized():
        dist.destroy_process_group()


PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint"]


def together(count: int, jobs: Sequence[Job]) -> None:
    """Does `jobs`, one after the other, in `count` processes that are forked from one which has imported torch. Raises
    RuntimeError if one of the processes fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.processes", *PRELOADED])
    port = free_port()
    processes = [context.Process(target=one_of, args=(rank, count, port, jobs)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if codes := [process.exitcode for process in processes if process.exitcode]:
        raise RuntimeError(f"{len(codes)} of {count} processes ended with exit code {codes[0]}")


def last(run: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and buffers after the last step of a run."""
    checkpoints = Checkpoints(run / "checkpoints", 3)
    step = checkpoints.steps()[-1]
    parts = {name: checkpoints.tensors(step, name) for name in ("model", "ema")}
    return {f"{part}/{name}": tensor.float() for part, found in parts.items() for name, tensor in found.items()}


def difference(run: Path, other: Path) -> float:
    """Largest difference of a tensor's entries, as a part of the largest entry of any weight."""
    ours, theirs = last(run), last(other)
    assert ours.keys() == theirs.keys()
    largest = max(
        float(tensor.abs().max()) for name, tensor in theirs.items() if tensor.numel() and "usage" not in name
    )
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours if ours[name].numel()) / largest


def train_all(families: Sequence[str], folder: Path, steps: int) -> None:
    """All runs of the table, in one start of two, one and three processes each: starting takes longer than training."""
    whole, half = {"steps": steps}, {"steps": steps // 2}

    def jobs(name: str, changes: dict[str, Any], shares: bool = False, of: Sequence[str] = families) -> list[Job]:
        return [Job(partial(train, family, folder), folder / family / name, changes, shares) for family in of]

    for family in families:
        (folder / family).mkdir()
    two = [*jobs("two", whole), *jobs("DDP 1", half)]
    together(2, [*two, *jobs("shares", whole, shares=True), *jobs("FSDP2 1", half, shares=True)])
    spread = [family for family in families if (folder / family / "FSDP2 1").is_dir()]
    for kind, of in (("DDP", families), ("FSDP2", spread)):
        for family in of:
            shutil.copytree(folder / family / f"{kind} 1", folder / family / f"{kind} 3")
    one = [*jobs("one", whole), *jobs("parts", {**whole, "accumulate": 2})]
    together(1, [*one, *jobs("DDP 1", whole), *jobs("FSDP2 1", whole, of=spread)])
    together(3, [*jobs("DDP 3", whole), *jobs("FSDP2 3", whole, shares=True, of=spread)])


PAIRS = {
    "2 parts": ("parts", "one"), "DDP": ("two", "one"), "FSDP2": ("shares", "two"), "DDP -> 1": ("DDP 1", "one"),
    "DDP -> 3": ("DDP 3", "one"), "FSDP2 -> 1": ("FSDP2 1", "one"), "FSDP2 -> 3": ("FSDP2 3", "one"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=FAMILIES)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    begin, families = time.perf_counter(), arguments.only or FAMILIES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images(folder)
        other_data(folder)
        train_all(families, folder, arguments.steps)
        print(f"{'':<22}" + "".join(f"{column:>12}" for column in PAIRS))
        for family in families:
            row = [
                f"{difference(folder / family / a, folder / family / b):.1e}" if (folder / family / a).is_dir() else "-"
                for a, b in PAIRS.values()
            ]
            print(f"{family:<22}" + "".join(f"{cell:>12}" for cell in row))
        for family in families:
            if (folder / family / "shares").is_file():
                print(f"{family}: {(folder / family / 'shares').read_text()}")
    print(f"{(time.perf_counter() - begin) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
