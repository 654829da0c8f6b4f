"""What is no picture says so, is listed or left out, and is counted once."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from common.errors import UserError
from images import files as image_files
from images.datasets import DataConfig, image_datasets
from images.files import BadImageError, BadImages, read_image, read_size
from images.listing import list_images


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


def bomb(folder: Path, width: int, height: int) -> Path:
    """A PNG whose header names a size, and that holds no pixels."""
    Image.new("L", (1, 1)).save(folder / "bomb.png")
    content = bytearray((folder / "bomb.png").read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (folder / "bomb.png").write_bytes(content)
    return folder / "bomb.png"


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (13_378, 13_378), (2**31 - 1, 1)])
def test_a_decompression_bomb_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    path = bomb(tmp_path, width, height)
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(BadImageError, match="expected at most 178,956,970") as caught:
        read_image(path, 6, 8, 3)
    assert str(width * height) in str(caught.value) or f"{width}x{height} pixels" in str(caught.value)
    assert read_size(path) == (0, 0)


def test_the_limit_of_pixels_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50 * 50)  # Pillow's own, which refuses from twice as many on
    Image.new("L", (100, 100), 7).save(tmp_path / "large.png")
    with pytest.raises(BadImageError, match=r"100x100 pixels by its header, expected at most 9,999: a decompression b"):
        read_image(tmp_path / "large.png", 6, 8, 1, max_pixels=9_999)
    assert read_image(tmp_path / "large.png", 6, 8, 1, max_pixels=10_000).shape == (8, 8, 1)
    assert read_size(tmp_path / "large.png", 10_000) == (100, 100)


def photos(root: Path) -> DataConfig:
    """Twenty, of which two may be bad; image i is of grey i."""
    root.mkdir()
    for number in range(20):
        Image.new("L", (8, 8), number).save(root / f"{number:02d}.png")
    return DataConfig(path=str(root), image_size=8, channels=1, validation_share=0, max_pixels=8_000)


def test_images_that_are_too_large_are_passed_over_until_the_limit_is_raised(tmp_path: Path) -> None:
    record, config = tmp_path / "bad_files.txt", photos(tmp_path / "photos")
    Image.new("L", (90, 90), 99).save(tmp_path / "photos" / "03.png")
    train, _ = image_datasets(config, 0, record)
    assert train.fetch([3], [0])["images"][0, 0, 0, 0] == 4
    assert record.read_text().startswith(f"{tmp_path}/photos/03.png\t90x90 pixels by its header, expected at most 8,0")
    assert image_datasets(config, 0, record)[0].bad_images.summary().startswith("1 of 20 images cannot be read")
    raised, _ = image_datasets(replace(config, max_pixels=8_100), 0, record)
    assert raised.bad_images.summary() == ""
    assert raised.fetch([3], [0])["images"][0, 0, 0, 0] == 99


def test_files_that_vanish_in_a_training_are_told_by_name(tmp_path: Path) -> None:
    """Whichever loader process finds them: what others have named counts although it is not there any more."""
    record, config = tmp_path / "bad_files.txt", photos(tmp_path / "photos")
    one, other = (image_datasets(config, 0, record)[0] for _ in range(2))
    for name in ("04", "05", "11"):
        (tmp_path / "photos" / f"{name}.png").unlink()
    assert one.fetch([4], [0])["images"][0, 0, 0, 0] == 6  # the next that can be read
    assert one.bad_images.summary() == f"2 of 20 images cannot be read and are passed over: see {record}"
    with pytest.raises(UserError) as caught:
        other.fetch([11], [0])
    assert str(caught.value).startswith(
        f"3 of 20 images cannot be read, and 2 may be: {tmp_path}/photos/04.png (gone since the folder was listed), "
    )
    Image.new("L", (8, 8), 4).save(tmp_path / "photos" / "04.png")  # brought back
    assert image_datasets(config, 0, record)[0].bad_images.summary() == ""  # listed anew, without the other two


def test_a_folder_that_is_gone_ends_the_run_at_once(tmp_path: Path) -> None:
    train, _ = image_datasets(photos(tmp_path / "photos"), 0)
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError) as caught:
        train.fetch([4], [0])
    assert str(caught.value) == (
        f"the folder {tmp_path}/photos is gone, which was there when this command began: bring it back, and give the "
        "same command again, which continues"
    )
    (tmp_path / "elsewhere").rename(tmp_path / "photos")
    assert train.fetch([4], [0])["images"][0, 0, 0, 0] == 4


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


def test_the_sheet_that_a_command_put_beside_its_results_is_no_image(tmp_path: Path) -> None:
    """As it is one of all of them: compressed, completed or trained on it would be nonsense."""
    for folder in ("ours", "set/ours", "own"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("000000.png", "sheet.png"):
            (tmp_path / folder / name).touch()
    for folder, settings in (("ours", "generate"), ("set/ours", "vary")):
        (tmp_path / folder / "settings.json").write_text(f'{{"command": "{settings}"}}')
    assert list_images(tmp_path / "ours").tolist() == [b"000000.png"]
    assert list_images(tmp_path / "set").tolist() == [b"ours/000000.png"]
    assert list_images(tmp_path / "own").tolist() == [b"000000.png", b"sheet.png"]
    (tmp_path / "own" / "settings.json").write_text('{"scanner": "A4"}')  # somebody's own sheet, and own settings
    assert list_images(tmp_path / "own").tolist() == [b"000000.png", b"sheet.png"]


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
