from __future__ import annotations

import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

import configs
from common.errors import UserError
from images.encoding import EncodeConfig
from pipelines.devices import open_device
from stage1_vq.encode import encode
from tests.training.toy import toy_config, toy_fit
from training.launcher import asked_shards, check_launcher

ALWAYS_SAID = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}


def launched(monkeypatch: pytest.MonkeyPatch, **asked: str) -> None:
    for name, value in {**ALWAYS_SAID, **asked}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("asked", "changes"),
    [
        ({}, {}),
        ({}, {"precision": "bf16", "compile": True, "accumulate": 4}),  # a launcher cannot say that nothing is asked
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "bf16"}),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {"accumulate": 4}),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, {"accumulate": 4}),
    ],
)
def test_what_agrees_with_the_config_passes(monkeypatch: pytest.MonkeyPatch, asked, changes):
    launched(monkeypatch, **asked)
    check_launcher(toy_config(**changes))


@pytest.mark.parametrize(
    ("asked", "changes", "message"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            {},
            r"^accelerate launch asks for mixed precision bf16, and train.precision is no: give --train.prec",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "fp16"}, "train.precision is fp16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "precision fp8, and train.precision is no: start it with"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"compile": True}, "--dynamo_backend inductor, which here"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            {"accumulate": 2},
            "STEPS=4, and train.accumulate is 2: give --train.accumulate 4",
        ),
    ],
)
def test_what_the_config_does_not_say_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked, changes, message: str
):
    launched(monkeypatch, **asked)
    with pytest.raises(UserError, match=message):
        toy_fit(tmp_path / "run", toy_config(**changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "multi_node"])
def test_our_configs_for_accelerate_ask_for_nothing_that_is_refused(monkeypatch: pytest.MonkeyPatch, name: str):
    path = Path(str(files(configs))) / "accelerate" / f"{name}.yaml"
    given = launch_command_parser().parse_args(["--config_file", str(path), "-m", "zellige"])
    given, *_ = _validate_launch_command(given)
    assert given.num_processes == (64 if name == "multi_node" else 8)
    asked = prepare_multi_gpu_env(given)
    launched(monkeypatch, **{key: asked[key] for key in asked if key.startswith(("ACCELERATE_", "FSDP_"))})
    check_launcher(toy_config(precision="bf16"))
    assert (asked_shards() is not None) == (name == "fsdp2")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            "mixed precision bf16, which only .* no; to sample .* --precision",
        ),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend inductor, which only trainings have"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP .*, which only trainings have: .* --multi_gpu"),
    ],
)
def test_other_commands_refuse_what_only_trainings_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked, message):
    launched(monkeypatch)
    open_device("cpu")
    launched(monkeypatch, **asked)
    for command in (
        lambda: open_device("cpu"),
        lambda: encode(EncodeConfig(model=str(tmp_path), out=str(tmp_path / "codes"), device="cpu")),
    ):
        with pytest.raises(UserError, match=f"^accelerate launch asks for .*{message}"):
            command()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("distributed_type: 'NO'\nmixed_precision: bf16\n", "accelerate launch asks for mixed precision bf16"),
        ("distributed_type: FSDP\nmixed_precision: 'no'\n", "accelerate launch asks for FSDP"),
    ],
)
def test_what_a_users_default_config_asks_for_is_refused(tmp_path: Path, settings: str, message: str):
    config = tmp_path / "default_config.yaml"
    machine = "compute_environment: LOCAL_MACHINE\nnum_machines: 1\nnum_processes: 1\nmachine_rank: 0\n"
    config.write_text(machine + settings)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    program = ["-m", "tests.training.toy", str(tmp_path / "run")]
    done = subprocess.run([*launch, *program], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "run").exists()
