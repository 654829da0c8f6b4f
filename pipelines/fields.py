"""The fields of config classes as options: their paths, types in words, and the comments beside them."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from common.errors import UserError
from common.wording import either

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
NUMERALS = {1: "one", 2: "two", 3: "three", 4: "four"}


class Option(NamedTuple):
    type: str  # in words, as in "expected a whole number"
    comment: str  # as it stands beside the field
    default: Any = None
    required: bool = False


class Choice(NamedTuple):
    kind: str
    config_class: type
    defaults: dict[str, Any]  # of its fields, where they are not those of the class
    others: list[str]  # kinds


def kinds_of(annotation: Any) -> dict[str, type]:
    """The dataclasses that a field may be, by the `kind` that each has; none where the field is something else."""
    options: tuple[Any, ...] = get_args(annotation) or (annotation,)
    classes = [inner for inner in options if isinstance(inner, type) and is_dataclass(inner)]
    hints = [(inner, get_type_hints(inner).get("kind")) for inner in classes]
    return {get_args(kind)[0]: inner for inner, kind in hints if get_origin(kind) is Literal}


def select_kinds(
    config_class: type, recipe: Any, given: Mapping[str, str], defaults: Any = None, prefix: str = ""
) -> dict[str, Choice]:
    """The choice for each field with a kind, by path, such as `model` and `model.quantizer`: the kind of the arguments,
    else of the recipe, else the default one. Raises UserError for a kind that there is not."""
    recipe = recipe if isinstance(recipe, dict) else {}
    selected: dict[str, Choice] = {}
    for field in fields(config_class):
        path, annotation = f"{prefix}{field.name}", get_type_hints(config_class)[field.name]
        default = getattr(defaults, field.name, None) if defaults is not None else default_of(field)
        inner_recipe, inner_class = recipe.get(field.name), annotation
        if kinds := kinds_of(annotation):
            in_recipe = inner_recipe.get("kind") if isinstance(inner_recipe, dict) else None
            kind = given.get(f"{path}.kind") or in_recipe or getattr(default, "kind", next(iter(kinds)))
            if kind not in kinds:
                raise UserError(f"{path}.kind: expected one of {', '.join(kinds)}, got {kind!r}")
            inner_class = kinds[kind]
            if type(default) is not inner_class:
                default = None
            values = {name.name: getattr(default, name.name) for name in fields(inner_class)} if default else {}
            selected[path] = Choice(kind, inner_class, values, [other for other in kinds if other != kind])
        if isinstance(inner_class, type) and is_dataclass(inner_class):
            selected.update(select_kinds(inner_class, inner_recipe, given, default, f"{path}."))
    return selected


def default_of(field: Field) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def options_of(
    config_class: type, selected: Mapping[str, Choice] | None = None, prefix: str = "", defaults: Any = None
) -> dict[str, Option]:
    """All options of a dataclass by path, such as `train.steps`, those of nested dataclasses included.

    `selected` gives the class of a field that a kind selects; `defaults`, an object or its fields by name, the values
    that hold in place of those of the class.
    """
    hints, comments = get_type_hints(config_class), comments_of(config_class)
    options: dict[str, Option] = {}
    for field in own_first(config_class):
        path = f"{prefix}{field.name}"
        choice = selected.get(path) if selected else None
        inner = choice.config_class if choice else hints[field.name]
        default = getattr(defaults, field.name) if defaults is not None else default_of(field)
        if is_dataclass(inner) and isinstance(inner, type):
            of_inner = default if type(default) is inner else None
            options.update(options_of(inner, selected, f"{path}.", of_inner))
            if choice:
                meaning = f"the fields that follow are those of {choice.kind}" if choice.others else ""
                kinds = either([choice.kind, *choice.others])
                options[f"{path}.kind"] = Option(kinds, meaning, choice.kind)
        else:
            required = field.default is MISSING and field.default_factory is MISSING
            options[path] = Option(type_in_words(hints[field.name]), comments.get(field.name, ""), default, required)
    return options


def own_first(config_class: type) -> list[Field]:
    """The fields of a config before those that it shares with others, which a dataclass inherits first."""
    names = [name for each in config_class.__mro__ for name in vars(each).get("__annotations__", {})]
    return sorted(fields(config_class), key=lambda field: names.index(field.name))


def type_in_words(annotation: Any) -> str:
    """`a whole number`, `no, bf16 or fp16`; of what may be None the other types."""
    if get_origin(annotation) is Literal:
        return either([str(value) for value in get_args(annotation)])
    if get_origin(annotation) is tuple:
        members = get_args(annotation)
        several = type_in_words(members[0]).removeprefix("a ") + "s"
        return f"a list of {several}" if members[-1] is Ellipsis else f"{NUMERALS[len(members)]} {several}"
    if annotation in WORDS:
        return WORDS[annotation]
    members = tuple(member for member in get_args(annotation) if member is not NoneType)
    return either([type_in_words(member) for member in members]) if members else str(annotation)


def comments_of(config_class: type) -> dict[str, str]:
    """The comment on the last line of each field's definition, inherited ones too: configs and their help are one
    thing."""
    comments: dict[str, str] = {}
    for each in reversed(config_class.__mro__):
        if is_dataclass(each):
            comments |= own_comments(each)
    return comments


def own_comments(config_class: type) -> dict[str, str]:
    """Those of `comments_of` that stand in the class itself."""
    source = textwrap.dedent(inspect.getsource(config_class))
    on_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    return {
        node.target.id: on_line[node.end_lineno]
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno in on_line
    }
