"""FSDP2: processes with shares of the weights train what processes with all of them do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from benchmarks.processes import Job, difference, images, last, together, train
from common.errors import UserError
from common.model_io import load_pretrained
from tests.training.toy import ToyData, ToyModel, ToyTask, toy_config, toy_fit
from training.checkpoint import Checkpoints
from training.launcher import asked_shards
from training.loop import fit
from training.sharding import check_shares, units_of

SAME = 1e-5  # largest difference of a tensor's entries after the last step, as a part of the largest entry of all

# ---- what is shared -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Whole(Block):
    stays_whole = True


def names_of_units(model: nn.Module) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[unit] for unit in units_of(model)]


def test_units_are_the_innermost_blocks_in_lists():
    stage = nn.Sequential(Block(2), nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2), Block(2), nn.ModuleList([stage, nn.Linear(2, 2)]))
    # The layers of a Block are a list, but of single layers; its Sequential is no child of a list.
    assert names_of_units(model) == ["1", "2.0.0"]


def test_what_stays_whole_is_in_no_unit_nor_beside_one():
    within = Block(2)
    within.layers.append(Whole(2))
    assert names_of_units(nn.ModuleList([Whole(2), Block(2), nn.ModuleList([nn.Sequential(Whole(2))]), within])) == [
        "1"
    ]


def test_blocks_that_share_a_weight_and_frozen_ones_are_no_units():
    tied, other, frozen = Block(2), Block(2), Block(2).requires_grad_(False)
    other.layers[1].weight = tied.layers[1].weight
    assert names_of_units(nn.ModuleList([tied, other, frozen, Block(2)])) == ["3"]


# ---- what the launcher asks for -------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As `accelerate launch --use_fsdp --fsdp_version 2` asks."""
    said = {
        "VERSION": "2", "SHARDING_STRATEGY": "FULL_SHARD", "RESHARD_AFTER_FORWARD": "true", "OFFLOAD_PARAMS": "false",
        "MIN_NUM_PARAMS": "100000000", "FORWARD_PREFETCH": "false", "USE_ORIG_PARAMS": "true",
        "CPU_RAM_EFFICIENT_LOADING": "true", "SYNC_MODULE_STATES": "true", "ACTIVATION_CHECKPOINTING": "false",
        "ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
    }  # fmt: skip
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in said.items():
        monkeypatch.setenv(f"FSDP_{name}", value)
    return monkeypatch


def test_fsdp2_is_obeyed(asked):
    found = asked_shards()
    assert found is not None
    assert found.reshard_after_forward
    asked.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    found = asked_shards()
    assert found is not None
    assert not found.reshard_after_forward
    asked.setenv("ACCELERATE_USE_FSDP", "false")
    assert asked_shards() is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VERSION", "1", "with FSDP_VERSION=1, expected 2: give --fsdp_version 2"),
        ("OFFLOAD_PARAMS", "true", "with FSDP_OFFLOAD_PARAMS=true, expected false: give --fsdp_offload_params false"),
        ("STATE_DICT_TYPE", "FULL_STATE_DICT", "expected sharded_state_dict: leave --fsdp_state_dict_type out"),
        ("AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "POLICY=SIZE_BASED_WRAP, expected none: leave --fsdp_auto_wrap_p"),
        ("TRANSFORMER_CLS_TO_WRAP", "Block", "expected none: leave --fsdp_transformer_layer_cls_to_wrap out"),
        ("IGNORED_MODULES", "quantizer", "expected none: leave --fsdp_ignored_modules out"),
        ("ACTIVATION_CHECKPOINTING", "true", "expected false: give --fsdp_activation_checkpointing false"),
        ("FORWARD_PREFETCH", "true", "expected false: give --fsdp_forward_prefetch false"),
    ],
)
def test_what_is_not_obeyed_of_fsdp_is_refused(asked, tmp_path: Path, name: str, value: str, message: str):
    asked.setenv(f"FSDP_{name}", value)
    with pytest.raises(UserError, match=f"^accelerate launch asks for FSDP .*{message}"):
        toy_fit(tmp_path / "run", toy_config())
    assert not (tmp_path / "run").exists()


def test_fsdp_without_a_version_is_the_first_one(asked):
    asked.delenv("FSDP_VERSION")
    with pytest.raises(UserError, match="FSDP_VERSION=1, expected 2"):
        asked_shards()


