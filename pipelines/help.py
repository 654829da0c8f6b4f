"""What `--help` shows: every option of a command with its meaning, its type in words, and its default."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import yaml

from pipelines.fields import Choice, Option
from training.run_folder import flat

INDENT = 26  # columns before the text of an option
WIDEST = 100


def help_of(
    usage: str,
    config_class: type,
    options: Mapping[str, Option],
    selected: Mapping[str, Choice] | None = None,
    recipe: Mapping[str, Any] | None = None,
    note: str = "",
) -> str:
    """options: by path, those without a dot first; recipe: nested values that hold in place of the defaults; note:
    what else stands at the top."""
    width = min(WIDEST, shutil.get_terminal_size().columns)
    values = flat(recipe or {})
    lines = [f"usage: {usage}", "", *textwrap.wrap(f"{summary_of(config_class)} {note}".strip(), width), ""]
    shown: set[str] = set()
    for group, group_class in {"": config_class, **groups_of(config_class, selected or {})}.items():
        own = [path for path in options if path not in shown and path.rpartition(".")[0] == group]
        if group and own:
            title = f"{group}: {summary_of(group_class)}".removesuffix(": ")
            lines += ["", *textwrap.wrap(title, width), ""]
        for path in own:
            lines += option_lines(path, options[path], values, width)
        shown.update(own)
        if not group:
            lines += ["  -h, --help              this text"]
    return "\n".join(lines)


def option_lines(path: str, option: Option, values: Mapping[str, Any], width: int) -> list[str]:
    """`  --train.steps STEPS     optimiser steps of the whole run (whole number; default 10000)`"""
    remarks = [] if option.type == "text" else [option.type.removeprefix("a ")]
    default = values.get(path, option.default)
    if option.required and path not in values:
        remarks.insert(0, "required")
    elif default not in (None, ""):
        remarks.append(f"default {as_given(default)}")
    text = f"{option.comment} ({'; '.join(remarks)})" if remarks else option.comment
    name = f"  --{path} {path.rpartition('.')[2].upper()}"
    wrapped = textwrap.wrap(text.strip(), width - INDENT)
    if len(name) > INDENT - 2:
        return [name, *(" " * INDENT + line for line in wrapped)]
    first, *others = wrapped or [""]
    return [f"{name:<{INDENT}}{first}".rstrip(), *(" " * INDENT + line for line in others)]


def as_given(value: Any) -> str:
    """A value as one writes it on the command line: `true`, `[0.9,0.99]`."""
    if isinstance(value, list | tuple):
        return f"[{','.join(as_given(one) for one in value)}]"
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value).removesuffix("...\n").strip() if isinstance(value, bool) else str(value)


def groups_of(config_class: type, selected: Mapping[str, Choice], prefix: str = "") -> dict[str, type]:
    """The config classes inside a config class by path, in the order of the fields."""
    groups: dict[str, type] = {}
    for name, annotation in get_type_hints(config_class).items():
        path = f"{prefix}{name}"
        inner = selected[path].config_class if path in selected else annotation
        if isinstance(inner, type) and is_dataclass(inner):
            groups |= {path: inner, **groups_of(inner, selected, f"{path}.")}
    return groups


def summary_of(config_class: type) -> str:
    """The first paragraph of a config class's docstring on one line; empty where the class has none of its own."""
    document = config_class.__doc__ or ""
    if document.startswith(f"{config_class.__name__}("):  # dataclasses write the signature where there is none
        return ""
    return " ".join(inspect.cleandoc(document).partition("\n\n")[0].split())
