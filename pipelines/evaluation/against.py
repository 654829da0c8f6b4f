"""An earlier evaluation, repeated by its protocol and compared figure by figure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json
from common.own_code import refuse_code
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.protocol import NOT_REPEATED

NO_FIGURES = {"model", "data", "labels", "notes", "protocol"}  # keys of the file that are none
# Of the protocol: what cannot be the same, and what may differ as long as what it names is the same.
MAY_DIFFER = {"date", "asked", "path"}


def read_evaluation(path: str) -> dict[str, Any]:
    """Raises UserError for a file that is no evaluation with a protocol."""
    if not Path(path).is_file():
        raise UserError(f"against={path}: there is no such file; name one that `zellige evaluate --out` wrote")
    record = read_json(Path(path))
    if not isinstance(record.get("protocol"), dict):
        raise UserError(
            f"against={path} holds no protocol, expected a file that `zellige evaluate --out` wrote; one of an earlier "
            "version cannot be repeated: evaluate the model anew"
        )
    return record


def repeating(config: EvaluateConfig, record: dict[str, Any]) -> EvaluateConfig:
    """The config of the recorded evaluation; what is given beside `against` goes in the place of what it had. Raises
    UserError for options that this version does not know."""
    return with_recorded(config, record["protocol"].get("asked", {}), str(config.against))


def with_recorded(config: Any, recorded: dict[str, Any], path: str) -> Any:
    known = {field.name: field for field in fields(config)}
    if not isinstance(recorded, dict):
        raise UserError(f"against={path} does not say what was asked for; it was edited: evaluate the model anew")
    if unknown := recorded.keys() - known.keys():
        raise UserError(
            f"against={path} was asked for {', '.join(sorted(unknown))}, which this version does not know; repeat it "
            "with the version that wrote it"
        )
    taken: dict[str, Any] = {}
    for name, value in recorded.items():
        own = getattr(config, name)
        if is_dataclass(own):
            taken[name] = with_recorded(own, value, path)
        elif own == known[name].default and name not in NOT_REPEATED:
            refuse_code(value, name, f"against={path}")
            taken[name] = value
    try:
        return replace(config, **taken)
    except TypeError as error:
        raise UserError(
            f"against={path} was asked for values that no option takes ({error}); it was edited: evaluate anew"
        ) from error


def compared(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], str]:
    """Lines on the figures that differ and on what differs in the protocol, and a phrase that sums up."""
    names = [*dict.fromkeys([*before, *now])]
    figures = [name for name in names if name not in NO_FIGURES]
    different = [name for name in figures if name not in before or name not in now or before[name] != now[name]]
    lines = [difference(name, before.get(name), now.get(name)) for name in different]
    apart = [
        f"  {name}: was {was!r}, is {is_now!r}" for name, was, is_now in unlike(before["protocol"], now["protocol"])
    ]
    if apart:
        lines += ["what differs in the protocol:", *apart]
    elif different:
        lines.append("nothing differs in the protocol: something is not determined by it")
    if different:
        return lines, f"{len(different)} of {len(figures)} figures differ"
    return lines, f"all {len(figures)} figures are exactly the same"


def difference(name: str, was: Any, is_now: Any) -> str:
    if isinstance(was, int | float) and isinstance(is_now, int | float):
        relative = f", {(is_now - was) / abs(was):+.2e} of it" if was and math.isfinite(was) else ""
        return f"{name:<34}{was!r} -> {is_now!r} ({is_now - was:+.3g}{relative})"
    if was is None or is_now is None:
        return f"{name:<34}{'only now' if was is None else 'only before'}"
    return f"{name:<34}differs"


def unlike(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Leaves of the two protocols that are not the same, by path."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            if name not in MAY_DIFFER:
                yield from unlike(before.get(name), now.get(name), f"{path}.{name}" if path else name)
    elif before != now:
        yield path, before, now
