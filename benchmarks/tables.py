"""Missing numbers of a table, filled in by MIWAE, not-MIWAE, mean imputation and missForest: RMSE of these.

    python benchmarks/tables_peer.py export breast_cancer t.csv                     with scikit-learn in PEER
    python -m benchmarks.tables mcar --table t.csv --peer PEER/bin/python           half of all numbers, by chance
    python -m benchmarks.tables self --table t.csv                         those above the mean, in half of the columns

Numbers are standardised by what all of them are, as in Mattei and Frellsen 2019 and Ipsen et al. 2021; then some are
taken away, each method sees the same others, and is judged by those that were taken. The models are trained by
`train_table` with the packaged recipes, on all rows, and impute by 1,000 draws of each. Rows of --out that are there
are not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.trainings import read_config
from stage1_vae.tables.data import read_table, write_table
from stage1_vae.tables.miwae import MIWAE, impute
from stage1_vae.tables.models import load_table_model
from stage1_vae.tables.train import Stage1TableConfig, train_table

DRAWS = 1000

MODELS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {  # by experiment: the recipe, and what is changed of it
    "mcar": {"MIWAE": ("miwae", {})},
    "self": {
        "MIWAE": ("not_miwae", {"model.mask.kind": "at_random"}),
        "not-MIWAE, linear": ("not_miwae", {"model.mask.kind": "linear"}),
        "not-MIWAE, self-masking": ("not_miwae", {}),
        "not-MIWAE, self-masking, sign known": ("not_miwae", {"model.mask.missing": "high"}),
    },
}


def holes(experiment: str, rows: NDArray[np.float64], seed: int) -> NDArray[np.bool_]:
    """Which numbers are taken away."""
    if experiment == "mcar":
        return np.random.default_rng(seed).random(rows.shape) < 0.5
    missing = rows > 0
    missing[:, rows.shape[1] // 2 :] = False
    return missing


def rmse(filled: NDArray[np.float64], rows: NDArray[np.float64], missing: NDArray[np.bool_]) -> float:
    return float(np.sqrt(np.square(filled - rows)[missing].mean()))


def of_forest(peer: str, seen: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    with tempfile.TemporaryDirectory() as folder:
        given, filled = Path(folder) / "holes.npz", Path(folder) / "filled.npz"
        np.savez(given, rows=seen, seed=seed)
        script = str(Path(__file__).with_name("tables_peer.py"))
        subprocess.run([peer, script, "impute", str(given), str(filled)], check=True)
        found: NDArray[np.float64] = np.load(filled)["forest"]
        return found


def of_model(
    recipe: str, changes: dict[str, Any], names: tuple[str, ...], seen: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], float]:
    """The filled rows, and the minutes of the training."""
    with tempfile.TemporaryDirectory() as folder:
        table, run = Path(folder) / "t.csv", Path(folder) / "run"
        write_table(table, names, ([*("" if np.isnan(x) else repr(float(x)) for x in row)] for row in seen))
        given = {
            "table.path": str(table),
            "table.validation_share": 0.0,
            "train.seed": seed,
            "train.validate_every": 0,
            "train.tracker": "none",
            "train.log_every": 2000,
            **changes,
        }
        begin = time.time()
        if not train_table(read_config(Stage1TableConfig, recipe, given), run).finished:
            raise SystemExit("stopped; the same command goes on with this training anew")
        minutes = (time.time() - begin) / 60
        model = load_table_model(run)
        assert isinstance(model, MIWAE)
        rows = model.rows(read_table(table))
        return model.numbers(impute(model, rows, draws=DRAWS, seed=seed).single).numpy(), minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=MODELS)
    parser.add_argument("--table", required=True)
    parser.add_argument("--peer", help="a Python with scikit-learn; left out: no missForest")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", default="tables.jsonl")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table, out = read_table(given.table), Path(given.out)
    values = table.numbers(table.header)
    rows = (values - values.mean(0)) / values.std(0)
    done: dict[tuple[str, int], float] = {}
    for line in out.read_text().splitlines() if out.is_file() else []:
        found = json.loads(line)
        if (found["experiment"], found["table"], found["steps"]) == (given.experiment, table.path.stem, given.steps):
            done[found["method"], found["seed"]] = found["rmse"]

    def note(method: str, seed: int, value: float, minutes: float) -> None:
        done[method, seed] = value
        record = {
            "experiment": given.experiment,
            "table": table.path.stem,
            "steps": given.steps,
            "method": method,
            "seed": seed,
            "rmse": value,
            "minutes": minutes,
        }
        with out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"seed {seed}: {method}: RMSE {value:.4f}, {minutes:.1f} minutes", flush=True)

    for seed in range(given.seeds):
        missing = holes(given.experiment, rows, seed)
        seen = np.where(missing, np.nan, rows)
        if ("mean", seed) not in done:
            note("mean", seed, rmse(np.where(missing, np.nanmean(seen, axis=0), rows), rows, missing), 0.0)
        if given.peer is not None and ("missForest", seed) not in done:
            begin = time.time()
            filled = of_forest(given.peer, seen, seed)
            note("missForest", seed, rmse(filled, rows, missing), (time.time() - begin) / 60)
        for method, (recipe, changes) in MODELS[given.experiment].items():
            if (method, seed) not in done:
                filled, minutes = of_model(recipe, {**changes, "train.steps": given.steps}, table.header, seen, seed)
                note(method, seed, rmse(filled, rows, missing), minutes)
    print(f"{table.path.stem}, {len(rows)} rows of {rows.shape[1]} numbers, {given.seeds} seeds")
    for method in dict.fromkeys(method for method, _ in done):
        of_seeds = np.array([done[method, seed] for seed in range(given.seeds)])
        print(f"{method}: RMSE {of_seeds.mean():.3f} +- {of_seeds.std(ddof=1):.3f}")


if __name__ == "__main__":
    main()
