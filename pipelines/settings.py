"""What a folder of results was made with: a rerun continues it only with the same settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json

SETTINGS_NAME = "settings.json"


def recorded_settings(out: Path, results: str = "*.png") -> dict[str, Any]:
    """The settings that an earlier run recorded in `out`; empty if it wrote none of its `results` with them."""
    path, made = out / SETTINGS_NAME, out.rglob(results)
    return read_json(path) if path.exists() and next(made, None) is not None else {}


def check_settings(out: Path, settings: dict[str, Any], results: str = "*.png") -> None:
    """Raises UserError if `out` was begun with other settings, and names those that differ, or if it holds results that
    nobody recorded."""
    if not (out / SETTINGS_NAME).exists() and (foreign := next(out.rglob(results), None)) is not None:
        raise UserError(
            f"{out} holds {foreign.relative_to(out)}, which this command did not write; name another --out folder"
        )
    recorded = recorded_settings(out, results)
    changed = [
        f"{name} was {recorded.get(name)!r} and is now {value!r}"
        for name, value in settings.items()
        if recorded and recorded.get(name) != value
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
