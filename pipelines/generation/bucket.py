"""Results in a bucket: whose they are and with which settings, as of a folder, without its lock.

No lock reaches everywhere that a bucket does. Two jobs that write the same samples at once write the same objects
twice, each whole, and lose nothing but time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from accelerate import PartialState

from common.errors import UserError
from common.files import json_value
from common.owned_folder import SETTINGS_NAME, SHEET_NAME
from common.processes import on_main_process
from pipelines.generation.originals import ORIGINALS
from pipelines.generation.records import RECORDS
from pipelines.generation.store import Store
from pipelines.settings import compare_settings


def recorded_in(store: Store) -> dict[str, Any]:
    """The settings that an earlier job recorded; empty where there are none. Raises UserError for an object of that
    name that is something else."""
    if SETTINGS_NAME not in store.names(""):
        return {}
    try:
        found = json_value(store.read([SETTINGS_NAME])[0])
    except ValueError as error:
        raise UserError(f"{store.path(SETTINGS_NAME)} is not valid JSON ({error}); name another --out") from error
    return found if isinstance(found, dict) else {}


def has_results(store: Store) -> bool:
    return any(name[:6].isdigit() for name in store.names("")) or any(map(store.names, (RECORDS, ORIGINALS)))


@contextmanager
def results_bucket(
    store: Store,
    command: str,
    settings: Mapping[str, Any],
    state: PartialState,
    defaults: Mapping[str, Any],
    may_change: Mapping[str, Callable[[], bool]],
) -> Iterator[None]:
    """Inside, the settings are recorded. Where nothing was made, the record goes again. Raises UserError, on all
    processes, for a place that holds something else, and for one begun with other settings."""

    def open_bucket() -> None:
        recorded = recorded_in(store)
        owner = recorded.get("command")
        others = [name for name in store.names("") if name not in (SETTINGS_NAME, SHEET_NAME)]
        if owner is None and others:
            raise UserError(
                f"{store.title} holds {others[0]}, which this command did not write; name another --out place"
            )
        if owner not in (None, command):
            raise UserError(f"{store.title} is a place which `zellige {owner}` began; name another --out place")
        compare_settings(store.title, settings, recorded, defaults, may_change)
        record = {"command": command, **settings}
        store.write(SETTINGS_NAME, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())

    on_main_process(state, open_bucket)
    try:
        yield
    finally:
        if state.is_main_process:
            with suppress(UserError):
                if not has_results(store):
                    store.remove(SETTINGS_NAME)
