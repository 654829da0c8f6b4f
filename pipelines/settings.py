"""Folders of results: one command's, made with one set of settings, written by one process, or one job, at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState

from common.errors import UserError
from common.files import read_json, remove_leftovers_below, write_json
from common.folder_lock import gate, held, held_part, parts_of
from common.owned_folder import SETTINGS_NAME, check_owner, foreign_files
from common.precision import as_meant
from common.processes import on_main_process


@contextmanager
def results_folder(
    out: Path,
    command: str,
    settings: Mapping[str, Any],
    state: PartialState,
    *,
    defaults: Mapping[str, Any] | None = None,
    may_change: Mapping[str, Callable[[], bool]] | None = None,
    results: str = "*.png",
    part: range | None = None,
) -> Iterator[None]:
    """Inside, `out` is `zellige COMMAND`'s alone, its settings are recorded, and what a kill left half-written is gone.

    results: pattern of the files that the settings bind; where none was written, the record goes again. defaults,
    may_change: see `check_settings`. part: the numbers of the results that this job makes, of a folder that it shares
    with jobs of other parts. All processes of a job enter together; the main process holds the folder for them, and
    those that may outlast it keep a part of it by `folder_lock.held_part`. Raises UserError, on all of them, for a
    folder that another command began, that holds files of others, that another job is writing to, or that was begun
    with other settings.
    """
    with ExitStack() as stack:

        def check_and_record(others: bool) -> None:
            check_settings(out, settings, None if others else results, defaults, may_change)
            begun = recorded_settings(out, None) if others else {}  # of what may change the first job's is recorded
            remove_leftovers_below(out)
            kept = {name: begun[name] for name in may_change or () if name in begun}
            write_json(out / SETTINGS_NAME, {"command": command, **settings, **kept})

        def open_folder() -> None:
            check_owner(out, command)
            if part is None:
                stack.enter_context(held(out, command))
                stack.callback(forget_settings, out, results)
                check_and_record(others=False)
                return
            with gate(out, command):
                stack.callback(forget_settings_of_part, out, command, results)
                stack.enter_context(held_part(out, f"{command} --range {part.start}:{part.stop}", part))
                # Others have recorded what binds all, whatever they have made of it.
                check_and_record(others=len(parts_of(out)) > 1)

        on_main_process(state, open_folder)
        yield


def forget_settings_of_part(out: Path, command: str, results: str) -> None:
    """As `forget_settings`, unless jobs of other parts go by the record."""
    if next(out.rglob(results), None) is None:
        with suppress(UserError), gate(out, command):  # another keeps the folder now, and the record
            if not parts_of(out):
                forget_settings(out, results)
        with suppress(OSError):  # it is not empty
            out.rmdir()


def forget_settings(out: Path, results: str) -> None:
    """Takes the record back where there is nothing else that only it explains."""
    if next(out.rglob(results), None) is None and not foreign_files(out):
        with suppress(OSError):
            (out / SETTINGS_NAME).unlink()


def recorded_settings(out: Path, results: str | None = "*.png") -> dict[str, Any]:
    """The settings that an earlier run recorded in `out`; empty if it wrote none of its `results` with them. results:
    None where the record binds before there are any."""
    path = out / SETTINGS_NAME
    if not path.exists() or (results is not None and next(out.rglob(results), None) is None):
        return {}
    return as_meant(read_json(path))


def check_settings(
    out: Path,
    settings: Mapping[str, Any],
    results: str | None = "*.png",
    defaults: Mapping[str, Any] | None = None,
    may_change: Mapping[str, Callable[[], bool]] | None = None,
) -> None:
    """Raises UserError if `out` was begun with other settings, and names those that differ.

    defaults: of settings, so that a record from before there was one of them says what it was then. may_change: of
    settings that need not be the same, such as paths, whether the results would be the same with both values.
    """
    compare_settings(str(out), settings, recorded_settings(out, results), defaults, may_change)


def compare_settings(
    out: str,
    settings: Mapping[str, Any],
    recorded: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    may_change: Mapping[str, Callable[[], bool]] | None = None,
) -> None:
    """As `check_settings`, of what is recorded, a folder's or a bucket's; nothing is compared where it is empty."""
    if not recorded:
        return
    before = {**(defaults or {}), **recorded}
    now = json.loads(json.dumps(settings))  # as it reads in a file
    changed = [
        f"{name} was {before.get(name)!r} and is now {value!r}"
        for name, value in now.items()
        if before.get(name) != value and not (may_change and name in may_change and may_change[name]())
    ]
    changed += [
        f"{name} was {value!r}, which this version does not know"
        for name, value in recorded.items()
        if name not in now and name != "command" and value != (defaults or {}).get(name)
    ]
    if changed:
        raise UserError(
            f"{out} was begun with other settings: {'; '.join(changed)}; "
            "give the former values to continue it, or name another --out folder"
        )


def check_apart(out: Path, source: Path) -> None:
    """Raises UserError if `out` is the folder of the images, which `source` is or is in, or lies in the one it is:
    results would take the place of originals, and be read as images by the next run."""
    root = source if source.is_dir() else source.parent
    inside = source.is_dir() and root.resolve() in out.resolve().parents
    if inside or out.resolve() == root.resolve():
        raise UserError(
            f"{out} lies in the folder of the images, {root}, where what is written would be read as an image; "
            "name another --out folder"
        )
