"""What cannot be read in training is replaced, named and counted, and too much of it stops the run."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from images.datasets import (
    image_datasets,
)
from tests.images.numbered import config, save_folder
from training.data import Loader


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_replaced_named_and_counted(tmp_path: Path, workers: int) -> None:
    root, record = save_folder(tmp_path / "set", 100), tmp_path / "run" / "bad_files.txt"
    spoil(root / "a" / "010.png")
    dataset, _ = image_datasets(config(path=str(root), validation_share=0.0), 0, bad_files=record)
    requests = [[(index, index) for index in range(start, start + 10)] for start in (0, 10, 5, 10)]
    loader = Loader(dataset, requests, workers=workers, prefetch=2, device=torch.device("cpu"))
    batches = [batch["images"][:, 0, 0, 0].tolist() for batch in loader]
    assert batches[1] == [11, *range(11, 20)]  # the next good image in its place
    assert batches[2] == [*range(5, 10), 11, *range(11, 15)]
    assert batches[3] == batches[1]
    (line,) = set(record.read_text().splitlines())  # two workers that find it at one instant both name it
    location, reason = line.split("\t")
    assert location == str(root / "a" / "010.png")
    assert reason


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("options", "allowed"), [({}, 5), ({"max_bad_share": 0.035}, 7), ({"max_bad_share": 0.0}, 0)])
def test_more_bad_files_than_may_be_stop_with_the_list(
    tmp_path: Path, workers: int, options: dict[str, Any], allowed: int
) -> None:
    root, record = save_folder(tmp_path / "set", 100), tmp_path / "bad_files.txt"
    spoilt = [root / "a" / f"{number:03d}.png" for number in range(10, 10 + allowed)] + [root / "b" / "099.png"]
    for path in spoilt:
        spoil(path)
    data = config(path=str(root), validation_share=0.0, **options)
    dataset, _ = image_datasets(data, 0, bad_files=record)
    requests = [[(index, index) for index in range(start, start + 10)] for start in range(0, 200, 10)]
    loader = Loader(dataset, requests, workers=workers, prefetch=2, device=torch.device("cpu"))
    with closing(loader):  # as `caught` would keep its workers alive
        for _ in range(19):
            next(loader)
        found = dataset.bad_images.summary()
        assert workers or found == (
            f"{allowed} of 200 images cannot be read and are passed over: see {record}" if allowed else ""
        )
        with pytest.raises(
            UserError, match=f"{allowed + 1} of 200 images cannot be .*, and {allowed} may be"
        ) as caught:
            next(loader)
    assert str(spoilt[0]) in str(caught.value)
    for path in spoilt:
        assert str(path) in record.read_text()


def test_the_last_image_is_replaced_by_the_first(tmp_path: Path) -> None:
    root = save_folder(tmp_path, 100)
    spoil(root / "b" / "099.png")
    dataset, _ = image_datasets(config(path=str(root), validation_share=0.0), 0)
    batch = dataset.fetch([198, 199], [0, 1])
    assert batch["images"][:, 0, 0, 0].tolist() == [98, 0]
    assert batch["labels"].tolist() == [1, 0]  # of the image that is shown


def test_a_part_without_one_readable_image_does_not_search_for_ever(tmp_path: Path) -> None:
    root = save_folder(tmp_path, 100)
    data = config(path=str(root), validation_count=2)
    held_out = image_datasets(data, 0)[1]
    for name in held_out.names([0, 1]):
        spoil(root / name)
    with pytest.raises(UserError, match=r"none of the 2 images in this part of .* can be read"):
        held_out.fetch([0], [0])


def test_a_bad_file_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = save_folder(tmp_path, 100)
    spoil(root / "a" / "010.png")
    dataset, _ = image_datasets(config(path=str(root), validation_share=0.0), 0)
    tried: list[int] = []
    read = dataset.source.read
    monkeypatch.setattr(dataset.source, "read", lambda index, *rest: (tried.append(index), read(index, *rest))[1])
    for draw in range(3):
        dataset.fetch([10], [draw])
    assert tried == [10, 11, 11, 11]


def test_leaving_out_what_cannot_be_read(tmp_path: Path) -> None:
    root = save_folder(tmp_path, 100)
    spoil(root / "a" / "001.png")
    data = config(path=str(root), validation_share=0.0, crop="random", flip=True)
    dataset, _ = image_datasets(data, 0)
    batch, found = dataset.fetch_readable([0, 1, 2], [7, 8, 9])
    assert found == [0, 2]
    assert torch.equal(batch["images"], dataset.fetch([0, 2], [7, 9])["images"])
    nothing, found = dataset.fetch_readable([1], [0])
    assert found == []
    assert nothing["images"].shape == (0, 1, 8, 8)
