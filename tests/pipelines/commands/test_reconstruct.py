"""Reconstructions of files of any size, format and rotation, with their PSNR."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipelines.commands.reconstruct
from common.errors import UserError
from metrics.similarity import decibels
from pipelines.commands.reconstruct import ReconstructConfig, reconstruct_files
from pipelines.image_folders import target_names
from stage1_vq.autoencoders import AUTOENCODERS, VQVAEConfig
from stage1_vq.quantizers import GroupedQuantizerConfig, MultiscaleQuantizerConfig
from tests.pipelines.conftest import make_autoencoder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images of different sizes, one in a subfolder, one turned by its EXIF; and a text file."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    generator = np.random.default_rng(0)

    def noise(width: int, height: int) -> Image.Image:
        return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))

    noise(16, 16).save(folder / "a.png")
    noise(21, 18).save(folder / "sub" / "b.bmp")
    turned = Image.Exif()
    turned[0x0112] = 6  # turn a quarter to the right: 30 wide, 10 high becomes 10 wide, 30 high
    noise(30, 10).save(folder / "c.jpg", exif=turned)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_each_image_beside_its_reconstruction(model: Path, images: Path, tmp_path: Path):
    out = tmp_path / "out"
    line = reconstruct_files(ReconstructConfig(model=str(model), images=str(images), out=str(out)))
    sizes = {name: Image.open(out / name).size for name in ("a.png", "sub/b.png", "c.png")}
    assert sizes == {"a.png": (32, 16), "sub/b.png": (42, 18), "c.png": (20, 30)}
    with Image.open(images / "sub" / "b.bmp") as original, Image.open(out / "sub" / "b.png") as both:
        left = np.asarray(both.crop((0, 0, 21, 18)))
        right = np.asarray(both.crop((21, 0, 42, 18)))
        assert np.array_equal(left, np.asarray(original.convert("L")))
    results = json.loads((out / "psnr.json").read_text())
    assert sorted(results["psnr"]) == ["a.png", "c.png", "sub/b.png"]
    assert results["psnr"]["sub/b.png"] == decibels(left, right)
    assert results["mean_psnr"] == pytest.approx(sum(results["psnr"].values()) / 3)
    assert line.startswith(f"3 images in {out}, mean PSNR {results['mean_psnr']:.2f} dB")
    assert (out / "sheet.png").exists()


def test_reconstructions_alone_with_an_autoencoder_alone(images: Path, tmp_path: Path):
    autoencoder = make_autoencoder(channels=3).save_pretrained(tmp_path / "run" / "model").parent
    out = tmp_path / "out"
    reconstruct_files(ReconstructConfig(model=str(autoencoder), images=str(images / "a.png"), out=str(out), alone=True))
    with Image.open(out / "a.png") as image:
        assert (image.mode, image.size) == ("RGB", (16, 16))


def test_larger_images_are_scaled_down_if_asked_for(model: Path, images: Path, tmp_path: Path):
    config = ReconstructConfig(model=str(model), images=str(images), out=str(tmp_path / "out"), max_side=20, alone=True)
    reconstruct_files(config)
    sizes = {name: Image.open(tmp_path / "out" / name).size for name in ("a.png", "sub/b.png", "c.png")}
    assert sizes == {"a.png": (16, 16), "sub/b.png": (20, 17), "c.png": (7, 20)}
    with Image.open(images / "sub" / "b.bmp") as original, Image.open(tmp_path / "out" / "sub" / "b.png") as written:
        scaled = original.convert("L").resize((20, 17), Image.Resampling.BICUBIC)
        results = json.loads((tmp_path / "out" / "psnr.json").read_text())
        assert results["psnr"]["sub/b.png"] == decibels(np.asarray(scaled), np.asarray(written))
    with pytest.raises(UserError, match="max_side was 20 and is now None"):
        reconstruct_files(replace(config, max_side=None))
    with pytest.raises(UserError, match="max_side=0, expected at least 1 pixel"):
        replace(config, max_side=0)


def test_a_rerun_keeps_what_is_there_and_makes_what_is_missing(model: Path, images: Path, tmp_path: Path, monkeypatch):
    config = ReconstructConfig(model=str(model), images=str(images), out=str(tmp_path / "out"))
    reconstruct_files(config)
    before = {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*.*"))}
    (tmp_path / "out" / "c.png").unlink()
    reconstruct, calls = pipelines.commands.reconstruct.reconstruct, []
    monkeypatch.setattr(
        pipelines.commands.reconstruct,
        "reconstruct",
        lambda *args, **more: calls.append(1) or reconstruct(*args, **more),
    )
    reconstruct_files(config)
    assert {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*.*"))} == before
    assert len(calls) == 1


def test_an_image_that_changed_is_reconstructed_anew(model: Path, images: Path, tmp_path: Path):
    """Although what replaced it is older than the reconstruction."""
    config = ReconstructConfig(model=str(model), images=str(images), out=str(tmp_path / "out"))
    reconstruct_files(config)
    Image.new("RGB", (16, 16), "white").save(images / "a.png")
    os.utime(images / "a.png", (1, 1))
    reconstruct_files(config)
    with Image.open(tmp_path / "out" / "a.png") as both:
        assert np.asarray(both)[:, :16].min() == 255
    results = json.loads((tmp_path / "out" / "psnr.json").read_text())
    with Image.open(tmp_path / "out" / "a.png") as both:
        expected = decibels(np.full((16, 16), 255, np.uint8), np.asarray(both)[:, 16:])
    assert results["psnr"]["a.png"] == expected


def test_what_a_kill_left_half_written_is_cleared_away(model: Path, images: Path, tmp_path: Path):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    leftovers = [tmp_path / "out" / ".a.png.123.tmp", tmp_path / "out" / "sub" / ".b.png.123.tmp"]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    reconstruct_files(ReconstructConfig(model=str(model), images=str(images), out=str(tmp_path / "out")))
    assert not any(leftover.exists() for leftover in leftovers)


def test_the_sheet_of_large_images_stays_small(model: Path, tmp_path: Path):
    (tmp_path / "images").mkdir()
    Image.new("L", (1500, 10)).save(tmp_path / "images" / "wide.png")
    Image.new("L", (10, 40)).save(tmp_path / "images" / "tall.png")
    reconstruct_files(ReconstructConfig(model=str(model), images=str(tmp_path / "images"), out=str(tmp_path / "out")))
    assert Image.open(tmp_path / "out" / "wide.png").size == (3000, 10)
    assert max(Image.open(tmp_path / "out" / "sheet.png").size) < 2 * 1100 * 2  # two pictures, magnified


def test_images_that_share_a_name_keep_apart(model: Path, tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "a.bmp"):
        Image.new("L", (8, 8), 50).save(folder / name)
    reconstruct_files(ReconstructConfig(model=str(model), images=str(folder), out=str(tmp_path / "out")))
    assert sorted(json.loads((tmp_path / "out" / "psnr.json").read_text())["psnr"]) == [
        "a.bmp.png",
        "a.png.png",
    ]


def test_psnr_of_a_known_error():
    black = np.zeros((2, 2), dtype=np.uint8)
    assert decibels(black, black + 255) == 0
    assert decibels(black, black + 51) == pytest.approx(20 * np.log10(5))
    assert decibels(black, black) is None


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "there is no folder or file"),
        (lambda folder: folder.mkdir(), "holds no images; name a folder with image files in it"),
    ],
)
def test_nothing_to_reconstruct_is_refused(model: Path, tmp_path: Path, prepare, message):
    prepare(tmp_path / "images")
    config = ReconstructConfig(model=str(model), images=str(tmp_path / "images"), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=message):
        reconstruct_files(config)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_broken_images_is_refused_with_their_names(model: Path, images: Path, tmp_path: Path):
    (images / "a.png").write_bytes(b"not a png")
    config = ReconstructConfig(model=str(model), images=str(images), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"1 of 3 images cannot be read(.|\n)*a.png.* with --max_bad_share 0.67"):
        reconstruct_files(config)
    assert reconstruct_files(replace(config, max_bad_share=0.67)).startswith("2 images in ")


def test_results_are_kept_apart_from_the_images(model: Path, tmp_path: Path):
    (tmp_path / "images").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "images" / "a.png")
    config = ReconstructConfig(model=str(model), images=str(tmp_path / "images"), out=str(tmp_path / "images" / "new"))
    with pytest.raises(UserError, match="lies in the folder of the images"):
        reconstruct_files(config)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["a.png"]


def test_an_image_called_like_the_sheet_keeps_its_place():
    assert target_names(["a.jpg", "sheet.png"]) == {"a.jpg": "a.png", "sheet.png": "sheet.png.png"}


def test_no_two_images_share_a_file():
    assert target_names(["a.jpg", "a.jpg.png", "a.png"]) == {
        "a.jpg": "a.jpg.png", "a.jpg.png": "a.jpg.png.png", "a.png": "a.png.png",
    }  # fmt: skip


def test_of_a_model_of_scales_the_first_grids_alone(model: Path, images: Path, tmp_path: Path):
    """Two scales in two groups: the coarser ones give another image, as large; grids of half a scale and too many of
    them are refused."""
    layer = MultiscaleQuantizerConfig(scales=(1, 4), codebook_size=16, dim=3, phis=1)
    config = VQVAEConfig(
        width=8, residual_width=4, residual_blocks=1, quantizer=GroupedQuantizerConfig(groups=2, layer=layer)
    )
    folder = AUTOENCODERS["vqvae"](config, (16, 16)).save_pretrained(tmp_path / "scales")

    def reconstructed(name: str, grids: int | None, from_model: Path = folder) -> Image.Image:
        out = tmp_path / name
        reconstruct_files(
            ReconstructConfig(model=str(from_model), images=str(images), out=str(out), alone=True, grids=grids)
        )
        assert json.loads((out / "psnr.json").read_text())["grids"] == grids
        return Image.open(out / "sub" / "b.png")

    whole, all_grids, first = reconstructed("whole", None), reconstructed("all", 4), reconstructed("first", 2)
    assert whole.tobytes() == all_grids.tobytes()
    assert first.size == whole.size
    assert first.tobytes() != whole.tobytes()
    with pytest.raises(UserError, match="got codes of 1 grid, expected a multiple of 2"):
        reconstructed("half", 1)
    with pytest.raises(UserError, match="grids=5, expected 1 to 4: 1x1 codes of 16"):
        reconstructed("many", 5)
    with pytest.raises(UserError, match="grids=0, expected at least 1"):
        reconstructed("none", 0)
