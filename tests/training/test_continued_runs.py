"""Runs that an earlier build began, without a record of their data, are continued after whatever decides nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from common.files import sha256_of_file, write_json
from common.sealed_json import sealed
from common.tensor_files import load_tensors, save_tensors
from pipelines.options import read_recipe
from stage1_vq.train import Stage1Config, train_stage1
from stage2_prior.train import Stage2Config, train_stage2
from tests.test_earlier_builds import HERE, pictures

DATA = {"stage1": ("data.path", "images"), "stage2": ("codes", "shards")}


@pytest.fixture(params=["stage1", "stage2"])
def stage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder to work in with a run at step 4 and its data."""
    shutil.copytree(HERE / "begun" / request.param, tmp_path / "run")
    shutil.copytree(HERE / "shards", tmp_path / "shards")
    pictures(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return request.param


def train(stage: str, *changes: str, recipe: str = "run/config.yaml") -> None:
    """Gives the run's command again, with some fields changed."""
    arguments = ["--config", recipe, "--run", "run", *changes]
    if stage == "stage1":
        train_stage1(*read_recipe("train-stage1", Stage1Config, "stage1", arguments))
    else:
        config, run = read_recipe("train-stage2", Stage2Config, "stage2", arguments)
        train_stage2(config, Path(config.codes), run)


def steps_done() -> int:
    return max(json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines())


def test_it_goes_on_after_what_decides_nothing_and_is_refused_after_what_does(stage: str):
    field, data = DATA[stage]
    train(stage, "--train.steps", "5", "--train.validate_every", "5", "--train.workers", "1", "--train.save_every", "9")
    Path(data).rename("moved")
    train(stage, "--train.steps", "6", f"--{field}", "moved")
    assert steps_done() == 6
    for name, value in (("batch_size", "6"), ("seed", "1"), ("learning_rate", "0.1"), ("precision", "bf16")):
        with pytest.raises(UserError, match=rf"config: train.{name} was .* and is now '?{value}'?; give the former"):
            train(stage, "--train.steps", "8", f"--train.{name}", value)
    assert steps_done() == 6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_it_goes_on_compiled_and_as_it_was(stage: str):
    train(stage, "--train.steps", "6", "--train.compile", "true")
    train(stage, "--train.steps", "8")
    assert steps_done() == 8


def test_other_data_in_the_same_place_is_refused_until_the_record_is_taken_away(stage: str):
    field, data = DATA[stage]
    train(stage, "--train.steps", "5")
    if stage == "stage1":
        Path("images/dark/03.png").rename("images/light/03a.png")
    else:
        index = json.loads(Path("shards/index.json").read_text())
        shard = Path("shards", index["shards"][0]["file"])
        tensors = load_tensors(shard)
        save_tensors({**tensors, "names": tensors["names"].flip(0)}, shard)
        index["shards"][0]["sha256"] = sha256_of_file(shard)
        write_json(Path("shards/index.json"), sealed(index))
    with pytest.raises(
        UserError, match=rf"config: {field}='{data}' holds something else than when the run began; .* run"
    ):
        train(stage, "--train.steps", "6")
    Path("run/run.json").unlink()
    train(stage, "--train.steps", "6")
    assert steps_done() == 6


def test_what_was_moved_before_there_was_a_record_is_told_how_to_go_on(stage: str):
    field, data = DATA[stage]
    Path(data).rename("moved")
    with pytest.raises(UserError, match=rf"write the new {field} into run/config.yaml"):
        train(stage, f"--{field}", "moved")
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    (config["data"] if stage == "stage1" else config)[field.rpartition(".")[2]] = "moved"
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    train(stage, "--train.steps", "5")
    assert steps_done() == 5


def test_the_run_folder_of_the_other_stage_is_refused_by_name(stage: str):
    shutil.copy("run/config.yaml", "recipe.yaml")
    other, name = {"stage1": ("stage2", "stage two"), "stage2": ("stage1", "stage one")}[stage]
    shutil.rmtree("run")
    shutil.copytree(HERE / "begun" / other, "run")
    with pytest.raises(UserError, match=rf"^run is a run of {name}, and this is"):
        train(stage, recipe="recipe.yaml")
    assert not Path("run/run.json").exists()
