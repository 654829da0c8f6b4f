"""Images one batch after another: the same as all at once, made when they are asked for, counted for a person."""

from __future__ import annotations

import io
import itertools
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import progress
from common.errors import UserError
from pipelines import streaming
from pipelines.latents.pipeline import LatentPipeline
from pipelines.two_stage import TwoStagePipeline
from tests.pipelines.conftest import make_pipeline
from tests.pipelines.latents.test_judging import small_vae


@pytest.mark.parametrize("labels", [None, "class 1", [2, 0, 1, 1, "class 0", 2, 0]])
def test_a_stream_brings_the_images_of_generate(labels):
    pipeline = make_pipeline()
    asked = {"labels": labels, "seed": 5, "first_index": 2, "temperature": 0.8}
    whole = pipeline.generate(7, batch_size=3, **asked)
    parts = list(pipeline.stream(7, batch_size=3, **asked))
    assert [len(part.images) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.codes[0] for part in parts]), whole.codes[0])
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    alone = pipeline.generate(7, **asked)  # in one batch
    assert torch.equal(alone.codes[0], whole.codes[0])
    expected = {type(None): [2, 0, 1, 2, 0, 1, 2], str: [1] * 7, list: [2, 0, 1, 1, 0, 2, 0]}[type(labels)]
    assert alone.labels.tolist() == whole.labels.tolist() == expected


def test_a_stream_of_a_vae_brings_the_images_of_generate():
    pipeline = LatentPipeline(small_vae())
    whole = pipeline.generate(5, seed=3, first_index=4, batch_size=2, pixels="sample")
    parts = list(pipeline.stream(5, seed=3, first_index=4, batch_size=2, pixels="sample"))
    assert [len(part.images) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)


@pytest.mark.parametrize("pipeline", [make_pipeline(), LatentPipeline(small_vae())], ids=["two stages", "vae"])
def test_what_nobody_asks_for_is_not_made(pipeline: TwoStagePipeline | LatentPipeline, monkeypatch):
    made: list[range] = []
    sample = pipeline.sample
    monkeypatch.setattr(
        pipeline, "sample", lambda indices, *rest, **more: made.append(indices) or sample(indices, *rest, **more)
    )
    stream = pipeline.stream(10**15, batch_size=2, first_index=4)  # a list of all would not fit into any memory
    assert made == []
    assert len(next(stream).images) == 2
    next(stream)
    stream.close()
    assert made == [range(4, 6), range(6, 8)]
    with pytest.raises(StopIteration):
        next(stream)


def test_mistakes_are_told_before_the_first_batch():
    pipeline, vae = make_pipeline(), LatentPipeline(small_vae())
    for wrong, said in (
        ({"labels": 7}, "label 7 is out of range"),
        ({"labels": [0]}, "got 1 label for 4 images"),
        ({"prompts": "a cat"}, "knows no prompt"),
        ({"batch_size": 0}, "expected at least 1 of each"),
        ({"heat": 1.0}, "no setting 'heat'"),
        ({"guidance_scale": 2.0}, "no setting 'guidance_scale' of sampling; use guidance$"),
        ({"generator": None}, "use seed"),
    ):
        with pytest.raises(UserError, match=said):
            pipeline.stream(4, **wrong)
    with pytest.raises(UserError, match="expected at least 1 of each"):
        vae.stream(0)
    with pytest.raises(UserError, match="expected mean, mode or sample"):
        vae.stream(4, pixels="median")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("pipeline", [make_pipeline(), LatentPipeline(small_vae())], ids=["two stages", "vae"])
def test_a_person_sees_a_bar_of_what_takes_long_unless_it_is_turned_off(pipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)

    def shown(after: float, **options: bool) -> str:
        monkeypatch.setattr(streaming, "BAR_AFTER", after)
        monkeypatch.setattr(sys, "stderr", Terminal())
        pipeline.generate(4, batch_size=2, **options)
        return sys.stderr.getvalue()

    assert "4/4" in shown(0)
    assert shown(0, progress=False) == ""
    assert shown(60) == ""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert shown(0) == ""
    assert progress.BAR_AFTER > 0


def test_batches_of_a_stream_are_saved_one_behind_another(tmp_path: Path):
    for number, part in enumerate(make_pipeline().stream(5, batch_size=2)):
        part.save(tmp_path / "codes", first_index=2 * number)
    for number, part in enumerate(LatentPipeline(small_vae()).stream(3, batch_size=2)):
        part.save(tmp_path / "latents", first_index=2 * number)
    assert sorted(path.name for path in (tmp_path / "codes").iterdir()) == [f"{i:06d}.png" for i in range(5)]
    assert sorted(path.name for path in (tmp_path / "latents").iterdir()) == [f"{i:06d}.png" for i in range(3)]


