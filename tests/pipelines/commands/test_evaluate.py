"""Figures of a model against their definitions, one image at a time."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codes.shards import CodeDataset, CodeShardWriter
from codes.spec import Grid
from codes.training_images import TrainingImages, hashes_of
from common.errors import UserError
from images.datasets import to_float
from metrics.similarity import ssim
from pipelines import TwoStagePipeline
from pipelines.codec.tables import fit_tables_to_shards
from pipelines.commands.evaluate import EvaluateConfig, EvaluateDataConfig, evaluate
from pipelines.evaluation.of_codes import Figures, images_for, training_codes
from pipelines.figures import bits_of_codes, entropy, training_shares
from pipelines.pictures import to_pil
from stage1_vq.autoencoders import DVAE, VQVAE2, DVAEConfig, VQVAE2Config
from stage1_vq.quantizers import GumbelQuantizerConfig
from stage2_prior.condition import Condition, EmbeddingSpec, TextSpec
from tests.pipelines.conftest import make_autoencoder, make_pipeline, make_prior
from tests.stage2_prior.tiny import tiny_prior


def some_images(count: int) -> torch.Tensor:
    pixels = torch.randint(256, (count, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    return to_float(pixels.to(torch.uint8))


def pipeline_that_tells_apart(images: torch.Tensor) -> TwoStagePipeline:
    """With a codebook that was fitted to the images, all of whose codes differ."""
    autoencoder = make_autoencoder()
    autoencoder.initialise([images])
    assert len(np.unique(hashes_of(autoencoder.encode(images)))) == len(images)
    return TwoStagePipeline(autoencoder, make_prior(autoencoder, 0))


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
    assert found["bits_per_pixel_packed"] == pytest.approx(16 * 4 / 256)
    error = (pipeline.decode(codes) - images).square().mean(dim=(1, 2, 3))
    assert found["psnr"] == pytest.approx(float((10 * (4 / error).log10()).mean()))
    assert found["codes_used"] == len(codes[0].unique()) / 16
    assert found["ssim"] == pytest.approx(float(ssim(pipeline.decode(codes), images).mean()))
    assert found["estimated_entropy_of_codes"] == pytest.approx(entropy(codes[0].flatten().bincount(minlength=16)))
    assert "two_stage_bits_per_dimension" not in found  # a VQ-VAE's decoder is no likelihood


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
    assert found["two_stage_bits_per_dimension"] == pytest.approx(float(bits.mean()) / 256)
    assert 4 < found["two_stage_bits_per_dimension"] < 20  # noise cannot be had for less than some 8 bits


def test_the_command_prints_and_writes_the_figures(model: Path, digits: Path, tmp_path: Path, capsys):
    data = EvaluateDataConfig(path=str(digits), split="train")
    line = evaluate(EvaluateConfig(model=str(model), data=data, num=10, batch_size=4, out=str(tmp_path / "f.json")))
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["images"] == 10
    assert line.startswith(f"10 images: PSNR {figures['psnr']:.2f} dB, {figures['bits_per_code']:.3f} bits per code")
    assert f"bits_per_code{figures['bits_per_code']:>27.4f}" in capsys.readouterr().out


def write_training_codes(pipeline: TwoStagePipeline, images: torch.Tensor, folder: Path, **options: str) -> Path:
    codes, options = pipeline.encode(images), {"stage1_fingerprint": pipeline.autoencoder.fingerprint(), **options}
    writer = CodeShardWriter(folder, pipeline.prior.code_spec, ["train"], **options)
    writer.write(0, codes, torch.full((len(images),), -1), [f"{i}" for i in range(len(images))])
    writer.finish()
    return folder


def write_pictures(images: torch.Tensor, folder: Path) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        to_pil(image).save(folder / f"renamed {number}.png")
    return folder


@pytest.mark.parametrize("recorded", [True, False])
def test_training_images_are_no_test_images_whatever_they_are_called(recorded: bool, tmp_path: Path, capsys):
    """Known to the model itself, or by the codes of its training."""
    images = some_images(140)
    pipeline = pipeline_that_tells_apart(images)
    codes = write_training_codes(pipeline, images[:120], tmp_path / "codes")
    if recorded:
        pipeline.prior.training_images = TrainingImages.of(CodeDataset(codes))
    model = pipeline.save_pretrained(tmp_path / "model")
    named = None if recorded else str(codes)

    def figures_of(name: str, chosen: torch.Tensor) -> tuple[dict[str, Any], str]:
        data = EvaluateDataConfig(path=str(write_pictures(chosen, tmp_path / name)))
        evaluate(EvaluateConfig(model=str(model), data=data, codes=named, out=str(tmp_path / "figures.json")))
        return json.loads((tmp_path / "figures.json").read_text()), capsys.readouterr().out

    figures, printed = figures_of("seen", images[:110])
    said = "warning: all of these images have exactly the codes of images that the prior was trained on"
    assert figures["share_of_training_images"] == 1
    assert said in printed
    assert figures["notes"][0].startswith(said)
    figures, printed = figures_of("some", images[10:])
    assert figures["share_of_training_images"] == pytest.approx(110 / 130)
    assert "warning: 110 of 130 of these images have exactly the codes" in printed
    figures, printed = figures_of("others", images[120:])
    assert figures["share_of_training_images"] == 0
    assert "warning" not in printed


def test_images_whose_codes_are_alike_are_not_taken_for_training_images(tmp_path: Path):
    pipeline, images = make_pipeline(num_classes=0), some_images(1).expand(110, -1, -1, -1)
    pipeline.prior.training_images = TrainingImages.of(
        CodeDataset(write_training_codes(pipeline, images[:1], tmp_path / "codes"))
    )
    figures = Figures(pipeline)
    figures.add(images, torch.full((110,), -1))
    assert "share_of_training_images" not in figures.means()
    assert figures.notes() == [
        "note: whether the prior was trained on these images cannot be told: their codes are too alike"
    ]


def test_a_model_that_records_no_training_images_says_that_nothing_is_known(model: Path, digits: Path, capsys):
    evaluate(EvaluateConfig(model=str(model), data=EvaluateDataConfig(path=str(digits), split="train")))
    printed = capsys.readouterr().out
    assert "note: whether the model was trained on these images is not known" in printed
    assert "share_of_training_images" not in printed


def test_frequencies_are_those_of_training_where_its_codes_are_named(tmp_path: Path):
    pipeline, images = make_pipeline(num_classes=0), some_images(60)
    training = CodeDataset(write_training_codes(pipeline, images[:50], tmp_path / "codes"))
    pipeline.tables = fit_tables_to_shards(training)
    figures = Figures(pipeline, training)
    for part in images[50:].split(4):
        figures.add(part, torch.full((len(part),), -1))
    found, codes = figures.means(), pipeline.encode(images[50:])[0]
    shares = training_shares(training.counts()[0])
    assert found["bits_by_training_frequencies"] == pytest.approx(float(-shares[codes.flatten()].log2().mean()))
    assert found["bits_by_tables"] == pytest.approx(pipeline.tables.grids["codes"].bits(codes.numpy()).mean())
    assert "estimated_entropy_of_codes" not in found
    other = write_training_codes(pipeline, images[:5], tmp_path / "other", stage1_fingerprint="another")
    with pytest.raises(UserError, match=r"holds codes of autoencoder another, .*; encode images with this model"):
        training_codes(str(other), pipeline.autoencoder)


def test_few_images_and_small_ones_are_told(tmp_path: Path):
    autoencoder = make_autoencoder(image_size=(8, 8))
    figures = Figures(TwoStagePipeline(autoencoder, make_prior(autoencoder, 0)))
    images = some_images(5)[..., :8, :8]
    figures.add(images, torch.full((5,), -1))
    assert "ssim" not in figures.means()
    notes = " ".join(figures.notes())
    assert "ssim is left out: its windows of 11x11 pixels are larger than the images" in notes
    bits = torch.from_numpy(figures.values["bits"]) / 4
    error = float(bits.std()) / math.sqrt(5)
    assert "figures of 5 images only: those of others would differ by some" in notes
    assert f"{error:.2f} bits per code (standard errors)" in notes
    for _ in range(19):
        figures.add(images, torch.full((5,), -1))
    assert "images only" not in " ".join(figures.notes())
    one = Figures(TwoStagePipeline(autoencoder, make_prior(autoencoder, 0)))
    one.add(images[:1], torch.full((1,), -1))
    assert "figures of 1 image only: those of others would differ, and use other codes" in one.notes()[-1]


def test_a_broken_image_is_left_out_and_its_neighbour_counts_once(model: Path, tmp_path: Path):
    generator = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(generator.integers(0, 256, (16, 16), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    config = EvaluateConfig(model=str(model), data=EvaluateDataConfig(path=str(tmp_path)), out=str(tmp_path / "f.json"))

    def figures() -> tuple[str, dict[str, Any]]:
        line = evaluate(config)
        found = json.loads((tmp_path / "f.json").read_text())
        assert "figures of 2 images only" in found.pop("notes")[-1]
        protocol = found.pop("protocol")["images"]
        assert found.pop("labels") == {}
        assert (protocol["images"], protocol["unreadable"], protocol["own_size"]) == (2, protocol["of"] - 2, "16x16")
        return line, found

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


def test_where_no_image_can_be_read_it_says_so(model: Path, tmp_path: Path):
    (tmp_path / "broken").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "broken" / name).write_bytes(b"nothing")
    data = EvaluateDataConfig(path=str(tmp_path / "broken"), max_bad_share=1.0)
    with pytest.raises(UserError, match=r"none of the 2 images of .*broken that were chosen can be read"):
        evaluate(EvaluateConfig(model=str(model), data=data))


def test_classes_are_those_of_the_prior_or_none(digits: Path):
    pipeline = make_pipeline()
    data = EvaluateDataConfig(path=str(digits), split="train")
    assert set(images_for(EvaluateConfig(data=data), pipeline).labels.tolist()) == {
        -1
    }  # the digits' classes have other names
    pipeline.prior.class_names = ("2", "0", "1")
    labels = images_for(EvaluateConfig(data=data), pipeline).labels
    real = np.load(digits)["labels"]
    assert labels.tolist() == [{0: 1, 1: 2, 2: 0}[label] for label in real.tolist()]


def test_impossible_options_are_refused():
    with pytest.raises(UserError, match="num=0, expected at least 1"):
        EvaluateConfig(model="m", data=EvaluateDataConfig(path="d"), num=0)


def test_every_key_is_a_plain_identifier_of_one_grid_and_of_several():
    levels = VQVAE2Config(channels=1, width=8, residual_width=8, residual_blocks=1)
    autoencoder = VQVAE2(levels, (16, 16)).eval()
    several = TwoStagePipeline(autoencoder, make_prior(autoencoder, 0))
    for pipeline in (make_pipeline(), several):
        figures = Figures(pipeline)
        figures.add(some_images(2), torch.tensor([-1, -1]))
        assert [name for name in figures.means() if not re.fullmatch("[a-z][a-z0-9_]*", name)] == []
    names = [grid.name for grid in autoencoder.code_spec().grids]
    assert len(names) == 2
    for name in names:
        assert {
            f"bits_per_code_{name}",
            f"codes_used_{name}",
            f"estimated_entropy_of_codes_{name}",
        } <= figures.means().keys()
