"""The blocks of docs/python.md, from top to bottom, as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.two_stage import TwoStagePipeline
from tests.pipelines.conftest import make_autoencoder, make_prior
from tests.pipelines.test_model_card import Hub

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
SMALLER = {
    '"train.steps": 2000': '"train.steps": 2, "train.batch_size": 4, "data.validation_count": 2, "model.width": 8',
    '"train.steps": 4000': '"train.steps": 2, "train.batch_size": 4, "model.width": 8, "model.heads": 2',
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page speaks of: a model of ten digits, pictures of some, and a hub."""
    autoencoder = make_autoencoder(image_size=(28, 28))
    prior = make_prior(autoencoder, num_classes=10)
    prior.class_names = tuple("0123456789")
    TwoStagePipeline(autoencoder, prior).save_pretrained(tmp_path / "runs" / "quickstart" / "model")
    (tmp_path / "my_digits").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "my_digits" / f"{number}.png")
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", hub.api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_of_the_page_runs(folder: Path):
    text = PAGE.read_text(encoding="utf-8")
    for written, smaller in SMALLER.items():
        assert written in text
        text = text.replace(written, smaller)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```python")
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["made"].images.shape == (3, 1, 28, 28)
    assert names["made"].images.abs().max() <= 1
    assert len(list((folder / "many").iterdir())) == 12
    assert names["sevens"].labels.tolist() == [7] * 8
    assert [image.shape for image in names["restored"]] == [(1, 28, 28)] * 12
    assert names["result"].finished
    assert (folder / "models" / "digits" / "model_index.json").is_file()
    assert names["again"].fingerprint() == names["pipeline"].fingerprint()
    assert "license: mit" in names["card"].read_text()


def test_the_script_of_which_the_types_are_checked_runs(folder: Path):
    from tests.zellige.typed_script import first_pictures, round_trip, share

    model = folder / "runs" / "quickstart" / "model"
    assert [picture.size for picture in first_pictures(model, 3)] == [(28, 28)] * 3
    assert round_trip(model).shape == (4, 1, 28, 28)
    assert share(TwoStagePipeline.from_pretrained(model), "owner/typed").endswith("owner/typed")
