"""A record of training images finds them again by their codes, whatever their files are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from codes import training_images
from codes.shards import CodeDataset
from codes.training_images import TrainingImages, hashes_of
from common.errors import UserError
from tests.codes.test_codes import SPEC, random_codes, write_folder


@pytest.fixture
def dataset(tmp_path: Path) -> CodeDataset:
    write_folder(tmp_path / "codes", (40, 30, 50))
    return CodeDataset(tmp_path / "codes", "train")


def test_images_are_found_by_their_codes(dataset: CodeDataset):
    record = TrainingImages.of(dataset)
    seen = dataset.fetch([3, 69, 41], [0, 0, 0])["codes"]
    assert record.among(hashes_of(seen)) == (3, 3)
    other = random_codes(5, seed=9)
    assert record.among(hashes_of(other)) == (0, 5)
    changed = tuple(grid.clone() for grid in seen)
    changed[1][0, 3, 5] = (changed[1][0, 3, 5] + 1) % 1000  # one code of one image
    assert record.among(hashes_of(changed)) == (2, 3)
    assert (len(record.hashes), record.complete) == (70, True)


def test_a_hash_does_not_depend_on_the_type_or_the_batch(dataset: CodeDataset):
    codes = dataset.fetch(range(70), range(70))["codes"]
    stored = np.concatenate([hashes_of(parts) for parts in dataset.stored()])
    assert np.array_equal(hashes_of(codes), stored)
    assert np.array_equal(hashes_of([grid[7:9].to(torch.int32).numpy() for grid in codes]), stored[7:9])


def test_of_many_images_a_part_is_kept_and_the_share_found_is_that_of_all(dataset: CodeDataset, monkeypatch):
    monkeypatch.setattr(training_images, "LARGEST", 20)
    record = TrainingImages.of(dataset)
    assert (len(record.hashes), record.complete) == (20, False)
    seen = hashes_of(dataset.fetch(range(70), range(70))["codes"])
    assert record.among(seen) == (20, 20)  # the others are not judged
    assert record.among(np.concatenate([seen, seen[:1], seen[:1]]))[1] in (19, 20)  # what three share tells nothing
    mixed = np.concatenate([seen, hashes_of(random_codes(70, seed=9))])
    found, compared = record.among(mixed)
    assert found == 20
    assert 25 < compared < 60


def test_it_comes_back_from_its_tensors(dataset: CodeDataset):
    record = TrainingImages.of(dataset)
    loaded = TrainingImages.from_tensors(record.tensors())
    assert np.array_equal(loaded.hashes, record.hashes)
    assert loaded.complete
    with pytest.raises(UserError, match="a record of training images holds something else"):
        TrainingImages.from_tensors({"something": torch.zeros(3)})


def test_counts_are_of_every_code_of_a_split(dataset: CodeDataset, monkeypatch):
    monkeypatch.setattr("codes.shards.CHUNK", 7)  # ends inside shards
    codes = dataset.fetch(range(70), range(70))["codes"]
    for grid, counts, expected in zip(SPEC.grids, dataset.counts(), codes, strict=True):
        assert torch.equal(counts, expected.flatten().bincount(minlength=grid.vocabulary))
