"""A script's stream is written as the command writes its samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from pipelines.generation.layout import Layout
from pipelines.generation.sinks import pictures_of
from pipelines.generation.store import FolderStore
from pipelines.generation.stream import write_stream, written_samples
from pipelines.pictures import to_pil
from tests.pipelines.conftest import make_pipeline


@pytest.mark.parametrize("kind", ["png", "tar"])
def test_a_script_goes_on_where_it_was_stopped(tmp_path: Path, kind: str):
    pipeline, out = make_pipeline(), tmp_path / "out"

    def stopped():
        for number, batch in enumerate(pipeline.stream(11, batch_size=3)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        write_stream(stopped(), out, format=kind, images_per_shard=4)
    start = written_samples(out, images_per_shard=4)
    assert start == 8
    rest = pipeline.stream(11 - start, first_index=start, batch_size=3)
    assert write_stream(rest, out, format=kind, images_per_shard=4, first_index=start) == 11
    assert write_stream(pipeline.stream(11, batch_size=3), tmp_path / "once", format=kind, images_per_shard=4) == 11
    made, once = (
        {str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (out, tmp_path / "once")
    )
    assert made == once
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [i % 3 for i in range(11)]
    whole = pipeline.generate(11, batch_size=3).images
    layout = Layout(kind, 4)
    pictures = pictures_of(FolderStore(out), layout, range(11))
    assert all(file.tobytes() == to_pil(image).tobytes() for file, image in zip(pictures, whole, strict=True))


def test_tensors_are_written_and_gaps_are_refused(tmp_path: Path):
    assert write_stream([torch.zeros(2, 3, 4, 4), torch.ones(1, 3, 4, 4)], tmp_path / "out", format="webp") == 3
    assert (tmp_path / "out" / "000002.webp").exists()
    with pytest.raises(UserError, match=r"first_index=1000, but .* holds 0 images"):
        write_stream([], tmp_path / "out", format="webp", first_index=1000)
    with pytest.raises(UserError, match="first_index=3, expected a multiple of images_per_shard=1000"):
        write_stream([], tmp_path / "out", format="webp", first_index=3)
    with pytest.raises(UserError, match="format was 'webp' and is now 'png'"):
        write_stream([], tmp_path / "out")
    with pytest.raises(UserError, match="format=gif, expected png, webp, jpeg or tar"):
        write_stream([], tmp_path / "out", format="gif")


def test_a_stream_from_the_beginning_takes_the_place_of_a_longer_one(tmp_path: Path):
    write_stream([torch.zeros(12, 1, 4, 4)], tmp_path, images_per_shard=4)

    def stopped():
        yield torch.ones(6, 1, 4, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_stream(stopped(), tmp_path, images_per_shard=4)
    assert written_samples(tmp_path, images_per_shard=4) == 4  # those from 8 on are of the former
    assert write_stream([torch.ones(6, 1, 4, 4)], tmp_path, images_per_shard=4) == 6
    assert sorted(path.name for path in (tmp_path / ".units").iterdir()) == ["000000-000004.json", "000004-000006.json"]