def test_fsdp_with_float16_or_compiled_is_refused(asked, tmp_path: Path):
    with pytest.raises(UserError, match=r"asks for FSDP, and train\.precision is fp16, expected bf16 or no"):
        toy_fit(tmp_path / "run", toy_config(precision="fp16"))
    with pytest.raises(UserError, match=r"asks for FSDP, and train\.compile is true, expected false"):
        toy_fit(tmp_path / "run", toy_config(compile=True))


# ---- two processes, three, and one ----------------------------------------------------------------------------------


class BlockModel(ToyModel):
    """The toy with blocks between its layers, and a weight outside of them that nothing calls."""

    kind = "blocks"

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__(width, dropout)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(()))
        self.tied = nn.Linear(width, 1)
        self.tied.weight = self.layers[4].weight
        self.narrow = nn.ModuleList([nn.Sequential(nn.Linear(width, 1), nn.Tanh())])  # one row, none for others

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.pending += x.detach().mean(0)
        z = self.layers[:4](x - self.input_mean)
        for block in self.blocks:
            z = block(z)
        return self.gain * (self.layers[4](z) + self.narrow[0](z) + self.tied(z)).squeeze(-1)


def train_blocks(run: Path, changes: dict[str, Any]) -> None:
    """Two micro-batches a step, of which one of one process is not finite; a layer learns in every second step."""
    torch.manual_seed(0)
    task = ToyTask(BlockModel(), nan_draws=[25], first_every=2)
    settings = {"steps": 6, "batch_size": 12, "accumulate": 2, "learning_rate": 1e-3, "schedule": "constant"}
    config = toy_config(**{**settings, "validate_every": 6, **changes})
    resolved = {"model": task.model.arguments(), "train": asdict(config)}
    fit(task, ToyData(37, 0.1), ToyData(13), config, run, resolved)


def train_on_a_full_disk(run: Path, changes: dict[str, Any]) -> None:
    """The second process cannot write its shares of step 6. Both say so."""
    real = HuggingFaceStorageWriter.write_data

    def full(writer: HuggingFaceStorageWriter, *arguments: Any) -> Any:
        if dist.get_rank() == 1 and "step_00000006" in str(writer.path):
            raise OSError(28, "No space left on device")
        return real(writer, *arguments)

    HuggingFaceStorageWriter.write_data = full
    try:
        with pytest.raises(UserError, match=r"the disk is full: .*step_00000006 was not written"):
            train_blocks(run, changes)
    finally:
        HuggingFaceStorageWriter.write_data = real


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings of two processes."""
    place = tmp_path_factory.mktemp("runs")
    together(
        2,
        [
            Job(train_blocks, place / "blocks_whole", {}),
            Job(train_blocks, place / "blocks", {}, shares=True),
            Job(train_blocks, place / "blocks_beside", {"save_in_background": True}, shares=True),
            Job(train_on_a_full_disk, place / "full", {"save_in_background": True}, shares=True),
            Job(toy_fit_of, place / "no_blocks", {}, shares=True),
        ],
    )
    return place


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior, and an autoencoder with a codebook and a discriminator; what two processes had saved after half of the
    steps, continued by three."""
    place = tmp_path_factory.mktemp("families")
    images(place)
    prior, codebook = partial(train, "transformer", place), partial(train, "vqgan, adversary", place)
    halves = {"save_every": 3}
    together(
        2,
        [
            Job(prior, place / "prior_whole", halves),
            Job(prior, place / "prior", {**halves, "validate_every": 6}, shares=True),
            Job(codebook, place / "codebook_whole", {}),
            Job(codebook, place / "codebook", halves, shares=True),
        ],
    )
    for name in ("prior_whole", "codebook"):
        halved(place / name, place / f"{name}_on_three")
    together(
        3,
        [
            Job(prior, place / "prior_whole_on_three", halves, shares=True),
            Job(codebook, place / "codebook_on_three", halves, shares=True),
        ],
    )
    return place


