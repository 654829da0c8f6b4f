"""`interpolate`: the files of a walk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from common.errors import UserError
from pipelines.commands.interpolate import InterpolateConfig, interpolate_files
from pipelines.commands.vary import VaryConfig, vary_files


def test_interpolate_writes_its_files(model: Path, pictures: Path, tmp_path: Path):
    out, (first, second) = tmp_path / "walk", (str(pictures / name) for name in ("0.png", "2.png"))
    interpolate_files(InterpolateConfig(model=str(model), first=first, second=second, out=str(out), num=4, top_k=3))
    walk = [f"step_{i:02d}.png" for i in range(4)]
    assert sorted(path.name for path in out.iterdir()) == ["settings.json", "sheet.png", *walk]


def test_a_walk_of_a_build_that_recorded_nothing_goes_on_and_others_are_refused(
    model: Path, pictures: Path, tmp_path: Path
):
    first, second = (str(pictures / name) for name in ("0.png", "2.png"))
    config = InterpolateConfig(model=str(model), first=first, second=second, out=str(tmp_path / "walk"), num=3)
    interpolate_files(config)
    (tmp_path / "walk" / "settings.json").unlink()
    interpolate_files(config)
    with pytest.raises(UserError, match="num was 3 and is now 4"):
        interpolate_files(replace(config, num=4))
    with pytest.raises(UserError, match="is a folder which `zellige interpolate` began"):
        vary_files(VaryConfig(model=str(model), images=first, out=str(tmp_path / "walk")))
    (tmp_path / "photos").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "photos" / "step_00.png")
    with pytest.raises(UserError, match=r"holds step_00\.png, which this command did not write"):
        interpolate_files(replace(config, out=str(tmp_path / "photos")))


def test_originals_are_not_written_over(model: Path, pictures: Path):
    two = {"model": str(model), "first": str(pictures / "0.png"), "second": str(pictures / "1.png")}
    with pytest.raises(UserError, match="lies in the folder of the images"):
        interpolate_files(InterpolateConfig(out=str(pictures), **two))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num": 1}, "num=1, expected at least 2"), ({"redrawn": -1}, "redrawn=-1, expected a share from 0 to 1")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        InterpolateConfig(model="m", first="a", second="b", out="o", **options)


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
