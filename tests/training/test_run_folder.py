from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from common.errors import UserError
from common.runs import stage_of_run
from tests.processes import Processes
from tests.training.toy import toy_config, toy_fit, toy_program
from training.config import TrainConfig
from training.run_folder import (
    FREE_FIELDS,
    RunFacts,
    check_stage,
    defaults_of,
    flat,
    open_run_folder,
    write_config,
)

CONFIG = {
    "model": {"kind": "vqvae", "widths": (64, 128), "attention": None},
    "data": {"path": Path("images")},
    "train": {"steps": 10, "learning_rate": 3e-4, "workers": 2},
}


def with_train(**changes):
    return {**CONFIG, "train": {**CONFIG["train"], **changes}}


def test_the_config_is_written_as_plain_yaml(tmp_path: Path):
    open_run_folder(tmp_path / "runs" / "a")
    write_config(tmp_path / "runs" / "a", CONFIG, continued=False)
    read = yaml.safe_load((tmp_path / "runs" / "a" / "config.yaml").read_text())
    assert read["model"]["widths"] == [64, 128]
    assert read["data"]["path"] == "images"
    assert read["train"]["learning_rate"] == 3e-4


def test_the_same_config_continues_and_free_fields_may_change(tmp_path: Path):
    write_config(tmp_path, CONFIG, continued=False)
    write_config(tmp_path, CONFIG, continued=True)
    write_config(tmp_path, {**CONFIG, "data": {"path": Path("images"), "max_bad_share": 0.05}}, continued=True)
    write_config(tmp_path, with_train(steps=20, workers=8), continued=True)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["steps"] == 20


def test_another_config_is_refused_by_the_names_of_its_fields(tmp_path: Path):
    write_config(tmp_path, CONFIG, continued=False)
    other = {**with_train(learning_rate=1e-3, steps=20), "model": {"kind": "vqvae", "widths": (64, 128, 256)}}
    with pytest.raises(UserError) as caught:
        write_config(tmp_path, other, continued=True)
    message = str(caught.value)
    assert "train.learning_rate was 0.0003 and is now 0.001" in message
    assert "model.widths was [64, 128] and is now [64, 128, 256]" in message
    assert "train.steps" not in message
    assert "another --run folder" in message
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["learning_rate"] == 3e-4


def test_a_run_without_checkpoint_starts_anew_with_any_config(tmp_path: Path):
    write_config(tmp_path, CONFIG, continued=False)
    write_config(tmp_path, with_train(learning_rate=1e-3), continued=False)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["learning_rate"] == 1e-3


