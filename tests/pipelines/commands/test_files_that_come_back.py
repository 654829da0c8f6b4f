"""decompress and info: files that come back or say what is wrong with them."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from metrics.similarity import decibels
from pipelines import TwoStagePipeline
from pipelines.codec.archive import read_archive, write_archive
from pipelines.codec.codec import Codec
from pipelines.commands.compress import CompressConfig, compress_files
from pipelines.commands.decompress import DecompressConfig, decompress_files
from pipelines.commands.info import InfoConfig, describe_file
from pipelines.pictures import to_pil
from tests.pipelines.conftest import make_autoencoder, make_pipeline


def test_the_model_is_found_by_its_fingerprint(model, images, tmp_path):
    models = tmp_path / "models"
    make_pipeline(num_classes=0).save_pretrained(models / "a" / "other")
    make_autoencoder(codebook_size=12).save_pretrained(models / "b")
    Codec.from_pretrained(model).prior.save_pretrained(models / "c")  # a prior alone
    compress_files(CompressConfig(model=str(model), images=str(images / "00.png"), out=str(tmp_path / "zlg")))
    config = DecompressConfig(models=str(models), files=str(tmp_path / "zlg"), out=str(tmp_path / "png"))
    with pytest.raises(
        UserError, match=r"was compressed by a model that is not in .*models: its autoencoder is \w+, its pr"
    ):
        decompress_files(config)
    TwoStagePipeline.from_pretrained(model).save_pretrained(models / "d")
    assert decompress_files(config) == f"1 image in {tmp_path / 'png'}; 1 in mode prior, exact arithmetic 1"


def test_info_tells_bytes_bits_model_and_quality(model, images, tmp_path):
    compress_files(CompressConfig(model=str(model), images=str(images / "00.png"), out=str(tmp_path)))
    path = tmp_path / "00.zlg"
    size, payload = path.stat().st_size, len(read_archive(path.read_bytes()).entries[0].payload)
    codec = Codec.from_pretrained(model)
    plain = describe_file(InfoConfig(file=str(path)))
    assert plain.splitlines() == [
        f"{path}: 1 image, {size} bytes ({payload} of codes), {8 * size / 256:.4f} bits per pixel",
        "mode: prior",
        "1 of 16x16 pixels: 4x4 codes of 16",
        f"autoencoder: {codec.stage1.hex()}",
        f"prior: {codec.prior_fingerprint.hex()}, exact arithmetic 1",
    ]
    full = describe_file(InfoConfig(file=str(path), model=str(model), against=str(images / "00.png")))
    original = np.asarray(Image.open(images / "00.png"))
    psnr = decibels(original, np.asarray(to_pil(codec.decompress(path.read_bytes())[0])))
    assert full.startswith(plain)
    assert full.splitlines()[5] == "the model is here: vqvae and transformer"
    assert full.splitlines()[6].startswith(f"PSNR: {psnr:.2f} dB")


def test_an_image_that_was_not_compressed_is_told(model, images, tmp_path):
    compress_files(CompressConfig(model=str(model), images=str(images / "00.png"), out=str(tmp_path)))
    config = InfoConfig(file=str(tmp_path / "00.zlg"), model=str(model), against=str(images / "sub" / "wide.bmp"))
    with pytest.raises(
        UserError, match=r"wide.bmp has 18x21 pixels, .*00.zlg 16x16; name the image that was compressed"
    ):
        describe_file(config)
    with pytest.raises(UserError, match=r"notes.txt cannot be read as an image"):
        describe_file(replace(config, against=str(images / "notes.txt")))


@pytest.mark.skipif(os.name == "nt", reason="such names cannot be there")
def test_images_come_back_whatever_characters_their_names_have(model, images, tmp_path):
    names = ["12:30:05.png", "a\\b.png", "new\nline.png", "é.png", "c:/d.png", "a\\..\\e.png"]
    for name in names:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / "00.png", path)
    compress_files(
        CompressConfig(model=str(model), images=str(tmp_path / "images"), out=str(tmp_path / "zlg"), archive=True)
    )
    decompress_files(DecompressConfig(model=str(model), files=str(tmp_path / "zlg"), out=str(tmp_path / "png")))
    written = {str(path.relative_to(tmp_path / "png" / "images")) for path in (tmp_path / "png").rglob("*.png")}
    assert written == set(names)


def test_a_damaged_file_is_named(model, images, tmp_path):
    compress_files(CompressConfig(model=str(model), images=str(images), out=str(tmp_path / "zlg")))
    path = tmp_path / "zlg" / "04.zlg"
    archive = read_archive(path.read_bytes())
    path.write_bytes(write_archive(archive._replace(entries=(archive.entries[0]._replace(crc=1),))))
    config = DecompressConfig(model=str(model), files=str(tmp_path / "zlg"), out=str(tmp_path / "png"))
    with pytest.raises(UserError, match=r"04.zlg was edited: its codes do not have the checksum"):
        decompress_files(config)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"04.zlg is damaged or cut short"):
        decompress_files(config)


def test_damaged_files_do_not_keep_the_others_from_being_decoded(model, images, tmp_path):
    out, png = tmp_path / "zlg", tmp_path / "png"
    compress_files(CompressConfig(model=str(model), images=str(images), out=str(out)))
    archive = read_archive((out / "04.zlg").read_bytes())
    (out / "04.zlg").write_bytes(write_archive(archive._replace(entries=(archive.entries[0]._replace(crc=1),))))
    (out / "06.zlg").write_bytes((out / "06.zlg").read_bytes()[:-2])
    with pytest.raises(UserError, match=r"\(1 more such failures\); 10 other images written to") as refused:
        decompress_files(DecompressConfig(model=str(model), files=str(out), out=str(png)))
    assert "06.zlg is damaged or cut short" in str(refused.value)
    assert len(list(png.rglob("*.png"))) == 10


def test_a_class_is_named_by_its_name_too(model, images, tmp_path):
    config = CompressConfig(model=str(model), images=str(images / "00.png"), out=str(tmp_path / "a"), label="class 2")
    compress_files(config)
    compress_files(replace(config, label=2, out=str(tmp_path / "b")))
    assert (tmp_path / "a" / "00.zlg").read_bytes() == (tmp_path / "b" / "00.zlg").read_bytes()
    with pytest.raises(UserError, match="this model has no class named 'class 9'"):
        compress_files(replace(config, label="class 9", out=str(tmp_path / "c")))


def test_nothing_to_decompress_is_told(model, tmp_path):
    (tmp_path / "empty").mkdir()
    config = DecompressConfig(model=str(model), files=str(tmp_path / "empty"), out=str(tmp_path / "png"))
    with pytest.raises(UserError, match=r"empty holds no .zlg files; name a folder that `zellige compress` wrote"):
        decompress_files(config)
    with pytest.raises(UserError, match=r"absent.zlg is no file; name a .zlg file"):
        decompress_files(replace(config, files=str(tmp_path / "absent.zlg")))
    with pytest.raises(UserError, match=r"there is no folder .*nowhere; name one that holds models"):
        decompress_files(replace(config, model=None, models=str(tmp_path / "nowhere"), files=str(tmp_path / "a.zlg")))


def test_how_many_images_may_be_broken_is_a_setting(model, images, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    for number in range(2):
        (folder / f"{number:02d}.png").write_bytes(b"not a png")
    config = CompressConfig(model=str(model), images=str(folder), out=str(tmp_path / "zlg"))
    with pytest.raises(UserError, match=r"2 of 12 images cannot be read, and 1 may be.* with --max_bad_share 0.34"):
        compress_files(config)
    line = compress_files(replace(config, max_bad_share=0.34))  # in the same folder: it is no setting of the files
    assert "; 2 could not be read, see" in line
    assert len(list((tmp_path / "zlg").rglob("*.zlg"))) == 10
