from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch

from common.errors import UserError
from common.model_io import load_pretrained, model_folder, said_by, weight_types
from common.tensor_files import load_tensors, save_tensors
from tests.training.toy import ToyModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return ToyModel(width=8).save_pretrained(tmp_path / "run" / "model")


def test_a_saved_model_comes_back_equal_and_at_rest(tmp_path: Path):
    model = ToyModel(width=8, dropout=0.5)
    model.input_mean.normal_()
    loaded = ToyModel.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.arguments() == {"width": 8, "dropout": 0.5}
    assert not loaded.training
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_saving_twice_writes_the_same_bytes(tmp_path: Path):
    model = ToyModel()
    first, second = model.save_pretrained(tmp_path / "a"), model.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_fingerprint_tells_weights_buffers_and_arguments_apart(tmp_path: Path):
    torch.manual_seed(0)
    model = ToyModel()
    seen = {model.fingerprint()}
    model.layers[0].bias.data[0] += 1
    seen.add(model.fingerprint())
    model.input_mean[0] += 1
    seen.add(model.fingerprint())
    model.dropout = 0.1
    seen.add(model.fingerprint())
    assert len(seen) == 4
    model.pending += 1  # not part of the model at rest
    assert model.fingerprint() in seen


def test_a_field_that_a_later_version_adds_with_a_default_changes_no_fingerprint():
    @dataclass(frozen=True, kw_only=True)
    class Inner:
        kind: Literal["inner"] = "inner"
        size: int = 4

    @dataclass(frozen=True, kw_only=True)
    class Config:
        width: int
        inner: Inner = field(default_factory=Inner)

    @dataclass(frozen=True, kw_only=True)
    class LaterInner(Inner):
        decay: float = 0.99

    @dataclass(frozen=True, kw_only=True)
    class LaterConfig(Config):
        inner: Inner = field(default_factory=LaterInner)
        bias: bool = False

    assert said_by(Config(width=3)) == said_by(LaterConfig(width=3)) == {"width": 3, "inner": {"kind": "inner"}}
    assert said_by(LaterConfig(width=3, bias=True)) != said_by(Config(width=3))
    changed = said_by(LaterConfig(width=3, inner=LaterInner(decay=0.5)))
    assert changed == {"width": 3, "inner": {"kind": "inner", "decay": 0.5}}


def test_tied_weights_can_be_saved(tmp_path: Path):
    model = ToyModel()
    model.layers[1].weight = model.layers[1].bias
    loaded = ToyModel.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert torch.equal(loaded.layers[1].weight, model.layers[1].bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_comes_back_in_the_type_that_it_was_saved_in(dtype: torch.dtype, tmp_path: Path):
    model = ToyModel().to(dtype)
    model.register_buffer("steps", torch.tensor([3, 2**40]))
    folder = model.save_pretrained(tmp_path / "model")
    loaded = Counting.from_pretrained(folder)
    assert {tensor.dtype for name, tensor in loaded.state_dict().items() if name != "steps"} == {dtype}
    assert torch.equal(loaded.steps, torch.tensor([3, 2**40]))
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.layers[0].weight.requires_grad
    assert (loaded.save_pretrained(tmp_path / "again") / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


class Counting(ToyModel):
    """With a buffer of whole numbers."""

    steps: torch.Tensor

    def __init__(self, width: int = 16, dropout: float = 0.0):
        super().__init__(width, dropout)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))


def test_each_weight_has_its_own_type(tmp_path: Path):
    model = ToyModel()
    model.layers[0].to(torch.bfloat16)
    model.input_mean = model.input_mean.to(torch.float16)
    loaded = ToyModel.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert weight_types(loaded) == weight_types(model)
    assert loaded.layers[0].weight.dtype == torch.bfloat16
    assert loaded.layers[4].weight.dtype == torch.float32
    assert loaded.fingerprint() == model.fingerprint()


class Tied(ToyModel):
    """The gain of the norm is its bias too."""

    def __init__(self, width: int = 16, dropout: float = 0.0):
        super().__init__(width, dropout)
        self.layers[1].weight = self.layers[1].bias


def test_tied_weights_are_tied_in_another_type_too(tmp_path: Path):
    model = Tied().bfloat16()
    loaded = Tied.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert loaded.layers[1].weight is loaded.layers[1].bias
    assert loaded.layers[1].weight.dtype == torch.bfloat16
    assert loaded.fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("steps", torch.float32, r"steps is of torch.float32, expected torch.int64"),
        ("input_mean", torch.int64, r"input_mean is of torch.int64, expected one of torch.float32, torch.float64, "),
        ("input_mean", torch.float8_e4m3fn, r"input_mean is of torch.float8_e4m3fn, expected one of torch.float32"),
    ],
)
def test_what_loading_would_round_or_nothing_can_compute_with_is_refused(
    tmp_path: Path, name: str, dtype: torch.dtype, message: str
):
    folder = Counting().save_pretrained(tmp_path / "model")
    weights = load_tensors(folder / "model.safetensors")
    save_tensors({**weights, name: weights[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        Counting.from_pretrained(folder)


def test_the_fingerprint_of_a_float32_folder_is_what_it_was(tmp_path: Path):
    """Priors record it of their autoencoder, and files of theirs."""
    model = ToyModel(width=2)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) / 8 + number)
    known = "309e5b3b76750d4e3df005520ccdc630d9961870a957403d215d12587cab2e75"
    assert model.fingerprint() == known
    assert ToyModel.from_pretrained(model.save_pretrained(tmp_path / "model")).fingerprint() == known


def test_a_run_folder_stands_for_its_model(folder: Path):
    assert model_folder(folder.parent) == folder
    assert isinstance(load_pretrained(folder.parent, {"toy": ToyModel}), ToyModel)


def test_another_kind_is_named(folder: Path):
    with pytest.raises(UserError, match=r"holds a model of kind 'toy', expected one of: pixelcnn, transformer"):
        load_pretrained(folder, {"transformer": ToyModel, "pixelcnn": ToyModel})


def test_a_missing_folder_is_named_and_never_looked_for_on_the_hub(tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no folder .*absent"):
        ToyModel.from_pretrained(tmp_path / "absent")


def test_a_name_that_no_hub_could_have_is_refused_without_asking():
    with pytest.raises(
        UserError, match=r"^'my models/photos' is neither a local folder nor a model that the hub would"
    ):
        ToyModel.from_pretrained("my models/photos")


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path: Path):
    with pytest.raises(UserError, match=r"is not a model folder: it holds no config.json"):
        ToyModel.from_pretrained(tmp_path)


def test_truncated_weights_are_named(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        ToyModel.from_pretrained(folder)


def test_missing_weights_are_named(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model.safetensors"):
        ToyModel.from_pretrained(folder)


@pytest.mark.parametrize("change", [{"width": 9}, {"depth": 3}])
def test_weights_that_do_not_fit_the_config_are_refused(folder: Path, change: dict[str, int]):
    description = json.loads((folder / "config.json").read_text())
    description["arguments"].update(change)
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"cannot be read as a toy model by this version"):
        ToyModel.from_pretrained(folder)


def test_a_pointer_in_place_of_the_weights_is_named(folder: Path):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(
        UserError, match=r"model.safetensors is a Git LFS pointer, not the file itself: run `git lfs pull`"
    ):
        load_pretrained(folder, {ToyModel.kind: ToyModel})
