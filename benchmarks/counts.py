"""Counts: what a model of simulated cells finds of how they were made, and the log-likelihood of held-out ones.

    python -m benchmarks.counts --cells cells.npz [--seed 0] [--peer PEER/bin/python]      PEER with scvi-tools

2,000 cells of 40 genes in two batches: z ~ N(0, I) of 2 numbers, shares = softmax(W z + c + d_s), log of the size
N(m_s, 0.3^2), and ZINB with theta and a probability of surplus zeros of each gene. Trained on 1,600 of them by
`train_table` with the recipe `counts`, 400 epochs at 5e-3, five times the published rate: log theta moves by no more
than that in a step, and 100 epochs leave it half way (correlation 0.47). log p of the others by importance weights of
200 draws, beside that of the true model by 20,000 draws of its own p(z, l), and scvi-tools, another process on the same
cells.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.trainings import read_config
from stage1_vae.evaluation import log_mean_exp
from stage1_vae.tables.counts import Counts, log_zero_inflated
from stage1_vae.tables.data import read_table, write_table
from stage1_vae.tables.models import load_table_model
from stage1_vae.tables.train import Stage1TableConfig, noise_of, train_table

CELLS, TRAIN, GENES, LATENTS, BATCHES = 2000, 1600, 40, 2, 2
SIZE_SPREAD = 0.3


def simulated(seed: int) -> dict[str, Any]:
    """Cells, and how they were made."""
    chance = np.random.default_rng(seed)
    truth = {
        "weights": 0.7 * chance.normal(size=(LATENTS, GENES)),
        "centres": 0.8 * chance.normal(size=GENES),
        "of_batch": 0.3 * chance.normal(size=(BATCHES, GENES)),
        "theta": np.exp(chance.uniform(np.log(0.7), np.log(8), size=GENES)),
        "surplus": chance.uniform(0.02, 0.4, size=GENES),
        "size": np.log([600.0, 1000.0]),
    }
    batch = chance.integers(0, BATCHES, CELLS)
    z = chance.normal(size=(CELLS, LATENTS))
    log_size = truth["size"][batch] + SIZE_SPREAD * chance.normal(size=CELLS)
    logits = z @ truth["weights"] + truth["centres"] + truth["of_batch"][batch]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rate = np.exp(log_size)[:, None] * shares
    counts = chance.poisson(chance.gamma(truth["theta"], rate / truth["theta"]))
    counts[chance.random(counts.shape) < truth["surplus"]] = 0
    return {"truth": truth, "counts": counts, "batch": batch, "log_size": log_size, "shares": shares}


@torch.inference_mode()
def true_log_p(made: dict[str, Any], cells: range, draws: int = 20_000) -> float:
    """A mean over cells in nats, by draws of p(z, l), a cell at a time."""
    truth = {name: torch.from_numpy(value).float() for name, value in made["truth"].items()}
    counts = torch.from_numpy(made["counts"]).float()
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(draws, LATENTS, generator=generator)
    spread = SIZE_SPREAD * torch.randn(draws, 1, generator=generator)
    surplus = torch.log(truth["surplus"] / (1 - truth["surplus"]))
    rates = [
        (truth["size"][s] + spread).exp() * (z @ truth["weights"] + truth["centres"] + truth["of_batch"][s]).softmax(-1)
        for s in range(BATCHES)
    ]
    found = [
        log_mean_exp(log_zero_inflated(counts[cell], rates[made["batch"][cell]], truth["theta"], surplus).sum(-1))
        for cell in cells
    ]
    return float(torch.stack(found).mean())


def theta_by_likelihood(made: dict[str, Any], steps: int = 1_000) -> np.ndarray:
    """theta of each gene of greatest likelihood where all rates are known: as well as these cells tell it."""
    counts = torch.from_numpy(made["counts"][:TRAIN]).float()
    rate = torch.from_numpy(np.exp(made["log_size"][:TRAIN])[:, None] * made["shares"][:TRAIN]).float()
    log_theta, surplus = torch.zeros(GENES, requires_grad=True), torch.zeros(GENES, requires_grad=True)
    optimizer = torch.optim.Adam([log_theta, surplus], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        (-log_zero_inflated(counts, rate, log_theta.exp(), surplus).mean(0).sum()).backward()
        optimizer.step()
    return log_theta.detach().exp().numpy()


@torch.inference_mode()
def log_p(model: Counts, rows: Tensor, draws: int = 200) -> float:
    parts = [
        log_mean_exp(model(few, noise=noise_of(model, few, range(start, start + len(few)), draws)).log_weights)
        for start, few in zip(range(0, len(rows), 50), rows.split(50), strict=True)
    ]
    return float(torch.cat(parts).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", required=True, help="a file to write, for the peer")
    parser.add_argument("--peer", help="a Python with scvi-tools; left out: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    made = simulated(given.seed)
    counts, batch = made["counts"], made["batch"]
    np.savez(
        given.cells,
        train=counts[:TRAIN],
        test=counts[TRAIN:],
        train_batch=batch[:TRAIN],
        test_batch=batch[TRAIN:],
        latents=LATENTS,
    )
    genes = [f"g{number}" for number in range(GENES)]
    with tempfile.TemporaryDirectory() as folder:
        tables = [Path(folder) / "train.csv", Path(folder) / "test.csv"]
        for path, part in zip(tables, (slice(TRAIN), slice(TRAIN, None)), strict=True):
            rows = ([str(s), *map(str, row)] for s, row in zip(batch[part], counts[part], strict=True))
            write_table(path, ["batch", *genes], rows)
        steps = given.epochs * TRAIN // 128
        changes = {
            "table.path": str(tables[0]),
            "table.batch_column": "batch",
            "table.validation_share": 0.0,
            "model.latents": LATENTS,
            "objective.annealing_steps": steps // 5,
            "train.steps": steps,
            "train.learning_rate": given.learning_rate,
            "train.validate_every": 0,
            "train.log_every": steps,
            "train.seed": given.seed,
            "train.tracker": "none",
        }
        train_table(read_config(Stage1TableConfig, "counts", changes), Path(folder) / "run")
        model = load_table_model(Path(folder) / "run")
        assert isinstance(model, Counts)
        train_rows, rows = (model.rows(read_table(path)) for path in tables)
    with torch.inference_mode():
        posterior, library = model.posteriors(train_rows)
        assert library is not None
        likelihood = model.likelihood(posterior.mean[None], library.mean[None], train_rows)
        assert model.log_dispersion is not None
        assert likelihood.zero_logits is not None
        theta = model.log_dispersion[0].exp().numpy()
        surplus = likelihood.zero_logits[0].sigmoid().mean(0).numpy()
        log_size, shares = library.mean[:, 0].numpy(), likelihood.share[0].numpy()
    truth = made["truth"]
    for name, found, true in (
        ("log theta of genes", np.log(theta), np.log(truth["theta"])),
        ("the same, all rates known", np.log(theta_by_likelihood(made)), np.log(truth["theta"])),
        ("surplus zeros of genes", surplus, truth["surplus"]),
        ("log size of cells", log_size, made["log_size"][:TRAIN]),
        ("log shares of genes in cells", np.log(shares).ravel(), np.log(made["shares"][:TRAIN]).ravel()),
    ):
        error = np.abs(found - true)
        print(f"{name}: correlation {np.corrcoef(found, true)[0, 1]:.3f}, median error {np.median(error):.3f}")
    print(f"true model: log p {true_log_p(made, range(TRAIN, CELLS)):.3f} nats per cell", flush=True)
    print(f"ours: log p {log_p(model, rows):.3f} nats per cell", flush=True)
    if given.peer is not None:
        script = str(Path(__file__).with_name("counts_peer.py"))
        options = ["--seed", str(given.seed), "--epochs", str(given.epochs)]
        options += ["--learning_rate", str(given.learning_rate)]
        subprocess.run([given.peer, script, given.cells, *options], check=True)


if __name__ == "__main__":
    main()
