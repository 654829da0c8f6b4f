"""Mistakes in options and recipes as one sentence: the field's path, what was expected and what was given."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import UserError
from common.wording import either, one_line
from pipelines.fields import Option


def check_fields(recipe: Any, options: Mapping[str, Option], where: str, prefix: str = "") -> None:
    """Raises UserError for a key of the recipe that is no field, or a value where fields should stand."""
    for key, value in recipe.items():
        path = f"{prefix}{key}"
        if any(name.startswith(f"{path}.") for name in options):
            if not isinstance(value, dict):
                raise UserError(f"{where}{path}: expected fields below it, got {value!r}")
            check_fields(value, options, where, f"{path}.")
        elif path not in options:
            raise UserError(f"{where}{unknown_field(path, options)}")


def unknown_field(path: str, options: Mapping[str, Option]) -> str:
    """Names the fields that were probably meant: of the same group, or of the same name elsewhere."""
    groups = {name[:dot] for name in options for dot in range(len(name)) if name[dot] == "."}
    names = {name: name.rpartition(".") for name in sorted({*options, *groups})}
    parent, _, last = path.rpartition(".")
    siblings = {own: name for name, (group, _, own) in names.items() if group == parent}
    meant = (
        [siblings[own] for own in difflib.get_close_matches(last, siblings, n=1)]
        or [name for own, name in siblings.items() if is_short_for(last, own)]
        or [name for name, (_, _, own) in names.items() if own == last]
        or [name for name, (_, _, own) in names.items() if is_short_for(last, own)]
    )
    return f"there is no field {path}; " + (
        f"did you mean {either(meant[:3])}?" if meant else "see --help for all fields"
    )


def is_short_for(given: str, name: str) -> bool:
    """Whether `given` is made of a name's initials, as lr of learning_rate, or one holds the other, as batch_size and
    batch do."""
    if min(len(given), len(name)) > 2 and (given in name or name in given):
        return True
    return len(given) > 1 and given == "".join(word[:1] for word in name.split("_"))


def check_arguments(arguments: Sequence[str], options: Mapping[str, Option]) -> None:
    """Raises UserError for a group of fields that is given a value, as in `--data my_photos`."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, _, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name in options:
            continue
        inner = [path for path in options if path.startswith(f"{name}.")]
        if inner:
            value = value or following
            first = next((path for path in inner if path in (f"{name}.path", f"{name}.kind")), None)
            meant = f"did you mean --{first} {value}?" if first and value[:2] not in ("", "--") else "see --help"
            raise UserError(f"{name} is a group of fields, expected one of {', '.join(inner[:4])} ...; {meant}")


def explain(message: str, options: Mapping[str, Option], arguments: Sequence[str] = ()) -> str:
    """jsonargparse's message as one sentence with the field's path, what was expected and what was given."""
    if match := re.match(r'Parser key "([^"]+)":', message):
        path, given = match[1], re.search(r"(?:Got|Given) value: (.*)", message)
        if path in options and given:
            if "number" in options[path].type and re.fullmatch(r"[+-]?(nan|inf|infinity)", given[1].lower()):
                return f"{path}: expected a finite number, got {given[1]}"
            return f"{path}: expected {options[path].type}{example(options[path].type, given[1])}, got {given[1]!r}"
    if (match := re.match(r"argument --(\S+): expected one argument", message)) and match[1] in options:
        expected = options[match[1]]
        return f"{match[1]}: expected {expected.type if expected.type != 'text' else 'a value'}, got nothing"
    if match := re.match(r"unrecognized arguments: --([^ =]+)", message):
        return unknown_field(match[1], options)
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        missing = [path for path, option in options.items() if option.required and not is_given(path, arguments)]
        hint = f"did you mean --{missing[0]} {match[1]}?" if missing else "see --help"
        return f"unexpected argument {match[1]!r}; options are given as --NAME VALUE, {hint}"
    if match := re.match(r"the following arguments are required: (.*)", message):
        return f"missing: {', '.join('--' + name for name in match[1].split(', '))}; see --help"
    return one_line(message)


def is_given(path: str, arguments: Sequence[str]) -> bool:
    return any(argument == f"--{path}" or argument.startswith(f"--{path}=") for argument in arguments)


def example(expected: str, given: str) -> str:
    """` such as [128,128]` where two whole numbers were expected and one was given, or [7,9] where 7,9 for a list."""
    numbers = re.findall(r"\d+(?:\.\d+)?", given) or ["256"]
    if expected == "a list of whole numbers":
        return f" such as [{','.join(numbers)}]"
    if expected not in ("two whole numbers", "two numbers"):
        return ""
    first, second = (numbers * 2)[:2]
    return f" such as [{first},{second}]"
