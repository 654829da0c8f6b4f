"""Pictures are encoded and written while the model makes the next ones, so many at most that wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from common.machine import cores
from common.processes import process_state
from pipelines.generation.encoder import Encoder, Piece, work_through

MOST = 16  # processes
ALONE = 0.25  # seconds that are spent on writing before there is a process for it: few images are soon written
LITTLE = 0.25  # of the time, spent on writing, is none where the model keeps all cores busy: they would take turns


def spare_cores() -> int:
    """Those that the model leaves."""
    return cores() - (torch.get_num_threads() if process_state().device.type == "cpu" else 1)


Send = Callable[[Mapping[str, bytes]], None]
"""Puts files somewhere, by their names; may be called in several threads."""


def sent(piece: Piece, files: list[bytes], send: Send | None) -> list[bytes]:
    if send is None:
        return files
    send(dict(zip(piece.names, files, strict=True)))
    return []


class Writers:
    """Works through pieces, the first ones by itself, later ones by processes that start as they are needed, one for
    each core at most. Who gives a piece waits while more than `waiting` pictures are unfinished, so memory does not
    depend on how much slower writing is than making.

    What goes wrong with a piece is raised to whoever gives the next one, or waits for it or for the end; pieces that
    wait are left undone then. As a context it ends when all is done, and where it is left by an exception as soon as
    what has begun is done.
    """

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self.spares = spare_cores() > 0
        self.begun, self.spent = time.perf_counter(), 0.0  # seconds on writing, as long as it is done here
        self.together = False
        self.pool = ThreadPoolExecutor(min(cores(), MOST), "writer")
        self.own = threading.local()  # of a thread: the process whose replies it waits for
        self.encoders: list[Encoder] = []
        self.unfinished = 0  # pictures
        self.changed = threading.Condition()
        self.error: BaseException | None = None

    def give(self, piece: Piece, send: Send | None = None) -> Future[list[bytes]]:
        """Of one thread at a time. The bytes of the piece's files, or none, where these are written or sent. Raises
        what went wrong before."""
        self.check()
        count = len(piece.pictures)
        if self.is_alone():
            begin = time.perf_counter()
            done: Future[list[bytes]] = Future()
            done.set_result(sent(piece, work_through(piece), send))
            self.spent += time.perf_counter() - begin
            return done
        with self.changed:
            while self.unfinished and self.unfinished + count > self.waiting:
                self.changed.wait()
            self.unfinished += count
        return self.pool.submit(self.work_through, piece, send)

    def is_alone(self) -> bool:
        """Whether this process does the next piece by itself."""
        if not self.together:
            little = not self.spares and self.spent < LITTLE * (time.perf_counter() - self.begun)
            self.together = self.spent >= ALONE and not little
        return not self.together

    def work_through(self, piece: Piece, send: Send | None) -> list[bytes]:
        """In a thread of the pool."""
        try:
            self.check()
            if not hasattr(self.own, "encoder"):
                self.own.encoder = Encoder()
                self.encoders.append(self.own.encoder)
            return sent(piece, self.own.encoder.work_through(piece), send)
        except BaseException as error:
            self.error = self.error or error
            raise
        finally:
            with self.changed:
                self.unfinished -= len(piece.pictures)
                self.changed.notify_all()

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
        for encoder in self.encoders:
            encoder.close()
        if kind is None:
            self.check()
