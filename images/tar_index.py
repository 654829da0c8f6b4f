"""What is in a tar of webdataset: where each image lies, its class and its caption.

A sample is what stands together under one key, the name up to its first dot: `0001.jpg`, `0001.cls`, `0001.txt`. How
members become samples is webdataset's own way (version 1.0.2), but that a damaged tar is told, and that hidden files in
folders, of which it takes `dir/._1.png` for the field `_1.png` of a sample `dir/`, are none.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import closing
from typing import BinaryIO, NamedTuple

import numpy as np

from common.errors import UserError
from common.processes import process_state
from common.wording import counted
from images.files import FORMATS
from images.tar_files import Tar

KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # key and field of a member
META = re.compile(r"__[^/]*__($|/)")  # members that are none of a sample
IMAGE_FIELDS = frozenset(FORMATS.split())
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
PIECE = 2**20  # bytes
LONGEST_LABEL = 32  # bytes: of a number of a class
DAMAGED = (ValueError, OverflowError, RecursionError, EOFError)  # what tarfile raises for headers that make no sense


class TarIndex(NamedTuple):
    """The images of one tar, n, in its order."""

    names: np.ndarray  # n, bytes: members
    spans: np.ndarray  # n 2, int64: where the image begins, and how many bytes it has
    labels: np.ndarray  # n, int64, -1 where there is none
    captions: np.ndarray  # n 3, int64: where the caption begins, its bytes, 0 for none, and whether it is JSON


class Member(NamedTuple):
    name: str
    start: int  # of its bytes in the tar
    size: int


def make_index(file: BinaryIO, tar: Tar, image_field: str | None = None) -> TarIndex:
    """Walks through a tar. Raises UserError for one that is damaged, and for samples whose image or class is not to be
    told."""
    names, spans, labels, captions = [], [], [], []
    lonely = 0  # classes of samples without an image

    def content(member: Member) -> bytes:
        file.seek(member.start)
        return file.read(min(member.size, LONGEST_LABEL))

    for sample in samples_of(members_of(file, tar), tar):
        image = image_of(sample, image_field, tar)
        if image is None:
            lonely += "cls" in sample
            continue
        names.append(image.name.encode("utf-8", "surrogateescape"))
        spans.append((image.start, image.size))
        labels.append(label_of(content(sample["cls"]), sample["cls"], tar) if "cls" in sample else -1)
        words = sample.get("txt") or sample.get("json") or Member("", 0, 0)
        captions.append((words.start, words.size, "txt" not in sample))
    if lonely and -1 in labels:
        raise UserError(
            f"{tar.place} holds images without classes and {counted(lonely, 'class', 'classes')} without an image, "
            "expected the files of one sample to follow one another, as `tar --sort=name` packs them"
        )
    return TarIndex(
        np.array(names) if names else np.zeros(0, dtype="S1"),
        np.array(spans, dtype=np.int64).reshape(-1, 2),
        np.array(labels, dtype=np.int64),
        np.array(captions, dtype=np.int64).reshape(-1, 3),
    )


def members_of(file: BinaryIO, tar: Tar) -> Iterator[Member]:
    """The regular files of a tar, in its order. Raises UserError for one that is damaged, cut short or compressed.

    Header by header, for tarfile's own loop takes a damaged header within a tar for its end.
    """
    file.seek(0)
    beginning = file.read(8)
    for magic, how in COMPRESSED.items():
        if beginning.startswith(magic):
            raise UserError(
                f"{tar.place} is compressed by {how}, and what is inside cannot be reached: unpack it to a .tar"
            )
    file.seek(0)
    try:
        archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
    except (tarfile.TarError, *DAMAGED) as error:
        raise damaged(tar, 0, str(error)) from error
    with closing(archive):
        archive.offset = position = 0
        while True:
            file.seek(position)
            try:
                member = archive.tarinfo.fromtarfile(archive)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                check_end(file, tar, position)
                return
            except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
                if process_state().is_main_process:
                    print(f"{tar.place} has no end mark at byte {position}: it may be cut short there", flush=True)
                return
            except (tarfile.TarError, *DAMAGED) as error:
                raise damaged(tar, position, str(error)) from error
            end = member.offset_data + member.size
            if member.size < 0 or archive.offset <= position or (member.isreg() and end > tar.size):
                raise damaged(tar, position, f"{member.name} would go on to byte {end}, and the tar has {tar.size}")
            if member.isreg():
                if member.sparse is not None:
                    raise UserError(
                        f"{tar.place} holds {member.name} with holes, as `tar --sparse` makes them: pack it without"
                    )
                yield Member(member.name, member.offset_data, member.size)
            position = archive.offset


def damaged(tar: Tar, position: int, reason: str) -> UserError:
    return UserError(f"{tar.place} is damaged or cut short at byte {position} ({reason}): fetch or make it anew")


def check_end(file: BinaryIO, tar: Tar, position: int) -> None:
    """Raises UserError for something behind the end of a tar: zeros where a header was, or another tar."""
    file.seek(position)
    while piece := file.read(PIECE):
        if piece.strip(b"\0"):
            raise damaged(tar, position, "zeros, which mark the end, and more behind them")


def samples_of(members: Iterator[Member], tar: Tar) -> Iterator[dict[str, Member]]:
    """Members that follow one another under one key, by their fields in lower case: webdataset's own rules. Raises
    UserError for a field that a sample has twice."""
    key: str | None = None
    sample: dict[str, Member] = {}
    for member in members:
        match = None if META.match(member.name) else KEY.match(member.name)
        if match is None or match[1].endswith("/"):  # files without an ending, and hidden ones
            continue
        if match[1] != key:
            if sample:
                yield sample
            key, sample = match[1], {}
        field = match[2].lower()
        if field in sample:
            raise UserError(
                f"{tar.place} holds {sample[field].name} and {member.name}, the same field of one sample (a sample is "
                "what has the same name up to its first dot); rename one"
            )
        sample[field] = member
    if sample:
        yield sample


def image_of(sample: dict[str, Member], image_field: str | None, tar: Tar) -> Member | None:
    """The image of a sample, None where it has none. Raises UserError where it has several."""
    if image_field is not None:
        return sample.get(image_field.lower())
    fields = [field for field in sample if field in IMAGE_FIELDS]
    if not fields:  # such as input.jpg
        fields = [field for field in sample if field.rpartition(".")[2] in IMAGE_FIELDS]
    if len(fields) > 1:
        names = " and ".join(sample[field].name for field in fields[:3])
        raise UserError(
            f"{tar.place} holds several images of one sample, {names} (a sample is what has the same name up to its "
            f"first dot): say which by --data.image_field, such as {fields[0]}, or rename them"
        )
    return sample[fields[0]] if fields else None


def label_of(content: bytes, member: Member, tar: Tar) -> int:
    try:
        label = int(content)
    except ValueError:
        label = -2
    if not -1 <= label < 2**31:
        raise UserError(
            f"{member.name} in {tar.place} holds {content[:20]!r}, expected the number of a class, 0 or more, or -1 "
            "where it is not known"
        )
    return label


def caption_in_json(text: str) -> str | None:
    """`caption` of a JSON object, as img2dataset writes it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    caption = value.get("caption") if isinstance(value, dict) else None
    return caption.strip() if isinstance(caption, str) else None
