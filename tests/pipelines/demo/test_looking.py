"""What a demo shows of images that go through a model and back, and of files."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from pipelines.codec.codec import Codec
from pipelines.codec.lossless import LosslessCodec
from pipelines.commands.reconstruct import ReconstructConfig, reconstruct_files
from pipelines.demo import packing
from pipelines.demo.limits import Limits
from pipelines.demo.looking import as_taken, error_map, reconstruct, reconstruct_latent
from pipelines.demo.model import open_subject, some_samples
from pipelines.latents.pipeline import LatentPipeline
from tests.pipelines.conftest import make_autoencoder, make_pipeline
from tests.stage1_vae.exact.tiny import tiny_vae

LIMITS = Limits(images=3)


def photo(height: int, width: int, channels: int = 1) -> Image.Image:
    """Noise, of mode "L" or "RGB"."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def test_a_reconstruction_is_that_of_the_command_with_its_psnr(model: Path, pictures: Path, tmp_path: Path):
    reconstruct_files(ReconstructConfig(model=str(model), images=str(pictures), out=str(tmp_path / "r"), alone=True))
    psnr = json.loads((tmp_path / "r" / "psnr.json").read_text())["psnr"]["0.png"]
    codec = Codec.from_pretrained(model)
    for own_size in (None, 512):  # the picture has the model's size
        seen = reconstruct(codec, Image.open(pictures / "0.png"), own_size)
        assert seen.reconstruction.tobytes() == Image.open(tmp_path / "r" / "0.png").tobytes()
        assert dict(seen.facts)["PSNR"] == f"{psnr:.2f} dB"


def test_codes_are_told_as_numbers_and_as_colours():
    pipeline = make_pipeline()
    codec = Codec(pipeline.autoencoder, pipeline.prior)
    seen = reconstruct(codec, photo(16, 16), None)
    codes = pipeline.encode(seen.original)[0][0]
    title, *rows = seen.numbers.splitlines()
    assert title.endswith("4×4 codes of 16")
    assert [[int(number) for number in row.split()] for row in rows] == codes.tolist()
    picture = np.asarray(seen.between[0][0])
    squares = picture.reshape(4, 64, 4, 64, 3)
    colour_of = {}
    for row in range(4):
        for column in range(4):
            colours = np.unique(squares[row, :, column].reshape(-1, 3), axis=0)
            assert len(colours) == 1
            assert colour_of.setdefault(int(codes[row, column]), tuple(colours[0])) == tuple(colours[0])
    assert len(set(colour_of.values())) == len(colour_of) > 1


def test_bits_are_those_of_codes_alike_and_of_the_prior_where_it_knows_the_size():
    pipeline = make_pipeline()
    codec = Codec(pipeline.autoencoder, pipeline.prior)
    facts = dict(reconstruct(codec, photo(16, 16), None).facts)
    assert facts["bits, every code as likely"] == "64, 0.250 per pixel"  # 16 codes of 4 bits
    bits = float(facts["bits by the transformer prior"].partition(",")[0])
    payload = packing.compress(codec, photo(16, 16), None)
    assert 0 < bits <= 8 * len(payload.data)
    facts = dict(reconstruct(codec, photo(20, 40), 32).facts)  # 16x32, of which the prior knows nothing
    assert facts["bits, every code as likely"] == "128, 0.250 per pixel"
    assert "bits by the transformer prior" not in facts


def test_an_error_map_is_black_where_nothing_is_lost_and_brightest_from_64_levels_on():
    original = Image.new("RGB", (3, 1), (100, 100, 100))
    other = original.copy()
    other.putpixel((1, 0), (132, 132, 132))
    other.putpixel((2, 0), (200, 200, 200))
    brightness = np.asarray(error_map(original, other)).sum(axis=2)[0].tolist()
    assert brightness[0] < 10 < brightness[1] < brightness[2]
    other.putpixel((1, 0), (164, 164, 164))
    brightness = np.asarray(error_map(original, other)).sum(axis=2)[0].tolist()
    assert brightness[1] == brightness[2] > 500


def test_a_file_decompresses_to_what_was_shown(tmp_path: Path):
    pipeline = make_pipeline()
    codec = Codec(pipeline.autoencoder, pipeline.prior)
    for picture, own_size, size in ((photo(16, 16), None, (16, 16)), (photo(30, 50), 40, (40, 24))):
        packed = packing.compress(codec, picture, own_size)
        (tmp_path / "a.zlg").write_bytes(packed.data)
        found = packing.decompress(codec, tmp_path / "a.zlg", LIMITS)
        assert [one.tobytes() for one in found.pictures] == [packed.pictures[0].tobytes()]
        assert found.pictures[0].size == size
        assert found.line.startswith(f"1 image in {len(packed.data)} bytes, ")
    assert packed.notes == ["1 image is in mode packed: the prior knows only codes of 16x16 images"]


def test_sizes_stand_beside_png_and_webp_of_the_same_psnr():
    codec = Codec(make_autoencoder())
    packed = packing.compress(codec, photo(64, 64), 64)
    ours, png, lossless, webp = packed.sizes
    assert (ours.size, ours.bits) == (len(packed.data), 8 * len(packed.data) / 64**2)
    assert (png.psnr, lossless.psnr) == ("equal", "equal")
    buffer = io.BytesIO()
    photo(64, 64).save(buffer, "PNG", optimize=True)
    assert png.size == buffer.tell()
    assert float(webp.psnr.removesuffix(" dB")) >= float(ours.psnr.removesuffix(" dB"))
    assert webp.size < lossless.size


