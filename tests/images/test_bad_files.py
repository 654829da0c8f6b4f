"""What is no picture says so, is listed or left out, and is counted once."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from images import files as image_files
from images.files import BadImageError, BadImages, list_images, read_image


def write_bad_files(folder: Path) -> list[Path]:
    good = folder / "good.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(good)
    Image.fromarray(noise).save(folder / "whole.jpg")
    files = {
        "empty.png": b"",
        "text.jpg": b"this is not an image",
        "truncated.png": good.read_bytes()[:5000],
        "truncated.jpg": (folder / "whole.jpg").read_bytes()[:1500],
        "header_only.gif": b"GIF89a",
        "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        "page.jpg": b"\n<!DOCTYPE html><html>404</html>",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((4, 4), 10**6, dtype=np.int32)).save(folder / "deep.tif")
    (folder / "absent.png").symlink_to(folder / "nowhere.png")
    return [folder / name for name in (*files, "float.tif", "deep.tif", "absent.png")]


def test_files_that_are_no_images_say_why(tmp_path: Path) -> None:
    reasons = {}
    for path in write_bad_files(tmp_path):
        with pytest.raises(BadImageError) as caught:
            read_image(path, 6, 8, 3)
        reasons[path.name] = str(caught.value)
    assert reasons["empty.png"] == "no image in a format that is known, or a damaged one"
    assert reasons["pointer.jpg"].startswith("is a Git LFS pointer, not the file itself: run `git lfs pull` ")
    assert reasons["page.jpg"].startswith("is a web page, not the file itself: ")
    assert "truncated" in reasons["truncated.png"]
    assert "truncated" in reasons["truncated.jpg"]
    assert reasons["float.tif"] == "floating-point pixels, expected 8 or 16 bits per channel"
    assert reasons["deep.tif"].startswith("pixel values from 1000000 to 1000000, signed or 32-bit integers, expected")
    assert "FileNotFoundError" in reasons["absent.png"]
    assert not any("\n" in reason for reason in reasons.values())


def test_a_decompression_bomb_is_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImageError, match="decompression bomb"):
        read_image(tmp_path / "bomb.png", 6, 8, 3)


def test_listing_is_sorted_recursive_and_follows_links_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    elsewhere = tmp_path / "elsewhere"
    for path in (
        root / "b/2.PNG",
        root / "b/1.jpeg",
        root / "a/deep/3.webp",
        root / "0.tif",
        elsewhere / "x.png",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for ignored in (root / "notes.txt", root / ".hidden.png", root / ".git/4.png", root / "b/._1.jpeg"):
        ignored.parent.mkdir(exist_ok=True)
        ignored.touch()
    (root / "linked").symlink_to(elsewhere)
    (root / "a/loop").symlink_to(root)
    assert list_images(root).tolist() == [
        b"0.tif",
        b"a/deep/3.webp",
        b"b/1.jpeg",
        b"b/2.PNG",
        b"linked/x.png",
    ]


def test_what_systems_scatter_about_is_not_listed(tmp_path: Path) -> None:
    for name in ("cat/a.jpg", "cat/@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg", "@eaDir/b.jpg", "__MACOSX/cat/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path).tolist() == [b"cat/a.jpg"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lost+found").mkdir()
    scandir = os.scandir

    def refuse(folder: str) -> Any:
        if folder.endswith("lost+found"):  # as root, who runs tests in containers, may read all
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        UserError, match=r"no permission to read the folder .*lost\+found, .*: change its owner, or name"
    ):
        list_images(tmp_path)


def test_a_line_of_pixels_does_not_take_all_memory(tmp_path: Path) -> None:
    """1x30000 pixels to cover 256x256 are 2 thousand million."""
    Image.new("L", (30000, 1)).save(tmp_path / "line.png")
    with pytest.raises(BadImageError, match="1x30000 pixels, of which 256x256 would be cut out of 256x7680000"):
        read_image(tmp_path / "line.png", 256, 256, 3)
    assert read_image(tmp_path / "line.png", 1, 1, 3).shape == (1, 30000, 3)
    Image.new("L", (500, 1)).save(tmp_path / "bar.png")
    assert read_image(tmp_path / "bar.png", 256, 256, 1).shape == (256, 128000, 1)


def test_names_that_are_not_text_are_listed_and_read(tmp_path: Path) -> None:
    name = b"caf\xe9.png"  # Latin-1, as old archives have it
    Image.new("L", (4, 4)).save(tmp_path / "plain.png")
    try:
        os.rename(tmp_path / "plain.png", os.path.join(os.fsencode(tmp_path), name))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert list_images(tmp_path).tolist() == [name]
    assert read_image(tmp_path / os.fsdecode(name), 4, 4, 3).shape == (4, 4, 3)


def test_bad_images_are_recorded_once_by_whoever_finds_them(tmp_path: Path) -> None:
    record = tmp_path / "run" / "bad_files.txt"
    one, other = BadImages(1000, record), BadImages(1000, record)
    one.add("a.png", "empty")
    other.add("a.png", "empty")
    other.add("b.png", "torn")
    one.add("b.png", "torn")
    assert record.read_text() == "a.png\tempty\nb.png\ttorn\n"


def add_bad(bad_images: BadImages, count: int) -> None:
    for number in range(count):
        bad_images.add(f"{number}.png", "empty")


def test_more_bad_images_than_may_be_are_an_error_that_lists_them(tmp_path: Path) -> None:
    record = tmp_path / "bad_files.txt"
    names = [tmp_path / f"{number}.png" for number in range(6)]
    for name in names:
        name.touch()
    for name in names[:5]:
        BadImages(309, record).add(str(name), "empty")  # as five loader processes
    with pytest.raises(UserError) as caught:
        BadImages(309, record).add(str(names[5]), "torn")
    message = str(caught.value)
    assert message.startswith(f"6 of 309 images cannot be read, and 5 may be: {names[0]} (empty), ")
    assert f"{names[4]} (empty) and 1 more; repair or remove them and run the same command again, " in message
    assert f"or let more pass with --data.max_bad_share 0.04; all are listed in {record}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("images", "max_share", "allowed"),
    [
        (309, 0.01, 5),  # a few of a small set
        (50, 0.01, 5),
        (49, 0.01, 4),  # but at most a tenth
        (9, 0.01, 0),
        (700, 0.01, 7),
        (1_281_167, 0.01, 12_811),
        (309, 0.1, 30),
        (9, 0.5, 4),
        (309, 0.0, 0),  # none is none
        (10, 1.0, 10),
    ],
)
def test_how_many_images_may_be_bad(images: int, max_share: float, allowed: int) -> None:
    bad_images = BadImages(images, max_share=max_share, option="--share")
    add_bad(bad_images, allowed)
    assert len(bad_images.seen) == allowed
    if allowed < images:
        with pytest.raises(UserError, match=f"{allowed + 1} of {images} images .*, and {allowed} may be: .*--share "):
            bad_images.add("one more.png", "empty")


def test_the_share_that_the_message_names_lets_the_set_pass() -> None:
    with pytest.raises(UserError) as caught:
        add_bad(BadImages(309), 6)
    share = float(str(caught.value).split("--data.max_bad_share ")[1])
    add_bad(BadImages(309, max_share=share), 6)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_from_nothing_to_all(share: float) -> None:
    with pytest.raises(UserError, match=r"--data.max_bad_share is .*, expected a share of the images, from 0 to 1"):
        BadImages(10, max_share=share)


def test_images_repaired_or_removed_since_the_last_start_no_longer_count(tmp_path: Path) -> None:
    record = tmp_path / "bad_files.txt"
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path in paths:
        path.touch()
    before = BadImages(300, record)
    for path in paths[:3]:
        before.add(str(path), "empty")
    Image.new("L", (2, 2)).save(paths[0])
    paths[2].unlink()
    with pytest.raises(UserError, match="2 of 10 images") as caught:
        BadImages(10, record).add(str(paths[3]), "torn")
    assert f"{paths[1]} (empty), {paths[3]} (torn);" in str(caught.value)
    BadImages(20, record).add(str(paths[3]), "torn")  # the fourth line of the record, but two are bad and two may be


def test_the_summary_tells_what_is_still_bad(tmp_path: Path) -> None:
    record = tmp_path / "bad_files.txt"
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        path.touch()
    worker, main = BadImages(300, record), BadImages(300, record)
    assert main.summary() == ""
    for path in paths:
        worker.add(str(path), "empty")
    assert main.summary() == f"3 of 300 images cannot be read and are passed over: see {record}"
    Image.new("L", (2, 2)).save(paths[0])
    paths[1].unlink()
    later = BadImages(300, record)
    assert later.summary() == f"1 of 300 images cannot be read and is passed over: see {record}"


@pytest.mark.parametrize(
    "name", ["two\nlines.png", "a\ttab.png", '"quoted".png', "line\x85end\u2028.png", "caf\udce9.png"]
)
def test_names_of_any_characters_are_recorded_once(tmp_path: Path, name: str) -> None:
    record, path = tmp_path / "bad_files.txt", tmp_path / name
    try:
        path.touch()
    except OSError:
        pytest.skip("this file system takes no such names")
    for _ in range(2):  # two runs
        BadImages(300, record).add(str(path), "empty")
        BadImages(300, record).add("relative" + name, "empty")
    assert len(record.read_bytes().strip().split(b"\n")) == 2
    assert BadImages(300, record).recorded() == {str(path): "empty", "relative" + name: "empty"}
    assert BadImages(300, record).bad() == {str(path): "empty"}


def test_suffixes_are_formats_that_pillow_knows() -> None:
    known = {*Image.registered_extensions(), ".avif"}  # which not every Pillow is built with
    assert image_files.SUFFIXES - known == set()


def test_a_record_of_images_that_were_copied_since_keeps_those_of_this_place(tmp_path: Path) -> None:
    record = tmp_path / "bad_files.txt"
    for place in ("old", "old too", "new"):
        (tmp_path / place).mkdir()
        for name in ("a.png", "line\nbreak.png"):
            (tmp_path / place / name).write_bytes(b"")
            BadImages(1000, record).add(str(tmp_path / place / name), "no image")
    bad_images = BadImages(1000, record)
    bad_images.keep_only([str(tmp_path / "new"), "squares.npz"])
    assert set(bad_images.recorded()) == {str(tmp_path / "new" / name) for name in ("a.png", "line\nbreak.png")}
    assert bad_images.summary().startswith("2 of 1000 images cannot be read")
    before = record.stat().st_mtime_ns
    bad_images.keep_only([str(tmp_path / "new"), "squares.npz"])
    assert record.stat().st_mtime_ns == before
    bad_images.keep_only([])
    assert bad_images.recorded() == {}
    BadImages(1000, tmp_path / "none.txt").keep_only([])
    assert not (tmp_path / "none.txt").exists()
