"""What a folder of results was made with: a rerun continues it only with the same settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.errors import UserError
from training.files import read_json

SETTINGS_NAME = "settings.json"


def recorded_settings(out: Path) -> dict[str, Any]:
    """The settings that an earlier run recorded in `out`; empty if it made no image with them."""
    path, made = out / SETTINGS_NAME, out.rglob("*.png")
    return read_json(path) if path.exists() and next(made, None) is not None else {}


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raises UserError if `out` was begun with other settings, and names those that differ."""
    recorded = recorded_settings(out)
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