def test_an_edited_config_is_one_sentence(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("train: [1, 2")
    with pytest.raises(UserError, match="is not valid YAML"):
        write_config(tmp_path, CONFIG, continued=True)


# ---- what a later version adds -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Nearest:
    kind: Literal["nearest"] = "nearest"
    size: int = 512
    revive_below: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Finite:
    kind: Literal["finite"] = "finite"
    levels: tuple[int, ...] = (8, 8)


@dataclass(frozen=True, kw_only=True)
class Config:
    path: str
    quantizer: Nearest | Finite = field(default_factory=lambda: Nearest(size=64))
    extra: Nearest | Finite = field(default_factory=Nearest)


def begin(run: Path, config: Config, *without: str) -> None:
    """A run of a version that did not know the fields `without`."""
    write_config(run, asdict(config), continued=False)
    values = asdict(config)
    for name in without:
        group, _, leaf = name.rpartition(".")
        del (values[group] if group else values)[leaf]
    (run / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    (run / "run.json").unlink()


def go_on(run: Path, config: Config, **data: str) -> None:
    write_config(run, asdict(config), RunFacts(defaults=defaults_of(config), data=lambda: data), continued=True)


def test_defaults_inside_a_config_are_those_of_its_class():
    assert defaults_of(Config(path="a", quantizer=Finite(levels=(3,)))) == {
        "quantizer.kind": "nearest",
        "quantizer.levels": (8, 8),
        "extra.kind": "nearest",
        "extra.size": 512,
        "extra.revive_below": 0.0,
    }


def test_a_field_that_was_not_there_had_its_default(tmp_path: Path):
    begin(tmp_path, Config(path="a"), "quantizer.revive_below", "extra")
    with pytest.raises(UserError, match=r"config: quantizer.revive_below was 0.0 and is now 0.5; give"):
        go_on(tmp_path, Config(path="a", quantizer=Nearest(size=64, revive_below=0.5)))
    with pytest.raises(UserError, match=r"extra.kind was 'nearest' and is now 'finite'"):
        go_on(tmp_path, Config(path="a", extra=Finite()))
    go_on(tmp_path, Config(path="a"))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["quantizer"]["revive_below"] == 0.0


def test_a_field_that_is_no_longer_there_is_named_if_it_was_not_none(tmp_path: Path):
    begin(tmp_path, Config(path="a"))
    (tmp_path / "config.yaml").write_text((tmp_path / "config.yaml").read_text() + "old: 3\nolder: null\n")
    with pytest.raises(UserError, match=r"config: old was 3 and is now None; give"):
        go_on(tmp_path, Config(path="a"))


# ---- data ----------------------------------------------------------------------------------------------------------


def test_data_may_move_but_not_change(tmp_path: Path):
    write_config(tmp_path, asdict(Config(path="a")), RunFacts(data=lambda: {"path": "1f"}), continued=False)
    go_on(tmp_path, Config(path="b"), path="1f")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["path"] == "b"
    with pytest.raises(UserError) as caught:
        go_on(tmp_path, Config(path="b"), path="2e")
    assert str(caught.value) == (
        f"{tmp_path} was started with another config: path='b' holds something else than when the run began; give the "
        f"former values to continue it, which --config {tmp_path}/config.yaml has, or delete {tmp_path}/run.json to go "
        "on with other data, or name another --run folder to start anew"
    )
    (tmp_path / "run.json").unlink()
    go_on(tmp_path, Config(path="b"), path="2e")
    go_on(tmp_path, Config(path="c"), path="2e")


def test_what_was_not_recorded_is_known_by_its_path_only(tmp_path: Path):
    begin(tmp_path, Config(path="a"))
    with pytest.raises(UserError, match=r"path was 'a' and is now 'b'; .* not recorded .* write the new path into"):
        go_on(tmp_path, Config(path="b"), path="1f")
    (tmp_path / "config.yaml").write_text((tmp_path / "config.yaml").read_text().replace("path: a", "path: b"))
    go_on(tmp_path, Config(path="b"), path="1f")
    go_on(tmp_path, Config(path="c"), path="1f")  # now it is recorded


# ---- free fields and stages ----------------------------------------------------------------------------------------


def test_every_field_of_a_training_is_free_or_decides():
    deciding = {
        "batch_size", "optimizer", "learning_rate", "betas", "weight_decay", "warmup_steps", "schedule",
        "final_learning_rate", "max_grad_norm", "skip_grad_norm", "precision", "ema_decay", "seed",
    }  # fmt: skip
    free = {name.removeprefix("train.") for name in FREE_FIELDS if name.startswith("train.")}
    assert free | deciding == set(flat(asdict(TrainConfig())))
    assert not free & deciding


@pytest.mark.parametrize("recorded", [True, False])
def test_a_folder_of_the_other_stage_is_refused_by_name(tmp_path: Path, recorded: bool):
    for stage, config in (("stage one", {"model": 1, "data": 2}), ("stage two", {"model": 1, "label_dropout": 0.1})):
        run = tmp_path / stage
        run.mkdir()
        write_config(run, config, RunFacts(stage=stage), continued=False)
        if not recorded:
            (run / "run.json").unlink()
        assert stage_of_run(run) == stage
        check_stage(run, stage)
    with pytest.raises(UserError, match=r"stage one is a run of stage one, and this is stage two: name another"):
        check_stage(tmp_path / "stage one", "stage two")
    check_stage(tmp_path / "none", "stage two")
    assert stage_of_run(tmp_path) is None


# ---- whose folder it is -------------------------------------------------------------------------------------------


def test_a_second_training_in_the_same_run_is_refused_and_one_after_a_kill_goes_on(
    processes: Processes, tmp_path: Path
):
    config = {"steps": 1_000_000, "log_every": 1, "save_every": 3}
    first = processes.start(toy_program, tmp_path / "run", config)
    first.wait_for("step 7/")
    with pytest.raises(UserError) as refused:
        toy_fit(tmp_path / "run", toy_config(steps=12))
    first.kill()
    first.wait()
    assert re.match(
        rf"another process is writing to {tmp_path}/run \(zellige train, pid {first.pid}, on \S+, since [\d: -]+\);",
        str(refused.value),
    )
    done = max(int(path.name.removeprefix("step_")) for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert done >= 6
    processes.start(toy_program, tmp_path / "run", config).wait_for(f"step {done + 1}/")


@pytest.mark.parametrize("foreign", ["cat.png", "sub/cat.png", "config.yaml", "index.json"])
def test_a_run_is_not_begun_among_files_of_others(tmp_path: Path, foreign: str):
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).write_text("mine")
    with pytest.raises(UserError, match=f"holds {foreign}, which this command did not write; name another --run"):
        toy_fit(tmp_path, toy_config(steps=1))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / foreign]


def test_logs_of_a_job_system_may_lie_in_the_run(tmp_path: Path):
    for name in ("slurm-12.out", "logs/12.err", ".hydra/overrides", "train.sbatch"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    toy_fit(tmp_path, toy_config(steps=2))
    assert toy_fit(tmp_path, toy_config(steps=4)).steps_done == 4
    assert (tmp_path / "slurm-12.out").exists()
