"""Files of version 1 are read as docs/format.md lays them down, and what is wrong with one is told."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from benchmarks.codec_version1 import write_version1
from common.errors import UserError
from pipelines.codec.archive import Archive, Entry, Environment, Mode, Shape, open_archive, read_archive

EARLIER = Path(__file__).parents[2] / "earlier_builds" / "zlg"
STAGE1, PRIOR, TABLES = b"stage-1!", b"a prior!", b"a table!"
ENVIRONMENT = Environment("cuda", (2, 9))
SHAPE = Shape(300, 17, ((2, 2, 600), (5, 3, 600), (4, 4, 7)))
OTHER = Shape(16, 16, ((4, 4, 512),))


def an_archive() -> Archive:
    entries = (
        Entry(Mode.prior, SHAPE, 0x01020304, b"abc", 6, 2, "cat/a.png"),
        Entry(Mode.packed, OTHER, 0xFFFFFFFF, bytes(18), name="b.jpg"),
        Entry(Mode.table, SHAPE, 0, b"", name="c"),
        Entry(Mode.prior, OTHER, 7, b"x" * 200, None, 0, "d"),
    )
    return Archive(entries, STAGE1, PRIOR, TABLES, ENVIRONMENT, 8, version=1, arithmetic=0)


def resealed(data: bytes) -> bytes:
    """With the right checksum of the file."""
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


def test_what_was_written_is_read():
    assert read_archive(write_version1(an_archive())) == an_archive()
    plain = Archive((Entry(Mode.packed, OTHER, 5, bytes(18)),), STAGE1, version=1, arithmetic=0)
    assert read_archive(write_version1(plain)) == plain


def test_what_no_image_needs_is_left_out():
    full = an_archive()
    packed = full._replace(entries=full.entries[1:2])
    assert read_archive(write_version1(packed)) == packed._replace(prior=None, tables=None, environment=None, lanes=1)


def test_the_bytes_of_one_image_in_mode_prior():
    entry = Entry(Mode.prior, SHAPE, 0x01020304, b"abc", 6, 2)
    expected = bytes.fromhex(
        "895a4c47 01 01"  # magic, version, flags: a prior
        + STAGE1.hex()
        + PRIOR.hex()
        + "01 02 09 08"  # cuda, torch 2.9, 8 lanes
        + "01"  # one shape:
        + "ac02 11 03"  # 300 x 17, three grids:
        + "09 d804"  # 2 x 2, square, of 600
        + "16 03"  # 5 x 3, vocabulary as before
        + "11 07"  # 4 x 4, square, of 7
        + "01"  # one image:
        + "02 18 04030201 07 02"  # shape 0 in mode 2, 24 bits, CRC, label 6, lane 2
        + "616263"
    )
    expected += struct.pack("<I", zlib.crc32(expected))
    assert write_version1(Archive((entry,), STAGE1, PRIOR, TABLES, ENVIRONMENT, 8)) == expected


def test_the_bytes_of_an_archive_of_two_with_names():
    entries = (
        Entry(Mode.table, OTHER, 1, b"ab", name="é"),
        Entry(Mode.packed, OTHER, 2, bytes(range(18)), name="b"),
    )
    expected = bytes.fromhex(
        "895a4c47 01 06" + STAGE1.hex() + TABLES.hex()  # flags: tables and names
        + "01 10 10 01 11 8004"  # one shape: 16 x 16, one grid, 4 x 4, square, of 512
        + "02 01 0f 01000000 00 9001 02000000"  # two images, of 15 and 144 bits
        + "04 c3a9 00 62"  # four bytes of names
    )  # fmt: skip
    both = (0x6162 >> 1) << 144 | int.from_bytes(bytes(range(18)), "big")
    expected += (both << 1).to_bytes(20, "big")  # 159 bits
    expected += struct.pack("<I", zlib.crc32(expected))
    assert write_version1(Archive(entries, STAGE1, PRIOR, TABLES, ENVIRONMENT, 8)) == expected


def test_every_cut_is_refused():
    data = write_version1(an_archive())
    for length in range(len(data)):
        with pytest.raises(UserError, match=r"is no .zlg file|is damaged or cut short"):
            read_archive(data[:length])


def test_every_cut_with_a_right_checksum_is_refused_too():
    data = write_version1(an_archive())
    for length in range(10, len(data)):
        with pytest.raises(UserError, match=r"was edited or is from another program"):
            read_archive(resealed(data[:length]))


def with_bytes(position: int, new: bytes) -> bytes:
    data = bytearray(write_version1(an_archive()))
    data[position : position + 1] = new
    return resealed(bytes(data))


HUGE = b"\xff" * 8 + b"\x7f"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PNG", "x.zlg is no .zlg file: it does not begin as one; name a file that `zellige compress` wrote"),
        (with_bytes(4, b"\x04"), "x.zlg has version 4 of the .zlg format, expected 1 to 3, which this program reads"),
        (write_version1(an_archive()) + b"x", "x.zlg is damaged or cut short: its checksum is wrong; copy it again"),
        (with_bytes(5, b"\x0f"), "x.zlg was edited or is from another program: its flags are 15; compress the image"),
        (with_bytes(30, b"\x04"), "its device is number 4"),
        (with_bytes(33, b"\x00"), "it claims lanes: 0, expected 1 to 64"),
        (with_bytes(33, b"\x41"), "it claims lanes: 65, expected 1 to 64"),
        (with_bytes(34, HUGE), "it claims shapes: 9223372036854775807, expected 1 to"),
        (with_bytes(34, b"\xff" * 12), "it claims shapes in more than ten bytes"),
        (with_bytes(34, b"\x80" * 12), "it claims shapes in more than ten bytes"),
        (with_bytes(35, HUGE), "it claims rows: 9223372036854775807"),
        (with_bytes(37, b"\x00"), "it claims columns: 0, expected 1 to 2147483648"),
        (with_bytes(38, b"\x00"), "it claims grids: 0, expected 1 to 256"),
        (with_bytes(39, b"\x01"), "it claims rows of codes: 1, expected 4 to"),
        (with_bytes(39, b"\x0b"), "its first grid has no vocabulary"),
        (with_bytes(52, HUGE), "it claims images: 9223372036854775807, expected 1 to"),
        (with_bytes(53, b"\x08"), "it claims shape and mode: 8, expected 0 to 7"),
        (with_bytes(53, b"\x03"), "it has an image in mode 3"),
        (with_bytes(54, HUGE), "it claims bits of an image: 9223372036854775807"),
        (with_bytes(53, b"\x00"), "an image has 24 bits, expected 238 for its packed codes"),
        (with_bytes(60, b"\x08"), "it claims lane: 8, expected 0 to 7"),
        (with_bytes(54, b"\x02"), "its payloads have 221 bytes, expected 218"),
        (with_bytes(54, b"\x40"), "its payloads have 221 bytes, expected 226"),
        (with_bytes(-5, b"\xff"), "what fills its last byte is not zero"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(data, message):
    with pytest.raises(UserError) as refused:
        read_archive(data, "x.zlg")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_mode_whose_model_is_not_named_is_refused():
    data = bytearray(write_version1(Archive((Entry(Mode.table, OTHER, 1, bytes(18)),), STAGE1, None, TABLES)))
    assert data[30] == 1
    data[30] = 2
    with pytest.raises(UserError, match="it does not name the prior of an image"):
        read_archive(resealed(bytes(data)))


def test_names_are_as_many_as_images():
    entries = an_archive().entries
    data = write_version1(Archive((entries[1]._replace(name="a\0b"),), STAGE1))
    with pytest.raises(UserError, match="it holds 2 names for 1 images"):
        read_archive(data)


def test_what_was_kept_is_read():
    for mode in ("packed", "table", "prior"):
        archive = read_archive((EARLIER / f"{mode}.zlg").read_bytes())
        assert [entry.mode.name for entry in archive.entries] == [mode]
        assert (archive.version, archive.arithmetic) == (1, 0)
        assert (archive.environment is None) == (mode != "prior")
        assert write_version1(archive) == (EARLIER / f"{mode}.zlg").read_bytes()


def test_images_are_read_one_by_one_as_in_version_2(tmp_path):
    path = tmp_path / "x.zlg"
    path.write_bytes(write_version1(an_archive()))
    with open_archive(path) as file:
        assert (file.count, file.head) == (4, an_archive()._replace(entries=()))
        assert list(file.entries([2, 0])) == [an_archive().entries[2], an_archive().entries[0]]
        assert list(file.names()) == [entry.name for entry in an_archive().entries]
        assert file.bytes_read == path.stat().st_size


def test_payloads_take_bits_and_not_bytes():
    entry = Entry(Mode.table, OTHER, 1, b"\x80")  # one bit
    one, nine = (len(write_version1(Archive((entry,) * count, STAGE1, None, TABLES))) for count in (1, 9))
    in_index = 1 + 1 + 4  # shape and mode, length, CRC
    assert nine - one == 8 * in_index + 1
    assert read_archive(write_version1(Archive((entry,) * 9, STAGE1, None, TABLES))).entries == (entry,) * 9
