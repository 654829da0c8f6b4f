from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from tests.training.toy import ToyModel
from training.checkpoint import Checkpoints
from training.optimizers import load_optimizer_tensors, optimizer_tensors


def saved(folder: Path, *steps: int, keep_newest: int = 10, best_step: int | None = None) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep_newest)
    for step in steps:
        tensors = {"model": {"weight": torch.full((50,), float(step))}, "optimizer": {"a/b": torch.zeros(3)}}
        checkpoints.save(step, tensors, {"step": step}, best_step)
    return checkpoints


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_what_is_saved_comes_back(tmp_path: Path):
    checkpoints = saved(tmp_path, 5, 12)
    assert checkpoints.newest_good() == (12, [])
    assert checkpoints.state(12) == {"step": 12}
    assert torch.equal(checkpoints.tensors(12, "model")["weight"], torch.full((50,), 12.0))


def test_the_newest_and_the_best_are_kept(tmp_path: Path):
    checkpoints = saved(tmp_path, *range(10, 60, 10), keep_newest=2, best_step=20)
    assert checkpoints.steps() == [20, 40, 50]


def test_milestones_are_kept_for_ever_and_the_next_run_keeps_them_too(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep_newest=2, keep_every=20)
    for step in range(10, 80, 10):
        checkpoints.save(step, {"model": {"weight": torch.zeros(3)}}, {}, 30)
    assert checkpoints.steps() == [20, 30, 40, 60, 70]
    truncate(checkpoints.path(60) / "model.safetensors")  # damaged, and ahead of where the run goes on
    checkpoints.save(50, {"model": {"weight": torch.zeros(3)}}, {}, None)
    assert checkpoints.steps() == [20, 40, 50]


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("model.safetensors", truncate, "the checksum of model.safetensors differs"),
        ("optimizer.safetensors", flip_a_bit, "the checksum of optimizer.safetensors differs"),
        ("state.json", Path.unlink, "state.json is missing"),
        ("manifest.json", truncate, "manifest.json is missing or unreadable"),
        ("manifest.json", Path.unlink, "manifest.json is missing or unreadable"),
        ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is missing or unreadable"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path: Path, name: str, damage, sentence: str):
    checkpoints = saved(tmp_path, 5, 12)
    damage(checkpoints.path(12) / name)
    assert checkpoints.newest_good() == (5, [f"checkpoint {checkpoints.path(12)} is damaged ({sentence})"])


def test_all_damaged_is_an_error_that_says_what_to_do(tmp_path: Path):
    checkpoints = saved(tmp_path, 5, 12)
    for step in (5, 12):
        truncate(checkpoints.path(step) / "model.safetensors")
    with pytest.raises(
        UserError, match=r"every checkpoint .* is damaged: .*step_00000012.*step_00000005.*delete that folder"
    ):
        checkpoints.newest_good()


def test_no_checkpoint_is_no_error(tmp_path: Path):
    assert Checkpoints(tmp_path / "none", 3).newest_good() == (None, [])


def test_damaged_checkpoints_ahead_of_the_run_are_removed_by_the_next_save(tmp_path: Path):
    checkpoints = saved(tmp_path, 5, 12)
    truncate(checkpoints.path(12) / "model.safetensors")
    saved(tmp_path, 8)
    assert checkpoints.steps() == [5, 8]


def test_a_refused_write_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints = saved(tmp_path, 5)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.checkpoint.save_tensors", full)
    with pytest.raises(UserError, match=r"the disk is full: .*step_00000008 was not written"):
        saved(tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]
    assert checkpoints.newest_good() == (5, [])


def stepped(model: ToyModel, groups: int) -> torch.optim.Optimizer:
    weights = list(model.parameters())
    parts = [{"params": weights[g::groups]} for g in range(groups)]
    optimizer = torch.optim.AdamW(parts, lr=0.1, fused=True)
    torch.manual_seed(1)
    for _ in range(3):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_optimiser_state_goes_by_the_names_of_the_weights(tmp_path: Path):
    model = ToyModel()
    optimizer = stepped(model, groups=2)
    tensors = optimizer_tensors(optimizer, model)
    assert "exp_avg/layers.0.weight" in tensors
    assert len(tensors) == 3 * len(list(model.parameters()))
    other = torch.optim.AdamW([{"params": list(model.parameters())[::-1]}], lr=0.1, fused=True)  # another order
    load_optimizer_tensors(other, model, tensors)
    for weight in model.parameters():
        for entry, value in optimizer.state[weight].items():
            assert torch.equal(other.state[weight][entry], value)


def test_state_files_are_text(tmp_path: Path):
    checkpoints = saved(tmp_path, 5)
    manifest = json.loads((checkpoints.path(5) / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["model.safetensors", "optimizer.safetensors", "state.json"]
