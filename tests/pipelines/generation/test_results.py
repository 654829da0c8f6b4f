"""Folders, tars and buckets are completed to the same bytes, whoever makes which part of them and whatever breaks."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.folder_lock import LOCK_NAME, gate, held_part
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.evaluation.written import written
from pipelines.generation import results, work
from pipelines.generation.records import PASSES
from pipelines.generation.store import FolderStore, ObjectStore
from pipelines.two_stage import TwoStagePipeline


def contents(out: Path) -> dict[str, bytes]:
    """All that is there, records of units too, but those of what timing decides; what a kill leaves hidden."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.parent.name != PASSES]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def visible(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if not name.startswith(".")}


@pytest.fixture
def config(model: Path, tmp_path: Path) -> GenerateConfig:
    """Eleven images, four to a folder."""
    return GenerateConfig(
        model=str(model), out=str(tmp_path / "out"), num=11, batch_size=3, images_per_shard=4, device="cpu"
    )


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch):
    """What is there must not be made again."""

    def refuse() -> None:
        def sample(*arguments, **settings):
            raise AssertionError("sampled although everything was there")

        monkeypatch.setattr(TwoStagePipeline, "sample", sample)

    return refuse


def sizes_of_batches(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """The batches that are sampled from now on."""
    batches: list[range] = []
    sample = TwoStagePipeline.sample
    monkeypatch.setattr(
        TwoStagePipeline,
        "sample",
        lambda self, indices, *rest, **more: batches.append(indices) or sample(self, indices, *rest, **more),
    )
    return batches


def test_thousands_lie_in_folders_of_their_own_and_each_begins_a_batch(config, tmp_path: Path, monkeypatch):
    batches = sizes_of_batches(monkeypatch)
    generate_files(config)
    images = [f"{i:06d}.png" for i in range(4)]
    images += [f"000004/{i:06d}.png" for i in range(4, 8)] + [f"000008/{i:06d}.png" for i in range(8, 11)]
    assert sorted(visible(tmp_path / "out")) == sorted([*images, "samples.jsonl", "settings.json", "sheet.png"])
    assert batches == [range(0, 3), range(3, 6), range(4, 7), range(7, 10), range(8, 11)]
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == images
    assert all((tmp_path / "out" / line["file"]).stat().st_size == line["bytes"] for line in lines)
    assert len(written(str(tmp_path / "out"))) == 11  # as evaluate reads it


@pytest.mark.parametrize("harm", ["gone", "short", "other", "flipped", "no records"])
def test_what_comes_to_harm_is_made_again_and_nothing_else(config, tmp_path: Path, harm: str):
    generate_files(config)
    out = tmp_path / "out"
    before = contents(out)
    hurt = out / "000004" / "000006.png"
    if harm == "gone":
        hurt.unlink()
    elif harm == "short":  # as a power cut leaves it
        hurt.write_bytes(hurt.read_bytes()[:-20])
    elif harm == "flipped":
        data = hurt.read_bytes()
        hurt.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    elif harm == "other":
        hurt.write_bytes(hurt.read_bytes() + b"x")
    else:
        for record in (out / ".units").iterdir():
            record.unlink()
        hurt.write_bytes(b"")
    times = {path: path.stat().st_mtime_ns for path in out.rglob("0*.png") if path != hurt}
    assert "1 of them new" in generate_files(config)
    assert contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_webp_loses_nothing_and_jpeg_what_its_quality_says(config, tmp_path: Path):
    generate_files(config)
    pixels = {}
    for kind, suffix in (("png", "png"), ("webp", "webp"), ("jpeg", "jpg")):
        made = replace(config, format=kind, out=str(tmp_path / kind))
        generate_files(made)
        with Image.open(tmp_path / kind / "000004" / f"000005.{suffix}") as image:
            pixels[kind] = np.asarray(image.convert("L")).astype(int)
        before = contents(tmp_path / kind)
        for record in (tmp_path / kind / ".units").iterdir():
            record.unlink()
        (tmp_path / kind / f"000002.{suffix}").write_bytes(before[f"000002.{suffix}"][:-1])
        assert "1 of them new" in generate_files(made)
        assert contents(tmp_path / kind) == before
    assert (pixels["webp"] == pixels["png"]).all()
    assert 0 < abs(pixels["jpeg"] - pixels["png"]).mean() < 4
    with pytest.raises(UserError, match=r"begun with other settings: format was 'webp' and is now 'png'"):
        generate_files(replace(config, out=str(tmp_path / "webp")))
    with pytest.raises(UserError, match=r"quality was 95 and is now 60"):
        generate_files(replace(config, format="jpeg", quality=60, out=str(tmp_path / "jpeg")))
    with pytest.raises(UserError, match=r"quality=60 with format=png, expected 1 to 100, with jpeg only"):
        replace(config, quality=60)


def test_compression_changes_bytes_and_no_pixel_and_binds_the_folder(config, tmp_path: Path):
    pixels, sizes = {}, {}
    for level in (None, 0, 6):
        generate_files(made := replace(config, compression=level, out=str(tmp_path / str(level))))
        file = tmp_path / str(level) / "000004" / "000005.png"
        with Image.open(file) as image:
            pixels[level], sizes[level] = image.tobytes(), file.stat().st_size
        assert "0 of them new" in generate_files(made)
    assert pixels[None] == pixels[0] == pixels[6]
    assert sizes[None] == sizes[6] < sizes[0]
    with pytest.raises(UserError, match="compression was 0 and is now None"):
        generate_files(replace(config, out=str(tmp_path / "0")))
    with pytest.raises(UserError, match="compression=3 with format=webp, expected 0 to 9, with png, tar or npz only"):
        replace(config, format="webp", compression=3)


def test_tars_hold_the_images_of_a_folder_and_are_whole_or_absent(config, tmp_path: Path, no_sampling):
    generate_files(config)
    tars = replace(config, format="tar", out=str(tmp_path / "tars"))
    generate_files(tars)
    out = tmp_path / "tars"
    names = ["000000.tar", "000004.tar", "000008.tar"]
    assert sorted(visible(out)) == [*names, "samples.jsonl", "settings.json", "sheet.png"]
    files = visible(tmp_path / "out")
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        with tarfile.open(out / line["tar"]) as archive:
            data = archive.extractfile(line["file"]).read()
            about = json.load(archive.extractfile(line["file"].replace("png", "json")))
            assert archive.getmember(line["file"]).mtime == 0
        assert len(data) == line["bytes"]
        assert about == {"index": line["index"], "label": line["label"], "class_name": line["class_name"]}
        assert data in (files.get(line["file"]), files.get(f"{line['tar'][:-4]}/{line['file']}"))
    assert (out / "sheet.png").read_bytes() == files["sheet.png"]
    read = written(str(out))
    assert read.labels.tolist() == [line["label"] for line in lines]
    for line in lines:
        assert (
            read.read(line["index"], 16, 16, 1) == written(str(tmp_path / "out")).read(line["index"], 16, 16, 1)
        ).all()

    before = contents(out)
    (out / "000004.tar").write_bytes(before["000004.tar"][:-512])
    assert "4 of them new" in generate_files(tars)
    assert contents(out) == before
    no_sampling()
    assert "0 of them new" in generate_files(tars)


def test_more_images_complete_the_last_thousand(config, tmp_path: Path):
    for kind in ("png", "tar"):
        grown = replace(config, format=kind, num=6, out=str(tmp_path / kind))
        generate_files(grown)
        generate_files(replace(grown, num=11))
        generate_files(replace(config, format=kind, out=str(tmp_path / f"{kind}_at_once")))
        assert contents(tmp_path / kind) == contents(tmp_path / f"{kind}_at_once")
        generate_files(replace(grown, num=2))  # fewer than are there: they stay in the record
        assert contents(tmp_path / kind) == contents(tmp_path / f"{kind}_at_once")


def test_jobs_of_ranges_complete_a_folder_in_any_order(config, tmp_path: Path, no_sampling):
    generate_files(config)
    parts = replace(config, out=str(tmp_path / "parts"))
    line = generate_files(replace(parts, range="8:11"))
    assert line.startswith("3 images of 11 in ")
    assert "who is the last writes samples.jsonl" in line
    generate_files(replace(parts, range="0:4", batch_size=None))
    assert not (tmp_path / "parts" / "samples.jsonl").exists()
    assert "4 of them new" in generate_files(replace(parts, range="4:8"))
    assert contents(tmp_path / "parts") == contents(tmp_path / "out")
    no_sampling()
    generate_files(replace(parts, range="0:8"))
    generate_files(parts)
    for given, message in (("0:5", "expected multiples of 4"), ("4:12", "within the 11 images"), ("4", "FIRST:END")):
        with pytest.raises(UserError, match=message):
            generate_files(replace(parts, range=given))


@pytest.mark.parametrize("kind", ["png", "tar"])
def test_what_came_to_harm_in_another_range_is_told_by_the_last_job(config, tmp_path: Path, kind: str):
    config, out = replace(config, format=kind), tmp_path / "out"
    generate_files(replace(config, range="0:8"))
    if kind == "tar":
        (out / "000000.tar").unlink()
        lost = "4 images"
    else:
        (out / "000002.png").unlink()
        (out / ".units" / "000004-000008.json").write_text("{")
        lost = "1 image"
    line = generate_files(replace(config, range="8:11"))
    assert line.startswith(
        f"3 images of 11 in {out}, 3 of them missed at the start; {lost} of other ranges, or what is"
    )
    assert line.endswith("the same command without --range makes them")
    assert not (out / "samples.jsonl").exists()
    assert f"{lost[0]} of them new" in generate_files(config)
    assert len((out / "samples.jsonl").read_text().splitlines()) == 11


def test_an_image_that_is_damaged_unseen_is_one_sentence_where_it_is_shown(config, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(work, "READ_AGAIN", 10)  # of more a rerun looks at sizes
    generate_files(config)
    hurt = tmp_path / "out" / "000001.png"
    data = hurt.read_bytes()
    hurt.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    with pytest.raises(
        UserError, match=r"000001\.png is damaged or gone \(.*\): delete it, and the same command makes"
    ):
        generate_files(config)
    hurt.unlink()
    generate_files(config)
    assert hurt.read_bytes() == data


def test_fewer_images_are_completed_in_the_batches_of_all(config, tmp_path: Path, monkeypatch):
    config = replace(config, num=9, batch_size=None, images_per_shard=None)
    generate_files(config)
    (tmp_path / "out" / "000001.png").unlink()
    batches = sizes_of_batches(monkeypatch)
    generate_files(replace(config, num=3))
    assert batches == [range(9)]


def test_a_part_that_another_job_makes_is_refused_and_the_others_are_not(config, tmp_path: Path):
    out = tmp_path / "out"
    generate_files(replace(config, range="0:4"))
    with gate(out, "generate"):
        part = held_part(out, "generate", range(4, 8))
        part.__enter__()
    try:
        for wanted in ("4:8", "0:8", None):
            with pytest.raises(UserError, match="is writing to"):
                generate_files(replace(config, range=wanted))
        generate_files(replace(config, range="8:11"))
        with pytest.raises(UserError, match="seed was 0 and is now 1"):
            generate_files(replace(config, range="0:4", seed=1))
    finally:
        part.__exit__(None, None, None)
    assert "4 of them new" in generate_files(config)
    assert not [path for path in out.iterdir() if path.name.startswith(LOCK_NAME)]


def test_jobs_at_once_go_on_in_the_batches_of_the_first(config, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "out"
    generate_files(replace(config, range="0:4"))
    for path in [*out.glob("0*.png"), *(out / ".units").iterdir()]:
        path.unlink()  # it is at work, and has made nothing yet
    with gate(out, "generate"):
        part = held_part(out, "generate", range(4))
        part.__enter__()
    batches = sizes_of_batches(monkeypatch)
    generate_files(replace(config, range="8:11", batch_size=None))
    assert batches == [range(8, 11)]
    generate_files(replace(config, range="4:8", batch_size=2))
    assert "was begun in batches of 3; what is missing is made in batches of 2" in capsys.readouterr().out
    monkeypatch.setattr(results, "recorded_of", lambda store: {})  # it came in the same moment
    generate_files(replace(config, range="4:8", batch_size=2))
    assert json.loads((out / "settings.json").read_text())["batch_size"] == 3
    part.__exit__(None, None, None)


def test_an_archive_of_fewer_images_is_made_anew_of_all(config, tmp_path: Path):
    generate_files(replace(config, format="npz", num=5))
    archive = tmp_path / "out" / "samples.npz"
    five = archive.read_bytes()
    generate_files(replace(config, num=5))
    assert archive.read_bytes() == five
    generate_files(config)
    generate_files(replace(config, format="npz", out=str(tmp_path / "at_once")))
    assert archive.read_bytes() == (tmp_path / "at_once" / "samples.npz").read_bytes()
    with np.load(archive) as arrays:
        assert (len(arrays["arr_0"]), arrays["arr_1"].tolist()) == (11, [i % 3 for i in range(11)])


def test_settings_bind_other_parts_before_there_is_an_image(config, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="not finite"):
        generate_files(replace(config, range="0:4", guidance=1e300))
    assert not out.exists()  # alone it takes its record back


def test_a_folder_of_an_earlier_build_goes_on_in_one_folder(config, tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    generate_files(replace(config, num=3, images_per_shard=None))
    settings = json.loads((out / "settings.json").read_text())
    for new in ("format", "quality", "images_per_shard", "plan"):
        del settings[new]
    (out / "settings.json").write_text(json.dumps(settings))
    for path in (out / ".units").iterdir():
        path.unlink()
    monkeypatch.setattr(results, "PER_SHARD", 4)
    batches = sizes_of_batches(monkeypatch)
    generate_files(replace(config, num=20, images_per_shard=None))
    assert len([path for path in out.iterdir() if path.name[:6].isdigit()]) == 20
    assert batches == [range(start, start + 3) for start in range(3, 20, 3)]  # none begins anew within
    assert json.loads((out / "settings.json").read_text())["images_per_shard"] is None


def in_memory(name: str) -> dict[str, bytes]:
    import fsspec

    files = fsspec.filesystem("memory")
    found = [path for path in files.find(f"/{name}") if PASSES not in path]
    return {path.removeprefix(f"/{name}/"): files.cat_file(path) for path in found}


@pytest.mark.parametrize("kind", ["png", "tar", "npz"])
def test_a_bucket_gets_the_objects_of_a_folder(config, tmp_path: Path, kind: str, monkeypatch, no_sampling):
    generate_files(replace(config, format=kind))
    place = replace(config, format=kind, out=f"memory://{kind}/place")
    write, written = ObjectStore.write_many, []

    def break_off(store: ObjectStore, files) -> None:
        written.extend(files)
        if len(written) > 6:
            raise KeyboardInterrupt
        write(store, files)

    monkeypatch.setattr(ObjectStore, "write_many", break_off)
    if kind != "tar":
        with pytest.raises(KeyboardInterrupt):
            generate_files(place)
    monkeypatch.setattr(ObjectStore, "write_many", write)
    assert "11 images in memory://" in generate_files(place)
    assert in_memory(f"{kind}/place") == contents(tmp_path / "out")
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        generate_files(replace(place, seed=1))
    no_sampling()
    assert "0 of them new" in generate_files(replace(place, range="4:8" if kind != "npz" else None))


def test_a_place_that_is_none_is_one_sentence(config, monkeypatch):
    with pytest.raises(UserError, match=r"nowhere://a cannot be reached \(Protocol not known: nowhere"):
        generate_files(replace(config, out="nowhere://a"))
    monkeypatch.setattr("pipelines.generation.store.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"s3://a/b needs the package s3fs, .*; pip install 'zellige\[s3\]'"):
        generate_files(replace(config, out="s3://a/b"))
    with pytest.raises(UserError, match=r"s3:/a/b, expected a folder, or an address with two slashes"):
        generate_files(replace(config, out=str(Path("s3://a/b"))))
    import fsspec

    fsspec.filesystem("memory").pipe_file("/others/notes.bin", b"x")
    with pytest.raises(UserError, match=r"memory://others holds notes.bin, which this command did not write"):
        generate_files(replace(config, out="memory://others"))


def test_a_full_disk_is_one_sentence_and_leaves_no_half(tmp_path: Path, monkeypatch):
    import errno

    store = FolderStore(tmp_path)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"the disk is full: .*000001\.png was not written"):
        store.write("000000/000001.png", b"x" * 100)
    assert list((tmp_path / "000000").iterdir()) == []


def generate_quietly(config: GenerateConfig) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        generate_files(config)
    except UserError:  # another has the part
        os._exit(2)
    os._exit(0)


def test_jobs_that_are_killed_at_any_moment_leave_what_one_undisturbed_job_does(config, tmp_path: Path):
    whole = replace(config, num=60, images_per_shard=10, batch_size=4)
    begin = time.perf_counter()
    generate_files(replace(whole, out=str(tmp_path / "peace")))
    peace = time.perf_counter() - begin
    chance, context = random.Random(0), multiprocessing.get_context("fork")
    killed = 0
    for turn in range(40):
        parts = ["0:30", "30:60"] if turn % 2 else [None]
        jobs = [context.Process(target=generate_quietly, args=(replace(whole, range=part),)) for part in parts]
        for job in jobs:
            job.start()
        time.sleep(peace * chance.uniform(0.1, 0.4))  # so that however fast the machine is, several are killed
        for job in jobs:
            killed += job.is_alive()
            job.kill()
            job.join()
        if (tmp_path / "out" / "samples.jsonl").exists():
            break
    assert killed >= 2
    assert "60 images" in generate_files(whole)
    assert contents(tmp_path / "out") == contents(tmp_path / "peace")
