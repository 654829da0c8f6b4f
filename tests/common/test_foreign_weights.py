"""Published files are read where their projects put the weights, and never run."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.foreign_weights import first_few, read_original_config, read_weights
from common.tensor_files import save_tensors

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}


def saved(content: Any, tmp_path: Path) -> Path:
    path = tmp_path / "file.ckpt"
    torch.save(content, path)
    return path


def assert_read(weights: dict[str, Tensor]) -> None:
    assert weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in WEIGHTS.items())


@pytest.mark.parametrize(
    ("content", "places"),
    [
        (WEIGHTS, ()),
        (WEIGHTS, ("state_dict",)),
        ({"state_dict": WEIGHTS, "epoch": 3}, ("state_dict",)),
        ({"model": {"b": torch.zeros(1)}, "ema": WEIGHTS}, ("ema", "model")),
        ({"model": WEIGHTS, "steps": 7}, ("ema", "model")),
        ({"trainer": {"vae_local": WEIGHTS, "other": {}}}, ("trainer.vae_local",)),
        ({"model": {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}}, ("model",)),
        ({f"_orig_mod.module.{name}": tensor for name, tensor in WEIGHTS.items()}, ()),
        ({"a._orig_mod.weight": WEIGHTS["a.weight"], "b": WEIGHTS["b"]}, ()),
        ({"n_averaged": torch.tensor(7), **{f"module.{name}": tensor for name, tensor in WEIGHTS.items()}}, ()),
        ({"state_dict": WEIGHTS, "best": np.float64(0.5), "curve": np.zeros((2, 3))}, ("state_dict",)),
        ({"state_dict": WEIGHTS, "saved_in": Path("/runs/a")}, ("state_dict",)),
    ],
    ids=[
        "bare",
        "bare, not nested",
        "nested",
        "the better of two",
        "the other",
        "deep",
        "data parallel",
        "compiled and data parallel",
        "a part compiled",
        "averaged",
        "beside numbers of NumPy",
        "beside a path",
    ],
)
def test_weights_are_found_in_their_place(content, places, tmp_path):
    assert_read(read_weights(saved(content, tmp_path), places))


def test_safetensors_are_read(tmp_path):
    save_tensors(WEIGHTS, tmp_path / "w.safetensors")
    assert_read(read_weights(tmp_path / "w.safetensors", ("state_dict",)))


def test_a_foreign_class_is_refused_by_its_name(tmp_path):
    path = saved({"model": WEIGHTS, "took": timedelta(hours=1)}, tmp_path)
    with pytest.raises(UserError, match=r"file.ckpt contains datetime.timedelta: to load it would run code"):
        read_weights(path, ("model",))


def test_a_file_that_holds_its_scripts_command_line_is_read_all_the_same(tmp_path):
    path = saved({"model": WEIGHTS, "args": argparse.Namespace(lr=1, hier="top")}, tmp_path)
    assert_read(read_weights(path, ("model",)))


class Trap:
    def __reduce__(self) -> Any:
        return (print, ("the file ran code",))


def test_code_in_a_file_does_not_run(tmp_path, capsys):
    path = saved({"state_dict": WEIGHTS, "trap": Trap()}, tmp_path)
    with pytest.raises(UserError, match="would run code from the file, so it is refused"):
        read_weights(path, ("state_dict",))
    assert "ran code" not in capsys.readouterr().out


def test_a_lightning_file_names_its_callback_and_is_read_all_the_same(tmp_path, monkeypatch):
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = {"best_model_score": torch.tensor(0.5), "best_model_path": "last.ckpt"}
    path = saved({"state_dict": WEIGHTS, "callbacks": {module.ModelCheckpoint: state}}, tmp_path)
    monkeypatch.undo()  # the reader has no Lightning
    assert_read(read_weights(path, ("state_dict",)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected named tensors"),
        ({}, "holds a dict, expected named tensors"),
        (
            {"epoch": 1, "weights": WEIGHTS},
            r"holds 'epoch' \(int\), 'weights' \(dict\) where only tensors are expected, ",
        ),
    ],
)
def test_a_file_of_something_else_is_refused(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_weights(saved(content, tmp_path), ("state_dict", "model"))


@pytest.mark.parametrize("name", ["cut.ckpt", "cut.safetensors", "empty.pt", "text.pt", "other text.pt"])
def test_a_damaged_file_is_refused(name, tmp_path):
    path = tmp_path / name
    if name == "cut.safetensors":
        save_tensors(WEIGHTS, path)
    elif name == "cut.ckpt":
        torch.save(WEIGHTS, path)
    content = path.read_bytes() if path.exists() else b""
    texts = {"text.pt": b"no weights", "other text.pt": b"hello"}  # h: what the unpickler has stored under that number
    path.write_bytes(texts.get(name, content[: len(content) // 2]))
    with pytest.raises(UserError, match="is no file of weights, or damaged"):
        read_weights(path)


@pytest.mark.parametrize("name", ["w.ckpt", "w.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "is a Git LFS pointer.*git lfs pull"),
        ("<!DOCTYPE html><html><head><title>Virus scan warning</title></head></html>", "is a web page.*download anew"),
    ],
)
def test_what_stands_in_place_of_the_weights_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} {message}"):
        read_weights(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*nothing.ckpt; give the file with the weights"):
        read_weights(tmp_path / "nothing.ckpt")
    with pytest.raises(UserError, match=r"there is no file .*nothing.yaml; give the original's config"):
        read_original_config(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match=r"there is no file .*; give the original's config"):
        read_original_config(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{embed_dim: 4, ddconfig: {ch: 8}}",
        "model: {target: taming.models.vqgan.VQModel, params: {embed_dim: 4, ddconfig: {ch: 8}}}\ndata: {}",
        "target: some.class\nparams: {embed_dim: 4, ddconfig: {ch: 8}}",
        "model: {class_path: some.VQModel, init_args: {embed_dim: 4, ddconfig: {ch: 8}}}\ntrainer: {devices: 8}",
        json.dumps({"embed_dim": 4, "ddconfig": {"ch": 8}}),
    ],
    ids=["flat", "taming", "params", "lightning", "json"],
)
def test_constructor_arguments_are_found_in_a_config(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    assert read_original_config(tmp_path / "config.yaml") == {"embed_dim": 4, "ddconfig": {"ch": 8}}


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "{a: 1e-05, b: -2E+3, c: 1.5e-8, d: 1e, e: e5, f: 12, g: 1.0e5, h: .5E3, i: 4.e2, j: .e5}"
    )
    expected = {"a": 1e-5, "b": -2000.0, "c": 1.5e-8, "d": "1e", "e": "e5", "f": 12}
    expected |= {"g": 100000.0, "h": 500.0, "i": 400.0, "j": ".e5"}
    assert read_original_config(tmp_path / "config.yaml") == expected


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is neither YAML nor JSON"), ("7", "holds a int, expected the")]
)
def test_a_config_of_something_else_is_refused(text, message, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_original_config(tmp_path / "config.yaml")


def test_lists_are_cut_short():
    assert first_few(["a", "b", "c"]) == "a, b, c"
    assert first_few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
