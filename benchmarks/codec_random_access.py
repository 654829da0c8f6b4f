"""One image of a large archive, held against all of them: time and bytes.

`python -m benchmarks.codec_random_access` writes an archive of 100,000 tiny images, packed codes, with names, and reads
single ones from the file, each time opened anew. It fails where one takes 5% of the time of all, or of their bytes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipelines.codec.archive import Archive, Entry, Mode, Shape, open_archive, read_archive, write_archive
from pipelines.codec.entropy_coding import pack

SHAPE = Shape(16, 16, ((4, 4, 512),))
SHARE = 0.05
REPEATS = 20


def archive_of(images: int) -> Archive:
    codes = np.random.default_rng(0).integers(0, 512, (images, 16))
    payloads = [pack([(row, 512)]) for row in codes]
    entries = [Entry(Mode.packed, SHAPE, i, payload, name=f"{i:06d}.png") for i, payload in enumerate(payloads)]
    return Archive(tuple(entries), bytes(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    images = parser.parse_args().images
    archive = archive_of(images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.zlg"
        path.write_bytes(write_archive(archive))
        size = path.stat().st_size
        begin = time.perf_counter()
        assert read_archive(path.read_bytes()).entries == archive.entries
        whole = time.perf_counter() - begin
        print(f"all {images} images: {size} bytes, {whole:.2f} s")
        failed = False
        for what, number in (("first", 0), ("middle", images // 2), ("last", images - 1)):
            times = []
            for _ in range(REPEATS):
                begin = time.perf_counter()
                with open_archive(path) as file:
                    entry = file.entry(number)
                times.append(time.perf_counter() - begin)
                assert entry == archive.entries[number]
            own = max(times)
            print(
                f"the {what}, number {number}: {file.bytes_read} bytes, {file.bytes_read / size:.3%}; {1000 * own:.2f} "
                f"ms at most, {own / whole:.3%}"
            )
            failed |= own > SHARE * whole or file.bytes_read > SHARE * size
    sys.exit(failed)


if __name__ == "__main__":
    main()
