"""Variants of many images: completed to the same bytes whoever makes which of them, and made anew of other images."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.folder_lock import gate, held_part
from pipelines import variants
from pipelines.commands.inpaint import InpaintConfig, inpaint_files
from pipelines.commands.vary import VaryConfig, vary_files
from pipelines.editing import Frame, read_view
from pipelines.generation.results import Output
from pipelines.generation.store import FolderStore
from pipelines.image_folders import Targets, target_names
from pipelines.pictures import to_pil
from pipelines.variants import each_alone, in_batches, write_variants
from tests.pipelines.conftest import make_pipeline
from tests.processes import Processes

NAMES = ("a.png", "b.png", "c.png", "sub/a.png", "sub/d.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of 4x4, each of one grey."""
    for number, name in enumerate(NAMES):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        grey(tmp_path / "in" / name, 20 * number)
    return tmp_path


def grey(path: Path, value: int) -> None:
    Image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(path)


def contents(out: Path) -> dict[str, bytes]:
    """With the records of what is there, and of what it was made of, but for the times of that."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "settings.json"]
    found = {str(path.relative_to(out)): path.read_bytes() for path in files}
    for name in [name for name in found if name.startswith(".originals/")]:
        found[name] = json.dumps([[about[0], about[2]] for about in json.loads(found[name])]).encode()
    return found


drawn: list[int] = []


def make(folder: Path, output: Output, count: int = 2, value: int = 1, **more) -> str:
    """Variant v of image i: its grey, and 3 * i + v * value more."""

    def draw(views: Sequence, batch: range) -> list[Tensor]:
        drawn.extend(batch)
        return [
            view.image + (3 * (i // count) + i % count * value) / 127.5 for view, i in zip(views, batch, strict=True)
        ]

    settings = {"value": value}
    frame = Frame(4, 4, 1)
    return write_variants(
        "vary",
        str(folder / "in"),
        output,
        count,
        settings,
        lambda path: read_view(path, frame),
        in_batches(draw, count),
        **more,
    )


def outputs(folder: Path, name: str = "out", **given) -> Output:
    return Output(**{"out": str(folder / name), "images_per_shard": 2, **given})


def test_variants_lie_under_their_images_names_by_whole_images(folder: Path):
    line = make(folder, outputs(folder))
    out = folder / "out"
    assert line == f"2 variants of each of 5 images in {out}, 10 of them new, the first on {out}/sheet.png"
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    files = ["a_0.png", "a_1.png", "b_0.png", "b_1.png", "part_000004/c_0.png", "part_000004/c_1.png"]
    files += [f"part_{start}/sub/{name}" for start, name in (("000004", "a_0.png"), ("000004", "a_1.png"))]
    files += ["part_000008/sub/d_0.png", "part_000008/sub/d_1.png"]
    assert [line["file"] for line in lines] == files
    assert [(line["image"], line["variant"]) for line in lines] == [(name, v) for name in NAMES for v in range(2)]
    for line in lines:
        number = line["index"] // 2
        with Image.open(out / line["file"]) as image:
            assert image.getpixel((0, 0)) == 23 * number + line["index"] % 2
        assert (out / line["file"]).stat().st_size == line["bytes"]
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 3 * 4  # the original and two variants


@pytest.mark.parametrize("kind", ["png", "webp", "tar", "npz"])
def test_what_is_missing_is_made_and_nothing_else_in_any_batches(folder: Path, kind: str):
    make(folder, outputs(folder, "whole", format=kind))
    whole = contents(folder / "whole")
    output = outputs(folder, format=kind)
    make(folder, output)
    gone = "000004.tar" if kind == "tar" else f"part_000004/c_1.{'webp' if kind == 'webp' else 'png'}"
    (folder / "out" / gone).unlink()
    drawn.clear()
    assert f"{4 if kind == 'tar' else 1} of them new" in make(folder, replace(output, batch_size=3))
    assert drawn == ([4, 5, 6, 7, 8, 9] if kind == "tar" else [4, 5, 6])
    assert contents(folder / "out") == whole
    if kind == "npz":
        with np.load(folder / "out" / "samples.npz") as archive:
            assert archive["arr_0"][:, 0, 0, 0].tolist() == [23 * (i // 2) + i % 2 for i in range(10)]


def test_a_tar_tells_of_each_variant_whose_it_is(folder: Path):
    make(folder, outputs(folder, format="tar"), label=None)
    with tarfile.open(folder / "out" / "000004.tar") as archive:
        assert archive.getnames() == [f"{i:06d}.{kind}" for i in range(4, 8) for kind in ("png", "json")]
        about = json.load(archive.extractfile("000007.json"))
    assert about == {"index": 7, "label": None, "image": "sub/a.png", "variant": 1}


def test_jobs_share_a_folder_by_ranges_of_images(folder: Path):
    make(folder, outputs(folder, "whole"))
    output = outputs(folder)
    line = make(folder, replace(output, range="2:4"))
    assert line.startswith("4 images of 10 in ")
    assert "who is the last writes samples.jsonl" in line
    with gate(folder / "out", "vary"):
        part = held_part(folder / "out", "vary", range(4, 5))
        part.__enter__()
    with pytest.raises(UserError, match="is writing to"):
        make(folder, replace(output, range="4:5"))
    make(folder, replace(output, range="0:2", batch_size=3))
    part.__exit__(None, None, None)
    assert "2 of them new" in make(folder, replace(output, range="4:5"))
    assert contents(folder / "out") == contents(folder / "whole")
    with pytest.raises(UserError, match=r"range=0:3, expected multiples of 2, the images of a folder, or 5, the end"):
        make(folder, replace(output, range="0:3"))
    with pytest.raises(UserError, match=r"range=0:8, expected FIRST:END, within the 5 images asked for"):
        make(folder, replace(output, range="0:8"))


@pytest.mark.parametrize("kind", ["png", "tar"])
def test_a_bucket_gets_the_objects_of_a_folder_and_goes_on(folder: Path, kind: str, monkeypatch):
    make(folder, outputs(folder, "whole", format=kind))
    place = outputs(folder, out=f"memory://variants-{kind}", format=kind)
    begun = drawn.copy()

    def stop(*arguments) -> None:
        if len(drawn) > len(begun) + 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(variants, "to_pil", lambda image: stop() or to_pil(image))
    with pytest.raises(KeyboardInterrupt):
        make(folder, place)
    monkeypatch.undo()
    assert "5 images" in make(folder, place)
    files = fsspec.filesystem("memory")
    found = {path.removeprefix(f"/variants-{kind}/"): files.cat_file(path) for path in files.find(f"/variants-{kind}")}
    whole = contents(folder / "whole")
    assert {name for name in found if name != "settings.json"} == set(whole)
    assert all(found[name] == whole[name] for name in whole if not name.startswith(".originals"))
    assert "0 of them new" in make(folder, place)
    with pytest.raises(UserError, match="value was 1 and is now 2"):
        make(folder, place, value=2)
    grey(folder / "in" / "sub" / "e.png", 1)  # the last unit has a place for it
    grey(folder / "in" / "sub" / "d.png", 9)
    assert "4 of them new" in make(folder, place)
    (folder / "in" / "b.png").unlink()  # all that follow have other numbers
    assert f"{10 if kind == 'tar' else 8} of them new" in make(folder, place)


@pytest.mark.parametrize("kind", ["png", "tar"])
def test_results_of_images_that_changed_are_made_anew_and_no_others(folder: Path, kind: str):
    output = outputs(folder, format=kind)
    make(folder, output)
    os.utime(folder / "in" / "b.png", (1, 1))  # touched, and the same
    assert "0 of them new" in make(folder, output)
    grey(folder / "in" / "c.png", 100)
    drawn.clear()
    assert f"{4 if kind == 'tar' else 2} of them new" in make(folder, output)
    assert drawn == ([4, 5, 6, 7] if kind == "tar" else [4, 5])
    make(folder, outputs(folder, "whole", format=kind))
    assert contents(folder / "out") == contents(folder / "whole")
    grey(folder / "in" / "b2.png", 5)  # those behind it have other numbers now, and other noise
    make(folder, output)
    shutil.rmtree(folder / "whole")
    make(folder, outputs(folder, "whole", format=kind))
    made, whole = contents(folder / "out"), contents(folder / "whole")
    assert {name: made[name] for name in whole} == whole


def test_a_kill_between_an_image_and_its_change_leaves_nothing_of_the_former(folder: Path, monkeypatch):
    """Killed while a unit is made anew: what is there of it may be of the former image, and is not taken for right."""
    output = outputs(folder)
    make(folder, output)
    grey(folder / "in" / "a.png", 90)
    monkeypatch.setattr(variants, "to_pil", lambda image: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(folder, output)
    monkeypatch.undo()
    assert not (folder / "out" / "a_0.png").exists()
    assert (folder / "out" / "b_0.png").exists()
    assert "2 of them new" in make(folder, output)
    with Image.open(folder / "out" / "a_1.png") as image:
        assert image.getpixel((0, 0)) == 91


def test_images_that_moved_are_the_same_and_others_are_refused(folder: Path):
    output = outputs(folder)
    make(folder, output)
    (folder / "elsewhere").mkdir()
    shutil.move(folder / "in", folder / "elsewhere" / "in")
    for path in (folder / "elsewhere" / "in").rglob("*.png"):
        os.utime(path, (5, 5))
    assert "0 of them new" in make(folder / "elsewhere", output)
    grey(folder / "elsewhere" / "in" / "a.png", 7)
    shutil.move(folder / "elsewhere" / "in", folder / "in")
    with pytest.raises(UserError, match=r"images was .* and is now"):
        make(folder, output)


@pytest.mark.parametrize("kind", ["png", "tar", "npz"])
def test_images_that_cannot_be_read_are_left_out_until_they_can(folder: Path, kind: str):
    whole = outputs(folder, "whole", format=kind)
    make(folder, whole)
    (folder / "in" / "c.png").write_bytes(b"no image")
    output = outputs(folder, format=kind, batch_size=3)
    line = make(folder, output)
    assert line.startswith("2 variants of each of 4 images")
    assert line.endswith("; 1 image could not be read (c.png)")
    lines = [json.loads(line) for line in (folder / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3, 6, 7, 8, 9]
    if kind == "npz":
        with np.load(folder / "out" / "samples.npz") as archive:
            assert archive["arr_0"].shape == (8, 4, 4, 3)
    drawn.clear()
    assert "0 of them new" in make(folder, output)
    assert not drawn
    if kind != "tar":
        (folder / "out" / "part_000004" / "sub" / "a_0.png").unlink()
        assert "1 of them new" in make(folder, output)  # and the one that is left out is not asked again
        assert not (folder / "out" / "part_000004" / "c_0.png").exists()
    grey(folder / "in" / "c.png", 40)
    assert f"{4 if kind == 'tar' else 2} of them new" in make(folder, output)
    assert contents(folder / "out") == contents(folder / "whole")


def test_where_no_image_can_be_read_nothing_stays(folder: Path):
    for name in NAMES:
        (folder / "in" / name).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of the images of .* can be read"):
        make(folder, outputs(folder))
    assert not [path for path in (folder / "out").rglob("*") if path.is_file()]
    for number, name in enumerate(NAMES):
        grey(folder / "in" / name, number)
    assert "10 of them new" in make(folder, outputs(folder), value=2)


def test_a_folder_of_an_earlier_build_goes_on_in_one_folder_and_is_made_anew(folder: Path):
    """It recorded neither what its files were made of nor in what form they are."""
    out = folder / "out"
    make(folder, outputs(folder, "whole"))
    out.mkdir()
    settings = {"command": "vary", "value": 1, "images": str((folder / "in").resolve()), "variants": 2}
    (out / "settings.json").write_text(json.dumps(settings))
    for name in ("a_0", "a_1", "b_0", "b_1", "c_0"):
        grey(out / f"{name}.png", 1)
    assert "10 of them new" in make(folder, outputs(folder, images_per_shard=None))
    assert not list(out.glob("part_*"))
    for path in (folder / "whole").rglob("*_?.png"):
        name = str(path.relative_to(folder / "whole"))
        assert (
            out / name.partition("/")[2] if name.startswith("part_") else out / name
        ).read_bytes() == path.read_bytes()


def test_drawn_one_by_one_a_result_is_the_same_in_any_batch(folder: Path):
    def write(name: str, batch_size: int | None) -> dict[str, bytes]:
        def draw(view, number: int) -> list[Tensor]:
            return [view.image * 0 + (10 * number + variant) / 127.5 - 1 for variant in range(3)]

        output = outputs(folder, name, batch_size=batch_size)
        read = lambda path: read_view(path, Frame(4, 4, 1))  # noqa: E731
        write_variants("vary", str(folder / "in"), output, 3, {}, read, each_alone(draw, 3))
        return contents(folder / name)

    assert write("out", None) == write("others", 4)
    with Image.open(folder / "out" / "part_000006" / "sub" / "a_2.png") as image:
        assert image.getpixel((0, 0)) == 32


def test_more_than_a_folder_should_hold_is_refused(folder: Path):
    with pytest.raises(UserError, match="images_per_shard=6000 with variants=2, expected at most 5000: not more than"):
        make(folder, outputs(folder, images_per_shard=6000))
    (folder / "in" / "part_3").mkdir()
    grey(folder / "in" / "part_3" / "x.png", 1)
    with pytest.raises(UserError, match=r"holds subfolders or images called part_\.\.\., as folders of results are"):
        make(folder, outputs(folder))
    make(folder, outputs(folder, format="tar"))


def test_names_of_results_are_those_of_few_images():
    names = ["a.jpg", "a.png", "b.jpg", "b.jpg.png", "sheet.webp", "sub/a.jpg", "d.png", "d.png.jpg"]
    targets = Targets(np.array(sorted(map(os.fsencode, names))))
    found = {name: f"{targets.stem(number)}.png" for number, name in enumerate(sorted(names))}
    assert found == target_names(names)


def test_inpaint_and_vary_make_the_same_in_batches_of_several_images(model: Path, pictures: Path, tmp_path: Path):
    for name, config, write in (
        (
            "inpainted",
            InpaintConfig(model=str(model), images=str(pictures), out="", variants=2, label=1),
            inpaint_files,
        ),
        ("varied", VaryConfig(model=str(model), images=str(pictures), out="", variants=2, share=0.5), vary_files),
    ):
        alone, several = (str(tmp_path / f"{name}{i}") for i in range(2))
        write(replace(config, out=alone))
        write(replace(config, out=several, batch_size=5, images_per_shard=2))
        images = pipeline_images(pictures)
        pipeline = make_pipeline()
        keep = torch.arange(16).expand(16, 16) < 8
        made = (
            pipeline.inpaint(images, keep, labels=1).images
            if name == "inpainted"
            else pipeline.vary(images, 0.5).images
        )
        for i in range(6):
            expected = np.asarray(to_pil(made[i])).astype(int)
            for out, part in ((alone, ""), (several, "part_000004/" if i >= 4 else "")):
                with Image.open(f"{out}/{part}{i // 2}_{i % 2}.png") as image:
                    assert abs(np.asarray(image).astype(int) - expected).max() <= 1  # of rounding
        lines = [json.loads(line) for line in Path(several, "samples.jsonl").read_text().splitlines()]
        assert {line["label"] for line in lines} == {1 if name == "inpainted" else None}


def pipeline_images(pictures: Path) -> Tensor:
    """Each of three images twice."""
    return make_pipeline().images(pictures).repeat_interleave(2, 0)


def test_another_mask_is_another_setting(model: Path, pictures: Path, tmp_path: Path):
    mask = tmp_path / "mask.png"
    keep = np.zeros((16, 16), dtype=np.uint8)
    keep[:8] = 255
    Image.fromarray(keep).save(mask)
    config = InpaintConfig(
        model=str(model), images=str(pictures), out=str(tmp_path / "out"), keep=str(mask), variants=1
    )
    inpaint_files(config)
    Image.fromarray(keep.T.copy()).save(mask)
    with pytest.raises(UserError, match="begun with other settings: mask was "):
        inpaint_files(config)
    with pytest.raises(UserError, match="got own_size=true with format=npz"):
        replace(config, own_size=True, format="npz")


def test_a_store_of_a_folder_lists_subfolders_of_a_unit(tmp_path: Path):
    store = FolderStore(tmp_path)
    store.write("x/y.png", b"12")
    assert store.sizes("x", ["y.png", "z.png"]) == [2, -1]


def test_processes_of_a_job_share_the_images(processes: Processes, model: Path, pictures: Path, tmp_path: Path):
    config = VaryConfig(
        model=str(model), images=str(pictures), out=str(tmp_path / "one"), variants=2, images_per_shard=1, device="cpu"
    )
    vary_files(config)
    for kind, count in (("png", 2), ("png", 3)):
        out = tmp_path / f"{kind}{count}"
        processes.together(vary_files, replace(config, out=str(out)), count=count)
        assert contents(out) == contents(tmp_path / "one")


def make_quietly(folder: Path, output: Output) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        make(folder, output)
    except UserError:  # another has the part
        os._exit(2)
    os._exit(0)


@pytest.mark.parametrize("kind", ["png", "tar"])
def test_jobs_that_are_killed_at_any_moment_leave_what_one_undisturbed_job_does(folder: Path, kind: str):
    for number in range(60):
        grey(folder / "in" / f"x{number}.png", number)
    begin = time.perf_counter()
    make(folder, outputs(folder, "peace", format=kind))
    peace = time.perf_counter() - begin
    chance, context = random.Random(0), multiprocessing.get_context("fork")
    killed = 0
    for turn in range(40):
        if turn == 3:
            grey(folder / "in" / "x7.png", 200)  # while nobody is at work
        parts = ["0:30", "30:65"] if turn % 2 else [None]
        given = [outputs(folder, format=kind, range=part, batch_size=2 + turn % 3) for part in parts]
        jobs = [context.Process(target=make_quietly, args=(folder, output)) for output in given]
        for job in jobs:
            job.start()
        time.sleep(peace * chance.uniform(0.1, 0.4))
        for job in jobs:
            killed += job.is_alive()
            job.kill()
            job.join()
        if turn > 3 and (folder / "out" / "samples.jsonl").exists():
            break
    assert killed >= 2
    make(folder, outputs(folder, format=kind))
    make(folder, outputs(folder, "peace", format=kind))
    assert contents(folder / "out") == contents(folder / "peace")
