"""Figures of a model against their definitions, one image at a time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codes.spec import Grid
from common.errors import UserError
from images.datasets import to_float
from pipelines import TwoStagePipeline
from pipelines.commands.evaluate import EvaluateConfig, EvaluateDataConfig, Figures, evaluate, images_to_evaluate
from pipelines.figures import bits_of_codes, entropy
from stage1_vq.autoencoders import DVAE, DVAEConfig
from stage1_vq.quantizers import GumbelQuantizerConfig
from stage2_prior.condition import Condition, EmbeddingSpec, TextSpec
from tests.pipelines.conftest import make_autoencoder, make_pipeline, make_prior
from tests.stage2_prior.tiny import tiny_prior


def some_images(count: int) -> torch.Tensor:
    pixels = torch.randint(256, (count, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    return to_float(pixels.to(torch.uint8))


def test_figures_are_means_over_images_whatever_the_batches():
    pipeline, images, labels = make_pipeline(), some_images(7), torch.tensor([0, 1, 2, 0, -1, 1, 2])
    one, two = Figures(pipeline), Figures(pipeline)
    one.add(images, labels)
    for part in ((0, 3), (3, 7)):
        two.add(images[slice(*part)], labels[slice(*part)])
    found = one.means()
    assert two.means() == pytest.approx(found)
    codes = pipeline.encode(images)
    known = labels.masked_fill(labels < 0, 3)
    with torch.no_grad():
        bits = pipeline.prior.nll(codes, Condition(known)).double() / math.log(2)
    assert found["images"] == 7
    assert found["bits_per_code"] == pytest.approx(float(bits.mean()))
    assert found["bits_per_pixel"] == pytest.approx(float(bits.sum(1).mean()) / 256)
    assert found["bits_per_pixel, packed"] == pytest.approx(16 * 4 / 256)
    error = (pipeline.decode(codes) - images).square().mean(dim=(1, 2, 3))
    assert found["psnr"] == pytest.approx(float((10 * (4 / error).log10()).mean()))
    assert found["codes used"] == len(codes[0].unique()) / 16
    assert "two-stage bits_per_dimension" not in found  # a VQ-VAE's decoder is no likelihood


def test_bits_of_a_prior_that_must_be_told_more_are_refused():
    """Its null label was never trained: the figure would mean nothing."""
    autoencoder = make_autoencoder()
    codes = tuple(torch.zeros(2, 4, 4, dtype=torch.int64) for _ in range(1))
    prior = tiny_prior("transformer", 3, autoencoder.code_spec(), knows_null_label=False)
    assert bits_of_codes(prior, codes, torch.tensor([0, 2]))[0].shape == (2, 4, 4)
    with pytest.raises(
        UserError, match=r"trained with label_dropout=0 and must be told the class or the text of every"
    ):
        bits_of_codes(prior, codes, torch.tensor([0, -1]))
    prior = tiny_prior("transformer", 0, autoencoder.code_spec(), given=(Grid("map", 2, 2, 4),))
    with pytest.raises(UserError, match=r"goes by codes of other pictures, which are not at hand here"):
        bits_of_codes(prior, codes, torch.tensor([-1, -1]))


def test_bits_of_a_prior_of_captions_are_those_without_any():
    autoencoder = make_autoencoder()
    prior = tiny_prior("transformer", 0, autoencoder.code_spec(), text=TextSpec(3, 9), embeddings=EmbeddingSpec(2, 5))
    codes = (torch.zeros(2, 4, 4, dtype=torch.int64),)
    nothing = {"embeddings": torch.zeros(2, 2, 5), "embedding_mask": torch.zeros(2, 2, dtype=torch.bool)}
    with torch.no_grad():
        expected = prior.nll(codes, Condition(text=torch.full((2, 3), -1), **nothing)) / math.log(2)
        found = bits_of_codes(prior, codes, torch.tensor([-1, -1]))[0].flatten(1)
    torch.testing.assert_close(found, expected.double())


def test_entropy_is_that_of_the_frequencies():
    assert entropy(torch.tensor([4, 0, 2, 2])) == pytest.approx(1.5)


def test_both_stages_together_bound_the_bits_of_an_image():
    torch.manual_seed(0)
    quantizer = GumbelQuantizerConfig(codebook_size=16, dim=8, embedding_dim=4)
    autoencoder = DVAE(DVAEConfig(channels=1, width=8, groups=3, blocks=1, quantizer=quantizer), (16, 16)).eval()
    pipeline = TwoStagePipeline(autoencoder, make_prior(autoencoder, 0))
    images = some_images(3)
    figures = Figures(pipeline)
    figures.add(images, torch.full((3,), -1))
    found = figures.means()
    with torch.no_grad():
        codes = autoencoder.encode(images)
        bits = autoencoder.decoder_bits(images, codes) + pipeline.prior.nll(codes, Condition()).double().sum(
            1
        ) / math.log(2)
    assert found["two-stage bits_per_dimension"] == pytest.approx(float(bits.mean()) / 256)
    assert 4 < found["two-stage bits_per_dimension"] < 20  # noise cannot be had for less than some 8 bits


def test_the_command_prints_and_writes_the_figures(model: Path, digits: Path, tmp_path: Path, capsys):
    data = EvaluateDataConfig(path=str(digits), split="train")
    line = evaluate(EvaluateConfig(model=str(model), data=data, num=10, batch_size=4, out=str(tmp_path / "f.json")))
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["images"] == 10
    assert line.startswith(f"10 images: PSNR {figures['psnr']:.2f} dB, {figures['bits_per_code']:.3f} bits per code")
    assert f"bits_per_code{figures['bits_per_code']:>21.4f}" in capsys.readouterr().out


def test_a_broken_image_is_left_out_and_its_neighbour_counts_once(model: Path, tmp_path: Path):
    generator = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(generator.integers(0, 256, (16, 16), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    config = EvaluateConfig(model=str(model), data=EvaluateDataConfig(path=str(tmp_path)), out=str(tmp_path / "f.json"))

    def figures() -> tuple[str, dict[str, float]]:
        line = evaluate(config)
        return line, json.loads((tmp_path / "f.json").read_text())

    (tmp_path / "b.png").rename(tmp_path / "b.txt")
    line, without = figures()
    assert line.startswith("2 images: ")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"1 of 3 images cannot be read, and 0 may be: .* with --data.max_bad_share 0.67"
    ):
        figures()
    config = replace(config, data=replace(config.data, max_bad_share=0.67))
    line, found = figures()
    assert found == pytest.approx(without)
    assert line.startswith("2 images: ")
    assert line.endswith(f"; 1 of 3 images cannot be read and is passed over: {tmp_path / 'b.png'}")


def test_classes_are_those_of_the_prior_or_none(digits: Path):
    pipeline = make_pipeline()
    data = EvaluateDataConfig(path=str(digits), split="train")
    assert set(images_to_evaluate(data, pipeline).labels.tolist()) == {-1}  # the digits' classes have other names
    pipeline.prior.class_names = ("2", "0", "1")
    labels = images_to_evaluate(data, pipeline).labels
    real = np.load(digits)["labels"]
    assert labels.tolist() == [{0: 1, 1: 2, 2: 0}[label] for label in real.tolist()]


def test_impossible_options_are_refused():
    with pytest.raises(UserError, match="num=0, expected at least 1"):
        EvaluateConfig(model="m", data=EvaluateDataConfig(path="d"), num=0)
