"""A second start on a folder of many images against the first: what the list that is kept of it saves.

    python -m benchmarks.kept_listing
    python -m benchmarks.kept_listing --files 10000 --folders 10

Makes empty files in folders of classes, and opens the folder as a training does, once without a list that is kept and
then with it, in turn; the ratio is that of the medians. On a local disk: over a network, where entries may be questions
to a server, the first takes longer and the second asks for the folders alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from images import listing


def make_files(root: Path, files: int, folders: int) -> Path:
    for number in range(files):
        place = root / f"class{number % folders:04d}"
        if number < folders:
            place.mkdir(parents=True)
        (place / f"{number:08d}.jpg").touch()
    listing.SETTLED = 0.0  # folders that changed just now would not be trusted
    return root


def seconds(root: Path, *, relist: bool) -> float:
    begin = time.perf_counter()
    listing.listing_of(root, relist)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--times", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        os.environ["XDG_CACHE_HOME"] = f"{work}/cache"
        root = make_files(Path(work) / "images", asked.files, asked.folders)
        time.sleep(0.1)
        seconds(root, relist=True)
        pairs = [(seconds(root, relist=True), seconds(root, relist=False)) for _ in range(asked.times)]
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    what = f"{asked.files:,} files in {asked.folders:,} folders"
    print(f"{what}: the second start lists them {first / second:.1f} times as fast")


if __name__ == "__main__":
    main()
