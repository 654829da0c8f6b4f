"""What the build of 2026-11-28 wrote still opens: model folders, runs, code shards, folders of images, `.zlg` files.

`earlier_builds/` was written by that build's commands (`train-stage1`, `encode`, `train-stage2`, `assemble`,
`compress`, `generate`) with models of a few weights, from the pictures that `pictures` draws. `begun/` holds runs of 8
steps as they were after step 4, `finished/` their weights at the end.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codes.shards import CodeDataset
from common.tensor_files import load_tensors
from pipelines.cli import main
from pipelines.two_stage import TwoStagePipeline

HERE = Path(__file__).parent / "earlier_builds"


def pictures(folder: Path) -> Path:
    """24 striped pictures of 16x16 in two classes."""
    for label, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            rows, columns = np.mgrid[:16, :16]
            pixels = (rows * (i + 1) + columns * (label + 2) * 3 + 90 * label) % 256
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:02d}.png")
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """A working folder with all that was written, and the pictures it was made of."""
    shutil.copytree(HERE, tmp_path, dirs_exist_ok=True)
    pictures(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_folder_is_the_model_that_it_was(place: Path):
    pipeline = TwoStagePipeline.from_pretrained(place / "model")
    assert pipeline.fingerprint() == json.loads((place / "model" / "model_index.json").read_text())["fingerprint"]
    images = pipeline.generate(3).images
    for i, image in enumerate(images):
        with Image.open(place / "generated" / f"{i:06d}.png") as written:
            before = np.asarray(written).astype(float)
        assert abs(before - (image[0].numpy() + 1) * 127.5).max() <= 1  # a rounding


def test_code_shards_are_those_of_the_model(place: Path, capsys):
    assert len(CodeDataset(place / "shards", "train")) == 18
    assert main(["codes", "verify", "--codes", "shards", "--model", "model"]) == 0


@pytest.mark.parametrize("mode", ["table", "packed"])
def test_zlg_files_decode(place: Path, mode: str):
    pipeline = TwoStagePipeline.from_pretrained(place / "model")
    with Image.open(place / "images" / "dark" / "03.png") as picture:
        image = torch.from_numpy(np.array(picture))[None, None] / 127.5 - 1
    (decoded,) = pipeline.decompress((place / "zlg" / f"{mode}.zlg").read_bytes())
    torch.testing.assert_close(decoded[None], pipeline.reconstruct(image))


def test_a_zlg_file_of_the_prior_says_what_it_is(place: Path, capsys):
    assert main(["info", "--file", "zlg/prior.zlg", "--model", "model"]) == 0
    assert "mode: prior" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("stage1", ["train-stage1", "--config", "{run}/config.yaml"]),
        ("stage2", ["train-stage2", "--config", "{run}/config.yaml"]),
        ("adversarial", ["train-stage1", "--config", "{run}/config.yaml"]),
    ],
)
def test_a_run_goes_on_and_ends_as_it_would_have(place: Path, name: str, command: list[str]):
    run = place / "begun" / name
    assert main([word.format(run=run) for word in command] + ["--run", str(run)]) == 0
    weights = load_tensors(run / "checkpoints" / "step_00000008" / "model.safetensors")
    expected = load_tensors(place / "finished" / f"{name}.safetensors")
    assert len(list((run / "checkpoints").iterdir())) == 2  # it began at step 4, not anew
    # Gumbel noise of the last has been another since it is drawn by a sample's place in its step: as near as that is.
    tolerance = {"atol": 0.02, "rtol": 0.0} if name == "adversarial" else {"atol": 1e-5, "rtol": 1e-4}
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, **tolerance, msg=lambda said, key=key: f"{key}: {said}")


def test_generate_adds_to_its_folder(place: Path):
    before = (place / "generated" / "000001.png").read_bytes()
    assert main(["generate", "--model", "model", "--num", "5", "--out", "generated"]) == 0
    assert (place / "generated" / "000004.png").exists()
    assert (place / "generated" / "000001.png").read_bytes() == before
