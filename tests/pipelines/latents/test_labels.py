"""generate, analogies and evaluate on VAEs that know classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from images.datasets import to_float
from pipelines.commands.analogies import AnalogiesConfig, analogy_files
from pipelines.commands.evaluate import EvaluateConfig, EvaluateDataConfig, evaluate
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.latents.pipeline import LatentPipeline
from stage1_vae.binarise import Binarised
from stage1_vae.evaluation import noise_of_draws
from stage1_vae.labels.m2 import M2, M2Config
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives.terms import elbo
from stage1_vae.vae import VAE, VAEConfig

NETWORK = DenseConfig(hidden=(12,))
NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = M2Config(classes=3, latents=2, classifier=NETWORK, encoder=NETWORK, decoder=NETWORK)
    vae = M2(config, (6, 4), Binarised("threshold"), NAMES)
    for weight in vae.parameters():
        weight.data.mul_(3)  # so that samples differ by more than a grey level
    return str(vae.save_pretrained(tmp_path_factory.mktemp("model") / "m2"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve grey pictures in folders of classes, which the model cannot know, one of unknown class among them."""
    root = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 6, 4), dtype=np.uint8)
    for number, one in enumerate(pixels):
        folder = root / ("unlabelled" if number == 0 else NAMES[number % 3])
        folder.mkdir(exist_ok=True)
        Image.fromarray(one).save(folder / f"{number:02d}.png")
    return root


def drawn(model: str, out: Path, **options: object) -> tuple[dict[str, bytes], list[dict]]:
    generate_files(GenerateConfig(model=model, out=str(out), num=6, seed=5, **options))
    records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return {path.name: path.read_bytes() for path in sorted(out.glob("0*.png"))}, records


def test_classes_are_drawn_in_turn_or_as_asked(model: str, tmp_path: Path):
    in_turn, records = drawn(model, tmp_path / "in_turn")
    assert [record["class_name"] for record in records] == [*NAMES, *NAMES]
    bees, of_bees = drawn(model, tmp_path / "bees", label="bee")
    assert {record["label"] for record in of_bees} == {1}
    assert [bees[name] == in_turn[name] for name in bees] == [False, True, False, False, True, False]
    assert drawn(model, tmp_path / "numbered", label=1)[0] == bees
    pipeline = LatentPipeline.from_pretrained(model)
    latents = pipeline.generate(4, labels=["cat", 0, "bee", 2], first_index=2, seed=5, batch_size=3).latents
    assert latents[:, :3].argmax(1).tolist() == [2, 0, 1, 2]
    assert torch.equal(latents[:, 3:], pipeline.generate(4, labels=0, first_index=2, seed=5).latents[:, 3:])


@pytest.mark.parametrize("label", [3, "dog"])
def test_classes_that_there_are_not_are_refused(model: str, tmp_path: Path, label):
    with pytest.raises(UserError, match=r"this model (knows the 3 classes|has no class named 'dog')"):
        drawn(model, tmp_path / "out", label=label)
    assert not (tmp_path / "out").exists()


def test_analogies_are_the_style_of_an_image_in_every_class(model: str, pictures: Path, tmp_path: Path):
    line = analogy_files(AnalogiesConfig(model=model, images=str(pictures / "bee"), out=str(tmp_path / "out")))
    assert line.startswith("3 variants of each of 4 images in")
    vae = M2.from_pretrained(model)
    image = to_float(torch.from_numpy(np.array(Image.open(pictures / "bee" / "01.png"))))[None, None]
    style = vae.encode(image)[:, 3:]
    for label in range(3):
        expected = vae.decode(torch.cat([torch.eye(3)[label : label + 1], style], dim=1))
        with Image.open(tmp_path / "out" / f"01_{label}.png") as found:
            assert np.abs(np.asarray(found) - (expected[0, 0].detach().numpy() + 1) * 127.5).max() < 0.51
    assert (tmp_path / "out" / "sheet.png").is_file()


def test_a_vae_without_classes_has_no_analogies(pictures: Path, tmp_path: Path):
    vae = VAE(VAEConfig(latents=2, encoder=NETWORK, decoder=NETWORK), (6, 4)).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="is a VAE of kind vae, which knows no classes"):
        analogy_files(AnalogiesConfig(model=str(vae), images=str(pictures), out=str(tmp_path / "out")))


def test_evaluate_says_how_many_classes_were_told_right(model: str, pictures: Path, tmp_path: Path):
    """Of the eleven images with a class; the bound, and log p with all classes summed over, of all twelve."""
    config = EvaluateConfig(
        model=model,
        data=EvaluateDataConfig(path=str(pictures)),
        out=str(tmp_path / "figures.json"),
        pictures=str(tmp_path / "pictures"),
        draws=20,
    )
    summary = evaluate(config)
    found = json.loads((tmp_path / "figures.json").read_text())
    vae, names = M2.from_pretrained(model), sorted(pictures.glob("*/*.png"))
    grey = np.stack([np.array(Image.open(name)) for name in names])
    images = torch.from_numpy(np.where(grey >= 128, 1.0, -1.0)).float()[:, None]
    labels = [NAMES.index(name.parent.name) if name.parent.name in NAMES else -1 for name in names]
    told = vae.class_log_probabilities(images).argmax(1).tolist()
    right = sum(a == b for a, b in zip(told, labels, strict=True))
    assert 0 < right < 11
    assert found["labelled_images"] == 11
    assert found["accuracy"] == pytest.approx(right / 11)
    assert f"{100 * right / 11:.2f}% of classes told right" in summary
    noise = noise_of_draws(vae.noise_source(images[:1]), range(12), range(20), 0, torch.device("cpu"))
    with torch.no_grad():
        terms = vae(images, noise=noise)
    assert found["elbo"] == pytest.approx(float(elbo(terms).detach().mean()), rel=1e-5)
    assert found["log_p"] == pytest.approx(float((terms.log_weights.logsumexp(0) - np.log(20)).mean()), rel=1e-5)
    assert (tmp_path / "pictures" / "analogies.png").is_file()
