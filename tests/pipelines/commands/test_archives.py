"""Archives: many images in one file, read one by one, and made again after a kill."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from PIL import Image

import pipelines.commands.compress as compress_module
from common import file_names
from common.errors import UserError
from pipelines.cli import main
from pipelines.codec.archive import read_archive, write_archive
from pipelines.codec.codec import Codec
from pipelines.codec.parts import Parts
from pipelines.commands.compress import CompressConfig, compress_files
from pipelines.commands.decompress import DecompressConfig, decompress_files
from pipelines.commands.info import InfoConfig, describe_file


def test_an_archive_and_files_of_the_same_names_are_not_mixed(model, images, tmp_path):
    out = tmp_path / "zlg"
    compress_files(CompressConfig(model=str(model), images=str(images), out=str(out), archive=True))
    compress_files(CompressConfig(model=str(model), images=str(images / "00.png"), out=str(out / "images")))
    config = DecompressConfig(model=str(model), files=str(out), out=str(tmp_path / "png"))
    with pytest.raises(
        UserError, match=r"the images of .*images.zlg and those of the files in .* would go to one folder"
    ):
        decompress_files(config)


def test_an_archive_that_is_there_is_kept(model, images, tmp_path):
    config = CompressConfig(model=str(model), images=str(images), out=str(tmp_path), archive=True)
    compress_files(config)
    assert compress_files(config) == f"{tmp_path / 'images.zlg'} is there already"


def test_an_archive_is_made_anew_when_images_were_added(model, images, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    config = CompressConfig(model=str(model), images=str(folder), out=str(tmp_path / "out"), archive=True)
    compress_files(config)
    shutil.copy(folder / "00.png", folder / "new.png")
    assert compress_files(config).startswith("13 images compressed")
    assert "new.png" in {entry.name for entry in read_archive((tmp_path / "out" / "images.zlg").read_bytes()).entries}


def test_info_of_an_archive(model, images, tmp_path):
    compress_files(CompressConfig(model=str(model), images=str(images), out=str(tmp_path), archive=True))
    lines = describe_file(InfoConfig(file=str(tmp_path / "images.zlg"))).splitlines()
    assert lines[0].startswith(f"{tmp_path / 'images.zlg'}: 12 images, ")
    assert lines[1] == "mode: prior (11), table (1)"
    assert lines[2:4] == ["11 of 16x16 pixels: 4x4 codes of 16", "1 of 18x21 pixels: 5x6 codes of 16"]
    assert lines[-1].startswith("tables: ")
    config = InfoConfig(file=str(tmp_path / "images.zlg"), model=str(model), against=str(images / "00.png"))
    with pytest.raises(UserError, match="holds 12 images, expected one to be held against"):
        describe_file(config)


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/../b", "", "a//b", "c:/x", "con.png", "a\\..\\b", "x" * 300])
def test_names_that_lead_elsewhere_are_refused(model, images, tmp_path, name, monkeypatch):
    monkeypatch.setattr(file_names, "WINDOWS", True)
    compress_files(CompressConfig(model=str(model), images=str(images), out=str(tmp_path / "zlg"), archive=True))
    path = tmp_path / "zlg" / "images.zlg"
    archive = read_archive(path.read_bytes())
    entries = (archive.entries[0]._replace(name=name), *archive.entries[1:])
    path.write_bytes(write_archive(archive._replace(entries=entries)))
    config = DecompressConfig(model=str(model), files=str(path), out=str(tmp_path / "png"))
    if name == "":  # no name: its number
        decompress_files(config)
        assert (tmp_path / "png" / "images" / "000000.png").exists()
        return
    with pytest.raises(UserError, match=r"calls an image .*, expected a path below one folder of this system; take"):
        decompress_files(config)
    assert not (tmp_path / "png").exists()


def test_batches_keep_within_the_limit_of_pixels(model, images, tmp_path):
    compress_files(CompressConfig(model=str(model), images=str(images), out=str(tmp_path / "zlg"), archive=True))
    config = DecompressConfig(
        model=str(model), files=str(tmp_path / "zlg"), out=str(tmp_path / "png"), max_pixels=20 * 24
    )
    line = f"12 images in {tmp_path / 'png'}; 11 in mode prior, exact arithmetic 1"
    assert decompress_files(config) == line
    # 18x21 pixels, which are decoded as 20x24.
    with pytest.raises(UserError, match=r"images.zlg claims 480 pixels, .*, expected at most 479 at once; raise"):
        decompress_files(replace(config, max_pixels=479, out=str(tmp_path / "other")))


def test_only_some_images_of_an_archive_are_decompressed(model, images, tmp_path, capsys):
    assert main(["compress", "--model", str(model), "--images", str(images), "--out", str(tmp_path / "zlg"),
                 "--archive"]) == 0  # fmt: skip
    back = ["decompress", "--model", str(model), "--files", str(tmp_path / "zlg"), "--out", str(tmp_path / "png")]
    assert main([*back, "--only", "[3,0,3]"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 images in ")
    written = sorted(path.name for path in (tmp_path / "png").rglob("*.png"))
    assert written == ["00.png", "03.png"]
    assert main([*back, "--only", "[12]"]) == 2
    assert "images.zlg has no image 12, expected 0 to 11" in capsys.readouterr().err
    assert main([*back, "--only", "7,9"]) == 2
    assert "only: expected a list of whole numbers such as [7,9], got '7,9'" in capsys.readouterr().err
    assert main([*back, "--only", "[]"]) == 2
    assert "only names no image, expected numbers such as [0,99]" in capsys.readouterr().err
    assert main(back) == 0
    assert "10 images in" in capsys.readouterr().out
    assert len(list((tmp_path / "png").rglob("*.png"))) == 12


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("batch_size", [5, 3])
def test_an_archive_is_taken_up_again_after_a_kill(model, images, tmp_path, monkeypatch, batch_size):
    whole = CompressConfig(model=str(model), images=str(images), out=str(tmp_path / "whole"), archive=True)
    compress_files(whole)
    config = replace(whole, out=str(tmp_path / "zlg"), batch_size=5)
    entries = Codec.entries
    coded: list[int] = []

    def counted(codec, pictures, *arguments):
        coded.append(len(pictures))
        if len(coded) == 3:
            raise StoppedError
        return entries(codec, pictures, *arguments)

    monkeypatch.setattr(Codec, "entries", counted)
    with pytest.raises(StoppedError):
        compress_files(config)
    assert not (tmp_path / "zlg" / "images.zlg").exists()
    back = DecompressConfig(model=str(model), files=str(tmp_path / "zlg"), out=str(tmp_path / "png"))
    for use in (lambda: decompress_files(back), lambda: describe_file(InfoConfig(file=back.files))):
        with pytest.raises(UserError, match="zlg holds an archive that is not finished; give the command again"):
            use()
    line = compress_files(replace(config, batch_size=batch_size))
    assert line.startswith("12 images compressed")
    assert coded[:3] == [5, 5, 2]
    assert sum(coded[3:]) == 2
    assert (tmp_path / "zlg" / "images.zlg").read_bytes() == (tmp_path / "whole" / "images.zlg").read_bytes()
    assert not (tmp_path / "zlg" / "images.parts").exists()
    assert "parts" not in (tmp_path / "zlg" / "sources.jsonl").read_text()


def test_what_changed_since_the_kill_is_coded_anew(model, images, tmp_path, monkeypatch):
    config = CompressConfig(model=str(model), images=str(images), out=str(tmp_path / "zlg"), archive=True, batch_size=4)
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "remove", lambda self: None)
        compress_files(config)
    parts = sorted((tmp_path / "zlg" / "images.parts").iterdir())
    assert len(parts) == 3
    assert ": 1 file, 12 images, " in describe_file(InfoConfig(file=config.out))  # an image is not counted twice
    (tmp_path / "zlg" / "images.zlg").unlink()
    parts[2].write_bytes(parts[2].read_bytes()[:-1])
    Image.open(images / "01.png").transpose(Image.Transpose.ROTATE_180).save(images / "00.png")
    coded: list[int] = []
    entries = Codec.entries
    monkeypatch.setattr(Codec, "entries", lambda codec, *a: coded.append(len(a[0])) or entries(codec, *a))
    compress_files(config)
    assert sum(coded) == 8
    written = (tmp_path / "zlg" / "images.zlg").read_bytes()
    compress_files(replace(config, out=str(tmp_path / "again")))
    assert (tmp_path / "again" / "images.zlg").read_bytes() == written


def test_of_an_archive_without_an_image_that_cannot_be_read_nothing_is_coded_again(
    model, images, tmp_path, monkeypatch
):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    config = CompressConfig(
        model=str(model), images=str(tmp_path / "images"), out=str(tmp_path / "zlg"), archive=True, max_bad_share=0.5
    )
    compress_files(config)
    written = (tmp_path / "zlg" / "images.zlg").read_bytes()
    coded: list[int] = []
    entries = Codec.entries
    monkeypatch.setattr(Codec, "entries", lambda codec, *a: coded.append(len(a[0])) or entries(codec, *a))
    assert "1 could not be read" in compress_files(config)
    assert sum(coded) == 0
    assert (tmp_path / "zlg" / "images.zlg").read_bytes() == written
    shutil.copy(images / "00.png", tmp_path / "images" / "broken.png")  # repaired: the images are others
    compress_files(config)
    assert sum(coded) == 13


def test_an_image_that_changes_while_batches_are_taken_up_is_coded_anew_later(model, images, tmp_path, monkeypatch):
    shutil.copytree(images, tmp_path / "images")
    config = CompressConfig(model=str(model), images=str(tmp_path / "images"), out=str(tmp_path / "zlg"), archive=True)
    with monkeypatch.context() as patch:
        patch.setattr(compress_module, "write_bytes", stop)
        with pytest.raises(StoppedError):
            compress_files(config)
    take_up = Parts.take_up

    def changed_at_once(parts, *arguments):
        take_up(parts, *arguments)
        shutil.copy(images / "01.png", tmp_path / "images" / "00.png")

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "take_up", changed_at_once)
        compress_files(config)
    compress_files(config)
    compress_files(replace(config, out=str(tmp_path / "fresh")))
    assert (tmp_path / "zlg" / "images.zlg").read_bytes() == (tmp_path / "fresh" / "images.zlg").read_bytes()


def stop(*arguments):
    raise StoppedError


def test_batches_that_a_kill_left_beside_their_archive_are_removed(model, images, tmp_path, monkeypatch):
    config = CompressConfig(model=str(model), images=str(images), out=str(tmp_path / "zlg"), archive=True)
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "remove", stop)
        with pytest.raises(StoppedError):
            compress_files(config)
    assert len(list((tmp_path / "zlg").rglob("*.zlg"))) == 2
    assert compress_files(config).endswith("images.zlg is there already")
    assert [path.name for path in (tmp_path / "zlg").rglob("*.zlg")] == ["images.zlg"]
    assert "parts" not in (tmp_path / "zlg" / "sources.jsonl").read_text()
