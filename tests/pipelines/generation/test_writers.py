"""Pictures that processes write are those that one process writes, so many at most wait, and errors reach who gives
them."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from common.errors import UserError
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.generation import encoder, sinks, writers
from pipelines.generation.encoder import Encoder, Form, Piece
from pipelines.generation.layout import Layout
from pipelines.generation.sinks import Sink, files_of_unit
from pipelines.generation.store import FolderStore
from pipelines.generation.writers import Writers


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes write from the first picture on, two of them."""
    monkeypatch.setattr(writers, "ALONE", 0)
    monkeypatch.setattr(writers, "LITTLE", 0)
    monkeypatch.setattr(writers, "cores", lambda: 2)
    monkeypatch.setattr(sinks, "PER_PIECE", 2)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def picture(number: int, size: tuple[int, int] = (5, 3)) -> Image.Image:
    return Image.new("RGB", size, (number % 256, 0, 7))


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg", "tar"])
def test_processes_write_the_bytes_that_one_process_writes(model: Path, tmp_path: Path, monkeypatch, kind, request):
    config = GenerateConfig(
        model=str(model),
        out=str(tmp_path / "alone"),
        num=11,
        batch_size=3,
        images_per_shard=4,
        device="cpu",
        format=kind,
    )
    generate_files(config)
    request.getfixturevalue("together")
    started: list[Encoder] = []
    begin = Encoder.__init__
    monkeypatch.setattr(Encoder, "__init__", lambda self: (started.append(self), begin(self))[1])
    generate_files(replace(config, out=str(tmp_path / "together")))
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    assert 1 <= len(started) <= 2
    assert all(one.process.poll() == 0 for one in started)


def test_few_images_start_no_process(model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(writers, "Encoder", None)
    monkeypatch.setattr(writers, "ALONE", 1e9)
    generate_files(GenerateConfig(model=str(model), out=str(tmp_path / "out"), num=11, batch_size=3, device="cpu"))
    assert len(list((tmp_path / "out").glob("0*.png"))) == 11


class Held:
    """In place of a process: works when it may."""

    may = threading.Event()

    def work_through(self, piece: Piece) -> list[bytes]:
        self.may.wait(30)
        return [b"made"] * len(piece.pictures)

    def close(self) -> None:
        pass


def test_no_more_pictures_wait_than_are_allowed(together, monkeypatch):
    monkeypatch.setattr(writers, "Encoder", Held)
    Held.may.clear()
    added: list[int] = []
    with Writers(waiting=6) as queue:
        sink = Sink(queue, Form("png"), str, add=lambda number, data: added.append(number))

        def make() -> None:
            for start in range(0, 40, 4):
                for number in reversed(range(start, start + 4)):
                    sink.take(number, picture(number))
                sink.flush()
            sink.finish()

        model = threading.Thread(target=make)
        model.start()
        for _ in range(20):
            time.sleep(0.01)
            assert queue.unfinished <= 6
        assert queue.unfinished == 6
        assert model.is_alive()
        Held.may.set()
        model.join(30)
        assert added == list(range(40))
        assert queue.unfinished == 0


def test_a_piece_larger_than_what_may_wait_is_written(together, monkeypatch):
    monkeypatch.setattr(writers, "Encoder", Held)
    Held.may.set()
    with Writers(waiting=1) as queue:
        given = [queue.give(Piece(Form("png"), None, ["a", "b"], [picture(0), picture(1)])) for _ in range(3)]
    assert [one.result() for one in given] == [[b"made"] * 2] * 3


@pytest.mark.parametrize("processes", [False, True])
def test_an_error_of_a_writer_ends_the_job_with_its_sentence(tmp_path: Path, request, processes: bool):
    if processes:
        request.getfixturevalue("together")
    (tmp_path / "000004").write_text("in the way")
    store, layout = FolderStore(tmp_path), Layout("png", per_shard=4)

    def make() -> None:
        with Writers(4) as queue:
            for start in range(0, 4000, 4):
                with files_of_unit(store, layout, Form("png"), queue) as sink:
                    for number in range(start, start + 4):
                        sink.take(number, picture(number))
                assert start < 1000  # long before the end

    with pytest.raises(UserError, match=r"^\S+/000004/00000[46]\.png cannot be written: a file stands where a folder"):
        make()
    assert {path.name for path in tmp_path.iterdir()} == {*(f"{i:06d}.png" for i in range(4)), "000004"}


def test_a_process_that_dies_is_one_sentence(together):
    piece = Piece(Form("png"), None, ["a"] * 4, [picture(0)] * 4)

    def work() -> None:
        with Writers(4) as queue:
            queue.give(piece).result()
            queue.encoders[0].process.kill()
            queue.encoders[0].process.wait()
            for _ in range(4):  # whichever process has it
                queue.give(piece)

    with pytest.raises(UserError, match=r"a process that writes images died \(exit code -9\)"):
        work()


def test_who_leaves_early_waits_for_what_has_begun_alone(together, tmp_path: Path, monkeypatch):
    pictures = [picture(number, (300, 300)) for number in range(50)]
    store, layout = FolderStore(tmp_path), Layout("png")

    def leave() -> None:
        with Writers(100) as queue, files_of_unit(store, layout, Form("png"), queue) as sink:
            for number, one in enumerate(pictures):
                sink.take(number, one)
            sink.flush()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    made = contents(tmp_path)
    assert len(made) < 50
    assert all(data == encoder.encoded(pictures[int(name[:6])], Form("png")) for name, data in made.items())
