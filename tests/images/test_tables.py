"""Data sets of Hugging Face: parquet files, what save_to_disk wrote, folders; by row, with classes and captions."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from images import tables
from images.datasets import DataConfig, image_datasets
from images.sources import open_source
from images.tables import TableSource


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), grey).save(file, "PNG")
    return file.getvalue()


def test_without_the_package_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data.path=hf:a/b is read by the package datasets, .*: pip install datasets"):
        open_source("hf:a/b", "train", Path())


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Any:
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf_cache"))
    yield datasets
    patch.undo()


def rows(hf: Any, count: int = 12, first: int = 0, **columns: Any) -> Any:
    """Image i is of grey i and of class i % 3."""
    numbers = range(first, first + count)
    values: dict[str, Any] = {
        "image": [{"bytes": png(i), "path": None} for i in numbers],
        "label": [i % 3 for i in numbers],
        "text": [f"the grey {i}" for i in numbers],
    }
    features = {"image": hf.Image(), "label": hf.ClassLabel(names=["cat", "dog", "fox"]), "text": hf.Value("string")}
    return hf.Dataset.from_dict(values, features=hf.Features(features))


def greys(source: Any) -> list[int]:
    return [int(source.read(index, 8, 8, 1)[0, 0, 0]) for index in range(len(source))]


def opened(path: Any, split: str = "train", **settings: Any) -> TableSource:
    config = DataConfig(path=str(path), split=split, **settings)  # type: ignore[arg-type]
    source = open_source(config.path, config.split, Path(), config.source_settings)
    assert isinstance(source, TableSource)
    return source


def test_parquet_files_a_saved_set_and_a_folder_are_the_same_images(hf: Any, tmp_path: Path) -> None:
    (tmp_path / "parquet").mkdir()
    rows(hf, 7).to_parquet(tmp_path / "parquet" / "part-0.parquet")
    rows(hf, 5, first=7).to_parquet(tmp_path / "parquet" / "part-1.parquet")
    parts = {"train": rows(hf), "test": rows(hf, 3, first=50)}
    hf.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    places = [
        tmp_path / "parquet",
        tmp_path / "parquet" / "part-*.parquet",
        f"hf:{tmp_path}/parquet",
        tmp_path / "saved",
    ]
    sources = [opened(place) for place in places]
    for source in sources:
        assert greys(source) == list(range(12))
        assert source.class_names == ("cat", "dog", "fox")
        assert source.labels is not None
        assert source.labels.tolist() == [i % 3 for i in range(12)]
        assert source.caption(4) == "the grey 4"
        assert source.sizes([2]).tolist() == [[8, 8]]
        assert source.name(4) == "000004"
    assert len({source.fingerprint() for source in sources}) == 1
    assert greys(opened(tmp_path / "saved", "test")) == [50, 51, 52]
    assert greys(opened(f"hf:{tmp_path}/saved?split=test")) == [50, 51, 52]
    with pytest.raises(UserError, match=r"has the parts train, test and none called valid: name one, such as hf:"):
        opened(f"hf:{tmp_path}/saved?split=valid")
    with pytest.raises(UserError, match="asks for part, expected split, config, revision"):
        opened(f"hf:{tmp_path}/saved?part=test")


def test_a_draw_sees_the_same_rows_at_every_start(hf: Any, tmp_path: Path) -> None:
    rows(hf).save_to_disk(tmp_path / "saved")
    config = DataConfig(path=str(tmp_path / "saved"), image_size=8, channels=1, validation_count=2)
    one, other = (image_datasets(config, 0) for _ in range(2))
    for left, right in zip(one, other, strict=True):
        assert np.array_equal(left.fetch([1, 0], [5, 6])["images"], right.fetch([1, 0], [5, 6])["images"])


def test_columns_are_told_by_their_kind_or_by_name(hf: Any, tmp_path: Path) -> None:
    """Files that other programs wrote: bytes, or structs of bytes and path; classes as numbers or names."""
    contents = [png(i) for i in range(4)]
    plain = hf.Dataset.from_dict({"jpg": contents, "kind": ["b", "a", None, "b"], "number": [0, 1, 2, 0]})
    plain.to_parquet(tmp_path / "plain.parquet")
    source = opened(tmp_path / "plain.parquet")
    assert (greys(source), source.labels, source.caption(0)) == ([0, 1, 2, 3], None, None)
    named = opened(tmp_path / "plain.parquet", label_field="kind")
    assert named.class_names == ("a", "b")
    assert named.labels is not None
    assert named.labels.tolist() == [1, 0, -1, 1]
    numbered = opened(tmp_path / "plain.parquet", label_field="number")
    assert numbered.class_names == ("0", "1", "2")
    structs = [{"bytes": content, "path": "x.png"} for content in contents]
    hf.Dataset.from_dict({"one": structs, "other": structs[::-1]}).to_parquet(tmp_path / "two.parquet")
    with pytest.raises(UserError, match="has the columns of images one, other, expected one column of images: sa"):
        opened(tmp_path / "two.parquet")
    assert greys(opened(tmp_path / "two.parquet", image_field="other")) == [3, 2, 1, 0]
    for settings, message in (
        ({"image_field": "nix"}, "has no column nix, expected data.image_field to be of jpg, kind, number"),
        ({"image_field": "kind"}, "the column kind of .* expected images: files as bytes"),
        ({"label_field": "nix"}, "has no column nix, expected data.label_field to be of"),
        ({"label_field": "jpg"}, "the column jpg of .* expected classes: numbers or names"),
    ):
        with pytest.raises(UserError, match=message):
            opened(tmp_path / "plain.parquet", **settings)


def test_rows_that_cannot_be_read_are_recorded(hf: Any, tmp_path: Path) -> None:
    contents = [png(i) if i not in (3, 8) else b"no image" * (i == 3) for i in range(30)]
    hf.Dataset.from_dict({"png": contents}).to_parquet(tmp_path / "x.parquet")
    record = tmp_path / "bad_files.txt"
    config = DataConfig(path=str(tmp_path / "x.parquet"), image_size=8, channels=1, validation_share=0)
    train, _ = image_datasets(config, 0, record)
    assert train.fetch([3, 8], [0, 1])["images"][:, 0, 0, 0].tolist() == [4, 9]
    title = f"hf:{tmp_path}/x.parquet?split=train"
    assert sorted(train.bad_images.recorded()) == [f"{title}/000003", f"{title}/000008"]
    assert image_datasets(config, 0, record)[0].bad_images.summary().startswith("2 of 30 images cannot be read")


def test_what_cannot_be_opened_says_why(hf: Any, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"x.parquet cannot be opened by datasets \(\w+: .*\); check the name, the net"):
        opened(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"fits no files; check the path"):
        opened(tmp_path / "none-*.parquet")
    with pytest.raises(UserError, match=r"hf:nobody/nothing cannot be opened by datasets"):
        opened("hf:nobody/nothing")
