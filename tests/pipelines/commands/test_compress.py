"""compress and tables: files that come back, resume, and say what they are."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pipelines.codec.codec as codec_module
import pipelines.commands.compress as compress_module
from benchmarks.codec_version1 import write_version1
from codes.shards import CodeShardWriter
from common.errors import UserError
from pipelines.cli import main
from pipelines.codec.archive import read_archive
from pipelines.codec.codec import Codec
from pipelines.commands.assemble import AssembleConfig, assemble
from pipelines.commands.compress import CompressConfig, compress_files, zlg_names
from pipelines.commands.decompress import DecompressConfig, decompress_files
from pipelines.commands.info import InfoConfig
from pipelines.commands.tables import TablesConfig, add_tables
from pipelines.image_folders import to_images
from pipelines.pictures import to_pil
from tests.pipelines.conftest import make_autoencoder, make_pipeline


def expected(model: Path, path: Path) -> np.ndarray:
    """As pixels of 8 bits: batches of other sizes may round the last bits of a float otherwise."""
    autoencoder = Codec.from_pretrained(model).autoencoder
    original = to_images(Image.open(path).convert("L"))
    height, width = original.shape[2:]
    padded = torch.nn.functional.pad(original, (0, -width % 4, 0, -height % 4), mode="replicate")
    with torch.no_grad():
        return np.asarray(to_pil(autoencoder.decode(autoencoder.encode(padded))[0, :, :height, :width]), dtype=int)


@pytest.mark.parametrize("mode", ["prior", "table", "packed", None])
@pytest.mark.parametrize("archive", [False, True])
def test_there_and_back(model, images, tmp_path, mode, archive):
    out = tmp_path / "zlg"
    config = CompressConfig(
        model=str(model), images=str(images), out=str(out), mode=mode, archive=archive, batch_size=5
    )
    line = compress_files(config)
    files = sorted(out.rglob("*.zlg"))
    assert len(files) == (1 if archive else 12)
    size = sum(path.stat().st_size for path in files)
    pixels = 11 * 256 + 18 * 21
    where = out / "images.zlg" if archive else out
    assert line.startswith(f"12 images compressed to {size} bytes in {where}, {8 * size / pixels:.4f} bits per pixel")
    other = "; 1 image is in mode table: the prior knows only codes of 16x16 images; --crop cuts all images to 16x16"
    assert (other in line) == (mode in ("prior", None))
    line = decompress_files(DecompressConfig(model=str(model), files=str(out), out=str(tmp_path / "png")))
    by_prior = "; 11 in mode prior, exact arithmetic 1" if mode in ("prior", None) else ""
    assert line == f"12 images in {tmp_path / 'png'}{by_prior}"
    root = tmp_path / "png" / ("images" if archive else "")
    for path in (*images.glob("*.png"), images / "sub" / "wide.bmp"):
        written = np.asarray(Image.open(root / path.relative_to(images).with_suffix(".png")), dtype=int)
        assert written.shape == expected(model, path).shape
        assert np.abs(written - expected(model, path)).max() <= 1


def test_a_rerun_keeps_what_is_sound_and_makes_the_rest(model, images, tmp_path):
    out = tmp_path / "zlg"
    config = CompressConfig(model=str(model), images=str(images), out=str(out))
    compress_files(config)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*.zlg"))}
    (out / "03.zlg").unlink()
    (out / "07.zlg").write_bytes(before[out / "07.zlg"][:-1])
    (out / ".08.zlg.99.tmp").write_bytes(b"half")
    line = compress_files(config)
    assert line.startswith("2 images compressed")
    assert "; 10 were there already" in line
    assert {path: path.read_bytes() for path in sorted(out.rglob("*.zlg"))} == before
    assert not (out / ".08.zlg.99.tmp").exists()

    back = DecompressConfig(model=str(model), files=str(out), out=str(tmp_path / "png"))
    decompress_files(back)
    pictures = {path: path.read_bytes() for path in sorted((tmp_path / "png").rglob("*.png"))}
    (tmp_path / "png" / "05.png").unlink()
    line = f"1 image in {tmp_path / 'png'}; 11 were there already; 1 in mode prior, exact arithmetic 1"
    assert decompress_files(back) == line
    assert sorted(pictures) == sorted((tmp_path / "png").rglob("*.png"))


def test_images_of_files_that_were_made_anew_are_made_anew(model, images, tmp_path):
    out, png = tmp_path / "zlg", tmp_path / "png"
    compress_files(CompressConfig(model=str(model), images=str(images / "00.png"), out=str(out)))
    back = DecompressConfig(model=str(model), files=str(out), out=str(png))
    decompress_files(back)
    before = (png / "00.png").read_bytes()
    other = Codec.from_pretrained(model).compress(to_images(Image.open(images / "01.png"))).data
    (out / "00.zlg").write_bytes(other)
    later = (png / "00.png").stat().st_mtime_ns + 10**9
    os.utime(out / "00.zlg", ns=(later, later))
    assert decompress_files(back) == f"1 image in {png}; 1 in mode prior, exact arithmetic 1"
    assert (png / "00.png").read_bytes() != before


@pytest.mark.parametrize("archive", [False, True])
def test_an_image_that_changed_is_compressed_anew(model, images, tmp_path, archive):
    """Although what replaced it is older than the .zlg file and has as many bytes."""
    folder, out = tmp_path / "images", tmp_path / "zlg"
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (2, 16, 16), dtype=np.uint8)
    for number in range(2):
        Image.fromarray(pixels[number]).save(folder / f"{number}.bmp")
    config = CompressConfig(model=str(model), images=str(folder), out=str(out), archive=archive)
    compress_files(config)
    before = {path.name: path.read_bytes() for path in out.glob("*.zlg")}
    times = os.stat(folder / "0.bmp")
    Image.fromarray(pixels[1]).save(folder / "0.bmp")
    os.utime(folder / "0.bmp", ns=(times.st_atime_ns, times.st_mtime_ns - 10**12))
    assert compress_files(config).startswith("2 images compressed" if archive else "1 image compressed")
    if archive:
        first, second = read_archive((out / "images.zlg").read_bytes()).entries
        assert first.crc == second.crc
    else:
        assert (out / "1.zlg").read_bytes() == before["1.zlg"]
        assert (out / "0.zlg").read_bytes() != before["0.zlg"]
        assert read_archive((out / "0.zlg").read_bytes()).entries[0].crc == read_archive(before["1.zlg"]).entries[0].crc
    again = compress_files(config)
    assert again == f"{out / 'images.zlg'} is there already" if archive else again.startswith(f"0 images in {out}; ")


def test_folders_that_moved_are_continued_and_others_refused(model, images, tmp_path):
    shutil.copytree(images, tmp_path / "a")
    config = CompressConfig(model=str(model), images=str(tmp_path / "a"), out=str(tmp_path / "zlg"))
    compress_files(config)
    back = DecompressConfig(model=str(model), files=str(tmp_path / "zlg"), out=str(tmp_path / "png"))
    decompress_files(back)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    shutil.copytree(tmp_path / "zlg", tmp_path / "zlg2", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "zlg")
    (tmp_path / "zlg2" / "03.zlg").unlink()
    moved = replace(config, images=str(tmp_path / "b"), out=str(tmp_path / "zlg2"))
    assert "; 11 were there already" in compress_files(moved)
    line = decompress_files(replace(back, files=str(tmp_path / "zlg2")))
    assert line == f"0 images in {tmp_path / 'png'}; 12 were there already"
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    shutil.copy(tmp_path / "c" / "01.png", tmp_path / "c" / "00.png")
    with pytest.raises(UserError, match=r"images was '.*b' and is now '.*c'"):
        compress_files(replace(moved, images=str(tmp_path / "c")))


def test_a_folder_begun_before_the_model_had_tables_is_continued_as_it_was_begun(images, tmp_path):
    model = make_autoencoder().save_pretrained(tmp_path / "model")
    config = CompressConfig(model=str(model), images=str(images / "00.png"), out=str(tmp_path / "zlg"))
    compress_files(config)
    writer = CodeShardWriter(tmp_path / "codes", make_autoencoder().code_spec(), ["train"])
    writer.write(0, (torch.arange(16).view(1, 4, 4),), torch.tensor([-1]), ["a"])
    writer.finish()
    add_tables(TablesConfig(model=str(model), codes=str(tmp_path / "codes")))
    compress_files(replace(config, images=str(images / "00.png")))
    (tmp_path / "zlg" / "00.zlg").write_bytes(b"")
    assert compress_files(config).startswith("1 image compressed")
    assert read_archive((tmp_path / "zlg" / "00.zlg").read_bytes()).entries[0].mode.name == "packed"
    with pytest.raises(UserError, match="mode was 'packed' and is now 'table'"):
        compress_files(replace(config, mode="table"))


def test_photos_of_many_sizes_use_the_prior_when_they_are_cropped_to_its_size(model, tmp_path):
    (tmp_path / "photos").mkdir()
    generator = np.random.default_rng(0)
    for number, (height, width) in enumerate([(40, 60), (61, 33), (16, 16), (9, 30), (200, 17)]):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    config = CompressConfig(model=str(model), images=str(tmp_path / "photos"), out=str(tmp_path / "as_they_are"))
    line = compress_files(config)
    hint = "--crop cuts all images to 16x16"
    assert line.endswith(f"; 4 images are in mode table: the prior knows only codes of 16x16 images; {hint}")
    cropped = replace(config, out=str(tmp_path / "cropped"), crop=True)
    assert "prior" not in compress_files(cropped)
    files = sorted((tmp_path / "cropped").glob("*.zlg"))
    assert [read_archive(path.read_bytes()).entries[0].mode.name for path in files] == ["prior"] * 5
    decompress_files(DecompressConfig(model=str(model), files=str(tmp_path / "cropped"), out=str(tmp_path / "png")))
    with Image.open(tmp_path / "photos" / "0.png") as photo, Image.open(tmp_path / "png" / "0.png") as written:
        middle = photo.convert("L").resize((24, 16), Image.Resampling.BICUBIC).crop((4, 0, 20, 16))
        codec = Codec.from_pretrained(model)
        expected = codec.decompress(codec.compress(to_images(middle)).data)[0]
        assert np.array_equal(np.asarray(written), np.asarray(to_pil(expected)))
    with pytest.raises(UserError, match="crop was True and is now False"):
        compress_files(replace(cropped, crop=False))


def test_large_images_are_scaled_down_if_asked_for(model, tmp_path):
    Image.new("L", (64, 64)).save(tmp_path / "square.png")
    config = CompressConfig(model=str(model), images=str(tmp_path / "square.png"), out=str(tmp_path / "o"), max_side=16)
    assert "prior" not in compress_files(config)
    entry = read_archive((tmp_path / "o" / "square.zlg").read_bytes()).entries[0]
    assert (entry.mode.name, entry.shape.height, entry.shape.width) == ("prior", 16, 16)
    assert json.loads((tmp_path / "o" / "settings.json").read_text())["max_side"] == 16


def test_images_are_not_decompressed_among_others(model, images, tmp_path):
    compress_files(CompressConfig(model=str(model), images=str(images / "00.png"), out=str(tmp_path / "a")))
    compress_files(CompressConfig(model=str(model), images=str(images / "01.png"), out=str(tmp_path / "b")))
    before = {path: path.read_bytes() for path in images.rglob("*.png")}
    among_originals = DecompressConfig(model=str(model), files=str(tmp_path / "a"), out=str(images))
    with pytest.raises(UserError, match=r"holds [\w/]+.png, which this command did not write; name another"):
        decompress_files(among_originals)
    assert {path: path.read_bytes() for path in images.rglob("*.png")} == before
    config = replace(among_originals, out=str(tmp_path / "png"))
    decompress_files(config)
    with pytest.raises(UserError, match=r"was begun with other settings: files was '.*a' and is now '.*b'"):
        decompress_files(replace(config, files=str(tmp_path / "b")))


def test_large_images_are_encoded_a_few_at_a_time(model, images, tmp_path, monkeypatch):
    together = []
    encode = codec_module.encode_any_size

    def counted(autoencoder, batch):
        together.append(tuple(batch.shape))
        return encode(autoencoder, batch)

    monkeypatch.setattr(codec_module, "encode_any_size", counted)
    for module in (codec_module, compress_module):
        monkeypatch.setattr(module, "PIXELS", 3 * 256 + 10)
    config = CompressConfig(model=str(model), images=str(images), out=str(tmp_path / "few"), mode="packed")
    compress_files(config)
    assert together == [(3, 1, 16, 16)] * 3 + [(2, 1, 16, 16), (1, 1, 18, 21)]
    together.clear()
    many = torch.cat([to_images(Image.open(images / f"{i:02d}.png")) for i in range(8)])
    codec = Codec.from_pretrained(model)
    data = codec.compress(many, "packed", np.int64(1)).data
    assert together == [(3, 1, 16, 16), (3, 1, 16, 16), (2, 1, 16, 16)]
    assert len(codec.decompress(data)) == 8
    monkeypatch.undo()
    compress_files(replace(config, out=str(tmp_path / "all")))
    for path in (tmp_path / "all").rglob("*.zlg"):
        assert path.read_bytes() == (tmp_path / "few" / path.relative_to(tmp_path / "all")).read_bytes()


def test_other_settings_do_not_mix(model, images, tmp_path):
    config = CompressConfig(model=str(model), images=str(images / "00.png"), out=str(tmp_path), mode="packed")
    compress_files(config)
    with pytest.raises(
        UserError, match=r"was begun with other settings: mode was 'packed' and is now 'table'; give the"
    ):
        compress_files(replace(config, mode="table"))


def test_what_a_mode_does_not_use_may_be_another(model, images, tmp_path):
    """Packed codes need the autoencoder alone, which is in the same folder here."""
    config = CompressConfig(model=str(model), images=str(images), out=str(tmp_path), mode="packed")
    compress_files(config)
    line = compress_files(replace(config, model=str(model / "stage1")))
    assert line.endswith("; 12 were there already")
    other = CompressConfig(model=str(model), images=str(images / "00.png"), out=str(tmp_path / "table"), mode="table")
    compress_files(other)
    with pytest.raises(UserError, match="this model has no tables"):
        compress_files(replace(other, model=str(model / "stage1")))


def test_a_label_is_told_to_the_prior(model, images, tmp_path):
    config = CompressConfig(model=str(model), images=str(images / "00.png"), out=str(tmp_path), label=2)
    compress_files(config)
    assert read_archive((tmp_path / "00.zlg").read_bytes()).entries[0].label == 2
    with pytest.raises(UserError, match="label 3 is out of range"):
        compress_files(replace(config, label=3, out=str(tmp_path / "other")))


def test_a_folder_of_version_1_is_continued(model, images, tmp_path):
    """Its settings name the models by other fingerprints and know lanes; what a prior coded is coded anew."""
    out = tmp_path / "zlg"
    config = CompressConfig(model=str(model), images=str(images), out=str(out))
    compress_files(config)
    sound = {path: path.read_bytes() for path in sorted(out.rglob("*.zlg"))}
    codec = Codec.from_pretrained(model)
    settings = json.loads((out / "settings.json").read_text())
    stage1, prior = codec.version1_fingerprints
    (out / "settings.json").write_text(json.dumps(settings | {"model": stage1.hex(), "prior": prior.hex(), "lanes": 8}))
    first = read_archive(sound[out / "00.zlg"])
    old = first._replace(stage1=stage1, prior=prior, environment=codec.environment, lanes=8, version=1)
    (out / "00.zlg").write_bytes(write_version1(old))
    line = compress_files(config)
    assert line.startswith("1 image compressed")
    assert "; 11 were there already" in line
    assert {path: path.read_bytes() for path in sorted(out.rglob("*.zlg"))} == sound


def test_tables_are_added_to_a_model_that_is_there(tmp_path, images):
    autoencoder = make_autoencoder()
    model = autoencoder.save_pretrained(tmp_path / "run" / "model")
    writer = CodeShardWriter(
        tmp_path / "codes", autoencoder.code_spec(), ["train"], stage1_fingerprint=autoencoder.fingerprint()
    )
    with torch.no_grad():
        codes = autoencoder.encode(torch.rand(30, 1, 16, 16) * 2 - 1)
    writer.write(0, codes, torch.full((30,), -1), [str(i) for i in range(30)])
    writer.finish()
    line = add_tables(TablesConfig(model=str(tmp_path / "run"), codes=str(tmp_path / "codes")))
    contexts = " and ".join(Codec.from_pretrained(model).tables.grids["codes"].tables)
    assert line.startswith(f"tables are in {model / 'tables.safetensors'} (codes: {contexts}); next: zellige compress")
    out = tmp_path / "zlg"
    compress_files(CompressConfig(model=str(tmp_path / "run"), images=str(images), out=str(out)))
    assert read_archive((out / "00.zlg").read_bytes()).entries[0].mode.name == "table"

    pipeline = make_pipeline()
    pipeline.prior.save_pretrained(tmp_path / "prior")
    names = {"stage1": str(model), "stage2": str(tmp_path / "prior"), "out": str(tmp_path / "whole")}
    assemble(AssembleConfig(**names, codes=str(tmp_path / "codes")))
    ours, theirs = Codec.from_pretrained(tmp_path / "whole").tables, Codec.from_pretrained(model).tables
    assert ours.fingerprint() == theirs.fingerprint()
    (tmp_path / "whole" / "tables.safetensors").unlink()
    add_tables(TablesConfig(model=str(tmp_path / "whole"), codes=str(tmp_path / "codes")))
    assert Codec.from_pretrained(tmp_path / "whole").tables.fingerprint() == theirs.fingerprint()

    make_autoencoder(codebook_size=12).save_pretrained(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"holds codes of autoencoder .*, expected those of .*; encode images with this"
    ):
        add_tables(TablesConfig(model=str(tmp_path / "other"), codes=str(tmp_path / "codes")))


def test_codes_without_images_are_refused(tmp_path):
    autoencoder = make_autoencoder()
    autoencoder.save_pretrained(tmp_path / "model")
    writer = CodeShardWriter(tmp_path / "codes", autoencoder.code_spec(), ["train"])
    writer.write(0, (torch.zeros(0, 4, 4, dtype=torch.int64),), torch.zeros(0), [])
    writer.finish()
    with pytest.raises(UserError, match="holds no training images to count; encode some"):
        add_tables(TablesConfig(model=str(tmp_path / "model"), codes=str(tmp_path / "codes")))


def test_images_that_share_a_name_keep_apart():
    assert zlg_names(["a.jpg", "a.png", "b.png"]) == {"a.jpg": "a.jpg.zlg", "a.png": "a.png.zlg", "b.png": "b.zlg"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CompressConfig(model="m", images="i", out="o", batch_size=0),
            "batch_size=0, expected at least 1 image",
        ),
        (
            lambda: DecompressConfig(files="f", out="o"),
            "expected one of --model MODEL and --models FOLDER, which holds",
        ),
        (lambda: CompressConfig(model="m", images="i", out="o", max_side=0), "max_side=0, expected at least 1 pixel"),
        (
            lambda: CompressConfig(model="m", images="i", out="o", max_side=9, crop=True),
            "got crop with max_side=9, expected either: crop gives all images the model's own size",
        ),
        (lambda: DecompressConfig(files="f", out="o", model="m", max_pixels=0), "max_pixels=0, expected at least 1"),
        (lambda: InfoConfig(file="f", model="m", models="n"), "expected one of --model MODEL and --models FOLDER"),
        (
            lambda: InfoConfig(file="f", against="a"),
            "against is given, but no model to decode the file with; give --model",
        ),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(UserError) as refused:
        make()
    assert message in str(refused.value)


def test_the_commands(model, images, tmp_path, capsys):
    zlg, png = str(tmp_path / "zlg"), str(tmp_path / "png")
    assert main(["compress", "--model", str(model), "--images", str(images), "--out", zlg, "--mode", "table"]) == 0
    assert main(["decompress", "--model", str(model), "--files", zlg, "--out", png]) == 0
    assert main(["info", "--file", f"{zlg}/00.zlg"]) == 0
    assert "mode: table" in capsys.readouterr().out
    assert json.loads((tmp_path / "zlg" / "settings.json").read_text())["mode"] == "table"
    assert main(["decompress", "--files", zlg, "--out", png]) == 2
