"""Runs that begin with the weights of another autoencoder, and parts that stand still."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from common.errors import UserError
from common.model_io import load_pretrained
from common.starting import differing_settings, take_weights
from pipelines.cli import main
from stage1_vq.autoencoders import AUTOENCODERS, Autoencoder, ViTVQGAN, ViTVQGANConfig, VQVAE2Config
from stage1_vq.quantizers import NearestQuantizerConfig
from stage1_vq.train import Stage1Config, train_stage1
from tests.stage1_vq.test_train import MODEL, QUANTIZER, TWO_LEVELS, make_config, squares

__all__ = ["squares"]
LEAST = 1e-12  # a learning rate at which weights stay what they were


def model_of(run: Path) -> Autoencoder:
    return load_pretrained(run, AUTOENCODERS)


def assert_same(one: torch.nn.Module, other: torch.nn.Module, part: str = "") -> None:
    first, second = one.state_dict(), other.state_dict()
    names = [name for name in first if name.startswith(part)]
    assert names
    for name in names:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-7, msg=name)


def gradient_config(path: str, **changes: object) -> Stage1Config:
    """Of a codebook that moves by gradients alone."""
    quantizer = NearestQuantizerConfig(codebook_size=16, dim=4, codebook_update="gradient", kmeans_iterations=3)
    return replace(make_config(path), model=replace(MODEL, quantizer=quantizer), **changes)  # type: ignore[arg-type]


def test_a_run_begins_with_all_weights_of_another_codebook_included(squares: str, tmp_path: Path, capsys):
    train_stage1(gradient_config(squares), tmp_path / "first")
    config = gradient_config(squares, start_from=str(tmp_path / "first"))
    config = replace(config, train=replace(config.train, steps=1, learning_rate=LEAST))
    train_stage1(config, tmp_path / "second")
    first, second = model_of(tmp_path / "first"), model_of(tmp_path / "second")
    assert_same(first, second, "encoder")
    assert_same(first, second, "quantizer.codebook")
    assert_same(first, second, "decoder")
    tensors = len(first.state_dict())
    assert f"note: from {tmp_path / 'first'}, {first!r}: {tensors} tensors kept\n" in capsys.readouterr().out


def test_what_a_begun_run_began_with_may_be_gone(squares: str, tmp_path: Path):
    train_stage1(make_config(squares), tmp_path / "first")
    config = replace(make_config(squares), start_from=str(tmp_path / "first"))
    train_stage1(config, tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    longer = replace(config, train=replace(config.train, steps=14))
    assert train_stage1(longer, tmp_path / "second").steps_done == 14
    with pytest.raises(UserError, match="there is no folder"):
        train_stage1(config, tmp_path / "third")


@pytest.mark.parametrize("model", [MODEL, TWO_LEVELS], ids=["vqvae", "vqvae2"])
def test_frozen_parts_stand_still_and_codes_stay(squares: str, tmp_path: Path, model: VQVAE2Config):
    """Moving averages, revival and all: the decoder learns on, and old codes decode with it."""
    train_stage1(replace(make_config(squares), model=model), tmp_path / "first")
    parts = [name for name, _ in model_of(tmp_path / "first").named_children() if not name.startswith("decoder")]
    config = replace(make_config(squares), model=model, start_from=str(tmp_path / "first"), frozen=tuple(parts))
    train_stage1(config, tmp_path / "second")
    first, second = model_of(tmp_path / "first"), model_of(tmp_path / "second")
    for part in parts:
        before, after = (getattr(model, part).state_dict() for model in (first, second))
        assert all(torch.equal(before[name], after[name]) for name in before), part
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    assert all(torch.equal(a, b) for a, b in zip(first.encode(images), second.encode(images), strict=True))
    assert not torch.equal(first.decode(first.encode(images)), second.decode(first.encode(images)))
    assert first.fingerprint() != second.fingerprint()
    assert second.codes_fingerprint() == first.fingerprint()  # priors and shards of the first go with the second
    longer = replace(config, train=replace(config.train, steps=14))
    shutil.rmtree(tmp_path / "first")
    train_stage1(longer, tmp_path / "second")
    assert model_of(tmp_path / "second").codes_maker == first.fingerprint()


def test_codes_are_those_of_another_only_where_all_that_makes_them_stands_still(squares: str, tmp_path: Path):
    train_stage1(make_config(squares), tmp_path / "first")
    for number, frozen in enumerate(((), ("encoder",), ("quantizer",))):
        config = replace(make_config(squares), start_from=str(tmp_path / "first"), frozen=frozen)
        train_stage1(config, tmp_path / str(number))
        assert model_of(tmp_path / str(number)).codes_maker is None
    wider = replace(MODEL, quantizer=replace(QUANTIZER, codebook_size=32))
    config = replace(make_config(squares), model=wider, start_from=str(tmp_path / "first"))
    train_stage1(replace(config, frozen=("encoder", "quantizer")), tmp_path / "wider")
    assert model_of(tmp_path / "wider").codes_maker is None


def test_parts_that_cannot_stand_still_are_refused(squares: str, tmp_path: Path):
    for frozen, message in (
        (("encodr",), "frozen=encodr: the model has no such part, expected one of quantizer, encoder, decoder"),
        (("encoder", "quantizer", "decoder"), "is all of the model: leave a part that learns out of it"),
        (("quantizer.entries",), "is a part of a quantizer, which stands still as a whole; give quantizer"),
    ):
        with pytest.raises(UserError, match=message):
            train_stage1(replace(make_config(squares), frozen=frozen), tmp_path / "run")


def test_positions_of_another_image_size_are_interpolated():
    config = ViTVQGANConfig(channels=1, patch=4, width=8, blocks=1, heads=2, quantizer=QUANTIZER)
    small, large = ViTVQGAN(config, (8, 8)), ViTVQGAN(config, (16, 24))
    name = next(name for name in small.state_dict() if name.endswith("positions.table"))
    with torch.no_grad():
        small.state_dict()[name].copy_(torch.arange(8.0).view(8, 1, 1).expand(8, 2, 2))
    taken = take_weights(large, small)
    assert name in taken.resized
    assert not taken.new
    torch.testing.assert_close(large.state_dict()[name], torch.arange(8.0).view(8, 1, 1).expand(8, 4, 6))
    assert "2 more" not in taken.describe("small", small)


def test_what_does_not_fit_is_new_and_settings_that_differ_are_told():
    small, wide = (AUTOENCODERS["vqvae"](replace(MODEL, width=width), (8, 8)) for width in (8, 12))
    taken = take_weights(wide, small)
    assert "quantizer.codebook" in taken.kept
    assert any(name.startswith("encoder") for name in taken.new)
    assert differing_settings(wide, small) == ("model.width=12 (was 8)",)
    assert "settings that differ: model.width=12 (was 8)" in taken.describe("small", small)


def test_from_takes_the_model_and_leaves_the_rest_of_the_recipe(squares: str, tmp_path: Path, capsys):
    train_stage1(make_config(squares), tmp_path / "first")
    recipe = {
        "model": {"kind": "vqgan", "channels": 3},
        "data": {"path": squares, "image_size": 8, "channels": 1, "validation_count": 20},
        "train": {"steps": 2, "batch_size": 12, "workers": 0, "tracker": "none", "preview_every": 0, "save_every": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    line = ["train-stage1", "--config", str(tmp_path / "recipe.yaml"), "--device", "cpu"]
    start = ["--from", str(tmp_path / "first"), "--run", str(tmp_path / "second"), "--frozen", "[encoder, quantizer]"]
    assert main([*line, *start]) == 0
    first, second = model_of(tmp_path / "first"), model_of(tmp_path / "second")
    assert second.config == first.config
    assert_same(first, second, "quantizer")
    assert main([*line, *start]) == 0  # as any run, again
    own = ["--config", str(tmp_path / "second" / "config.yaml"), "--run", str(tmp_path / "second")]
    assert main(["train-stage1", *own]) == 0
    capsys.readouterr()
    assert main([*line, *start, "--from", "x"]) == 2
    assert "got 2 models to begin with, expected one" in capsys.readouterr().err
    assert main([*line, *start, "--start_from", "x"]) == 2
    assert "got --from" in capsys.readouterr().err
    assert main([*line, "--from", str(tmp_path / "nothing"), "--run", str(tmp_path / "third")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_run_goes_on_with_the_same_command_when_what_it_began_with_is_gone(squares: str, tmp_path: Path, capsys):
    train_stage1(make_config(squares), tmp_path / "first")
    recipe = {
        "model": {"kind": "vqgan", "channels": 3},
        "data": {"path": squares, "image_size": 8, "channels": 1, "validation_count": 20},
        "train": {"steps": 2, "batch_size": 12, "workers": 0, "tracker": "none", "preview_every": 0, "save_every": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    line = ["train-stage1", "--config", str(tmp_path / "recipe.yaml"), "--device", "cpu"]
    start, run = ["--from", str(tmp_path / "first")], ["--run", str(tmp_path / "second")]
    assert main([*line, *start, *run, "--frozen", "[encoder, quantizer]"]) == 0
    maker = model_of(tmp_path / "second").codes_maker
    shutil.rmtree(tmp_path / "first")
    assert main([*line, *start, *run, "--frozen", "[encoder, quantizer]", "--train.steps", "4"]) == 0
    assert model_of(tmp_path / "second").codes_maker == maker
    assert yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())["train"]["steps"] == 4
    capsys.readouterr()
    for asked in ([*start, "--run", str(tmp_path / "third")], ["--from", str(tmp_path / "firs"), *run]):
        assert main([*line, *asked]) == 2
        assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("start", "message"),
    [("", "from is empty, expected: a run or model folder"), ("prior", r"--from .*prior: model.kind: .*got 'rar'")],
)
def test_from_names_what_cannot_be_begun_with(squares: str, tmp_path: Path, capsys, start: str, message: str):
    folder = tmp_path / "prior"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"kind": "rar", "arguments": {"config": {"layers": 1}}}))
    recipe = {"model": {"kind": "vqgan"}, "data": {"path": squares}, "train": {"steps": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    line = ["train-stage1", "--config", str(tmp_path / "recipe.yaml"), "--run", str(tmp_path / "run")]
    assert main([*line, "--from", str(folder) if start else ""]) == 2
    assert re.search(message, capsys.readouterr().err)
