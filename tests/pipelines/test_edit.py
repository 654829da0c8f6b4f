"""Inpainting, variations and walks: known codes survive bit for bit, and the files are what the pipeline draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipelines import TwoStagePipeline
from pipelines.edit import (
    InpaintConfig,
    InterpolateConfig,
    VaryConfig,
    inpaint_files,
    interpolate_files,
    kept_pixels,
    vary_files,
)
from pipelines.pictures import to_pil
from stage2_prior.sampling import SamplingConfig
from tests.pipelines.conftest import make_autoencoder, make_pipeline, make_prior


def some_images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(some_images()):
        to_pil(image).save(folder / f"{number}.png")
    return folder


def test_the_kept_half_survives_bit_for_bit_and_the_other_is_drawn():
    pipeline, images = make_pipeline(), some_images()
    keep = torch.zeros(16, 16, dtype=torch.bool)
    keep[:, :8] = True
    made = pipeline.inpaint(images, keep, labels=[0, 1, 2], seed=4)
    codes = pipeline.encode(images)[0]
    assert torch.equal(made.codes[0][:, :, :2], codes[:, :, :2])
    assert not torch.equal(made.codes[0][:, :, 2:], codes[:, :, 2:])
    assert torch.equal(pipeline.decode(made.codes), made.images)
    assert torch.equal(pipeline.inpaint(images, torch.ones(16, 16).bool(), labels=0).codes[0], codes)


def test_what_is_drawn_depends_on_seed_and_index_not_on_the_batch():
    pipeline, images = make_pipeline(), some_images()
    keep = torch.zeros(16, 16, dtype=torch.bool)
    whole = pipeline.inpaint(images, keep, labels=1, seed=2).codes[0]
    alone = pipeline.inpaint(images[1:2], keep, labels=1, seed=2, first_index=1).codes[0]
    assert torch.equal(whole[1:2], alone)
    assert not torch.equal(whole, pipeline.inpaint(images, keep, labels=1, seed=3).codes[0])
    assert torch.equal(whole, pipeline.generate(3, labels=1, seed=2).codes[0])  # nothing kept: as generated


def test_variations_keep_the_other_codes_whatever_the_batch():
    pipeline, images = make_pipeline(), some_images()
    codes = pipeline.encode(images)[0]
    varied = pipeline.vary(images, 0.25, labels=0, seed=1).codes[0]
    assert ((varied != codes).flatten(1).sum(1) <= 4).all()
    assert (varied != codes).any()
    assert torch.equal(pipeline.vary(images[2:], 0.25, labels=0, seed=1, first_index=2).codes[0], varied[2:])
    assert torch.equal(pipeline.vary(images, 0.0, labels=0).codes[0], codes)


def test_a_walk_begins_and_ends_at_its_images_and_passes_between_them():
    pipeline, (first, second, _) = make_pipeline(), some_images()
    walk = pipeline.interpolate(first, second, 5, labels=0).codes[0]
    ends = pipeline.encode(torch.stack([first, second]))[0]
    assert torch.equal(walk[[0, -1]], ends)
    assert ((walk == ends[0]) | (walk == ends[1])).all()
    mixed = pipeline.interpolate(first, second, 5, labels=0, redrawn=0.5).codes[0]
    assert torch.equal(mixed[[0, -1]], ends)
    assert not torch.equal(mixed, walk)
    assert torch.equal(pipeline.interpolate(first, second, 2, labels=0).codes[0], ends)


def test_without_a_label_any_class_is_drawn_without_guidance():
    pipeline = make_pipeline()
    pipeline.sampling = SamplingConfig(guidance=3.0)
    made = pipeline.vary(some_images(), 1.0)
    assert made.labels.tolist() == [3, 3, 3]  # the null label of three classes
    plain = TwoStagePipeline(pipeline.autoencoder, pipeline.prior)
    assert torch.equal(plain.vary(some_images(), 1.0).codes[0], made.codes[0])
    assert make_pipeline(num_classes=0).vary(some_images(), 0.5).labels is None


def test_without_a_label_a_prior_that_never_saw_the_null_label_is_refused():
    autoencoder = make_autoencoder()
    prior = make_prior(autoencoder)
    prior.knows_null_label = False
    with pytest.raises(UserError, match=r"must be told a class; give a label, one of the 3 from 0 to 2"):
        TwoStagePipeline(autoencoder, prior).vary(some_images(), 0.5)


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match="got images of 1x8x16, expected 1x16x16, the size that this model makes"):
        make_pipeline().vary(some_images()[:, :, :8], 0.5)


def test_inpaint_writes_variants_and_a_sheet(model: Path, pictures: Path, tmp_path: Path):
    out = tmp_path / "out"
    line = inpaint_files(InpaintConfig(model=str(model), images=str(pictures), out=str(out), variants=2, seed=3))
    assert line == f"2 variants of each of 3 images in {out}, the first on {out}/sheet.png"
    names = sorted(path.name for path in out.iterdir())
    assert names == [*(f"{i}_{variant}.png" for i in range(3) for variant in range(2)), "settings.json", "sheet.png"]
    image = to_tensor(pictures / "1.png")
    keep = torch.zeros(16, 16, dtype=torch.bool)
    keep[:, :8] = True
    made = make_pipeline().inpaint(image.expand(2, -1, -1, -1), keep, seed=3, first_index=2).images
    for variant in range(2):
        with Image.open(out / f"1_{variant}.png") as written:
            assert written.tobytes() == to_pil(made[variant]).tobytes()


def to_tensor(path: Path) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(Image.open(path))).float()
    return (pixels / 127.5 - 1).view(1, 16, 16)


def test_vary_and_interpolate_write_their_files(model: Path, pictures: Path, tmp_path: Path):
    line = vary_files(VaryConfig(model=str(model), images=str(pictures / "0.png"), out=str(tmp_path / "v"), variants=3))
    assert line.startswith("3 variants of each of 1 images in ")
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == [
        *(f"0_{variant}.png" for variant in range(3)),
        "settings.json",
        "sheet.png",
    ]
    out, (first, second) = tmp_path / "walk", (str(pictures / name) for name in ("0.png", "2.png"))
    interpolate_files(InterpolateConfig(model=str(model), first=first, second=second, out=str(out), steps=4))
    assert sorted(path.name for path in out.iterdir()) == ["sheet.png", *(f"step_{i:02d}.png" for i in range(4))]


def test_variants_of_other_settings_are_not_mixed(model: Path, pictures: Path, tmp_path: Path):
    config = InpaintConfig(model=str(model), images=str(pictures), out=str(tmp_path / "out"), variants=2)
    inpaint_files(config)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    inpaint_files(config)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UserError, match="keep was 'left' and is now 'top'"):
        inpaint_files(replace(config, keep="top"))
    vary = VaryConfig(model=str(model), images=str(pictures), out=str(tmp_path / "out"), variants=2)
    with pytest.raises(UserError, match=r"was begun with other settings: share was None and is now 0.3"):
        vary_files(vary)


def test_originals_are_not_written_over(model: Path, pictures: Path):
    before = {path: path.read_bytes() for path in pictures.iterdir()}
    several = {"model": str(model), "images": str(pictures), "variants": 1}
    two = {"model": str(model), "first": str(pictures / "0.png"), "second": str(pictures / "1.png")}
    for out in (pictures, pictures / "below"):
        for write, config in [
            (inpaint_files, InpaintConfig(out=str(out), **several)),
            (vary_files, VaryConfig(out=str(out), **several)),
        ]:
            with pytest.raises(UserError, match=r"lies in the folder of the images, .*name another --out folder"):
                write(config)
    with pytest.raises(UserError, match="lies in the folder of the images"):
        interpolate_files(InterpolateConfig(out=str(pictures), **two))
    assert {path: path.read_bytes() for path in pictures.iterdir()} == before


def test_an_unreadable_image_is_left_out_and_counted(model: Path, pictures: Path, tmp_path: Path):
    (pictures / "3.png").write_bytes(b"no image")
    config = VaryConfig(model=str(model), images=str(pictures), out=str(tmp_path / "out"), variants=1)
    assert vary_files(config).endswith("; 1 images could not be read")


def test_a_mask_is_white_where_pixels_stay(tmp_path: Path):
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    spec = make_pipeline().prior.code_spec
    keep = kept_pixels(str(tmp_path / "mask.png"), spec)
    assert torch.equal(keep, torch.arange(16)[:, None].expand(16, 16) < 8)
    with pytest.raises(UserError, match="keep=lefft is neither a file nor one of left, right, top, bottom, middle"):
        kept_pixels("lefft", spec)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: InpaintConfig(model="m", images="i", out="o", variants=0), "variants=0, expected at least 1"),
        (lambda: VaryConfig(model="m", images="i", out="o", share=1.2), "share=1.2, expected a share from 0 to 1"),
        (lambda: InterpolateConfig(model="m", first="a", second="b", out="o", steps=1), "steps=1, expected at least 2"),
        (lambda: InterpolateConfig(model="m", first="a", second="b", out="o", redrawn=-1), "redrawn=-1, expected"),
    ],
)
def test_impossible_options_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        config()


def test_a_missing_image_is_named(model: Path, pictures: Path, tmp_path: Path):
    config = InterpolateConfig(
        model=str(model), first=str(pictures / "0.png"), second=str(pictures / "none.png"), out=str(tmp_path / "o")
    )
    with pytest.raises(UserError, match=r"there is no image file .*none\.png; check the path"):
        interpolate_files(config)


def test_an_image_of_a_walk_that_cannot_be_read_is_told(model: Path, pictures: Path, tmp_path: Path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    first = str(sorted(pictures.glob("*.png"))[0])
    with pytest.raises(UserError, match=r"broken.png cannot be read: .*; name other images"):
        interpolate_files(InterpolateConfig(model=str(model), first=first, second=str(broken), out=str(tmp_path / "o")))
