"""`interpolate`: the files of a walk."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from pipelines.commands.interpolate import InterpolateConfig, interpolate_files


def test_interpolate_writes_its_files(model: Path, pictures: Path, tmp_path: Path):
    out, (first, second) = tmp_path / "walk", (str(pictures / name) for name in ("0.png", "2.png"))
    interpolate_files(InterpolateConfig(model=str(model), first=first, second=second, out=str(out), num=4, top_k=3))
    assert sorted(path.name for path in out.iterdir()) == ["sheet.png", *(f"step_{i:02d}.png" for i in range(4))]


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
