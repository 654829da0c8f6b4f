"""Tars of webdataset: samples as webdataset makes them, any image at any time, and damage that is told."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from images.datasets import DataConfig, ImageDataset, image_datasets
from images.encoding import Piece, files_of, write_captions
from images.run_facts import fingerprint_of
from images.sources import open_source
from images.tar_files import expand_braces, find_tars
from images.tar_index import make_index
from images.tars import TarSource
from stage2_prior.text import read_captions


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache / "zellige" / "tars"


def png(grey: int, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("L", size, grey).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, number: int, label: int | None = None, caption: str | None = None) -> list[tuple[str, bytes]]:
    fields = [(f"{key}.png", png(number))]
    fields += [] if label is None else [(f"{key}.cls", str(label).encode())]
    return fields + ([] if caption is None else [(f"{key}.txt", caption.encode())])


def write_shards(root: Path, shards: int = 3, each: int = 7) -> Path:
    """Image i of all is of grey i and class i % 3."""
    for shard in range(shards):
        numbers = range(shard * each, (shard + 1) * each)
        members = [field for i in numbers for field in sample(f"{i:04d}", i, i % 3, f"the grey {i}\n")]
        write_tar(root / f"train-{shard:06d}.tar", members)
    return root


def open_tars(path: Any, **changes: Any) -> TarSource:
    config = DataConfig(path=str(path), **changes)
    source = open_source(config.path, "train", Path(), config.source_settings)
    assert isinstance(source, TarSource)
    return source


def greys(source: TarSource) -> list[int]:
    return [int(source.read(index, 8, 8, 1)[0, 0, 0]) for index in range(len(source))]


def test_a_folder_of_tars_is_its_samples_with_classes_and_captions(tmp_path: Path) -> None:
    source = open_tars(write_shards(tmp_path))
    assert greys(source) == list(range(21))
    assert source.labels is not None
    assert source.labels.tolist() == [i % 3 for i in range(21)]
    assert source.class_names == ("0", "1", "2")
    assert source.name(8) == "train-000001.tar/0008.png"
    assert source.location(8) == str(tmp_path / "train-000001.tar" / "0008.png")
    assert source.caption(8) == "the grey 8"
    assert source.sizes([3, 4]).tolist() == [[8, 8], [8, 8]]
    assert source.stored_size(0) == len(png(0))
    assert source.files([0, 1, 20]) == [tmp_path / "train-000000.tar", tmp_path / "train-000002.tar"]


def test_names_of_classes_stand_beside_the_tars(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "classnames.txt").write_text("cat\ndog\nfox\nnone\n")
    assert open_tars(tmp_path).class_names == ("cat", "dog", "fox", "none")
    (tmp_path / "classnames.txt").write_text("cat\n")
    with pytest.raises(UserError, match="go from 0 to 2, expected 0 to 0: it has 1 class"):
        open_tars(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a", ["a"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{x,y}-{0..1}", ["x-0", "x-1", "y-0", "y-1"]),
        ("{x}", ["{x}"]),
    ],
)
def test_braces_are_those_of_shells(pattern: str, expanded: list[str]) -> None:
    assert list(expand_braces(pattern)) == expanded


def test_patterns_name_tars_and_what_is_missing_is_told(tmp_path: Path) -> None:
    write_shards(tmp_path)
    for pattern in ("train-{000000..000002}.tar", "train-*.tar"):
        assert greys(open_tars(tmp_path / pattern)) == list(range(21))
    assert greys(open_tars(tmp_path / "train-000001.tar")) == list(range(7, 14))
    with pytest.raises(UserError) as caught:
        open_tars(tmp_path / "train-{000000..000004}.tar")
    assert str(caught.value) == (
        f"2 tars of the 5 of data.path={tmp_path}/train-{{000000..000004}}.tar are not there, the first is "
        f"{tmp_path}/train-000003.tar: check the pattern, or bring what is missing"
    )
    with pytest.raises(UserError, match="fits no tars"):
        open_tars(tmp_path / "valid-*.tar")
    with pytest.raises(UserError, match=r"names .*train-000000.tar twice"):
        find_tars(str(tmp_path / "train-{000000,000000}.tar"))
    with pytest.raises(UserError, match=r"data.split=test, but .* is a set of tars, without such a part"):
        open_source(str(tmp_path / "train-*.tar"), "test", Path())


def test_relative_places_and_several_folders_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "a" / "0.tar", sample("x", 1))
    write_tar(tmp_path / "b" / "0.tar", sample("x", 2))
    write_tar(tmp_path / "0.tar", sample("x", 3))
    source = open_tars(tmp_path / "{a,b}" / "0.tar")
    assert [source.name(0), source.name(1)] == ["a/0.tar/x.png", "b/0.tar/x.png"]
    monkeypatch.chdir(tmp_path)
    assert open_tars("0.tar").name(0) == "0.tar/x.png"


def test_tars_lie_wherever_fsspec_reaches(tmp_path: Path) -> None:
    write_shards(tmp_path)
    system = fsspec.filesystem("memory")
    for file in tmp_path.glob("*.tar"):
        system.pipe(f"/bucket/{file.name}", file.read_bytes())
    for path in ("memory://bucket/train-{000000..000002}.tar", "memory://bucket/train-*.tar", "memory://bucket"):
        source = open_tars(path)
        assert greys(source) == list(range(21))
        assert source.name(8) == "train-000001.tar/0008.png"
        assert source.caption(20) == "the grey 20"
        assert source.files([0]) == []
    with pytest.raises(UserError, match=r"1 tar of the 2 .* not there, the first is memory://bucket/train-000003.tar"):
        open_tars("memory://bucket/train-{000002..000003}.tar")
    with pytest.raises(UserError, match=r"nosuch://x.tar cannot be opened by fsspec"):
        open_tars("nosuch://x.tar")
    system.rm("/bucket/train-000001.tar")
    with pytest.raises(UserError, match=r"train-000001.tar is gone, which was there when this command began"):
        source.read(8, 8, 8, 1)


def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    """Hidden files, links, folders and metadata are none; keys end at the first dot; endings are of any case."""
    path = tmp_path / "odd.tar"
    long = "deep/" * 40 + "long"  # a header of its own in PAX and GNU tars
    members = [
        ("__meta__/x.png", b"no"),
        (".hidden.png", b"no"),
        ("dir/._0001.png", b"no"),
        ("noending", b"no"),
        *sample("./dir.with.dots/0001", 1, 0),
        ("0002.PNG", png(2)),
        ("0002.seg.png", b"another field"),
        ("0002.json", json.dumps({"caption": "two", "width": 8}).encode()),
        ("0003.txt", b"no image"),
        *sample(long, 4),
        *sample("caf\udce9", 5),
    ]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for kind, name in ((tarfile.DIRTYPE, "0009.png"), (tarfile.SYMTYPE, "0010.png"), (tarfile.LNKTYPE, "0011.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0002.PNG"
            tar.addfile(member)
    source = open_tars(path)
    assert [source.member(i)[1] for i in range(len(source))] == [
        "./dir.with.dots/0001.png",
        "0002.PNG",
        f"{long}.png",
        "caf\udce9.png",
    ]
    assert greys(source) == [1, 2, 4, 5]
    assert source.labels is not None
    assert source.labels.tolist() == [0, -1, -1, -1]
    assert [source.caption(index) for index in range(4)] == [None, "two", None, None]
    webdataset = pytest.importorskip("webdataset", reason="the judge of what a sample is")
    with open(path, "rb") as file:
        files = webdataset.tariterators.tar_file_iterator(file)
        samples = webdataset.tariterators.group_by_keys({**one, "__url__": ""} for one in files)
        assert [one["__key__"] for one in samples if "png" in one] == [
            "./dir.with.dots/0001",
            "0002",
            long,
            "caf\udce9",
        ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tars_is_read(tmp_path: Path, form: int) -> None:
    long = "d" * 90 + "/" + "n" * 60
    assert greys(open_tars(write_tar(tmp_path / "x.tar", [*sample("a", 1), *sample(long, 2)], form))) == [1, 2]


@pytest.mark.parametrize(
    ("members", "field", "message"),
    [
        (["a.png", "a.jpg"], None, "several images of one sample, a.png and a.jpg"),
        (["a.in.png", "a.out.png"], None, "several images of one sample, a.in.png and a.out.png"),
        (["a.png", "a.PNG"], None, "a.png and a.PNG, the same field of one sample"),
        (["a.cls", "a.png"], None, "a.cls in .* holds b'.*', expected the number of a class, 0 or more"),
        (["a.txt"], None, "holds no images in 1 tar, expected members that end in png, jpg, jpeg, jpe"),
        (["a.png"], "jpg", "holds no images in 1 tar, expected members that end in jpg"),
    ],
)
def test_samples_that_do_not_say_their_image_or_class_are_refused(
    tmp_path: Path, members: list[str], field: str | None, message: str
) -> None:
    write_tar(tmp_path / "x.tar", [(name, png(1)) for name in members])
    with pytest.raises(UserError, match=message):
        open_tars(tmp_path, image_field=field)


def test_one_of_several_images_is_chosen_by_its_field(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.in.png", png(1)), ("a.out.png", png(2)), ("b.in.png", png(3))])
    assert greys(open_tars(tmp_path, image_field="in.png")) == [1, 3]
    assert greys(open_tars(tmp_path, image_field="out.png")) == [2]


def test_samples_in_pieces_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", png(1)), ("b.png", png(2)), ("a.cls", b"1"), ("b.cls", b"0")])
    with pytest.raises(UserError, match="images without classes and 2 classes without an image, expected the files of"):
        open_tars(tmp_path)


def headers(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def test_a_tar_that_is_cut_short_or_damaged_is_named_with_the_byte(tmp_path: Path) -> None:
    """tarfile, and webdataset with it, ends silently at a damaged header."""
    path = write_tar(tmp_path / "x.tar", [(f"{i}.png", png(i)) for i in range(4)])
    whole, starts = path.read_bytes(), headers(path)

    def error_of(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            open_tars(path)
        return str(caught.value)

    cut = error_of(whole[: starts[2] + 512 + 10])  # within the data
    assert cut.startswith(f"{path} is damaged or cut short at byte {starts[2]} (2.png would go on to byte ")
    assert f"{path} is damaged or cut short at byte {starts[3]} (" in error_of(whole[: starts[3] + 100])
    flipped = bytearray(whole)
    flipped[starts[1] + 3] ^= 1  # in a name: the header's sum does not fit
    assert f"{path} is damaged or cut short at byte {starts[1]} (bad checksum)" in error_of(bytes(flipped))
    zeros = bytearray(whole)
    zeros[starts[2] : starts[2] + 512] = bytes(512)
    assert f"at byte {starts[2]} (zeros, which mark the end, and more behind them)" in error_of(bytes(zeros))
    assert f"at byte {starts[-1] + 1024} (zeros" in error_of(whole + whole)
    assert f"{path} is damaged or cut short at byte 0 (" in error_of(b"no tar at all" * 100)
    assert f"{path} is damaged or cut short at byte 0 (empty file)" in error_of(b"")
    assert "is compressed by gzip, " in error_of(b"\x1f\x8b" + whole)


def test_a_tar_without_its_end_mark_is_read_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{i}.png", png(i)) for i in range(4)])
    end = headers(path)[3]
    path.write_bytes(path.read_bytes()[:end])
    assert len(open_tars(path)) == 3
    assert capsys.readouterr().out == f"{path} has no end mark at byte {end}: it may be cut short there\n"


def test_a_header_that_goes_backwards_ends(tmp_path: Path) -> None:
    """Sizes below 0, which once made tarfile run in a circle."""
    path = write_tar(tmp_path / "x.tar", [("a.png", png(1)), ("b.png", png(2))])
    content, start = bytearray(path.read_bytes()), headers(path)[1]
    content[start + 124 : start + 136] = b"\xff" * 10 + b"\xfc\x00"
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"damaged or cut short at byte {start}"):
        open_tars(path)


def test_the_index_is_kept_until_the_tar_changes(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counting(file: Any, tar: Any, field: Any) -> Any:
        made.append(tar.name)
        return make_index(file, tar, field)

    monkeypatch.setattr("images.tars.make_index", counting)
    write_shards(tmp_path, shards=2)
    first = open_tars(tmp_path)
    again = open_tars(tmp_path)
    assert len(made) == 2
    assert again.fingerprint() == first.fingerprint()
    assert again.spans.tolist() == first.spans.tolist()
    assert again.caption(9) == "the grey 9"
    write_tar(tmp_path / "train-000001.tar", sample("new", 99))
    assert greys(open_tars(tmp_path))[-1] == 99
    assert made[2:] == ["train-000001.tar"]
    open_tars(tmp_path, relist=True)
    assert len(made) == 5
    for file in own_cache.iterdir():  # damage costs time alone
        file.write_bytes(file.read_bytes()[:-30])
    assert greys(open_tars(tmp_path))[-1] == 99
    assert len(made) == 7


def test_a_step_sees_the_same_images_as_from_files(tmp_path: Path) -> None:
    """The same draws of the same pictures, of files and of tars, and so from any step on."""
    write_shards(tmp_path / "tars")
    for i in range(21):
        (tmp_path / "files" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / str(i % 3) / f"{i:04d}.png").write_bytes(png(i))

    def seen(path: Path) -> dict[int, Any]:
        train, held_out = image_datasets(
            DataConfig(path=str(path), image_size=6, channels=1, crop="random", validation_share=0), seed=3
        )
        assert not len(held_out)
        greys = [int(train.fetch([i], [0])["images"][0, 0, 0, 0]) for i in range(len(train))]
        assert sorted(greys) == list(range(21))
        order = np.argsort(greys)
        batch = train.fetch(order[[4, 5, 20]].tolist(), [40, 41, 42])
        return {"images": batch["images"].tolist(), "labels": batch["labels"].tolist()}

    assert seen(tmp_path / "tars") == seen(tmp_path / "files")


def test_an_image_that_cannot_be_read_is_recorded_and_looked_at_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{i:02d}.png", png(i) if i != 5 else png(i)[:40]) for i in range(20)])
    record = tmp_path / "bad_files.txt"
    config = DataConfig(path=str(path), image_size=8, channels=1, validation_share=0)
    train, _ = image_datasets(config, 0, record)
    assert train.fetch([5], [0])["images"][0, 0, 0, 0] == 6  # the next takes its place
    assert record.read_text().startswith(f"{path}/05.png\t")
    again, _ = image_datasets(config, 0, record)
    assert again.bad_images.summary() == f"1 of 20 images cannot be read and is passed over: see {record}"
    write_tar(path, [(f"{i:02d}.png", png(i)) for i in range(20)])
    mended, _ = image_datasets(config, 0, record)
    assert mended.bad_images.summary() == ""


def test_a_tar_that_goes_or_is_cut_while_it_is_read_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{i}.png", png(i)) for i in range(4)])
    source = open_tars(path)
    os.truncate(path, headers(path)[3] + 520)
    assert source.read(2, 8, 8, 1)[0, 0, 0] == 2
    with pytest.raises(UserError, match=re.escape(f"{path} ends within what had {len(png(3))} bytes from byte ")):
        source.read(3, 8, 8, 1)
    path.unlink()
    with pytest.raises(UserError, match=re.escape(f"{path} is gone, which was there when this command began")):
        source.read(0, 8, 8, 1)


def test_a_run_knows_its_tars_wherever_they_lie(tmp_path: Path) -> None:
    def known(folder: Path) -> str:
        source = open_tars(folder)
        return fingerprint_of(ImageDataset(source, DataConfig(path="x", image_size=8, channels=1)))

    one, other = known(write_shards(tmp_path / "a")), known(write_shards(tmp_path / "b"))
    assert one == other
    write_tar(tmp_path / "b" / "train-000002.tar", sample("x", 1))
    assert known(tmp_path / "b") != one


def test_captions_are_written_as_stage_two_reads_them(tmp_path: Path) -> None:
    """With the names that code shards have."""
    members = [*sample("a", 1, 0, "eine Füchsin"), *sample("b", 2, 0), *sample("c", 3, 0, "c")]
    path = write_tar(tmp_path / "x.tar", members)
    train, held_out = image_datasets(DataConfig(path=str(path), image_size=8, channels=1, validation_count=1), 0)
    write_captions(tmp_path / "captions.jsonl", [train, held_out])
    captions = dict(read_captions(tmp_path / "captions.jsonl"))
    assert captions == {"x.tar/a.png": "eine Füchsin", "x.tar/c.png": "c"}
    assert set(captions) < {*train.names(range(len(train))), *held_out.names(range(len(held_out)))}
    silent = open_tars(write_tar(tmp_path / "y.tar", sample("a", 1)))
    write_captions(tmp_path / "none.jsonl", [ImageDataset(silent, train.config)])
    assert not (tmp_path / "none.jsonl").exists()


def test_shards_of_codes_go_by_the_tars_of_their_images(tmp_path: Path) -> None:
    dataset = ImageDataset(open_tars(write_shards(tmp_path)), DataConfig(path="x", image_size=8, channels=1))
    assert files_of(Piece("train", dataset, 5, 4, 0)) == [tmp_path / "train-000000.tar", tmp_path / "train-000001.tar"]
