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
