"""`zellige evaluate` of VAEs: figures against their definitions, what is said beside them, pictures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from images.datasets import DataConfig, ImageDataset, open_images, to_float
from pipelines.cli import main
from pipelines.commands.evaluate import EvaluateConfig, EvaluateDataConfig, evaluate
from stage1_vae.binarise import Binarised, NumberedImages
from stage1_vae.decoders import FactorisedDecoder
from stage1_vae.evaluation import judge
from stage1_vae.hierarchies.markov import MarkovConfig, MarkovHierarchy
from stage1_vae.model import LikelihoodVAE
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.vae import VAE, VAEConfig
from tests.pipelines.conftest import make_pipeline


def small_vae(latents: int = 2, binarised: Binarised | None = Binarised("once", 7)) -> VAE:  # noqa: B008
    torch.manual_seed(0)
    config = VAEConfig(latents=latents, encoder=DenseConfig(hidden=(8,)), decoder=DenseConfig(hidden=(8,)))
    model = VAE(config, (6, 4), binarised).eval()
    with torch.no_grad():
        model.encoder.layers.layers[-1].weight.mul_(6)
    return model


@pytest.fixture
def images(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 6, 4, 1), dtype=np.uint8)
    path = tmp_path / "grey.npz"
    np.savez(path, images=pixels, labels=np.arange(9) % 3)
    return path


def settings(model: LikelihoodVAE, images: Path, **values: object) -> EvaluateConfig:
    folder = images.parent / "model"
    model.save_pretrained(folder)
    data = EvaluateDataConfig(path=str(images), split="train")
    return EvaluateConfig(model=str(folder), data=data, **{"out": str(images.parent / "figures.json"), **values})


def figures_of(config: EvaluateConfig) -> dict:
    evaluate(config)
    return json.loads(Path(str(config.out)).read_text())


def binary_images(images: Path, how: str, seed: int) -> torch.Tensor:
    config = DataConfig(path=str(images), image_size=(6, 4), channels=1)
    data = NumberedImages(ImageDataset(open_images(config), config), how, seed, training=False)
    return to_float(data.fetch(range(9), range(9))["images"])


def test_figures_are_those_of_images_binarised_as_the_training_had_them(images: Path):
    model = small_vae()
    found = figures_of(settings(model, images, draws=60, batch_size=4))
    expected = judge(model, binary_images(images, "once", 7), range(9), 60)
    assert (found["binarised"], found["binarised_seed"], found["images"], found["draws"]) == ("once", 7, 9, 60)
    assert found["log_p"] == pytest.approx(float(expected.log_p.mean()), rel=1e-5)
    assert found["elbo"] == pytest.approx(float(expected.elbo.mean()), rel=1e-5)
    assert found["gap"] == pytest.approx(found["log_p"] - found["elbo"], rel=1e-4)
    assert found["elbo"] == pytest.approx(-found["rate"] - found["distortion"], rel=1e-5)
    assert found["bits_per_dimension"] == pytest.approx(-found["log_p"] / (24 * math.log(2)), rel=1e-5)
    assert found["L_1"] <= found["L_5"] <= found["L_60"]
    assert sum(found["kl_per_dimension"]) == pytest.approx(found["rate"], rel=1e-5)
    of_draws = float(expected.log_p_error.square().sum().sqrt()) / 9
    assert found["log_p_error_by_draws"] == pytest.approx(of_draws, rel=1e-3)
    assert found["log_p_error_by_images"] == pytest.approx(float(expected.log_p.std()) / 3, rel=1e-3)
    parts = found["mutual_information"] + found["total_correlation"] + found["dimension_kl"]
    assert parts == pytest.approx(found["mutual_information"] + found["aggregate_kl"], abs=1e-4)
    assert found["mutual_information"] <= math.log(9) + 0.01


def test_a_decoder_without_a_mean_image_draws_none_for_psnr(images: Path, monkeypatch):
    def drawn(self: FactorisedDecoder, latents: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a PixelCNN would draw pixel after pixel")

    monkeypatch.setattr(FactorisedDecoder, "mean", drawn)
    monkeypatch.setattr(FactorisedDecoder, "mean_is_drawn", True)
    found = figures_of(settings(small_vae(), images, draws=5))
    assert found["images"] == 9
    assert "psnr" not in found


def test_batches_change_no_figure(images: Path):
    config = settings(small_vae(), images, draws=20)
    whole, parts = figures_of(config), figures_of(replace(config, batch_size=2))
    for name, value in whole.items():
        if isinstance(value, float):
            assert parts[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize(
    "change", [{"draws": 30}, {"seed": 1}, {"binarised": "threshold"}, {"num": 5}], ids=lambda one: next(iter(one))
)
def test_every_option_changes_the_figures(images: Path, change):
    config = settings(small_vae(), images, draws=20)
    assert figures_of(config)["log_p"] != figures_of(replace(config, **change))["log_p"]


def test_every_line_says_how_images_were_binarised(images: Path, capsys):
    summary = evaluate(settings(small_vae(), images, draws=20))
    printed = capsys.readouterr().out.partition("protocol:")[0]
    lines = [line for line in printed.splitlines() if "note" not in line and line != "likelihood:"]
    told = [line for line in lines if line.split()[0] not in ("images", "draws", "active_units")]
    assert len(told) > 12
    assert all(line.endswith("(binarised: drawn once, seed 7)") for line in told)
    assert "(binarised: drawn once, seed 7)" in summary


def test_a_model_that_does_not_record_it_must_be_told(images: Path):
    config = settings(small_vae(binarised=None), images, draws=5)
    with pytest.raises(UserError, match="does not record how its images were made black and white"):
        evaluate(config)
    assert figures_of(replace(config, binarised="threshold"))["binarised"] == "threshold"


def test_grey_images_under_a_likelihood_of_binary_ones_give_no_bits(images: Path):
    found = figures_of(settings(small_vae(binarised=Binarised("none")), images, draws=5))
    assert "bits_per_dimension" not in found
    assert any("none of these is a likelihood" in note for note in found["notes"])


def test_other_images_than_in_training_are_told(images: Path):
    found = figures_of(settings(small_vae(), images, draws=5, binarised="threshold"))
    assert any("trained on other images than these, binarised: drawn once, seed 7" in note for note in found["notes"])


def test_a_collapsed_posterior_is_told(images: Path):
    model = small_vae()
    before = figures_of(settings(model, images, draws=5))
    with torch.no_grad():
        model.encoder.layers.layers[-1].weight.zero_()
    found = figures_of(settings(model, images, draws=5))
    assert (before["active_units"], found["active_units"]) == (2, 0)
    assert not any("collapsed" in note for note in before["notes"])
    assert any("0 of 2 units are active" in note and "docs/collapse.md" in note for note in found["notes"])
    assert found["mutual_information"] == pytest.approx(0, abs=1e-4)


def test_a_log_p_that_hangs_on_few_draws_is_told(images: Path):
    model = small_vae(latents=8)
    with torch.no_grad():
        model.decoder.network.layers.layers[-1].weight.mul_(40)
    found = figures_of(settings(model, images, draws=50))
    assert found["effective_draws"] < 10
    assert any("it is too low by more than its error says" in note for note in found["notes"])
    one = figures_of(settings(model, images, draws=1))  # nothing can be told of one draw
    assert one["log_p_error_by_draws"] is None
    assert not any("too low" in note for note in one["notes"])


def test_pictures(images: Path, tmp_path: Path):
    evaluate(settings(small_vae(), images, draws=5, pictures=str(tmp_path / "pictures")))
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "samples.png", "reconstructions.png", "walks.png", "plane.png",
    }  # fmt: skip
    evaluate(settings(small_vae(latents=3), images, draws=5, pictures=str(tmp_path / "more")))
    assert not (tmp_path / "more" / "plane.png").exists()
    with Image.open(tmp_path / "more" / "walks.png") as walks:
        assert len(np.unique(np.array(walks))) > 10


def test_files_that_cannot_be_read_are_left_out(tmp_path: Path, images: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, pixels in enumerate(np.load(images)["images"]):
        Image.fromarray(pixels[:, :, 0]).save(folder / f"{i}.png")
    (folder / "4.png").write_bytes(b"no image")
    config = settings(small_vae(), images, draws=5)
    config = replace(config, data=EvaluateDataConfig(path=str(folder), max_bad_share=0.5))
    assert figures_of(config)["images"] == 8


def test_options_of_the_other_kind_are_refused(images: Path, tmp_path: Path, capsys):
    config = settings(small_vae(), images)
    with pytest.raises(UserError, match=r"codes=x, expected it left out for .*, a VAE, which has none"):
        evaluate(replace(config, codes="x"))
    with pytest.raises(UserError, match="draws=0, expected at least 1"):
        replace(config, draws=0)
    make_pipeline().save_pretrained(tmp_path / "codes_model")
    for name, value in {"draws": 5, "seed": 1, "binarised": "once", "pictures": "x"}.items():
        with pytest.raises(UserError, match=f"{name}={value}, expected it left out for .*, which is no VAE"):
            evaluate(replace(config, model=str(tmp_path / "codes_model"), **{name: value}))
    with pytest.raises(UserError, match="is a file, expected a folder"):
        evaluate(replace(config, pictures=str(images)))
    arguments = ["--model", config.model, "--data.path", str(images), "--data.split", "train", "--draws", "3"]
    assert main(["evaluate", *arguments]) == 0
    assert "9 images: log p" in capsys.readouterr().out


def test_units_of_a_silent_layer_are_told_from_those_that_pass_on_what_the_layer_above_says(images: Path, capsys):
    """A ladder whose lower layer takes its prior as its posterior: its means vary with the layer above, so that they
    count as active, but they say nothing, which their KL tells."""
    torch.manual_seed(0)
    config = MarkovConfig(latents=(3, 2), hidden=(8, 8), inference="top_down")
    model = MarkovHierarchy(config, (6, 4), Binarised("once", 7)).eval()
    with torch.no_grad():
        upper, lower = model.recognition[1].linear, model.recognition[0].linear
        upper.weight[:2] *= 30
        upper.bias[2:] = -3  # sure of it
        lower.weight.zero_()
        lower.bias[3:] = 40  # as wide as nothing
        model.priors[0].linear.weight[:3] *= 20
    found = figures_of(settings(model, images, draws=20))
    assert (found["active_units_of_group_0"], found["active_units_of_group_1"]) == (2, 3)
    assert (found["informed_units_of_group_0"], found["informed_units_of_group_1"]) == (2, 0)
    assert found["kl_of_group_1"] == pytest.approx(0, abs=1e-5)
    assert found["kl_of_group_0"] == pytest.approx(found["rate"], rel=1e-5)
    assert "informed_units_of_group_1" in capsys.readouterr().out