def halved(run: Path, copy: Path) -> Path:
    """A run as it was when it had taken three steps of six."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000006")
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["step_00000003"]
    return copy


def toy_fit_of(run: Path, changes: dict[str, Any]) -> None:
    toy_fit(run, toy_config(**changes))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_shares_train_what_whole_weights_do(runs: Path):
    assert difference(runs / "blocks", runs / "blocks_whole") < SAME


def test_a_step_that_is_not_finite_on_one_process_is_skipped_by_all(runs: Path):
    whole, shares = (lines(runs / name) for name in ("blocks_whole", "blocks"))
    assert [line["skipped_steps"] for line in shares if line["split"] == "train"] == [0, 1, 1]
    for line, expected in zip(shares, whole, strict=True):
        assert line.keys() == expected.keys()
        for key in line.keys() - {"split"}:
            assert line[key] == pytest.approx(expected[key], rel=1e-4)


def test_each_process_writes_its_share(runs: Path):
    newest = max((runs / "blocks" / "checkpoints").iterdir())
    files = [load_file(file) for file in sorted((newest / "shares").iterdir())]
    assert not (newest / "model.safetensors").exists()
    for part in ("model/", "ema/", "optimizer/exp_avg/"):
        assert [tuple(file[f"{part}blocks.0.layers.1.weight"].shape) for file in files] == [(8, 16), (8, 16)]
        assert sum(f"{part}layers.0.weight" in file for file in files) == 1  # whole on both, and written once


def test_the_model_of_a_run_is_whole(runs: Path):
    found = load_pretrained(runs / "blocks", {"blocks": BlockModel}).state_dict()
    expected = {name[4:]: tensor for name, tensor in last(runs / "blocks").items() if name.startswith("ema/")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_shares_of_two_processes_go_on_on_one_that_has_all(runs: Path, tmp_path: Path):
    run = halved(runs / "blocks", tmp_path / "run")
    train_blocks(run, {})
    assert difference(run, runs / "blocks_whole") < SAME
    assert (max((run / "checkpoints").iterdir()) / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prior", "codebook"])
def test_shares_of_a_prior_and_of_an_autoencoder_train_what_whole_weights_do(families: Path, name: str):
    assert difference(families / name, families / f"{name}_whole") < SAME


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prior_whole", "codebook"])
def test_what_two_processes_saved_goes_on_on_three(families: Path, name: str):
    assert difference(families / f"{name}_on_three", families / f"{name.partition('_')[0]}_whole") < SAME


def test_a_damaged_share_costs_one_interval(runs: Path, tmp_path: Path, capsys):
    shutil.copytree(runs / "blocks", tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 3)
    assert checkpoints.steps() == [3, 6]
    damaged = max((checkpoints.path(6) / "shares").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    train_blocks(tmp_path / "run", {})
    said = capsys.readouterr().out
    assert f"is damaged (the checksum of shares/{damaged.name} differs); continuing from step 3" in said
    assert difference(tmp_path / "run", runs / "blocks_whole") < SAME


def test_checkpoints_of_shares_beside_the_steps_are_those_between_them(runs: Path):
    one, other = (Checkpoints(runs / name / "checkpoints", 3) for name in ("blocks_beside", "blocks"))
    for step in (3, 6):
        assert one.damage(step) is other.damage(step) is None
        assert one.state(step) == other.state(step)
        for part in (
            "model",
            "ema",
            "optimizer",
        ):  # not byte for byte: a header has no order
            ours, theirs = one.tensors(step, part), other.tensors(step, part)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_whole_checkpoints_beside_the_steps_are_those_between_them(tmp_path: Path):
    for beside in (False, True):
        toy_fit(tmp_path / str(beside), toy_config(steps=6, validate_every=0, save_in_background=beside))
    files = [sorted((tmp_path / name / "checkpoints").rglob("*.*")) for name in ("True", "False")]
    assert len(files[0]) == 10
    for file, expected in zip(*files, strict=True):
        assert file.name == expected.name
        assert file.read_bytes() == expected.read_bytes()


def test_a_full_disk_beside_the_steps_is_said_when_the_next_checkpoint_is_due(tmp_path: Path, monkeypatch):
    def full(tensors: dict[str, Tensor], path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.checkpoint.save_tensors", full)
    task = ToyTask(ToyModel())
    with pytest.raises(UserError, match=r"the disk is full: .*step_00000003 was not written"):
        toy_fit(tmp_path, toy_config(validate_every=0, save_in_background=True), task)
    assert len(task.ended) == 6


def test_a_full_disk_of_one_process_is_said_by_all_and_leaves_the_checkpoint_before(runs: Path):
    assert Checkpoints(runs / "full" / "checkpoints", 3).newest_good() == (3, [])
    assert not list((runs / "full" / "checkpoints").glob(".*"))


def test_what_reads_all_weights_is_refused():
    task = ToyTask(BlockModel())
    check_shares(task)
    task.reads_weights = "objective.regularisation"
    with pytest.raises(UserError, match=r"FSDP, and objective\.regularisation reads all weights in each step"):
        check_shares(task)


def test_a_model_without_blocks_is_refused(runs: Path):
    said = (runs / "no_blocks").read_text()
    assert said.startswith("accelerate launch asks for FSDP, and a model of kind toy has no blocks")
