"""Ten million files encoded: what the listing, the manifest and a restart take, in seconds and in memory.

    python -m benchmarks.ten_million
    python -m benchmarks.ten_million --small 10000 --large 1000000

No file system is asked to hold ten million images: the calls that list a folder of a thousand files and tell size and
time of a file are answered by this script. All else is the code that `zellige encode` runs: the listing, kept and found
again, classes, split and fingerprints, the shards' plan, each shard with its labels and names (of one code an image,
without a network), the record of their sources, the index, and the same command again, which compares all files and
checksums. Checksums of the photos' bytes, which take as long as the disk takes to read them, are left out. Two numbers
of files, each in a process of its own; a row is flat where its seconds a file and bytes a file do not grow.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

PER_FOLDER, CLASSES, SHARD = 1000, 100, 8192  # files of a folder, classes, images of a shard


class Entry(SimpleNamespace):
    """What `os.scandir` yields."""

    name: str
    path: str
    folder: bool

    def is_dir(self) -> bool:
        return self.folder


def status(folder: bool, number: int) -> os.stat_result:
    mode = (stat.S_IFDIR if folder else stat.S_IFREG) | 0o755
    return os.stat_result((mode, number + 10, 1, 1, 0, 0, 40_000, 1e9, 1e9, 1e9))


@contextmanager
def simulated(root: str, count: int) -> Iterator[None]:
    """Below `root` are `count` files: root/class00/part000/image00000000.jpg."""
    scandir, real_stat = os.scandir, os.stat
    folders = -(-count // PER_FOLDER)

    def listed(path: Any = ".") -> Any:
        return made_up(str(path)) if str(path).startswith(root) else scandir(path)

    @contextmanager
    def made_up(place: str) -> Iterator[Any]:
        parts = place.removeprefix(root).strip("/").split("/")
        if parts == [""]:
            yield [Entry(name=f"class{c:02d}", path=f"{root}/class{c:02d}", folder=True) for c in range(CLASSES)]
        elif len(parts) == 1:
            own = range(int(parts[0][5:]), folders, CLASSES)
            yield [Entry(name=f"part{i:05d}", path=f"{place}/part{i:05d}", folder=True) for i in own]
        else:
            first = int(parts[1][4:]) * PER_FOLDER
            own = range(first, min(first + PER_FOLDER, count))
            yield (Entry(name=f"image{i:08d}.jpg", path="", folder=False) for i in own)

    def told(path: Any, *arguments: Any, **more: Any) -> os.stat_result:
        if (place := str(path)).startswith(root):
            return status(not place.endswith(".jpg"), hash(place) % 2**40)
        return real_stat(path, *arguments, **more)

    os.scandir, os.stat = listed, told  # type: ignore[assignment]
    try:
        yield
    finally:
        os.scandir, os.stat = scandir, real_stat


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def encode_all(work: Path, count: int) -> list[tuple[str, float, float]]:
    """Rows of what was done, its seconds, and the peak of memory up to its end beyond that before the first, in MiB."""
    from codes.shards import CodeShardWriter
    from codes.spec import CodeSpec, Grid
    from common import sources
    from images import encoding, listing
    from images.datasets import DataConfig, image_datasets

    root = str(work / "images")
    sources.contents_of = lambda files, given_up=None: "not read"  # type: ignore[assignment]
    spec = CodeSpec(grids=(Grid("codes", 1, 1, 256),), image_height=8, image_width=8, image_channels=3)
    config = DataConfig(path=root, image_size=8)
    rows: list[tuple[str, float, float]] = []
    before = megabytes()

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        made = work()
        rows.append((name, time.perf_counter() - begin, megabytes() - before))
        return made

    def open_writer(pieces: Sequence[Any], source: dict[str, Any], defaults: dict[str, Any]) -> CodeShardWriter:
        splits = [piece.split for piece in pieces]
        return CodeShardWriter(work / "codes", spec, splits, class_names=datasets[0].class_names, source=source)

    def encode_piece(piece: Any, batches: Any) -> Any:
        indices = range(piece.first, piece.first + piece.images)
        codes = (torch.zeros(piece.images, 1, 1, dtype=torch.int64),)
        return codes, torch.from_numpy(piece.dataset.labels[list(indices)]), piece.dataset.names(indices)

    class Unread:
        """In place of what reads images: tells the times of their files, as it does."""

        def __init__(self, pieces: Sequence[Any], *rest: Any) -> None:
            self.pieces = iter(pieces)
            self.times: list[str] = []

        def batches(self, piece: Any, progress: Any) -> None:
            self.times.append(sources.times_of(encoding.files_of(piece)))

        def close(self) -> None: ...

    encoding.PieceReader = Unread  # type: ignore[assignment, misc]

    def write() -> None:
        encoding.write_shards(work / "codes", *datasets, open_writer, encode_piece, shard_size=SHARD)

    with simulated(root, count):
        timed("listing, and keeping it", lambda: listing.listing_of(Path(root)))
        timed("opening by the kept list, classes, split", lambda: image_datasets(config, 0))
        datasets = image_datasets(config, 0)
        timed("shards, their sources, the index", write)
        timed("the same again: all files and checksums compared", write)
    return rows


def in_a_process(count: int) -> list[tuple[str, float, float]]:
    with tempfile.TemporaryDirectory() as work:
        environment = {**os.environ, "XDG_CACHE_HOME": f"{work}/cache"}
        command = [sys.executable, "-m", "benchmarks.ten_million", "--child", work, str(count)]
        (Path(work) / "images").mkdir()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=1_000_000)
    parser.add_argument("--large", type=int, default=10_000_000)
    asked = parser.parse_args(arguments)
    counts = (asked.small, asked.large)
    found = [in_a_process(count) for count in counts]
    print(f"| | {' | '.join(f'{c:,} files, s | µs a file | peak, MiB | bytes a file' for c in counts)} |")
    print(f"|{'---|' * 9}")
    for rows in zip(*found, strict=True):
        cells = [
            f"{seconds:.1f} | {1e6 * seconds / count:.2f} | {peak:.0f} | {peak * 2**20 / count:.0f}"
            for count, (_, seconds, peak) in zip(counts, rows, strict=True)
        ]
        print(f"| {rows[0][0]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(encode_all(Path(sys.argv[2]).resolve(), int(sys.argv[3]))))
    else:
        main()
