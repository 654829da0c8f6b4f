"""Pictures to the bytes of image files, and to files, here or by a process of its own.

Threads would not do: a model of small images is a loop in Python, as is the writing of small files, and the two would
wait for each other's lock. The process is given pixels and imports no torch, so it is there in a moment; it ends with
the pipe to it, whatever happens to this process, and Ctrl-C is not its matter.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from common.errors import UserError
from pipelines.generation.layout import Format
from pipelines.generation.store import FolderStore

QUALITY = 95  # of jpeg
ROOT = Path(__file__).resolve().parents[2]  # where the packages lie
NICE = 5  # below who makes the pictures, for whom all wait
PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from pipelines.generation.encoder import serve; serve()"


class Form(NamedTuple):
    """How pictures become bytes."""

    format: Format
    quality: int = QUALITY  # of jpeg
    compression: int | None = None  # of png, 0 to 9; None: zlib's own, 6


class Piece(NamedTuple):
    """Pictures, L or RGB, and the names of their files."""

    form: Form
    folder: str | None  # where the files are written; None: nowhere, their bytes are wanted
    names: Sequence[str]
    pictures: Sequence[Image.Image]


def encoded(picture: Image.Image, form: Form) -> bytes:
    """The bytes of an image file; only jpeg loses any of the pixels."""
    data = io.BytesIO()
    if form.format == "jpeg":
        picture.save(data, format="JPEG", quality=form.quality, subsampling=0)
    elif form.format == "webp":
        picture.save(data, format="WEBP", lossless=True)
    elif form.compression is None:
        picture.save(data, format="PNG")
    else:
        picture.save(data, format="PNG", compress_level=form.compression)
    return data.getvalue()


def work_through(piece: Piece) -> list[bytes]:
    """The bytes of a piece's files, or none, where they are written. Raises UserError for a full disk and the like."""
    if piece.folder is None:
        return [encoded(picture, piece.form) for picture in piece.pictures]
    store = FolderStore(Path(piece.folder))
    for name, picture in zip(piece.names, piece.pictures, strict=True):
        store.write(name, encoded(picture, piece.form))
    return []


class Encoder:
    """A process that works through pieces, one at a time."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", PROGRAM, str(ROOT), *filter(None, sys.path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.pieces, self.replies = self.process.stdin, self.process.stdout

    def work_through(self, piece: Piece) -> list[bytes]:
        """As `work_through`. Raises UserError where the process dies."""
        about = [[name, one.mode, *one.size] for name, one in zip(piece.names, piece.pictures, strict=True)]
        head = json.dumps([*piece.form, piece.folder, about]).encode() + b"\n"
        try:
            self.pieces.write(b"".join([head, *(picture.tobytes() for picture in piece.pictures)]))
            self.pieces.flush()
            reply = json.loads(self.replies.readline())
            if isinstance(reply, str):
                raise UserError(reply)
            return [self.replies.read(size) for size in reply]
        except (BrokenPipeError, json.JSONDecodeError) as error:
            code = self.process.wait()
            raise UserError(
                f"a process that writes images died (exit code {code}): if it ran out of memory, lower batch_size; the "
                "same command continues"
            ) from error

    def close(self) -> None:
        """Ends the process, whatever it is at."""
        self.replies.close()
        with suppress(BrokenPipeError):  # it died with something unread
            self.pieces.close()
        self.process.wait()


def serve() -> None:
    """What the process does: a line of JSON that tells of the pictures, and their pixels; back comes a line with the
    lengths of what was asked for, which follows, or with an error's sentence."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who gave the work decides about its end
    if hasattr(os, "nice"):
        os.nice(NICE)
    pieces, replies = sys.stdin.buffer, sys.stdout.buffer
    while line := pieces.readline():
        kind, quality, compression, folder, about = json.loads(line)
        try:
            pictures = [picture_in(pieces, mode, (width, height)) for _, mode, width, height in about]
            reply = reply_to(Piece(Form(kind, quality, compression), folder, [name for name, *_ in about], pictures))
            replies.write(reply)
            replies.flush()
        except (EOFError, BrokenPipeError):  # nobody waits for it any more
            os._exit(0)


def reply_to(piece: Piece) -> bytes:
    try:
        made = work_through(piece)
    except Exception as error:
        said = (
            str(error) if isinstance(error, UserError) else f"images were not written ({type(error).__name__}: {error})"
        )
        return json.dumps(said).encode() + b"\n"
    return b"".join([json.dumps([len(data) for data in made]).encode() + b"\n", *made])


def picture_in(pieces: IO[bytes], mode: str, size: tuple[int, int]) -> Image.Image:
    width, height = size
    data = pieces.read(expected := width * height * Image.getmodebands(mode))
    if len(data) < expected:
        raise EOFError
    return Image.frombytes(mode, size, data)
