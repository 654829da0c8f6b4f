"""Parquet files at an address: any image by its number, row groups fetched once, classes and captions, exact steps."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from common.errors import UserError  # noqa: E402
from common.model_io import load_pretrained  # noqa: E402
from images import parquet  # noqa: E402
from images.datasets import DataConfig, image_datasets  # noqa: E402
from images.parquet import ParquetSource, make_room  # noqa: E402
from images.sources import open_source  # noqa: E402
from pipelines.trainings import train_stage1  # noqa: E402
from stage1_vq.autoencoders import AUTOENCODERS, VQVAEConfig  # noqa: E402
from stage1_vq.quantizers import NearestQuantizerConfig  # noqa: E402
from stage1_vq.train import Stage1Config  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.data import BlockOrder, sample_order  # noqa: E402


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zellige"


@pytest.fixture(autouse=True)
def memory() -> Any:
    files = fsspec.filesystem("memory")
    yield files
    for name in files.find("/"):
        files.rm_file(name)


@pytest.fixture
def fetched(monkeypatch) -> list[tuple[str, int]]:
    """The row groups that are read from now on."""
    found: list[tuple[str, int]] = []
    read = pq.ParquetFile.read_row_group

    def noted(self, i: int, **options):
        found.append((self.metadata.num_rows, i))
        return read(self, i, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    return found


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), grey).save(file, "PNG")
    return file.getvalue()


def write(memory: Any, place: str, numbers: range, labels: Any = None, names: Any = None, group: int = 4) -> None:
    """Image i is of grey i."""
    columns = {
        "image": pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in numbers]),
        "text": pa.array([f"the grey {i} " for i in numbers]),
    }
    features: dict[str, Any] = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    if labels is not None:
        columns["label"] = pa.array([labels(i) for i in numbers])
    if names is not None:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    table = pa.table(columns)
    about = json.dumps({"info": {"features": features}}).encode()
    file = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"huggingface": about}), file, row_group_size=group)
    memory.pipe_file(place, file.getvalue())


def opened(path: str, **settings: Any) -> ParquetSource:
    config = DataConfig(path=path, **settings)
    source = open_source(config.path, config.split, Path(), config.source_settings)
    assert isinstance(source, ParquetSource)
    return source


@pytest.fixture
def two(memory: Any) -> str:
    """23 images in two files, with classes."""
    write(memory, "/set/train-0.parquet", range(13), lambda i: i % 3, ["cat", "dog", "fox"])
    write(memory, "/set/train-1.parquet", range(13, 23), lambda i: None if i == 20 else i % 3, ["cat", "dog", "fox"])
    write(memory, "/set/test-0.parquet", range(50, 54), lambda i: 0, ["cat", "dog", "fox"])
    return "memory://set/train-*.parquet"


def grey(source: ParquetSource, index: int) -> int:
    return int(source.read(index, 8, 8, 1)[0, 0, 0])


def test_any_image_is_read_from_its_row_group_which_is_fetched_once(two: str, fetched: list):
    source = opened(two)
    assert len(source) == 23
    assert source.labels.tolist() == [-1 if i == 20 else i % 3 for i in range(23)]
    assert source.class_names == ("cat", "dog", "fox")
    assert source.blocks.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] + [4] * 4 + [5] * 4 + [6] * 2
    assert not fetched  # classes are a column of their own
    order = np.random.default_rng(0).permutation(23).tolist()
    assert [grey(source, i) for i in order] == order
    assert Counter(fetched) == Counter([(13, 0), (13, 1), (13, 2), (13, 3), (10, 0), (10, 1), (10, 2)])
    again = pickle.loads(pickle.dumps(source))  # as a loader's worker has it
    assert [grey(again, i) for i in order] == order
    assert len(fetched) == 7
    assert source.caption(14) == "the grey 14"
    assert source.name(14) == "train-1.parquet/000001"
    assert source.location(14) == "memory:///set/train-1.parquet/000001"
    assert not source.still_bad(source.location(14))


def test_the_index_and_row_groups_outlast_the_process(two: str, fetched: list, monkeypatch):
    grey(opened(two), 5)
    monkeypatch.setattr(parquet, "make_index", lambda *arguments: pytest.fail("looked at again"))
    again = opened(two)
    assert grey(again, 6) == 6
    assert len(fetched) == 1
    assert again.labels.tolist()[:4] == [0, 1, 2, 0]


def test_a_file_that_is_another_one_is_read_anew(two: str, memory: Any):
    before = opened(two)
    grey(before, 0)
    write(memory, "/set/train-0.parquet", range(100, 113), lambda i: 1, ["cat", "dog", "fox"])
    after = opened(two)
    assert grey(after, 0) == 100
    assert after.labels[0] == 1
    assert after.fingerprint() != before.fingerprint()
    write(memory, "/set/train-0.parquet", range(13), lambda i: 1, ["cat", "dog", "fox"], group=3)
    with pytest.raises(UserError, match=r"train-0.parquet has 3 rows in a group that had 4 when it was indexed"):
        grey(after, 8)


def test_what_a_step_sees_is_a_function_of_the_step(two: str):
    config = DataConfig(path=two, image_size=8, channels=1, validation_count=5)
    train, held_out = image_datasets(config, 0)
    order = sample_order(train, 4, 7)
    assert isinstance(order, BlockOrder)
    seen = [
        train.fetch(*zip(*order.samples(range(s, s + 4)), strict=True))["images"][:, 0, 0, 0].tolist()
        for s in (0, 4, 8)
    ]
    other = sample_order(image_datasets(config, 0)[0], 4, 7)
    assert train.fetch(*zip(*other.samples(range(4, 8)), strict=True))["images"][:, 0, 0, 0].tolist() == seen[1]
    assert len({grey for batch in seen for grey in batch}) == 12
    assert set(train.indices) | set(held_out.indices) == set(range(23))
    assert len(set(held_out.blocks.tolist())) <= 3  # whole row groups, and a part of one
    batch = held_out.fetch(range(5), range(5))
    assert batch["images"][:, 0, 0, 0].tolist() == held_out.indices.tolist()


def test_a_run_continues_as_if_it_had_not_been_interrupted(two: str, tmp_path: Path, cache: Path):
    settings = {"channels": 1, "width": 8, "residual_width": 8, "residual_blocks": 1, "downsamplings": 1}
    model = VQVAEConfig(quantizer=NearestQuantizerConfig(codebook_size=8, dim=4), **settings)
    data = DataConfig(path=two, image_size=8, channels=1, validation_count=4, crop="random", shift=1)
    often = {"log_every": 2, "validate_every": 4, "preview_every": 0, "save_every": 4}

    def config(steps: int) -> Stage1Config:
        train = TrainConfig(steps=steps, batch_size=6, schedule="constant", tracker="none", workers=0, **often)
        return Stage1Config(model=model, data=data, train=train)

    train_stage1(config(8), tmp_path / "whole")
    train_stage1(config(4), tmp_path / "continued")
    shutil.rmtree(cache / "row_groups")  # of another machine
    train_stage1(config(8), tmp_path / "continued")
    whole, continued = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "continued"))
    assert whole == continued
    models = [load_pretrained(tmp_path / name, AUTOENCODERS).fingerprint() for name in ("whole", "continued")]
    assert models[0] == models[1]


def test_a_damaged_row_group_on_the_disk_is_fetched_again(two: str, fetched: list, cache: Path):
    grey(opened(two), 0)
    (kept,) = (cache / "row_groups").rglob("*.arrow")
    kept.write_bytes(kept.read_bytes()[:100])
    assert grey(opened(two), 1) == 1
    assert len(fetched) == 2
    assert not list((cache / "row_groups").rglob("*.lock"))


def test_where_nothing_can_be_kept_row_groups_are_in_memory(two: str, monkeypatch, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [grey(opened(two), i) for i in (3, 20)] == [3, 20]


def test_with_little_room_what_was_not_needed_for_longest_goes(tmp_path: Path, monkeypatch):
    for number in range(4):
        path = tmp_path / "set" / f"{number}.arrow"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 100)
        os.utime(path, (number, number))
    usage = type("Usage", (), {"total": 1000, "free": 250})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    make_room(tmp_path, 100)  # a tenth stays free
    assert len(list(tmp_path.rglob("*.arrow"))) == 4
    make_room(tmp_path, 300)
    assert sorted(path.name for path in tmp_path.rglob("*.arrow")) == ["2.arrow", "3.arrow"]


def test_classes_may_be_names_or_numbers_and_files_may_know_some_of_them(memory: Any):
    write(memory, "/named/0.parquet", range(4), lambda i: "ab"[i % 2])
    write(memory, "/named/1.parquet", range(4), lambda i: "cb"[i % 2])
    named = opened("memory://named/{0..1}.parquet", label_field="label")
    assert named.class_names == ("a", "b", "c")
    assert named.labels.tolist() == [0, 1, 0, 1, 2, 1, 2, 1]
    write(memory, "/numbers/0.parquet", range(4), lambda i: i + 1)
    assert opened("memory://numbers/0.parquet", label_field="label").labels.tolist() == [1, 2, 3, 4]
    assert opened("memory://numbers/0.parquet").labels is None


def test_files_of_others_have_bytes_and_nothing_else(memory: Any):
    file = io.BytesIO()
    pq.write_table(pa.table({"key": ["x", "y"], "jpg": [png(1), None]}), file)
    memory.pipe_file("/others/a.parquet", file.getvalue())
    source = opened("memory://others/a.parquet")
    assert grey(source, 0) == 1
    assert source.labels is None
    assert source.caption(0) is None
    assert source.still_bad(source.location(1))
    assert source.sizes([0, 1]).tolist() == [[8, 8], [0, 0]]


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("memory://set/none-*.parquet", {}, "fits no files; check the path"),
        ("memory://set/none.parquet", {}, "memory://set/none.parquet is not there"),
        (
            "memory://set/train-*.parquet",
            {"image_field": "picture"},
            "has no column picture, expected data.image_field",
        ),
        ("memory://set/train-*.parquet", {"image_field": "text"}, "the column text of .* is string, expected images"),
        ("memory://set/train-*.parquet", {"label_field": "text2"}, "has no column text2, expected data.label_field"),
        ("memory://set/train-*.parquet", {"split": "test"}, "is parquet files, without such a part"),
        ("memory://set/bad.parquet", {}, "memory://set/bad.parquet cannot be read"),
        ("memory://set/two.parquet", {}, "has the columns of images a, b, expected one column of images"),
        ("memory://set/{train-0,two}.parquet", {"image_field": "a"}, "has no column a, expected data.image_field"),
    ],
)
def test_what_cannot_be_is_one_sentence(two: str, memory: Any, path: str, settings: dict, message: str):
    memory.pipe_file("/set/bad.parquet", b"no parquet")
    file = io.BytesIO()
    pq.write_table(pa.table({"a": [png(1)], "b": [png(2)]}), file)
    memory.pipe_file("/set/two.parquet", file.getvalue())
    with pytest.raises(UserError, match=message):
        opened(path, **settings)


def test_without_the_package_the_message_names_it(monkeypatch):
    monkeypatch.setattr(parquet, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"is read by the package pyarrow, which is not there: pip install pyarrow"):
        opened("memory://set/a.parquet")
