"""Runs of tables: they learn, do not depend on micro-batches or on being stopped, and are told apart from others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.runs import TABLE, stage_of_recipe, stage_of_run
from stage1_vae.objectives import ELBOConfig, ImportanceConfig
from stage1_vae.tables.counts import CountsConfig
from stage1_vae.tables.data import TableConfig, read_table
from stage1_vae.tables.masks import SelfMaskingConfig
from stage1_vae.tables.miwae import MIWAE, MIWAEConfig
from stage1_vae.tables.models import load_table_model
from stage1_vae.tables.train import Stage1TableConfig, TableTask, noise_of, train_table
from training.config import TrainConfig


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """40 rows of three numbers that go by one another, a quarter missing; in units far from standard ones."""
    generator = np.random.default_rng(0)
    first = generator.normal(size=40)
    values = np.stack([1000 + 50 * first, 3 - first, 0.001 * (first + 0.1 * generator.normal(size=40))], axis=1)
    lines = ["name,a,b,c"]
    for number, (row, gaps) in enumerate(zip(values, generator.random(values.shape) < 0.25, strict=True)):
        cells = ("" if gap else repr(float(x)) for x, gap in zip(row, gaps, strict=True))
        lines.append(",".join([f"r{number}", *cells]))
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines))
    return path


def config(table: Path, model: dict[str, Any] | None = None, **train: Any) -> Stage1TableConfig:
    train = {"steps": 6, "batch_size": 8, "learning_rate": 1e-2, "validate_every": 3, "save_every": 3, **train}
    return Stage1TableConfig(
        model=MIWAEConfig(latents=2, hidden=(8,), **(model or {})),
        table=TableConfig(path=str(table), id_column="name"),
        objective=ImportanceConfig(draws=3),
        train=TrainConfig(preview_every=0, tracker="none", workers=0, log_every=50, schedule="constant", **train),
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_table_model(run).state_dict()


@pytest.mark.parametrize("mask", [{}, {"mask": SelfMaskingConfig()}], ids=["at random", "not at random"])
def test_a_run_learns_and_its_model_comes_back(
    table: Path, tmp_path: Path, mask: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    settings = config(table, mask, steps=60, validate_every=20, save_every=60)
    result = train_table(settings, tmp_path / "run")
    assert result.best_step == 60
    assert " rows/s, waiting for data" in capsys.readouterr().out
    model = load_table_model(tmp_path / "run")
    assert isinstance(model, MIWAE)
    assert model.columns == ("a", "b", "c")
    rows = model.rows(read_table(table))
    seen = rows[~rows.isnan()]
    assert abs(float(seen.mean())) < 0.2
    assert 0.8 < float(seen.std()) < 1.2
    torch.testing.assert_close(
        torch.from_numpy(read_table(table).numbers(model.columns)), model.numbers(rows), equal_nan=True, rtol=1e-5,
        atol=1e-6,
    )  # fmt: skip
    copy = MIWAE.from_arguments(**model.arguments())
    copy.load_state_dict(model.state_dict())
    assert copy.fingerprint() == model.fingerprint()
    assert stage_of_run(tmp_path / "run") == TABLE


def test_micro_batches_and_stops_change_nothing(table: Path, tmp_path: Path):
    train_table(config(table), tmp_path / "whole")
    train_table(config(table, accumulate=4), tmp_path / "parts")
    train_table(config(table, steps=3), tmp_path / "stopped")
    train_table(config(table), tmp_path / "stopped")
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], tensor, rtol=1e-4, atol=1e-6)
        assert torch.equal(weights(tmp_path / "stopped")[name], tensor)


def test_validation_takes_each_row_alike_in_whatever_batch(table: Path, tmp_path: Path):
    train_table(config(table), tmp_path / "run")
    model = load_table_model(tmp_path / "run")
    rows, numbers = model.rows(read_table(table)), torch.arange(40)
    noise = noise_of(model, rows, numbers.tolist(), 5)
    assert torch.equal(noise_of(model, rows[7:9], [7, 8], 5), noise[:, 7:9])
    task = TableTask(model, ObjectiveOfThree(), batch_size=8)
    whole = task.validate(model, {"rows": rows, "numbers": numbers})
    part = task.validate(model, {"rows": rows[3:6], "numbers": numbers[3:6]})
    for name, value in part.items():
        torch.testing.assert_close(whole[name][3:6], value)
    whole = {name: value.detach() for name, value in whole.items()}
    assert float((whole["log_likelihood"] - whole["kl"]).mean()) < float(-whole["negative_bound"].mean())


class ObjectiveOfThree:
    draws = 3
    companions: dict[str, Any] = {}  # noqa: RUF012
    reads_weights = None


def test_what_cannot_be_is_refused(table: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"train.evaluate_every=5, expected 0: of a table there are no images"):
        config(table, evaluate_every=5)
    for given in ({"gradient": "doubly_reparameterised"}, {"generator_over_all": True, "estimates": 2}):
        objective = ImportanceConfig(**given)
        replace(config(table), objective=objective)  # a miwae has one group of latents
        with pytest.raises(UserError, match=r"with model.kind=counts, expected reparameterised and false"):
            replace(config(table), model=CountsConfig(), objective=objective)
    (tmp_path / "empty.csv").write_text("name,a,b\nx,1,\ny,2,\n")
    with pytest.raises(UserError, match="has no number in column 'b'"):
        train_table(config(tmp_path / "empty.csv"), tmp_path / "run")
    train_table(config(table), tmp_path / "run")
    table.write_text(table.read_text().replace("r1,", "r1,1"))
    with pytest.raises(UserError, match="holds something else than when the run began"):
        train_table(config(table), tmp_path / "run")


def test_the_prior_on_weights_is_of_the_generator_alone(table: Path, tmp_path: Path):
    """After one step the encoder is where it would be without the prior, and the generator is not."""
    settings = config(table, steps=1, validate_every=1, save_every=1, max_grad_norm=0)
    for variance in (0.0, 1e-4):
        objective = ELBOConfig(generator_prior_variance=variance)
        train_table(replace(settings, objective=objective), tmp_path / f"run{variance}")
    one, other = weights(tmp_path / "run0.0"), weights(tmp_path / "run0.0001")
    for name, tensor in one.items():
        assert torch.equal(other[name], tensor) == name.startswith("encoder"), name


def test_a_recipe_with_a_table_is_one_of_tables():
    assert stage_of_recipe({"model": {}, "table": {}, "objective": {}}) == TABLE
    assert stage_of_recipe({"model": {}, "data": {}, "objective": {}}) == "stage one (VAE)"


def test_counts_learn_with_and_without_held_out_rows(tmp_path: Path):
    generator = np.random.default_rng(1)
    cells = enumerate(generator.poisson(4, (40, 3)))
    lines = ["batch,donor,g1,g2,g3", *(f"b{i % 2},d{i},{a},{b},{1 + c}" for i, (a, b, c) in cells)]
    (tmp_path / "c.csv").write_text("\n".join(lines))
    for share in (0.0, 0.2):
        settings = Stage1TableConfig(
            model=CountsConfig(latents=2, hidden=8),
            table=TableConfig(
                path=str(tmp_path / "c.csv"), batch_column="batch", category_columns=("donor",), validation_share=share
            ),  # held-out rows are of donors that no training row is of
            objective=ELBOConfig(),
            train=config(tmp_path, steps=20, validate_every=10, save_every=20).train,
        )
        result = train_table(settings, tmp_path / f"run{share}")
        assert ("negative_bound" in result.metrics) == bool(share)
    model = load_table_model(tmp_path / "run0.2")
    assert model.kind == "counts"
    with pytest.raises(UserError, match="batch, donor are named as what is known of a row, expected no such column"):
        train_table(replace(settings, model=MIWAEConfig()), tmp_path / "other")
