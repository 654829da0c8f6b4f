"""generate, reconstruct and interpolate on likelihood VAEs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.commands.interpolate import InterpolateConfig, interpolate_files
from pipelines.commands.reconstruct import ReconstructConfig, reconstruct_files
from pipelines.latents.models import is_vae
from pipelines.latents.pipeline import LatentPipeline, on_the_way
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.vae import VAE, VAEConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    network = DenseConfig(hidden=(12,))
    vae = VAE(VAEConfig(latents=3, encoder=network, decoder=network), (10, 8))
    for weight in vae.parameters():
        weight.data.mul_(4)  # so that samples differ by more than a grey level
    return str(vae.save_pretrained(tmp_path_factory.mktemp("model") / "vae"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pictures" / "a.png")
    Image.fromarray(pixels.T).save(tmp_path / "pictures" / "b.png")
    return tmp_path / "pictures"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*.png"))}


@pytest.mark.parametrize("pixels", ["mean", "mode", "sample"])
def test_samples_do_not_depend_on_how_many_are_made_at_once(model: str, tmp_path: Path, pixels):
    generate_files(GenerateConfig(model=model, out=str(tmp_path / "few"), num=3, seed=5, pixels=pixels))
    generate_files(GenerateConfig(model=model, out=str(tmp_path / "few"), num=7, seed=5, pixels=pixels))
    generate_files(GenerateConfig(model=model, out=str(tmp_path / "all"), num=7, seed=5, pixels=pixels))
    assert files(tmp_path / "few") == files(tmp_path / "all")
    assert len(set(files(tmp_path / "all").values())) == 7
    drawn = LatentPipeline.from_pretrained(model).generate(7, seed=5, batch_size=4, pixels=pixels)
    shown = np.stack([np.asarray(Image.open(tmp_path / "all" / f"{i:06d}.png")) for i in range(7)])
    assert np.abs((drawn.images[:, 0].numpy() + 1) * 127.5 - shown).max() < 0.51
    records = [json.loads(line) for line in (tmp_path / "all" / "samples.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(7))
    assert json.loads((tmp_path / "all" / "settings.json").read_text())["pixels"] == pixels
    with pytest.raises(UserError, match="was begun with other settings: seed was 5 and is now 6"):
        generate_files(GenerateConfig(model=model, out=str(tmp_path / "all"), num=7, seed=6, pixels=pixels))


def test_pixels_change_what_is_shown(model: str):
    pipeline = LatentPipeline.from_pretrained(model)
    mean, mode, sample = (pipeline.generate(4, pixels=pixels) for pixels in ("mean", "mode", "sample"))
    assert torch.equal(mean.latents, sample.latents)
    assert set(mode.images.unique().tolist()) == {-1.0, 1.0} == set(sample.images.unique().tolist())
    assert torch.equal(mode.images, mean.images.sign())
    assert not torch.equal(mode.images, sample.images)


def test_latents_are_normal(model: str):
    latents = LatentPipeline.from_pretrained(model).generate(4000, seed=1, batch_size=500).latents
    assert (latents.mean(0).abs() < 0.07).all()
    assert ((latents.T.cov() - torch.eye(3)).abs() < 0.1).all()


@pytest.mark.parametrize("option", [{"temperature": 0.9}, {"top_k": 5}, {"size": (20, 16)}])
def test_what_priors_over_codes_are_asked_is_refused(model: str, tmp_path: Path, option):
    name = next(iter(option))
    with pytest.raises(UserError, match=f"{name}=.*expected it left out: .* is a VAE"):
        generate_files(GenerateConfig(model=model, out=str(tmp_path), num=3, **option))
    assert not any(tmp_path.iterdir())


def test_a_vae_without_classes_draws_none(model: str, tmp_path: Path):
    with pytest.raises(UserError, match="this model has no classes, so a label cannot be chosen"):
        generate_files(GenerateConfig(model=model, out=str(tmp_path / "drawn"), num=3, label=3))


def test_reconstruct_shows_images_at_the_size_of_the_model(model: str, picture: Path, tmp_path: Path):
    out = tmp_path / "out"
    line = reconstruct_files(ReconstructConfig(model=model, images=str(picture), out=str(out)))
    assert line.startswith("2 images in")
    with Image.open(out / "a.png") as shown:
        assert shown.size == (16, 10)  # beside each other
    assert set(json.loads((out / "psnr.json").read_text())["psnr"]) == {"a.png", "b.png"}


def test_interpolate_walks_from_one_image_to_the_other(model: str, picture: Path, tmp_path: Path):
    ends = {"first": str(picture / "a.png"), "second": str(picture / "b.png")}
    interpolate_files(InterpolateConfig(model=model, **ends, out=str(tmp_path / "walk"), num=5))
    steps = sorted((tmp_path / "walk").glob("step_*.png"))
    assert len(steps) == 5
    reconstruct_files(ReconstructConfig(model=model, images=str(picture), out=str(tmp_path / "ends"), alone=True))
    for step, name in ((steps[0], "a.png"), (steps[-1], "b.png")):
        found = np.asarray(Image.open(step)).astype(int)
        assert np.abs(found - np.asarray(Image.open(tmp_path / "ends" / name)).astype(int)).max() <= 1
    with pytest.raises(UserError, match=r"redrawn=0\.5, expected it left out"):
        interpolate_files(InterpolateConfig(model=model, **ends, out=str(tmp_path / "other"), redrawn=0.5))


def test_an_arc_keeps_its_distance_from_the_origin():
    start, end = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 5.0])
    middle = on_the_way(start, end, 0.5)
    torch.testing.assert_close(middle.norm(), torch.tensor(4.0))
    torch.testing.assert_close(middle / 4, torch.tensor([2**-0.5, 0, 2**-0.5]))
    torch.testing.assert_close(on_the_way(start, end, 0.0), start)
    torch.testing.assert_close(on_the_way(start, end, 1.0), end)
    torch.testing.assert_close(on_the_way(start, -start, 0.25), start / 2)
    torch.testing.assert_close(on_the_way(start, torch.zeros(3), 0.5), start / 2)


def test_models_are_told_apart(model: str, tmp_path: Path):
    assert is_vae(model)
    (tmp_path / "config.json").write_text('{"kind": "vqvae"}')
    assert not is_vae(tmp_path)
    assert not is_vae(tmp_path / "none")
    with pytest.raises(UserError, match="there is no folder"):
        generate_files(GenerateConfig(model=str(tmp_path / "none"), out=str(tmp_path / "out")))
