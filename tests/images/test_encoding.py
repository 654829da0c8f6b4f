"""Shards are read ahead by the same processes, and what they were made of is recorded beside the encoding."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from common import sources as sources_module
from common.sources import Sources, added_beside, times_of
from images.datasets import DataConfig, ImageDataset, image_datasets
from images.encoding import PieceReader, cut_into_pieces


@pytest.fixture
def datasets(tmp_path: Path) -> tuple[ImageDataset, ImageDataset]:
    (tmp_path / "images").mkdir()
    for number in range(20):
        Image.fromarray(np.full((8, 8), 10 * number, np.uint8)).save(tmp_path / "images" / f"{number:02d}.png")
    (tmp_path / "images" / "05.png").write_bytes(b"none")
    config = DataConfig(path=str(tmp_path / "images"), image_size=8, channels=1, flip=True, validation_count=6)
    return image_datasets(config, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_pieces_are_read_as_their_datasets_have_them_by_the_same_processes(datasets, workers: int):
    pieces = cut_into_pieces(*datasets, augment_copies=2, shard_size=5)
    processes = set()
    with closing(PieceReader(pieces, 2, workers, torch.device("cpu"))) as reader:
        for piece in pieces:
            numbers = list(range(piece.first, piece.first + piece.images))
            draws = [piece.first_draw + place for place in range(piece.images)]
            expected, found = piece.dataset.fetch_readable(numbers, draws)
            read = list(reader.batches(piece, tqdm(disable=True)))
            assert torch.equal(torch.cat([images for images, _ in read]), expected["images"])
            assert [index for _, indices in read for index in indices] == found
            processes.add(tuple(worker.pid for worker in getattr(reader.loader._batches, "_workers", ())))
    assert len(processes) == 1
    assert len(processes.pop()) == workers


def test_times_of_files_are_those_before_the_first_of_them_is_asked_for(datasets, tmp_path: Path):
    pieces = cut_into_pieces(*datasets, augment_copies=1, shard_size=7)
    files = [
        piece.dataset.source.files(piece.dataset.indices[piece.first : piece.first + 7].tolist()) for piece in pieces
    ]
    before = [times_of(some) for some in files]
    with closing(PieceReader(pieces, 7, 2, torch.device("cpu"))) as reader:
        next(reader.batches(pieces[0], tqdm(disable=True)))  # the next pieces are read ahead by now
        for path in (tmp_path / "images").iterdir():
            os.utime(path, (1, 1))
        assert reader.times == before


def test_what_is_added_beside_is_there_at_the_end_and_errors_are_raised(tmp_path: Path, monkeypatch):
    file = tmp_path / "source"
    file.write_text("x")
    sources = Sources(tmp_path)
    with added_beside(sources) as add:
        for number in range(5):
            add(f"result{number}", [file], times_of([file]))
    assert sources.read() == {f"result{number}": sources.mark([file]) for number in range(5)}

    def broken(*arguments: object) -> str:
        raise OSError("no disk")

    def work() -> None:
        with added_beside(Sources(tmp_path)) as add:
            add("other", [file, file], times_of([file, file]))

    monkeypatch.setattr(sources_module, "contents_of", broken)
    with pytest.raises(OSError, match="no disk"):
        work()


def test_who_leaves_early_does_not_wait_for_all_files(tmp_path: Path, monkeypatch):
    read: list[Path] = []
    monkeypatch.setattr(sources_module, "AT_ONCE", 2)
    monkeypatch.setattr(sources_module, "content_of", lambda file: read.append(file) or "content")
    sources = Sources(tmp_path)
    sources.given_up = True
    sources.add("result", [tmp_path / str(number) for number in range(10)])
    assert not read
    assert not (tmp_path / "sources.jsonl").exists()