def test_files_of_others_are_refused_by_one_sentence_without_the_servers_path(tmp_path: Path):
    codec, lossless = Codec(make_autoencoder()), LosslessCodec(tiny_vae("dense_skip"))
    ours, path = packing.compress(codec, photo(16, 16), None).data, tmp_path / "a.zlg"
    height, width, _ = lossless.shape
    of_vae = packing.compress_losslessly(lossless, [photo(height, width)]).data
    cases = [
        (codec, b"no such file at all", "this file"),
        (codec, ours[:-9] + bytes(9), "this file"),
        (codec, of_vae, "compressed without loss, by a VAE, expected one with a loss"),
        (lossless, ours, "compressed with a loss, by an autoencoder, expected one without loss"),
        (Codec(make_autoencoder(codebook_size=32)), ours, "this file needs the autoencoder"),
        (LosslessCodec(tiny_vae("convolutional")), of_vae, "this file needs the VAE"),
    ]
    for reader, data, said in cases:
        path.write_bytes(data)
        with pytest.raises(UserError, match=said) as caught:
            packing.decompress(reader, path, LIMITS)
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(UserError, match="there is no file yet"):
        packing.decompress(codec, None, LIMITS)


def test_a_file_that_claims_more_pixels_than_are_allowed_is_refused(tmp_path: Path):
    codec = Codec(make_autoencoder())
    (tmp_path / "a.zlg").write_bytes(packing.compress(codec, photo(64, 64), 64).data)
    with pytest.raises(UserError, match="this file claims 4096 pixels"):
        packing.decompress(codec, tmp_path / "a.zlg", Limits(megapixels=0.001))


def test_lossless_files_give_back_what_was_put_in_and_no_more_than_is_asked_for(tmp_path: Path):
    codec = LosslessCodec(tiny_vae("dense_skip"))
    height, width, _ = codec.shape
    given = [photo(height + i, width + i).crop((0, 0, width, height)) for i in range(5)]
    packed = packing.compress_losslessly(codec, given)
    assert [size.psnr for size in packed.sizes] == ["equal"] * 3
    (tmp_path / "a.zlg").write_bytes(packed.data)
    found = packing.decompress(codec, tmp_path / "a.zlg", LIMITS)
    assert [one.tobytes() for one in found.pictures] == [one.tobytes() for one in given[2:]]
    assert found.line.endswith("the last 3 of which are shown")


def test_png_files_of_black_and_white_have_one_bit_a_pixel():
    codec = LosslessCodec(tiny_vae("dense_bernoulli"))
    pictures = [as_taken(LatentPipeline(codec.vae), photo(20 + i, 20)) for i in range(2)]
    png = packing.compress_losslessly(codec, pictures).sizes[1]
    sizes = []
    for mode in ("L", "1"):
        buffers = [io.BytesIO() for _ in pictures]
        for picture, buffer in zip(pictures, buffers, strict=True):
            picture.convert(mode).save(buffer, "PNG", optimize=True)
        sizes.append(sum(buffer.tell() for buffer in buffers))
    assert png.size == sizes[1] < sizes[0]


def test_a_vae_of_black_and_white_is_shown_such_images():
    pipeline = LatentPipeline(tiny_vae("dense_bernoulli"))
    taken = as_taken(pipeline, photo(20, 20))
    assert set(np.unique(np.asarray(taken))) == {0, 255}
    seen = reconstruct_latent(pipeline, photo(20, 20))
    assert seen.original.tobytes() == taken.tobytes()
    facts = dict(seen.facts)
    nats = float(facts["-log p, at most (ELBO)"].removesuffix(" nats"))
    assert facts["bits without loss, at most"].startswith(f"{nats / math.log(2):,.0f}, ")
    assert len(seen.numbers.split()) == 3
    grey = LatentPipeline(tiny_vae("dense_skip"))
    assert len(np.unique(np.asarray(as_taken(grey, photo(20, 20))))) > 2


def test_what_a_model_can_do_is_known_of_each_kind(model: Path, tmp_path: Path):
    autoencoder = make_autoencoder()
    autoencoder.save_pretrained(tmp_path / "stage1")
    tiny_vae("dense_bernoulli").save_pretrained(tmp_path / "vae")
    assembled, alone, vae = (open_subject(str(name), "cpu") for name in (model, tmp_path / "stage1", tmp_path / "vae"))
    assert assembled.pipeline is not None
    assert [len(some_samples(subject, 4)) for subject in (assembled, alone, vae)] == [4, 0, 4]
    assert (alone.pipeline, alone.latent, vae.codec) == (None, None, None)
    assert vae.lossless is not None
    assert (alone.image_size, vae.image_size) == ((16, 16), (8, 6))
    assert alone.describe().startswith("a vqvae, without a prior; codes 4×4 of 16, 16×16 pixels in grey, ")
    with pytest.raises(UserError, match="has no prior that reads captions"):
        open_subject(str(tmp_path / "stage1"), "cpu", "somewhere")
