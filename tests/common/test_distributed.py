"""Two processes with half the batch each hold the codebook of one process with all of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from common.distributed import draw_rows
from stage1_vq.quantizers import (
    GroupedQuantizerConfig,
    IBQConfig,
    LFQConfig,
    MultiscaleBSQConfig,
    MultiscaleQuantizerConfig,
    NearestQuantizerConfig,
    QuantizerConfig,
    ResidualQuantizerConfig,
    build_quantizer,
)
from tests.processes import Processes


def nearest(**settings: Any) -> NearestQuantizerConfig:
    defaults = {"codebook_size": 32, "dim": 4, "revive_after": 2, "kmeans_iterations": 3}
    return NearestQuantizerConfig(**{**defaults, **settings})


SETTINGS: dict[str, QuantizerConfig] = {
    "ema": nearest(),
    "ema, bfloat16": nearest(),
    "gradient": nearest(codebook_update="gradient"),
    "gradient, bfloat16": nearest(codebook_update="gradient"),
    # Without k-means: the centre of two latents is as near to one as to the other, and rounding chooses.
    "gradient, refreshed": nearest(codebook_update="gradient", revive_after=0, refresh=True, kmeans_iterations=0),
    "ema, normalised look-up": nearest(lookup_dim=3, l2_normalise=True),
    "residual": ResidualQuantizerConfig(depth=2, layer=nearest()),
    # Which layers the decoder sees is drawn by each process for itself: the codebook may not depend on it.
    "residual, shared, dropout": ResidualQuantizerConfig(
        depth=2, layer=nearest(), shared_codebook=True, quantizer_dropout=1.0
    ),
    "grouped": GroupedQuantizerConfig(layer=nearest(dim=2)),
    "multiscale": MultiscaleQuantizerConfig(
        scales=(1, 3), codebook_size=32, dim=4, phis=1, revive_after=2, kmeans_iterations=3
    ),
}
PROCESSES, MICRO_BATCHES, STEPS = 2, 2, 6


def batch(step: int, micro_batch: int, images: slice) -> Tensor:
    """Part of a global micro-batch of four images; far from where most codes start, so that many die."""
    generator = torch.Generator().manual_seed(10 * step + micro_batch)
    return torch.randn(4, 4, 3, 3, generator=generator)[images] + step


def train(name: str, images: slice) -> dict[str, Tensor]:
    """State and last health after some steps on this process's images; with bfloat16, on latents of that type and under
    its autocast, as an encoder gives them."""
    torch.manual_seed(0)
    quantizer = build_quantizer(SETTINGS[name])
    half = "bfloat16" in name

    def latents(step: int, micro_batch: int) -> Tensor:
        return batch(step, micro_batch, images).to(torch.bfloat16 if half else torch.float32)

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with autocast:
        quantizer.initialise([latents(0, micro_batch) for micro_batch in range(MICRO_BATCHES)])
    for step in range(STEPS):
        for micro_batch in range(MICRO_BATCHES):
            with autocast:
                quantizer(latents(step, micro_batch))
        torch.manual_seed(step)
        quantizer.update()
        health = quantizer.health(steps_per_epoch=4)
    assert "refreshed" in name or health["revived_codes"] > 0, "the test must see revivals"
    return {**quantizer.state_dict(), **health}


ENTROPY_CONFIGS: dict[str, Any] = {
    "lfq": LFQConfig(bits=4, dim=4, inverse_temperature=0.5),
    "ibq": IBQConfig(codebook_size=12, dim=4, temperature=0.5),
    "multiscale_bsq": MultiscaleBSQConfig(scales=(1, 3), dim=4, inverse_temperature=1.5),
}


def entropy_terms(name: str, images: slice) -> dict[str, Tensor]:
    """Entropies, and the gradient of their loss to the latents of these images of the whole batch."""
    torch.manual_seed(0)
    quantizer = build_quantizer(ENTROPY_CONFIGS[name])
    z = batch(0, 0, images).requires_grad_()
    quantized = quantizer(z)
    (quantized.losses["entropy_loss"] + quantized.losses["diversity_loss"]).backward()
    return {"batch_entropy": quantized.statistics["batch_entropy"], "gradient": z.grad}


def process(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    half = slice(2 * rank, 2 * rank + 2)
    found: dict[str, Any] = {name: train(name, half) for name in SETTINGS}
    first, second = torch.arange(20.0).view(20, 1).split([12, 8])  # global micro-batches, shared by halves
    torch.manual_seed(3 + rank)  # the first process's generator decides
    found["rows"] = draw_rows([first.chunk(2)[rank], second.chunk(2)[rank]], 7)
    found |= {name: entropy_terms(name, half) for name in ENTROPY_CONFIGS}
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def processes(process_server: Processes, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes ended up with."""
    folder = tmp_path_factory.mktemp("processes")
    process_server.together(process, folder, count=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_codebook_is_the_same_on_all_processes_bit_for_bit(processes, name):
    for key, tensor in processes[0][name].items():
        assert torch.equal(tensor, processes[1][name][key]), key


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_with_half_the_batch_do_what_one_does(processes, name):
    alone = train(name, slice(0, 4))
    assert alone.keys() == processes[0][name].keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(processes[0][name][key], tensor, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ENTROPY_CONFIGS)
def test_the_batch_entropy_is_that_of_the_batch_of_all_processes(processes, name):
    alone = entropy_terms(name, slice(0, 4))
    for found in processes:
        torch.testing.assert_close(found[name]["batch_entropy"], alone["batch_entropy"])
    gradient = torch.cat([found[name]["gradient"] for found in processes]) / PROCESSES  # as gradients are averaged
    torch.testing.assert_close(gradient, alone["gradient"], rtol=1e-4, atol=1e-7)


def test_rows_are_drawn_by_their_global_number(processes):
    torch.manual_seed(3)
    alone = draw_rows(torch.arange(20.0).view(20, 1).split([12, 8]), 7)
    assert torch.equal(processes[0]["rows"], alone)
    assert torch.equal(processes[1]["rows"], alone)
    assert len(alone.unique()) == 7


def test_all_rows_are_drawn_where_there_are_fewer_than_asked_for():
    parts = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])]
    assert sorted(draw_rows(parts, 10).flatten().tolist()) == [1, 2, 3]
