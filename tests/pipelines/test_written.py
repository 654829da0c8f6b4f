"""What `generate` wrote is judged alike, wherever and however it lies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from common.errors import UserError
from pipelines.commands.evaluate import EvaluateConfig, evaluate
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.commands.vary import VaryConfig, vary_files
from pipelines.evaluation.written import Objects, made_with, written

CLASSIFIER = "tests.pipelines.feature_networks:classifier"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def config(model: Path, tmp_path: Path) -> GenerateConfig:
    return GenerateConfig(
        model=str(model), out=str(tmp_path / "out"), num=21, batch_size=7, images_per_shard=7, device="cpu"
    )


def figures(made: str, digits: Path, out: Path) -> dict:
    evaluate(EvaluateConfig(made=made, reference=str(digits), features=CLASSIFIER, batch_size=16, out=str(out)))
    return json.loads(out.read_text())


def test_files_tars_and_buckets_give_the_same_figures(config, digits: Path, tmp_path: Path):
    generate_files(config)
    expected = figures(config.out, digits, tmp_path / "figures.json")
    for place, kind in ((tmp_path / "tars", "tar"), ("memory://written-png", "png"), ("memory://written-tar", "tar")):
        generate_files(replace(config, out=str(place), format=kind))
        found = figures(str(place), digits, tmp_path / "figures.json")
        assert found["protocol"]["made"]["sha256"] == expected["protocol"]["made"]["sha256"]
        assert found["protocol"]["made"]["made_with"]["seed"] == 0
        assert {name: found[name] for name in ("fd", "kd", "made_images")} == {
            name: expected[name] for name in ("fd", "kd", "made_images")
        }


@pytest.mark.parametrize("kind", ["png", "tar"])
def test_classes_are_those_that_were_asked_for(config, kind: str):
    place = f"memory://classes-{kind}"
    generate_files(replace(config, out=place, format=kind))
    source = written(place)
    assert source is not None
    assert source.labels.tolist() == [i % 3 for i in range(21)]
    assert source.class_names == ("0", "1", "2")


def test_objects_tell_what_other_sources_do(config):
    generate_files(replace(config, out="memory://objects"))
    source = written("memory://objects")
    assert isinstance(source, Objects)
    assert source.location(8) == "memory://objects/000007/000008.png"
    assert source.sizes([0, 20]).tolist() == [[16, 16]] * 2
    assert source.stored_size(8) == len(source.content(8).getvalue())
    assert not source.still_bad(source.location(8))
    before = source.fingerprint()
    source.labels[0] += 1
    assert source.fingerprint() != before
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/objects/000007/000008.png", b"no image")
    assert written("memory://objects").still_bad(source.location(8))
    memory.rm_file("/objects/000007/000009.png")
    with pytest.raises(UserError, match="memory://objects cannot be written or read"):
        written("memory://objects").read(8, 16, 16, 1)


def test_what_is_not_finished_or_was_edited_is_one_sentence(config, tmp_path: Path):
    tars = replace(config, out="memory://edited", format="tar")
    generate_files(replace(tars, range="0:7"))
    with pytest.raises(UserError, match="made=memory://edited is not finished: repeat the command"):
        written(tars.out)
    generate_files(tars)
    memory = fsspec.filesystem("memory")
    lines = memory.cat_file("/edited/samples.jsonl").decode().splitlines()
    memory.pipe_file("/edited/samples.jsonl", "\n".join(lines[:-1]).encode())
    with pytest.raises(UserError, match="holds other images in its tars than samples"):
        written(tars.out)
    memory.pipe_file("/edited/samples.jsonl", lines[0].replace("000000.tar", "../x.tar").encode())
    with pytest.raises(UserError, match=r"names '\.\./x\.tar', expected files of its own folder; it was edited"):
        written(tars.out)
    memory.pipe_file("/edited/samples.jsonl", b"")
    with pytest.raises(UserError, match="names no images"):
        written(tars.out)
    for path in ("memory://nothing", "memory://a/{0..3}.tar", str(tmp_path)):
        assert made_with(path) is None
        assert written(path) is None


def test_variants_are_judged_too(model: Path, pictures: Path, digits: Path, tmp_path: Path):
    for out, kind in ((tmp_path / "varied", "png"), (tmp_path / "tars", "tar")):
        vary_files(VaryConfig(model=str(model), images=str(pictures), out=str(out), variants=2, format=kind))
    found = [figures(str(tmp_path / name), digits, tmp_path / "figures.json") for name in ("varied", "tars")]
    assert [one["made_images"] for one in found] == [6, 6]
    assert found[0]["protocol"]["made"]["sha256"] == found[1]["protocol"]["made"]["sha256"]
    assert found[0]["protocol"]["made"]["made_with"]["share"] == 0.3
    (tmp_path / "varied" / "samples.jsonl").unlink()  # as of an earlier build
    assert written(str(tmp_path / "varied")) is None
    assert np.isfinite(figures(str(tmp_path / "varied"), digits, tmp_path / "figures.json")["kd"])
