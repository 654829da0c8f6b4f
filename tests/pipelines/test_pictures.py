"""Pictures hold the pixels they were given, and files are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipelines import pictures


def test_to_pil_covers_the_range_and_keeps_the_channels():
    values = torch.tensor([-1.0, 0.0, 1.0, 2.0])  # what lies outside is clamped
    grey = pictures.to_pil(values.reshape(1, 1, 4))
    assert grey.mode == "L"
    assert np.asarray(grey).tolist() == [[0, 128, 255, 255]]
    colour = pictures.to_pil(torch.stack([values, -values, values * 0]).reshape(3, 2, 2))
    assert (colour.mode, colour.size) == ("RGB", (2, 2))
    assert np.asarray(colour)[0, 0].tolist() == [0, 255, 128]


def test_every_picture_is_on_the_sheet_in_reading_order():
    shades = [Image.new("L", (60, 60), shade) for shade in (10, 60, 110, 160, 210)]
    sheet = np.asarray(pictures.contact_sheet(pictures.in_columns(shades, 2)))
    found = [sheet[r * 62 + 30, c * 62 + 30, 0] for r in range(3) for c in range(2)]
    assert found == [10, 60, 110, 160, 210, 255]  # the last cell is empty


def test_small_pictures_are_magnified_and_row_names_get_room():
    rows = [[Image.new("L", (28, 28), 0)] * 3] * 2
    plain, named = pictures.contact_sheet(rows), pictures.contact_sheet(rows, ["a name", "another"])
    assert plain.size == (3 * 60 + 4, 2 * 60 + 4)
    assert named.height == plain.height
    assert named.width > plain.width + 20
    assert np.asarray(named)[:, :20].min() < 128  # written in black


def test_class_rows_are_in_class_order_and_no_longer_than_asked():
    assert pictures.class_rows([2, 0, 2, 0, 2, 1], columns=2) == [[1, 3], [5], [0, 2]]


def test_a_png_cut_short_is_not_complete(tmp_path: Path):
    path = tmp_path / "image.png"
    assert not pictures.is_complete_png(path)
    pictures.save_png(Image.new("L", (9, 9), 7), path)
    assert pictures.is_complete_png(path)
    whole = path.read_bytes()
    for length in (0, 5, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not pictures.is_complete_png(path)


def test_a_write_that_fails_leaves_nothing_and_says_so(tmp_path: Path, monkeypatch):
    def fail(self, file, format):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(UserError, match="the disk is full"):
        pictures.save_png(Image.new("L", (9, 9)), tmp_path / "image.png")
    assert list(tmp_path.iterdir()) == []


def test_curves_are_drawn_from_what_the_run_logged(tmp_path: Path):
    lines = [
        {"step": 1, "split": "train", "psnr": 9.0},
        {"step": 2, "split": "validation", "psnr": None, "other": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = [pictures.Curve(name, tmp_path / "metrics.jsonl", name) for name in ("psnr", "absent")]
    pictures.draw_curves(curves, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 2 * image.height
