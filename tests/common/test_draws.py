"""What is drawn for samples: the same on any number of processes and micro-batches, by whatever draws in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from benchmarks.processes import AUTOENCODERS, BATCH, GRID, PRIORS_OF, SMALL, difference, images, train
from codes.latents import LatentSpec
from common import draws
from common.draws import (
    MicroBatch,
    draws_of,
    exponential_like,
    normal_like,
    spread,
    stratified,
    uniform,
    uniform_of_step,
)
from common.recompute import Recomputation, blocks_of
from stage1_vae.likelihoods import BernoulliConfig
from stage1_vae.networks import DenseConfig
from stage1_vae.vae import VAE, VAEConfig
from stage1_vq.autoencoders import AUTOENCODERS as AUTOENCODER_CLASSES
from stage1_vq.autoencoders import VQVAEConfig
from stage1_vq.quantizers import (
    BinaryMapperConfig,
    DiVeQConfig,
    FSPConfig,
    FSQConfig,
    NearestQuantizerConfig,
    ResidualQuantizerConfig,
)
from stage2_prior.latents import SecondVAEConfig
from stage2_prior.latents.second_vae import SecondVAE
from stage2_prior.priors import PRIORS, Prior, TransformerConfig, VARConfig
from stage2_prior.train import Stage2Task
from stage2_prior.train_latents import Stage2LatentTask
from tests.processes import Processes
from tests.stage1_vae.objectives.reference import facts, objective
from tests.stage1_vae.sequences.test_sequences import DECODERS, model_of, some
from tests.stage1_vq.tiny import AUTOENCODER_ROWS
from tests.stage2_prior.tiny import random_codes

CPU = torch.device("cpu")
TOTAL = 8
WAYS = ([0, 8], [0, 2, 4, 6, 8], [0, 1, 8])  # where micro-batches, of whatever processes, begin and end

DRAWN: dict[str, Callable[[int], Tensor]] = {
    "uniform": lambda count: uniform(count, 3, 5, device=CPU),
    "normal": lambda count: normal_like(torch.empty(count, 7)),
    "normal along another axis": lambda count: normal_like(torch.empty(2, count, 3), axis=1).movedim(1, 0),
    "exponential": lambda count: exponential_like(torch.empty(count, 33)),
    "spread": lambda count: spread(count, CPU),
    "stratified": lambda count: stratified(count, CPU),
}


def parts(ends: list[int], seed: int = 0) -> Iterator[MicroBatch]:
    for first, end in pairwise(ends):
        yield MicroBatch(seed, first, end - first, ends[-1])


@pytest.mark.parametrize("few", [draws.FEW, 0], ids=["drawn at once", "one after the other"])
@pytest.mark.parametrize("name", DRAWN)
def test_a_sample_draws_the_same_in_any_micro_batch(monkeypatch, name: str, few: int):
    monkeypatch.setattr(draws, "FEW", few)
    found = []
    for ends in WAYS:
        rows: list[list[Tensor]] = [[], []]
        for part in parts(ends):
            with draws_of(part):
                for row in rows:
                    row.append(DRAWN[name](part.size))
        found.append([torch.cat(row) for row in rows])
    for first, second in found:
        assert torch.equal(first, found[0][0])
        assert torch.equal(second, found[0][1])
    assert not torch.equal(*found[0])
    assert len(found[0][0].unique()) == found[0][0].numel()  # no sample draws what another does
    with draws_of(MicroBatch(1, 0, TOTAL, TOTAL)):
        assert not torch.equal(DRAWN[name](TOTAL), found[0][0])  # another step


@pytest.mark.parametrize("few", [draws.FEW, 0], ids=["drawn at once", "one after the other"])
@pytest.mark.parametrize("draw", [normal_like, exponential_like])
def test_the_layout_of_the_memory_changes_no_number(monkeypatch, draw: Callable[[Tensor], Tensor], few: int):
    monkeypatch.setattr(draws, "FEW", few)
    rows, pixels_first = torch.zeros(4, 3, 5, 5), torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last)

    def drawn(like: Tensor, in_step: bool) -> Tensor:
        torch.manual_seed(0)
        if not in_step:
            return draw(like)
        with draws_of(MicroBatch(seed=1, first=0, size=4, total=4)):
            return draw(like)

    for in_step in (False, True):
        assert torch.equal(drawn(rows, in_step), drawn(pixels_first, in_step))


def test_what_belongs_to_no_sample_is_the_same_in_all_micro_batches_of_a_step():
    found = []
    for part in parts([0, 2, 8]):
        with draws_of(part):
            found.append((uniform_of_step(5, device=CPU), uniform_of_step(5, device=CPU)))
    assert all(map(torch.equal, *found))
    assert not torch.equal(*found[0]), "drawn again it is another"
    with draws_of(MicroBatch(1, 0, TOTAL, TOTAL)):
        assert not torch.equal(uniform_of_step(5, device=CPU), found[0][0]), "and in another step"


@pytest.mark.parametrize("few", [draws.FEW, 0])
def test_numbers_are_of_their_distributions(monkeypatch, few: int):
    monkeypatch.setattr(draws, "FEW", few)
    with draws_of(MicroBatch(3, 100, 200, 400)):
        of_unit, normal = uniform(200, 100, device=CPU), normal_like(torch.empty(100, 200), axis=1)
        exponential, even = exponential_like(torch.empty(200, 100)), spread(200, CPU)
    assert 0 <= of_unit.min() < 0.001 < 0.999 < of_unit.max() < 1
    means = torch.stack([of_unit.mean(), normal.mean(), normal.std(), exponential.mean(), exponential.std()])
    torch.testing.assert_close(means, torch.tensor([0.5, 0.0, 1.0, 1.0, 1.0]), atol=0.04, rtol=0)
    steps = even.sort().values.diff()
    assert ((steps - 1 / 400).abs() < 1e-5).sum() >= 198  # but where they begin anew
    with draws_of(MicroBatch(3, 100, 200, 400)):
        strata = 400 * stratified(200, CPU)
    assert torch.equal(strata.floor(), torch.arange(100.0, 300.0))
    assert abs(float((strata % 1).mean()) - 0.5) < 0.05


def test_outside_of_a_step_and_for_another_number_of_samples_the_global_generator_draws():
    for inside in (False, True):
        torch.manual_seed(1)
        if inside:
            with draws_of(MicroBatch(0, 0, 4, 8)):
                found = [row(3) for row in DRAWN.values()]
        else:
            found = [row(3) for row in DRAWN.values()]
        torch.manual_seed(1)
        for one, row in zip(found, DRAWN.values(), strict=True):
            assert torch.equal(one, row(3))


class Noisy(nn.Module):
    """Draws for its samples, and has dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(3, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        drawn = normal_like(x) + uniform(len(x), 1, device=x.device) + spread(len(x), x.device)[:, None]
        return self.dropout(self.linear(x) * drawn) * exponential_like(x)


@pytest.mark.parametrize("inside", [False, True])
def test_a_recomputed_block_draws_the_same(inside: bool):
    model, x, found = nn.Sequential(Noisy(), Noisy()), torch.randn(4, 3), []
    for blocks in ([], blocks_of(model)):
        model.zero_grad()
        torch.manual_seed(2)
        with draws_of(MicroBatch(0, 4, 4 if inside else 1, 8)):
            with Recomputation(blocks).on():
                loss = model(x).square().sum()
            after = uniform(4, device=CPU)
            loss.backward()
        found.append([after, *(cast(Tensor, weight.grad) for weight in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# ---- all that draws in training -------------------------------------------------------------------------------------


def of_autoencoder(config: Any) -> Callable[[slice], Tensor]:
    model = AUTOENCODER_CLASSES[config.kind](config, (16, 16)).train()
    pictures = torch.rand(TOTAL, 1, 16, 16) * 2 - 1
    return lambda which: torch.stack(list(model(pictures[which]).losses.values())).sum()


def of_quantizer(config: Any) -> Callable[[slice], Tensor]:
    return of_autoencoder(VQVAEConfig(**SMALL, quantizer=config))


def of_prior(config: Any, spec: Any, label_dropout: float = 0.5) -> Callable[[slice], Tensor]:
    prior: Prior = PRIORS[config.kind](config, spec, 3).train()
    task, codes = Stage2Task(prior, label_dropout), random_codes(TOTAL, prior)
    labels = torch.arange(TOTAL) % 3

    def loss(which: slice) -> Tensor:
        batch = {"codes": tuple(grid[which] for grid in codes), "labels": labels[which]}
        return task.step(prior, batch, 0).loss

    return loss


def of_latents() -> Callable[[slice], Tensor]:
    """Draws of posteriors, of which a second VAE draws in turn."""
    prior = SecondVAE(SecondVAEConfig(hidden=(8,)), LatentSpec((6,), True, 16, 16, 1)).train()
    task = Stage2LatentTask(prior, cast(Any, None), cast(Any, None), draws=True)
    batch = {"mean": torch.randn(TOTAL, 6), "log_scale": torch.randn(TOTAL, 6)}
    return lambda which: task.step(prior, {name: rows[which] for name, rows in batch.items()}, 0).loss


def of_momenta() -> Callable[[slice], Tensor]:
    dense = DenseConfig(hidden=(7,))
    model = VAE(VAEConfig(latents=2, encoder=dense, decoder=dense, likelihood=BernoulliConfig()), (3, 3)).train()
    hamiltonian = objective("hamiltonian", facts(latent_shape=(2,)), draws=2)
    pictures, noise = torch.rand(TOTAL, 1, 3, 3).round() * 2 - 1, torch.randn(2, TOTAL, 2)
    return lambda which: hamiltonian.loss(model, pictures[which], 0, noise[:, which]).loss


RESIDUAL = ResidualQuantizerConfig(
    depth=3, quantizer_dropout=0.7, layer=NearestQuantizerConfig(codebook_size=16, dim=6), shared_codebook=False
)
FLEXTOK = replace(AUTOENCODER_ROWS["flextok, grey, nested, residual"], times="stratified", unconditional=0.2)
DRAWING: dict[str, Callable[[], Callable[[slice], Tensor]]] = {
    "Gumbel noise": lambda: of_autoencoder(AUTOENCODERS["dvae"][0]),
    "layers kept": lambda: of_autoencoder(VQVAEConfig(**SMALL, quantizer=RESIDUAL)),
    "directions of DiVeQ": lambda: of_quantizer(DiVeQConfig(codebook_size=16, dim=6, noise=0.5)),
    "points of a line": lambda: of_quantizer(DiVeQConfig(codebook_size=16, dim=6, noise=0.0, space_filling=True)),
    "perturbed scalars": lambda: of_quantizer(FSPConfig(levels=(3, 3), dim=6, quantized_share=0.5, moments=0)),
    "noise of FSQ": lambda: of_quantizer(FSQConfig(levels=(3, 3), dim=6, preserve_symmetry=True, noise_dropout=0.5)),
    "codes of FSQ drawn anew": lambda: of_quantizer(FSQConfig(levels=(3, 3), dim=6, unrounded=0.3, corruption=0.8)),
    "tokens kept, times and noise": lambda: of_autoencoder(AUTOENCODER_ROWS["flextok, grey, nested, residual"]),
    "times in strata": lambda: of_autoencoder(FLEXTOK),
    "times of a normal logit": lambda: of_autoencoder(replace(FLEXTOK, times="logit-normal")),
    "bits": lambda: of_quantizer(BinaryMapperConfig(bits=4, dim=6)),
    "labels left out": lambda: of_prior(TransformerConfig(layers=1, width=16, heads=2), GRID),
    "masks of MaskGIT": lambda: of_prior(*PRIORS_OF["maskgit"]),
    "masks of diffusion": lambda: of_prior(*PRIORS_OF["diffusion"]),
    "paths left out": lambda: of_prior(VARConfig(layers=2, width=32, heads=2, drop_path=0.5, initial_gain=1.0),
                                       PRIORS_OF["var"][1], 0.0),
    "latents": of_latents,
    "momenta": of_momenta,
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWING)
def test_whatever_draws_in_training_draws_by_the_place_of_a_sample(name: str):
    loss, found = DRAWING[name](), []
    for ends in ([0, 8], [0, 2, 4, 6, 8]):
        losses = []
        for part in parts(ends):
            with draws_of(part):
                losses.append(loss(slice(part.first, part.first + part.size)))
        found.append(torch.stack(losses).mean())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    with draws_of(MicroBatch(5, 0, TOTAL, TOTAL)):
        assert (loss(slice(0, TOTAL)) - found[0]).abs() > 1e-5  # it draws at all


def test_hidden_steps_are_those_of_the_sequence_however_long_the_others_are():
    torch.manual_seed(0)
    model = model_of(DECODERS["recurrent, at the start"], tokens=True, word_dropout=0.5).train()
    sequences, latents = some(tokens=True), torch.randn(1, 3, 3)
    with draws_of(MicroBatch(0, 0, 3, 3)):
        whole = model.log_likelihood(latents, sequences)
    for place, length in enumerate(model.lengths(sequences).tolist()):
        with draws_of(MicroBatch(0, place, 1, 3)):
            alone = model.log_likelihood(latents[:, place : place + 1], sequences[place : place + 1, :length])
        torch.testing.assert_close(alone[:, 0], whole[:, place])


# ---- runs -----------------------------------------------------------------------------------------------------------

FAMILIES = ["dvae", "maskgit", "diffusion", "transformer"]  # priors leave out labels, too
SAME = 1e-5  # largest difference of a tensor's entries after the last step, as a part of the largest entry of all


def train_each(folder: Path, name: str, accumulate: int) -> None:
    for family in FAMILIES:
        changes = {"steps": 3, "log_every": 100, "accumulate": accumulate}
        train(family, folder, folder / f"{family} {name}", changes)


@pytest.fixture(scope="module")
def runs(process_server: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    images(folder)
    train_each(folder, "one", 1)
    train_each(folder, "parts", 4)
    process_server.together(train_each, folder, "two", 2)
    return folder


@pytest.mark.parametrize("name", ["parts", "two"])
@pytest.mark.parametrize("family", FAMILIES)
def test_processes_and_micro_batches_train_what_one_batch_does(runs: Path, family: str, name: str):
    assert BATCH % 4 == 0
    assert difference(runs / f"{family} {name}", runs / f"{family} one") < SAME