def test_what_was_made_says_what_it_is():
    made = make_pipeline().generate(3)
    assert repr(made) == "Generated(3 images of 1x16x16 on cpu, 4x4 codes, labels [0, 1, 2])"
    assert repr(make_pipeline(0).generate(1)) == "Generated(1 image of 1x16x16 on cpu, 4x4 codes)"
    assert repr(make_pipeline().generate(12)).endswith("labels [0, 1, 2, 0, 1, 2, 0, 1, ...])")
    drawn = LatentPipeline(small_vae()).generate(2)
    assert repr(drawn) == "Drawn(2 images of 1x6x4 on cpu, 2 latents)"
    for one in (made, drawn):  # a notebook shows pictures
        assert one._repr_png_().startswith(b"\x89PNG")
    images, codes, labels = made  # as ever
    assert (images.shape, len(codes), labels.tolist()) == ((3, 1, 16, 16), 1, [0, 1, 2])


class Alive:
    """How many tensors of images that a pipeline has made are there, whenever it makes others."""

    def __init__(self, pipeline: TwoStagePipeline | LatentPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.seen: list[int] = []
        decode = pipeline.decode

        def watched(*given: Any, **more: Any) -> torch.Tensor:
            self.seen.append(sum(one() is not None for one in self.tensors))
            made = decode(*given, **more)
            self.tensors.append(weakref.ref(made))
            return made

        monkeypatch.setattr(pipeline, "decode", watched)


@pytest.mark.parametrize("pipeline", [make_pipeline(), LatentPipeline(small_vae())], ids=["two stages", "vae"])
def test_there_is_one_batch_at_a_time_beside_the_result(pipeline: TwoStagePipeline | LatentPipeline, monkeypatch):
    alive = Alive(pipeline, monkeypatch)
    whole = pipeline.generate(9, batch_size=2)
    assert alive.seen == [0] * 5
    assert whole.images.shape[0] == len(whole[1] if isinstance(pipeline, LatentPipeline) else whole.codes[0]) == 9
    assert whole.images.storage_offset() == 0
    assert whole.images.untyped_storage().nbytes() == whole.images.nbytes  # nothing else is kept with it
    for part in pipeline.stream(9, batch_size=2):
        del part
    assert alive.seen == [0] * 10


class Numbered(Sequence):
    """A list of what is told of so many images that nobody could hold it."""

    def __init__(self, value: Any, images: int) -> None:
        self.value, self.images = value, images
        self.copied = 0

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, place: Any) -> Any:
        if not isinstance(place, slice):
            return self.value
        count = len(range(*place.indices(self.images)))
        self.copied = max(self.copied, count)
        return [self.value] * count

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.value, min(self.images, 1000))


@pytest.mark.parametrize("pipeline", [make_pipeline(), LatentPipeline(small_vae())], ids=["two stages", "vae"])
def test_labels_of_a_million_images_are_not_copied(pipeline):
    labels = Numbered("class 2", 10**9)
    if not pipeline.num_classes:
        with pytest.raises(UserError, match="has no classes"):
            pipeline.stream(10**9, labels=labels)
        return
    made = next(pipeline.stream(10**9, labels=labels, batch_size=3))
    assert made.labels.tolist() == [2, 2, 2]
    assert labels.copied == 3
    for given in (np.array([2, 0, 1]), torch.tensor([2, 0, 1]), iter([2, 0, 1]), ("class 2", 0, 1)):
        parts = list(pipeline.stream(3, labels=given, batch_size=2))
        assert [part.labels.tolist() for part in parts] == [[2, 0], [1]]


def test_large_images_are_decoded_so_many_at_a_time_as_have_the_pixels_of_a_batch(monkeypatch):
    pipeline, sizes = make_pipeline(0), []
    decode = pipeline.autoencoder.decode
    codes = (torch.randint(16, (6, 8, 4)),)  # twice the training size
    whole = decode(codes)
    monkeypatch.setattr(pipeline.autoencoder, "decode", lambda part: sizes.append(len(part[0])) or decode(part))
    assert (pipeline.decode(codes) - whole).abs().max() < 1e-5
    pipeline.decode((torch.randint(16, (2, 16, 16)),))
    pipeline.decode((torch.randint(16, (70, 4, 4)),))
    assert sizes == [3, 3, 1, 1, 70]
