"""Lossless files: their bytes, what is read of them, and what is said of those that are wrong."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelines.codec.lossless as lossless_module
import pipelines.codec.lossless_archive as lossless_archive
from common.errors import UserError
from images.datasets import to_float
from pipelines.codec.archive import open_archive, sealed
from pipelines.codec.fields import Fields, WrongFieldError, place_of_page, varint
from pipelines.codec.lossless import LosslessCodec
from pipelines.codec.lossless_archive import (
    Chain,
    Group,
    ImageShape,
    LosslessArchive,
    Segment,
    crc_of_pixels,
    following,
    open_lossless,
    packed_names,
    read_lossless,
    unpacked_names,
    write_lossless,
)
from pipelines.codec.lossless_facts import figures_of, lines_of
from tests.stage1_vae.exact.tiny import random_values, tiny_vae

NAMES = tuple(f"cat/{number:03}.png" for number in (7, 8, 9, 11, 12))


def pixels_of(vae, count: int) -> torch.Tensor:
    """uint8 b c H W."""
    values = random_values(vae, count) * (255 if vae.config.likelihood.kind == "bernoulli" else 1)
    return values.movedim(-1, 1).to(torch.uint8)


@pytest.fixture(scope="module")
def codec() -> LosslessCodec:
    return LosslessCodec(tiny_vae("dense_skip"))


@pytest.fixture(scope="module")
def images(codec) -> torch.Tensor:
    return pixels_of(codec.vae, 5)


@pytest.fixture(scope="module")
def data(codec, images) -> bytes:
    return codec.compress(images, NAMES)


def an_archive() -> LosslessArchive:
    groups = (Group(1, False), Group(2, True), Group(2, True))
    first = Segment(Chain(groups, 300, b"\0abc"), (1, 2**32 - 1, 0), 12345, NAMES)
    second = Segment(Chain((Group(1, False),), 9, b"x"), (5,), 0, ("last",))
    return LosslessArchive(b"the VAE!", ImageShape(8, 6, 3), (first, second))


def test_what_was_written_is_read():
    archive = an_archive()
    data = write_lossless(archive)
    assert read_lossless(data) == archive
    unnamed = archive._replace(segments=tuple(s._replace(names=("",) * s.images) for s in archive.segments))
    assert read_lossless(write_lossless(unnamed)) == unnamed
    head = bytes.fromhex("895a4c47 03 04") + b"\x17" + b"the VAE!" + bytes([1, 8, 6, 3, 2, 5])
    assert data.startswith(head)


def test_the_bytes_of_a_segment():
    """runs, bits, checksums and names, as docs/format.md has them."""
    archive = an_archive()
    facts = lossless_archive.facts_of(archive.segments[0], named=False)
    expected = bytes([2, 2, 1, 5, 2]) + varint(300) + varint(12345) + bytes.fromhex("01000000ffffffff00000000")
    assert facts == expected


@pytest.mark.parametrize(
    ("name", "next_name"),
    [("000.png", "001.png"), ("a9", "a10"), ("a099b.jpg", "a100b.jpg"), ("1/2.x3", "1/2.x4"), ("cat.png", None)],
)
def test_names_that_follow(name, next_name):
    assert following(name) == next_name
    assert following("7" * 30) == "7" * 29 + "8"


def test_names_of_numbered_images_cost_nearly_nothing():
    names = [f"{number:06}.png" for number in range(4096)]
    packed = packed_names(names)
    assert len(packed) < 60
    assert unpacked_names(packed, 4096) == tuple(names)
    others = ["b", "ä/1.png", "a\udcff9", "a\udcff10", "x" * 4000]
    assert unpacked_names(packed_names(others), 5) == tuple(others)


def test_names_that_would_take_all_memory_are_refused(monkeypatch):
    with pytest.raises(WrongFieldError, match="it does not hold names for 3 images"):
        unpacked_names(zlib.compress(b"a" * 10**7), 3)
    with pytest.raises(WrongFieldError, match="it holds a name of 5000 characters"):
        unpacked_names(zlib.compress(b"a" * 5000 + b"\0b\0c"), 3)
    monkeypatch.setattr(lossless_archive, "NAMES_BYTES", 20)
    with open_lossless(write_lossless(an_archive())) as file, pytest.raises(UserError, match="names have more than 20"):
        list(file.names())


def test_images_come_back(codec, images, data):
    assert torch.equal(codec.decompress(data), to_float(images))
    assert torch.equal(codec.decompress(codec.compress(to_float(images))), to_float(images))
    assert torch.equal(codec.decompress(data, [4, 1]), to_float(images[[4, 1]]))
    with open_lossless(data) as file:
        assert tuple(file.names()) == NAMES


def test_files_of_several_segments(monkeypatch):
    """Of each only so much is decoded as lies upon the image that is asked for."""
    monkeypatch.setattr(lossless_module, "SEGMENT", 4)
    codec = LosslessCodec(tiny_vae("map_colour"))
    images = pixels_of(codec.vae, 10)
    data = codec.compress(images, [str(number) for number in range(10)])
    assert torch.equal(codec.decompress(data), to_float(images))
    with open_lossless(data) as file:
        assert [place.images for place in file.places] == [4, 4, 2]
        before = file.bytes_read
        assert [number for number, _ in codec.images(file, [5])] == [5]
        assert file.bytes_read - before < len(data) / 2
    damaged = bytearray(data)
    damaged[file.places[0].stack.start] ^= 1
    with open_lossless(bytes(damaged)) as file:
        found = dict(codec.images(file, range(4, 10)))
        assert sorted(found) == list(range(4, 10))
        with pytest.raises(UserError, match="its pixels do not have the checksum that it names"):
            dict(codec.images(file, range(4)))


def test_a_file_that_does_not_decode_is_not_written(codec, images, monkeypatch):
    plain = lossless_module.decode_chain

    def otherwise(model, chain):
        for values in plain(model, chain):
            yield values ^ 1

    monkeypatch.setattr(lossless_module, "decode_chain", otherwise)
    with pytest.raises(UserError, match="does not decode to the same images on cpu, so nothing was written"):
        codec.compress(images)


def test_figures(codec, images, data):
    archive = read_lossless(data)
    found = figures_of([archive])
    assert (found.images, found.numbers, found.first_images) == (5, 5 * 48, 1)
    assert found.payload_bits == 8 * len(archive.segments[0].chain.stack)
    assert 0.8 < found.payload_bits / found.bound_bits < 1.3
    lines = lines_of([archive], len(data))
    assert lines[1] == "5 of 8x6 pixels in grey"
    assert lines[-1] == f"VAE: {codec.model.hex()}, exact arithmetic 1"
    assert "nothing lies under 1 image at the bottom of 1 stack" in lines[3]


def test_other_models_and_images_are_refused(codec, images, data):
    other = LosslessCodec(tiny_vae("convolutional"))
    with pytest.raises(UserError, match=f"needs the VAE {codec.model.hex()}, this model is {other.model.hex()}"):
        other.decompress(data)
    with pytest.raises(UserError, match="an image has 8x7 pixels in grey, expected 8x6 pixels in grey"):
        codec.compress(torch.zeros(1, 1, 8, 7, dtype=torch.uint8))
    with pytest.raises(UserError, match="numbers lie between those of 8 bits"):
        codec.compress(torch.full((1, 1, 8, 6), 0.0))
    with pytest.raises(UserError, match="got 4 names for 5 images"):
        codec.compress(images, NAMES[:4])
    with pytest.raises(UserError, match="the file has no image 5, expected 0 to 4"):
        codec.decompress(data, [0, 5])
    binary = LosslessCodec(tiny_vae("dense_bernoulli"))
    with pytest.raises(UserError, match="has values between black and white"):
        binary.compress(images)
    black_and_white = pixels_of(binary.vae, 6)
    assert torch.equal(binary.decompress(binary.compress(black_and_white)), to_float(black_and_white))


def test_files_of_the_other_kind_are_told(data):
    with pytest.raises(UserError, match="holds images without loss, and no codes"):
        open_archive(data)
    with pytest.raises(UserError, match="holds codes of images, expected images without loss"):
        open_lossless(data[:4] + b"\2" + data[5:])


def test_the_fingerprint_is_of_all_that_coding_goes_by():
    vae = tiny_vae("dense_skip")
    fingerprint = LosslessCodec(vae).model
    assert LosslessCodec(tiny_vae("dense_skip")).model == fingerprint
    with torch.no_grad():
        next(vae.encoder.parameters())[0] += 1e-3
    assert LosslessCodec(vae).model != fingerprint
    other = tiny_vae("dense_skip")
    other.config = dataclasses.replace(
        other.config, likelihood=dataclasses.replace(other.config.likelihood, smallest_log_scale=-6.0)
    )
    assert LosslessCodec(other).model != fingerprint


# ---- damaged and edited files ---------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_is_found(codec, images, data, draw):
    """Whether checksums are right or not: what comes back are the images, or one sentence."""
    place, value = draw.draw(st.integers(5, len(data) - 1)), draw.draw(st.integers(1, 255))
    changed = bytearray(data)
    changed[place] ^= value
    with pytest.raises(UserError) as refused:
        codec.decompress(bytes(changed))
    assert "\n" not in str(refused.value)
    with open_lossless(data) as file:
        facts, stack = file.places[0].facts, file.places[0].stack
    own = bytes(changed)
    if place < facts.start - 4:
        again = sealed(own[: facts.start - 4]) + own[facts.start : -4]
    elif facts.start <= place < facts.stop - 4:
        again = own[: facts.start] + sealed(own[facts.start : facts.stop - 4], place_of_page(0)) + own[stack.start : -4]
    else:
        again = own[:-4]
    with suppress(UserError):  # where it is not told, it was the bound, or the bits that were not got back
        assert torch.equal(codec.decompress(sealed(again)), to_float(images))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (bytes([2, 2, 1, 5, 2]), bytes([2, 2, 1, 5, 3]), "it claims groups of a run: 3, expected 1 to 2"),
        (bytes([2, 2, 1, 5, 2]), bytes([2, 2, 1, 5, 1]), "its groups hold 3 images, expected 5"),
        (bytes([2, 2, 1, 5, 2]), bytes([2, 1, 1, 5, 2]), "it claims images of a group: 1, expected 2 to 129"),
        (bytes([2, 2, 1, 5, 2]), bytes([0, 2, 1, 5, 2]), "it claims runs of groups: 0, expected 1 to 5"),
    ],
)
def test_facts_that_cannot_be(old, new, message):
    data = write_lossless(an_archive())
    with open_lossless(data) as file:
        facts = file.places[0].facts
    own = data[facts.start : facts.stop - 4]
    assert own.startswith(old)
    edited = data[: facts.start] + sealed(new + own[len(old) :], place_of_page(0)) + data[facts.stop : -4]
    with pytest.raises(UserError, match=message):
        read_lossless(sealed(edited))


@pytest.mark.parametrize(
    ("position", "new", "message"),
    [
        (8, b"\2", "it claims an arithmetic: 2, expected 1 to 1"),
        (9, b"\0", "it claims rows: 0"),
        (11, b"\0", "it claims channels: 0"),
        (12, b"\0", "it claims segments: 0"),
        (12, b"\xff\xff\xff\xff\x0f", "it ends too early"),
        (13, b"\x81\x20", "it claims images of a segment: 4097, expected 1 to 4096"),
        (14, varint(1 << 59), "it has 1[0-9]+ bytes, expected 5764"),
    ],
)
def test_heads_that_cannot_be(position, new, message):
    data = write_lossless(an_archive())
    fields = Fields(data, 6)
    end = fields.number("bytes of the head", 0, 1 << 63) + fields.position
    head = bytearray(data[fields.position : end - 4])
    head[position : position + 1] = new
    edited = sealed(data[:6] + varint(len(head) + 4) + bytes(head)) + data[end:-4]
    with pytest.raises(UserError, match=message):
        read_lossless(sealed(edited))


def test_a_checksum_binds_the_shape():
    assert crc_of_pixels(ImageShape(2, 3, 1), bytes(6)) != crc_of_pixels(ImageShape(3, 2, 1), bytes(6))
    expected = zlib.crc32(struct.pack("<3Q", 1, 2, 3) + bytes(range(6)))
    assert crc_of_pixels(ImageShape(1, 2, 3), bytes(range(6))) == expected
