"""A tiny model, and images to compress with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.codec.tables import fit_tables
from tests.pipelines.conftest import make_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model with three classes and tables."""
    pipeline = make_pipeline()
    pipeline.tables = fit_tables(pipeline.prior.code_spec, [pipeline.encode(torch.rand(40, 1, 16, 16) * 2 - 1)])
    return pipeline.save_pretrained(tmp_path_factory.mktemp("tables") / "model")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images of 16x16, one of another size in a subfolder, and a text file."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    generator = np.random.default_rng(0)
    for number in range(11):
        Image.fromarray(generator.integers(0, 256, (16, 16), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    Image.fromarray(generator.integers(0, 256, (18, 21, 3), dtype=np.uint8)).save(folder / "sub" / "wide.bmp")
    (folder / "notes.txt").write_text("no image")
    return folder
