"""A reference is computed once, found by what the images are, and never taken damaged or of something else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from images.datasets import to_float
from metrics.features import FeatureNetwork
from metrics.reference import (
    DESCRIPTION_NAME,
    TENSORS_NAME,
    cache_folder,
    find,
    hash_of,
    image_digests,
    place_of,
    reference_of,
)

IMAGES = torch.randint(0, 256, (11, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SET = {"path": "photos", "split": "train", "size": [6, 5]}


class Counting(nn.Module):
    """Features and logits of an image; counts how many it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -1.0]))
        self.seen = 0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += len(images)
        means = images.float().mean(dim=(1, 2, 3))[:, None]
        return means * self.weight, torch.cat([means, -means, means * 0], dim=1) / 255


def network(treatment: str = "none") -> FeatureNetwork:
    made = FeatureNetwork("test:counting", Counting(), {"resize": treatment})
    made.network.seen = 0
    return made


def batches(images: Tensor = IMAGES, size: int = 4) -> Callable[[], Iterable[Tensor]]:
    return lambda: iter(images.split(size))


def test_a_reference_is_computed_once_and_found_again(tmp_path: Path):
    first, again = network(), network()
    made = reference_of(batches(), first, SET, tmp_path)
    found = reference_of(batches(size=3), again, {**SET, "path": "moved"}, tmp_path)
    assert (first.network.seen, again.network.seen) == (11, 0)
    assert torch.equal(made.features, found.features)
    assert torch.equal(made.probabilities, found.probabilities)
    assert torch.equal(made.features, first(IMAGES))
    assert torch.equal(made.statistics.covariance, found.statistics.covariance)
    assert found.description["set"]["path"] == "moved"
    described = {key: value for key, value in made.description.items() if key != "set"}
    assert described == {
        "images": hash_of(image_digests(IMAGES)),
        "count": 11,
        "rounding": "8 bits",
        "network": first.describe(),
    }
    (place,) = tmp_path.iterdir()
    written = json.loads((place / DESCRIPTION_NAME).read_text())
    assert written["set"] == SET
    assert {file.name for file in place.iterdir()} == {DESCRIPTION_NAME, TENSORS_NAME}


def test_without_a_cache_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert reference_of(batches(), network(), SET, None).features.shape == (11, 2)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/zellige/references")


def changed(images: Tensor) -> Tensor:
    images = images.clone()
    images[7, 1, 2, 3] ^= 1
    return images


@pytest.mark.parametrize(
    ("images", "treatment"),
    [
        (changed(IMAGES), "none"),  # by one level of one pixel
        (IMAGES.flip(0), "none"),  # in another order
        (IMAGES[:-1], "none"),
        (IMAGES.transpose(2, 3).contiguous(), "none"),
        (IMAGES.view(11, 3, 5, 6), "none"),  # the same bytes in another shape
        (to_float(IMAGES), "none"),  # not of 8 bits
        (IMAGES, "224x224"),
    ],
)
def test_other_images_and_other_treatments_have_their_own(tmp_path: Path, images: Tensor, treatment: str):
    reference_of(batches(), network(), SET, tmp_path)
    other = network(treatment)
    reference_of(batches(images), other, SET, tmp_path)
    assert other.network.seen == len(images)
    assert len(list(tmp_path.iterdir())) == 2


def test_unrounded_images_are_labelled(tmp_path: Path):
    assert reference_of(batches(to_float(IMAGES)), network(), SET, tmp_path).description["rounding"] == "none"


def test_digests_of_several_processes_are_those_of_one():
    parts = [image_digests(IMAGES[process::3]) for process in range(3)]
    in_order = [parts[number % 3][number // 3] for number in range(11)]
    assert hash_of(in_order) == hash_of(image_digests(IMAGES))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def of_another(file: Path) -> None:
    written = json.loads((file.parent / DESCRIPTION_NAME).read_text())
    (file.parent / DESCRIPTION_NAME).write_text(json.dumps({**written, "images": "0" * 64}))


@pytest.mark.parametrize("name", [DESCRIPTION_NAME, TENSORS_NAME])
@pytest.mark.parametrize("harm", [cut, flipped, Path.unlink, of_another])
def test_a_damaged_reference_is_made_anew(tmp_path: Path, capsys, name: str, harm: Callable[[Path], None]):
    made = reference_of(batches(), network(), SET, tmp_path)
    harm(place_of(tmp_path, made.description) / name)
    again = network()
    assert torch.equal(reference_of(batches(), again, SET, tmp_path).features, made.features)
    assert again.network.seen == 11
    assert "this reference is damaged" in capsys.readouterr().out
    assert find(tmp_path, made.description) is not None


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path):
    made = reference_of(batches(), network(), SET, tmp_path)
    place = place_of(tmp_path, made.description)
    (place / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is no reference that Zellige kept, so it is left alone"):
        reference_of(batches(), network(), SET, tmp_path)
    assert (place / "thesis.tex").read_text() == "mine"


def test_a_set_of_no_images_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="a reference of no images at all"):
        reference_of(lambda: iter(()), network(), SET, tmp_path)
