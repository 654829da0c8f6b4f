"""What visitors may upload and ask for, and that one of them is served at a time."""

from __future__ import annotations

import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.errors import UserError
from pipelines.demo.limits import Desk, Limits, StoppedError, check_count, open_upload
from tests.pipelines.conftest import make_pipeline

LIMITS = Limits(megabytes=0.05, megapixels=0.01, images=3)


def a_png_that_claims(width: int, height: int, path: Path) -> Path:
    """Its header is right and its pixels are not there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", struct.pack(">I", 13), header, struct.pack(">I", zlib.crc32(header))]
    path.write_bytes(b"".join([*parts, struct.pack(">I", 0), b"IDAT", struct.pack(">I", zlib.crc32(b"IDAT"))]))
    return path


def test_an_image_of_too_many_pixels_is_refused_by_its_header(tmp_path: Path):
    path = a_png_that_claims(9000, 8000, tmp_path / "bomb.png")
    with pytest.raises(UserError, match=r"9000x8000 pixels, expected at most 0\.01 million; scale it down"):
        open_upload(path, 1, LIMITS)
    with pytest.raises(UserError, match="cannot be read as an image"):  # as many as are allowed, but they are missing
        open_upload(a_png_that_claims(90, 90, tmp_path / "short.png"), 1, LIMITS)


def test_what_is_no_image_or_too_large_a_file_is_told_without_the_servers_path(tmp_path: Path):
    (tmp_path / "text.png").write_text("no image at all")
    (tmp_path / "large.png").write_bytes(bytes(60_000))
    for name, said in [("text.png", "this file cannot be read as an image"), ("large.png", "expected at most 0.05")]:
        with pytest.raises(UserError, match=said) as caught:
            open_upload(tmp_path / name, 3, LIMITS)
        assert str(tmp_path) not in str(caught.value)
    for path, said in [
        (None, "there is no image yet; upload one"),
        (tmp_path / "gone.png", "is not kept here any more"),
    ]:
        with pytest.raises(UserError, match=said):
            open_upload(path, 3, LIMITS)


def test_uploads_are_read_as_a_person_sees_them(tmp_path: Path):
    """Deep grey keeps its white, transparency lies over white, a camera's rotation is applied."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert np.asarray(open_upload(tmp_path / "deep.png", 1, LIMITS))[-1, -1] == 255
    Image.new("RGBA", (6, 4), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(open_upload(tmp_path / "clear.png", 3, LIMITS)).min() == 255
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_upload(tmp_path / "turned.jpg", 3, LIMITS).size == (4, 6)


@pytest.mark.parametrize("count", [0, 4])
def test_a_request_is_for_as_many_images_as_are_allowed(count):
    with pytest.raises(UserError, match=f"got {count} images, expected 1 to 3"):
        check_count(count, LIMITS)


class Slow(nn.Module):
    """Layers that take their time, as those of a large model do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.passed = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(500):
            x = self.layer(x)
            self.passed += 1
            time.sleep(0.01)
        return x


def test_a_request_that_takes_too_long_ends_in_the_middle_of_the_network():
    model = Slow()
    desk = Desk([model], seconds=0.05)
    with pytest.raises(UserError, match=r"took more than 0\.05 seconds"), desk.serving("a"):
        model(torch.zeros(1))
    assert 0 < model.passed < 100
    model.passed = 400  # who is not a visitor is not hurried
    assert not desk.stop("a")


def test_a_visitor_stops_their_own_request_and_nobody_elses():
    model = Slow()
    desk = Desk([model], seconds=60)
    ended: list[type[Exception]] = []

    def ask() -> None:
        try:
            with desk.serving("a"):
                model(torch.zeros(1))
        except StoppedError:
            ended.append(StoppedError)

    thread = threading.Thread(target=ask)
    thread.start()
    while not model.passed:
        time.sleep(0.001)
    assert not desk.stop("b")
    assert desk.stop("a")
    thread.join(timeout=30)
    assert ended == [StoppedError]
    assert model.passed < 500
    with desk.serving("a"):  # what was stopped before does not stop the next
        model.layer(torch.zeros(1))


def test_a_prior_is_stopped_between_two_codes():
    """Its stepper passes no layer."""
    pipeline = make_pipeline()
    desk, steps = Desk([pipeline.autoencoder, pipeline.prior], seconds=60), [0]
    make_stepper = pipeline.prior.stepper

    class Counting:
        def __init__(self, *arguments: Any) -> None:
            self.stepper = make_stepper(*arguments)

        def next(self, previous: torch.Tensor | None) -> torch.Tensor:
            steps[0] += 1
            if steps[0] == 3:
                desk.stop("a")
            return self.stepper.next(previous)

    pipeline.prior.stepper = Counting
    with pytest.raises(StoppedError), desk.serving("a"):
        pipeline.sample([0], [0], 0)
    assert steps == [3]
    pipeline.sample([0], [0], 0)  # outside nobody looks at the clock
    assert steps == [3 + 16]


def test_one_is_served_after_the_other():
    desk, inside, most = Desk([], seconds=60), [0], [0]

    def ask(visitor: str) -> None:
        with desk.serving(visitor):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            inside[0] -= 1

    threads = [threading.Thread(target=ask, args=(str(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert most == [1]
