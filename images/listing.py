"""Which image files a folder holds. The list of a large folder is kept: a million files over a network take minutes.

A kept list is taken while no folder in it has changed: adding, removing or renaming a file changes the time of its
folder, and a thousand folders are asked for their times at once where a million files are not. What a list cannot show
is a file that is written anew under its name, which changes nothing in it, and a change on a file system that keeps no
times of folders, for which there is `data.relist`.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cache import find_arrays, keep_arrays
from common.errors import UserError
from common.owned_folder import SETTINGS_NAME, SHEET_NAME, owner_of
from common.processes import on_main_process, process_state
from images.files import MASK_ENDING, SUFFIXES

UNREAD = "heic heif jxl dng cr2 cr3 nef arw raf orf rw2 psd svg"  # pictures too, which Pillow by itself cannot read
PACKED_SUFFIXES = frozenset({".tar", ".parquet"})  # of files that hold many pictures
UNREAD_SUFFIXES = frozenset(f".{name}" for name in UNREAD.split())
SCATTERED = (
    "__MACOSX",
    "@eaDir",
)  # folders that unpacking on other systems, and Synology's disks, leave among pictures
KIND = "listings"  # of caches
KEPT_FROM = 10_000  # files: fewer are listed as quickly as a list of them is read
SETTLED = 5.0  # seconds: a folder that changed so shortly before it was listed may change again at the same time


class Listing(NamedTuple):
    paths: np.ndarray  # n, bytes, relative to the folder, sorted
    unread: Counter[str]  # pictures of each ending in `UNREAD_SUFFIXES`, and files of `PACKED_SUFFIXES`, beside them
    folders: list[str]  # all that were looked into, as paths
    states: list[bytes]  # of each, what changes with its entries


def list_images(root: Path) -> np.ndarray:
    """Paths, relative to `root`, of all image files below it: sorted, as bytes in one array.

    One array, because a list of a million strings is copied bit by bit into every loader process as its
    reference counts are touched. Hidden files and folders are left out (thumbnails and resource forks that
    systems scatter about), and masks, whose names end in `MASK_ENDING`, and the sheet that a command of ours put
    beside its results; links are followed, each folder once. Raises UserError for a folder that may not be read.
    """
    return scan_folder(root).paths


def listing_of(root: Path, relist: bool = False) -> Listing:
    """As `scan_folder`, by the list that is kept of the folder if it still holds. The main process looks, and all get
    what it found. relist: look in any case. Raises UserError."""
    return on_main_process(process_state(), lambda: kept_or_scanned(root, relist))


def kept_or_scanned(root: Path, relist: bool) -> Listing:
    key = os.path.realpath(root)
    if not relist and (kept := find_listing(key)) is not None:
        return kept
    begun = time.time()
    listing = scan_folder(root)
    if len(listing.paths) >= KEPT_FROM:
        keep_arrays(
            KIND,
            key,
            {
                "paths": listing.paths,
                "unread": np.frombuffer(json.dumps(listing.unread).encode(), dtype=np.uint8),
                "folders": np.array([os.fsencode(folder) for folder in listing.folders]),
                "states": np.array(listing.states),
                "begun": np.array(begun),
            },
        )
    return listing


def find_listing(key: str) -> Listing | None:
    """The list that is kept of a folder; None where there is none, or it may not hold any more."""
    arrays = find_arrays(KIND, key)
    if arrays is None:
        return None
    try:
        folders = [os.fsdecode(folder) for folder in arrays["folders"].tolist()]
        states = arrays["states"].tolist()
        settled = int((float(arrays["begun"]) - SETTLED) * 1e9)
        for folder, state in zip(folders, states, strict=True):
            status = os.stat(folder)
            if state_of(status) != state or max(status.st_mtime_ns, status.st_ctime_ns) > settled:
                return None
        unread = Counter(json.loads(arrays["unread"].tobytes()))
    except (OSError, KeyError, ValueError, TypeError):
        return None
    return Listing(arrays["paths"], unread, folders, states)


def state_of(status: os.stat_result) -> bytes:
    """What changes with the entries of a folder."""
    return f"{status.st_dev} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}".encode()


def scan_folder(root: Path) -> Listing:
    """`list_images`, and what else there is to say of the folder."""
    found: list[np.ndarray] = []  # paths of each folder: as single objects they would take three times the memory
    unread: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    folders: list[str] = []
    states: list[bytes] = []

    def visit(folder: str, prefix: str) -> None:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        folders.append(folder)
        states.append(state_of(status))  # before its entries: what changes meanwhile changes the state
        paths: list[bytes] = []
        with os.scandir(folder) as found_here:
            entries = sorted(found_here, key=lambda entry: entry.name)
            of_results = has_our_sheet(folder, {entry.name for entry in entries})
            for entry in entries:
                if entry.name.startswith(".") or entry.name in SCATTERED or (of_results and entry.name == SHEET_NAME):
                    continue
                suffix = os.path.splitext(entry.name)[1].lower()
                if entry.is_dir():
                    visit(entry.path, f"{prefix}{entry.name}/")
                elif entry.name.lower().endswith(MASK_ENDING):
                    continue
                elif suffix in SUFFIXES:
                    paths.append(os.fsencode(prefix + entry.name))
                elif suffix in UNREAD_SUFFIXES or suffix in PACKED_SUFFIXES:
                    unread[suffix] += 1
        if paths:
            found.append(np.array(paths))

    try:
        visit(os.path.realpath(root), "")
    except PermissionError as error:
        raise UserError(
            f"no permission to read the folder {error.filename}, in which there may be images: change its owner, or "
            "name a folder beside it"
        ) from error
    paths = np.concatenate(found) if found else np.zeros(0, dtype="S1")
    found.clear()
    paths.sort()
    return Listing(paths, unread, folders, states)


def has_our_sheet(folder: str, names: set[str]) -> bool:
    """Whether the contact sheet of a folder is one that a command of ours made of the other images in it. A sheet.png
    of somebody's own is an image as any other."""
    return {SETTINGS_NAME, SHEET_NAME} <= names and owner_of(Path(folder)) is not None
