"""What one visitor may ask of a demo: sizes of uploads, images, seconds; and that one is served after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode

from common.errors import UserError
from images.files import BadImageError, open_upright, read_size

MEGABYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    megabytes: float = 10.0  # of an upload
    megapixels: float = 25.0  # of an uploaded image, by its header, before it is decoded
    side: int = 512  # pixels of the longer side: images that are looked at in their own size are scaled down to it
    images: int = 16  # of a request
    seconds: float = 60.0  # that a request may take once its turn has come
    waiting: int = 16  # requests in the queue


class StoppedError(Exception):
    """The visitor has asked for nothing more."""


def open_upload(path: str | Path | None, channels: int, limits: Limits) -> Image.Image:
    """An uploaded image as a person sees it, "L" (channels=1) or "RGB" (3). Its size is read before its pixels are.
    Raises UserError, which does not name the path: visitors know nothing of the server's files."""
    if path is None:
        raise UserError("there is no image yet; upload one, or take one of the examples")
    check_bytes(path, limits)
    height, width = read_size(path)
    if height * width > limits.megapixels * 1e6:
        raise UserError(
            f"this image has {width}x{height} pixels, expected at most {limits.megapixels:g} million; scale it down"
        )
    try:
        return open_upright(Path(path), channels)
    except BadImageError as error:
        reason = str(error).replace(str(path), "the file")
        raise UserError(f"this file cannot be read as an image: {reason}; take a PNG, JPEG or WebP file") from error


def check_bytes(path: str | Path, limits: Limits) -> None:
    """Raises UserError for a file that is too large, and for one that was uploaded too long ago."""
    if not Path(path).is_file():
        raise UserError("this file is not kept here any more; upload it again")
    size = Path(path).stat().st_size
    if size > limits.megabytes * MEGABYTE:
        raise UserError(
            f"this file has {size / MEGABYTE:.1f} MiB, expected at most {limits.megabytes:g}; take a smaller one"
        )


def check_count(count: int, limits: Limits) -> int:
    """Raises UserError for more images than a request may ask for."""
    if not 1 <= count <= limits.images:
        raise UserError(f"got {count} images, expected 1 to {limits.images}, as many as a request may ask for here")
    return count


class EachOperation(TorchFunctionMode):
    """Does something before each operation on tensors of this thread, which changes nothing of them."""

    def __init__(self, before: Callable[[], None]) -> None:
        super().__init__()
        self.before = before

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.before()
        return function(*args, **(kwargs or {}))


class Desk:
    """Where one visitor at a time is served, for a limited time, and may be told to leave.

    A request ends in the middle of an image too. The clock is looked at before each of the model's layers, in any
    thread, and in the visitor's own before each operation on tensors: steppers take the weights themselves and pass no
    layer. So what was stopped does not go on unseen, and who waits waits no longer than the limit.
    """

    def __init__(self, models: Sequence[nn.Module], seconds: float) -> None:
        self.seconds = seconds
        self.turn = threading.Lock()
        self.visitor: str | None = None
        self.deadline = 0.0
        self.leaving: set[str] = set()
        for model in models:
            for layer in model.modules():
                layer.register_forward_pre_hook(self.look_at_the_clock)

    @contextmanager
    def serving(self, visitor: str) -> Iterator[None]:
        """While it lasts nobody else is served. Within it StoppedError and, when the time is over, UserError may be
        raised."""
        with self.turn:
            self.leaving.discard(visitor)
            self.visitor, self.deadline = visitor, time.monotonic() + self.seconds
            try:
                with EachOperation(self.look_at_the_clock):
                    yield
            finally:
                self.visitor = None

    def stop(self, visitor: str) -> bool:
        """Ends what a visitor has asked for; whether there was anything. What still waits for its turn is not known
        here."""
        if self.visitor != visitor:
            return False
        self.leaving.add(visitor)
        return True

    def look_at_the_clock(self, *_: Any) -> None:
        visitor = self.visitor
        if visitor is None:
            return
        if visitor in self.leaving:
            raise StoppedError
        if time.monotonic() > self.deadline:
            raise UserError(
                f"this took more than {self.seconds:g} seconds, as long as a request may take here; ask for fewer or "
                "smaller images"
            )
