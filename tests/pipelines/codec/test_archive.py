"""The bytes of a file are those of docs/format.md, its head is small, and what is wrong with one is told."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.codec_fuzz import resealed
from codes.spec import CodeSpec, Grid
from common.errors import UserError
from pipelines.codec.archive import (
    PAGE,
    Archive,
    Entry,
    Mode,
    Shape,
    crc_of,
    open_archive,
    read_archive,
    sealed,
    write_archive,
)
from pipelines.codec.fields import Fields, place_of_page, varint
from tests import plain_zlg
from tests.stage2_prior.tiny import SPECS

STAGE1, PRIOR, TABLES = b"stage-1!", b"a prior!", b"a table!"
SHAPE = Shape(300, 17, ((2, 2, 600), (5, 3, 600), (4, 4, 7)))
OTHER = Shape(16, 16, ((4, 4, 512),))


def an_archive() -> Archive:
    entries = (
        Entry(Mode.prior, SHAPE, 0x01020304, b"abc", 6, name="cat/a.png"),
        Entry(Mode.packed, OTHER, 0xFFFFFFFF, bytes(18), name="b.jpg"),
        Entry(Mode.table, SHAPE, 0, b"", name="c"),
        Entry(Mode.prior, OTHER, 7, b"x" * 200, None, name="d"),
    )
    return Archive(entries, STAGE1, PRIOR, TABLES)


def a_large_archive(count: int = 2 * PAGE + 3) -> Archive:
    """Of more images than a page has, hardly two alike."""
    entries = []
    for i in range(count):
        mode, shape = Mode(i % 3), Shape(8, 8 + i % 5, ((1, 1 + i % 5, 16),))
        bits = shape.packed_bits if mode == Mode.packed else i % 37
        payload = (int.from_bytes(bytes([i % 251 + 1] * 8), "big") % 2**bits | 1) << -bits % 8
        data = payload.to_bytes(-(-bits // 8), "big") if bits else b""
        entries.append(Entry(mode, shape, i, data, i if mode == Mode.prior else None, name=f"{i}.png"))
    return Archive(tuple(entries), STAGE1, PRIOR, TABLES)


def with_facts(position: int, new: bytes, archive: Archive | None = None) -> bytes:
    """An archive, with other bytes in the place of one of its head; length and checksums are right."""
    data = write_archive(archive or an_archive())
    fields = Fields(data, 6)
    end = fields.number("bytes of the head", 0, 1 << 63) + fields.position
    facts = bytearray(data[fields.position : end - 4])
    facts[position : position + 1] = new
    return sealed(sealed(data[:6] + varint(len(facts) + 4) + bytes(facts)) + data[end:-4])


def test_what_was_written_is_read():
    assert read_archive(write_archive(an_archive())) == an_archive()
    assert read_archive(write_archive(a_large_archive())) == a_large_archive()
    plain = Archive((Entry(Mode.packed, OTHER, 5, bytes(18)),), STAGE1)
    assert read_archive(write_archive(plain)) == plain


@pytest.mark.parametrize("count", [1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1])
def test_archives_of_any_number_of_images(count):
    archive = a_large_archive(count)._replace(prior=PRIOR if count > 2 else None, tables=TABLES if count > 1 else None)
    data = write_archive(archive)
    assert read_archive(data) == archive
    with open_archive(data) as file:
        assert (file.count, file.head) == (count, archive._replace(entries=()))
        assert list(file.entries(range(count - 1, -1, -1))) == [*reversed(archive.entries)]
        assert list(file.names()) == [entry.name for entry in archive.entries]


def test_what_no_image_needs_is_left_out():
    full = an_archive()
    packed = full._replace(entries=full.entries[1:2])
    assert read_archive(write_archive(packed)) == packed._replace(prior=None, tables=None)


def test_the_bytes_of_one_image_in_mode_prior():
    entry = Entry(Mode.prior, SHAPE, 0x01020304, b"abc", 6)
    expected = bytes.fromhex(
        "895a4c47 02 01 29"  # magic, version, flags: a prior; 41 bytes of head follow
        + STAGE1.hex()
        + PRIOR.hex()
        + "01"  # exact arithmetic 1
        + "01"  # one image
        + "01"  # of one shape:
        + "ac02 11 03"  # 300 x 17, three grids:
        + "09 d804"  # 2 x 2, square, of 600
        + "16 03"  # 5 x 3, vocabulary as before
        + "11 07"  # 4 x 4, square, of 7
        + "02 18 04030201 07"  # shape 0 in mode 2, 24 bits, CRC, label 6
    )
    expected += struct.pack("<I", zlib.crc32(expected))
    expected += b"abc"
    expected += struct.pack("<I", zlib.crc32(expected))
    assert write_archive(Archive((entry,), STAGE1, PRIOR, TABLES)) == expected


def test_the_bytes_of_an_archive_of_two_with_names():
    entries = (
        Entry(Mode.table, OTHER, 1, b"ab", name="é"),
        Entry(Mode.packed, OTHER, 2, bytes(range(18)), name="b"),
    )
    expected = bytes.fromhex(
        "895a4c47 02 06 2c" + STAGE1.hex() + TABLES.hex()  # flags: tables and names
        + "02 01 10 10 01 11 8004"  # two images of one shape: 16 x 16, one grid, 4 x 4, square, of 512
        + "01 0f 01000000 00 02000000"  # the first of 15 bits
        + "04 c3a9 00 62"  # four bytes of names
    )  # fmt: skip
    expected += struct.pack("<I", zlib.crc32(expected))
    both = (0x6162 >> 1) << 144 | int.from_bytes(bytes(range(18)), "big")
    expected += (both << 1).to_bytes(20, "big")  # 159 bits
    expected += struct.pack("<I", zlib.crc32(expected))
    assert write_archive(Archive(entries, STAGE1, PRIOR, TABLES)) == expected


def test_the_bytes_of_an_archive_of_two_pages():
    one, two = Shape(8, 8, ((1, 1, 16),)), Shape(9, 8, ((1, 2, 300),))
    entries = [Entry(Mode.packed, one, 5, b"\xa0")] * PAGE + [Entry(Mode.packed, two, 6, bytes.fromhex("ff80c0"))]
    first = bytes.fromhex("01 08 08 01 05 10" + "00 05000000" * PAGE)  # one shape, the images in it
    second = bytes.fromhex("01 09 08 01 04 02 ac02 00 06000000")
    first += struct.pack("<I", zlib.crc32(bytes(8) + first))  # page 0
    second += struct.pack("<I", zlib.crc32(b"\1" + bytes(7) + second))
    expected = bytes.fromhex("895a4c47 02 00 14" + STAGE1.hex() + "8102")  # 20 bytes of head follow; 257 images
    expected += bytes.fromhex("8a0a 8001 11 03")  # pages of 1290 and 17 bytes, of payloads of 128 and 3
    expected += struct.pack("<I", zlib.crc32(expected))
    expected += first + second + b"\xaa" * 128 + bytes.fromhex("ff80c0")
    expected += struct.pack("<I", zlib.crc32(expected))
    assert write_archive(Archive(tuple(entries), STAGE1)) == expected


PUBLISHED = {
    "vqgan": CodeSpec((Grid("codes", 16, 16, 16384),), 256, 256),
    "vqvae2": CodeSpec((Grid("level0", 32, 32, 512), Grid("level1", 64, 64, 512)), 256, 256),
    "rq": CodeSpec(tuple(Grid(f"depth{i}", 8, 8, 16384) for i in range(4)), 256, 256),
    "var": CodeSpec(
        tuple(Grid(f"scale{i}", n, n, 4096) for i, n in enumerate((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))), 256, 256
    ),
}


@pytest.mark.parametrize("kind", [*SPECS, *PUBLISHED])
def test_head_and_checks_of_one_image_take_at_most_64_bytes(kind):
    spec = {**SPECS, **PUBLISHED}[kind]
    shape = Shape(spec.image_height, spec.image_width, tuple((g.height, g.width, g.vocabulary) for g in spec.grids))
    entry = Entry(Mode.prior, shape, 2**32 - 1, bytes(1500), label=999)
    assert len(write_archive(Archive((entry,), STAGE1, PRIOR, TABLES))) - 1500 <= 64


def test_the_checksum_of_codes_binds_size_and_grids_too():
    codes = (torch.arange(6).view(1, 2, 3), torch.zeros(1, 1, 2, dtype=torch.int64))
    shape = Shape(9, 9, ((2, 3, 8), (1, 2, 8)))
    words = struct.pack("<9Q", 9, 9, 2, 3, 8, 1, 2, 8, 0)[:-8] + struct.pack("<8Q", 0, 1, 2, 3, 4, 5, 0, 0)
    assert crc_of(shape, codes) == zlib.crc32(words)
    others = [shape._replace(width=10), shape._replace(grids=((2, 3, 9), (1, 2, 8)))]
    assert len({crc_of(one, codes) for one in [shape, *others]}) == 3


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**31, 2**62])
def test_numbers_of_any_size(number):
    assert varint(number)[-1] < 128
    assert sum((byte & 127) << 7 * place for place, byte in enumerate(varint(number))) == number


@pytest.mark.parametrize("archive", [an_archive(), a_large_archive()])
def test_every_cut_is_refused(archive):
    data = write_archive(archive)
    for length in range(0, len(data), 1 if len(data) < 500 else 7):
        with pytest.raises(UserError, match=r"is no .zlg file|is damaged or cut short"):
            read_archive(data[:length])
        with pytest.raises(UserError, match=r"is no .zlg file|is damaged or cut short"):
            open_archive(data[:length])


@pytest.mark.parametrize("archive", [an_archive(), a_large_archive()])
def test_every_cut_with_right_checksums_is_refused_too(archive):
    data = write_archive(archive)
    for length in range(12, len(data), 1 if len(data) < 500 else 7):
        with pytest.raises(UserError, match=r"was edited or is from another program|is damaged or cut short"):
            read_archive(resealed(data[:length]))


@pytest.mark.parametrize("archive", [an_archive(), a_large_archive()])
def test_every_changed_byte_is_found(archive):
    """By all that is read at once; of one image the index is known to be right, and its codes have their checksum."""
    data, place = write_archive(archive), len(archive.entries) // 2
    end = len(data)
    with open_archive(data) as file:
        begin = file.payload_starts[0]
    for position in range(0, end, 1 if end < 500 else 7):
        changed = data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]
        with pytest.raises(UserError, match=r"is no .zlg file|has version|is damaged or cut short"):
            read_archive(changed)
        try:
            with open_archive(changed) as file:
                entry = file.entry(place)
        except UserError:
            continue
        assert entry._replace(payload=b"") == archive.entries[place]._replace(payload=b"")
        assert position >= begin or len(archive.entries) > PAGE  # the page of other images


HUGE = b"\xff" * 8 + b"\x7f"
WHOLE, LARGE = write_archive(an_archive()), write_archive(a_large_archive())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PNG", "x.zlg is no .zlg file: it does not begin as one; name a file that `zellige compress` wrote"),
        (WHOLE[:9], "x.zlg is damaged or cut short: it ends after 9 bytes; copy it again from where it came"),
        (WHOLE[:4] + b"\4" + WHOLE[5:], "x.zlg has version 4 of the .zlg format, expected 1 to 3, which this program"),
        (WHOLE[:4] + b"\3" + WHOLE[5:], "x.zlg holds images without loss, and no codes (version 3 of the format); "),
        (WHOLE + b"x", "x.zlg is damaged or cut short: it has 327 bytes, expected 326; copy it again from where it"),
        (WHOLE[:6] + b"\xff" * 300, "is damaged or cut short: it claims bytes of its head in more than ten"),
        (sealed(WHOLE[:-4] + b"xy"), "is damaged or cut short: it has 328 bytes, expected 326"),
        (resealed(WHOLE[:5] + b"\x0f" + WHOLE[6:]), "x.zlg was edited or is from another program: its flags are 15; c"),
        (with_facts(16, b"\2"), "it claims an arithmetic of its prior: 2, expected 1 to 1"),
        (with_facts(25, b"\0"), "it claims images: 0, expected 1 to 281474976710656"),
        (with_facts(25, HUGE), "it claims images: 9223372036854775807, expected 1 to 281474976710656"),
        (with_facts(25, varint(1 << 48)), "it claims bytes of a page: 2, expected 5 to"),
        (with_facts(26, b"\0"), "it claims shapes: 0, expected 1 to 4"),
        (with_facts(26, b"\5"), "it claims shapes: 5, expected 1 to 4"),
        (with_facts(26, b"\x80" * 12), "it claims shapes in more than ten bytes"),
        (with_facts(27, HUGE), "it claims rows: 9223372036854775807"),
        (with_facts(29, b"\0"), "it claims columns: 0, expected 1 to 2147483648"),
        (with_facts(30, b"\0"), "it claims grids: 0, expected 1 to 256"),
        (with_facts(31, b"\1"), "it claims rows of codes: 1, expected 4 to"),
        (with_facts(31, b"\x0b"), "its first grid has no vocabulary"),
        (with_facts(44, b"\x08"), "it claims shape and mode: 8, expected 0 to 7"),
        (with_facts(44, b"\x03"), "it has an image in mode 3"),
        (with_facts(45, HUGE), "it claims bits of an image: 9223372036854775807"),
        (with_facts(50, b"\xff" * 5 + b"\1"), "it claims label: 68719476735, expected 0 to 2147483648"),
        (with_facts(57, b"\x20"), "is damaged or cut short: it has 326 bytes, expected 330"),
        (with_facts(70, b"\0"), "it holds 1 names for 4 images"),
        (with_facts(71, b"\0"), "it holds 5 names for 4 images"),
        (with_facts(89, b""), "it ends too early"),
        (with_facts(89, b"db"), "1 bytes of its head have no meaning"),
        (sealed(WHOLE[:-5] + b"\x01"), "was edited or is from another program: what fills a last byte is not zero"),
        (with_facts(25, b"\x03", a_large_archive()), "it claims shapes: 4, expected 1 to 3"),
        (with_facts(27, b"\x04", a_large_archive()), "it claims bytes of a page: 4, expected 5 to"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(data, message):
    with pytest.raises(UserError) as refused:
        read_archive(data, "x.zlg")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("mode", [Mode.prior, Mode.table])
def test_a_mode_whose_model_is_not_named_is_refused(mode):
    plain = Archive((Entry(Mode.packed, OTHER, 1, bytes(18)),), STAGE1)
    data = with_facts(16, bytes([mode, 144, 1]), plain)  # with the number of its bits
    with pytest.raises(UserError, match=f"it does not name the {mode.name} of an image"):
        read_archive(data)


def test_names_are_as_many_as_images():
    entries = an_archive().entries
    data = write_archive(Archive((entries[1]._replace(name="a\0b"),), STAGE1))
    with pytest.raises(UserError, match="it holds 2 names for 1 images"):
        read_archive(data)


def test_payloads_take_bits_and_not_bytes():
    entry = Entry(Mode.table, OTHER, 1, b"\x80")  # one bit
    one, nine = (len(write_archive(Archive((entry,) * count, STAGE1, None, TABLES))) for count in (1, 9))
    in_index = 1 + 1 + 4  # shape and mode, length, CRC
    assert nine - one == 8 * in_index + 1
    assert read_archive(write_archive(Archive((entry,) * 9, STAGE1, None, TABLES))).entries == (entry,) * 9


@given(flags=st.integers(0, 7), facts=st.binary(max_size=200), rest=st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_behind_the_version_end_in_an_error(flags, facts, rest):
    head = b"\x89ZLG\2" + bytes([flags]) + varint(len(facts) + 4) + facts
    for data in (sealed(sealed(head) + rest), sealed(head + rest), b"\x89ZLG\2" + facts):
        with pytest.raises(UserError):
            read_archive(data)


# ---- of a page ------------------------------------------------------------------------------------------------------


def with_page(number: int, new: bytes) -> bytes:
    """The large archive, with another page in the place of one of the same length; all checksums are right."""
    with open_archive(LARGE) as file:
        begin, end = file.index_starts[number : number + 2]
    assert len(new) == end - begin - 4
    return sealed(LARGE[:begin] + sealed(new, place_of_page(number)) + LARGE[end:-4])


def page(number: int) -> bytearray:
    with open_archive(LARGE) as file:
        begin, end = file.index_starts[number : number + 2]
    return bytearray(LARGE[begin : end - 4])


def test_what_is_wrong_with_a_page_is_told():
    without_shapes, longer, cut, shorter = page(1), page(1), page(1), page(1)
    without_shapes[0] = 0
    longer[-1:] = b"\0"  # one name more
    cut[0] = 6  # the first image is read as a shape
    shorter[shorter.index(b"256.png") - 2] -= 1  # the length of the names
    for data, message in (
        (LARGE.replace(b"256.png", b"256.jpg"), "x.zlg is damaged or cut short: the checksum of its page 1 is wrong"),
        (with_page(1, bytes(without_shapes)), "x.zlg was edited or is from another program: it claims shapes: 0, exp"),
        (with_page(1, bytes(longer)), "it holds 257 names for 256 images"),
        (with_page(1, bytes(shorter)), "was edited or is from another program: 1 bytes of its page 1 have no meaning"),
        (with_page(1, bytes(cut)), "was edited or is from another program: it claims"),
    ):
        with open_archive(data, "x.zlg") as file:
            assert file.entry(PAGE - 1) == a_large_archive().entries[PAGE - 1]  # other pages do not suffer
            with pytest.raises(UserError) as refused:
                file.entry(PAGE)
            assert message in str(refused.value)
            assert file.entry(2 * PAGE) == a_large_archive().entries[2 * PAGE]
        with pytest.raises(UserError, match=r"is damaged or cut short: its checksum is wrong|was edited"):
            read_archive(data)


def test_a_page_of_one_image_without_a_name():
    entries = [Entry(Mode.packed, OTHER, i, bytes(18), name=f"{i:03}.png" if i < PAGE else "") for i in range(PAGE + 1)]
    archive = Archive(tuple(entries), STAGE1)
    assert read_archive(write_archive(archive)) == archive


def test_pages_that_changed_places_are_found():
    """They are of equal length, and so are their payloads: nothing else would tell them apart."""
    entries = [Entry(Mode.packed, OTHER, i, bytes(18), name=f"{i:03}.png") for i in range(3 * PAGE)]
    data = write_archive(Archive(tuple(entries), STAGE1))
    with open_archive(data) as file:
        first, second, third, _ = file.index_starts
    assert second - first == third - second
    swapped = sealed(data[:first] + data[second:third] + data[first:second] + data[third:-4])
    for number in (0, PAGE):
        with open_archive(swapped) as file, pytest.raises(UserError, match=f"checksum of its page {number // PAGE} is"):
            file.entry(number)
    with open_archive(swapped) as file:
        assert file.entry(2 * PAGE) == entries[2 * PAGE]
    with pytest.raises(AssertionError):
        plain_zlg.read_file(swapped)


def test_payloads_are_as_long_as_the_head_says():
    """A page of one byte more of payloads, and the next of one byte less."""
    with open_archive(LARGE) as file:
        first, second = file.payload_starts[1] - file.payload_starts[0], file.payload_starts[2] - file.payload_starts[1]
    directory = LARGE.index(varint(first), 7 + 27)
    data = bytearray(LARGE)
    data[directory] += 1
    data[LARGE.index(varint(second), directory + 2)] -= 1
    with open_archive(resealed(bytes(data))) as file:
        assert file.entry(2 * PAGE) == a_large_archive().entries[2 * PAGE]
        for number, claimed, right in ((0, first + 1, first), (PAGE, second - 1, second)):
            with pytest.raises(UserError, match=f"was edited .* payloads have {claimed} bytes, expected {right}"):
                file.entry(number)


# ---- images one by one ----------------------------------------------------------------------------------------------


def test_one_image_is_read_from_head_page_and_payload(tmp_path):
    archive, path = a_large_archive(20 * PAGE), tmp_path / "large.zlg"
    path.write_bytes(write_archive(archive))
    for number in (0, PAGE - 1, PAGE, 10 * PAGE + 7, 20 * PAGE - 1):
        with open_archive(path) as file:
            assert file.entry(number) == archive.entries[number]
            page = number // PAGE
            index = file.index_starts[page + 1] - file.index_starts[page]
            assert file.bytes_read <= 4096 + index + len(archive.entries[number].payload) + 1
            assert file.bytes_read < path.stat().st_size / 5
    with open_archive(path) as file:
        assert list(file.names()) == [entry.name for entry in archive.entries]
        assert file.bytes_read <= 4096 + file.payload_starts[0]
        assert file.bytes_read < path.stat().st_size


def test_a_page_is_read_once_for_its_neighbours(tmp_path):
    path = tmp_path / "large.zlg"
    path.write_bytes(LARGE)
    with open_archive(path) as file:
        begun = file.bytes_read
        entries = list(file.entries(range(PAGE, PAGE + 20)))
        payloads = sum(len(entry.payload) for entry in entries)
        assert file.bytes_read - begun <= file.index_starts[2] - file.index_starts[1] + payloads + 20


def test_a_file_is_closed(tmp_path):
    (tmp_path / "x.zlg").write_bytes(WHOLE)
    with open_archive(tmp_path / "x.zlg") as file:
        assert not file.file.closed
    assert file.file.closed


def test_what_is_no_file_and_no_image_is_told(tmp_path):
    with pytest.raises(UserError, match=r"none.zlg is no file; name a .zlg file"):
        open_archive(tmp_path / "none.zlg")
    with pytest.raises(UserError, match=r"is no file; name a .zlg file"):
        open_archive(tmp_path)
    with open_archive(WHOLE, "x.zlg") as file:
        for number in (-1, 4):
            with pytest.raises(UserError, match=f"x.zlg has no image {number}, expected 0 to 3"):
                file.entry(number)
