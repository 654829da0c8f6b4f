"""Command-line options and YAML recipes as frozen dataclasses: mistakes are told with the field's path."""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from training.errors import UserError

Config = TypeVar("Config")


class Option(NamedTuple):
    type: str  # as the dataclass annotates it
    comment: str  # as it stands beside the field


def read_options(command: str, config_class: type[Config], arguments: Sequence[str]) -> Config:
    """A command's options, `--field value`, as `config_class`. Raises UserError; `--help` exits."""
    parser = new_parser(command, config_class)
    parser.add_class_arguments(config_class)
    return config_class(**parse(parser, options_of(config_class), arguments))


def read_recipe(
    command: str,
    config_class: type[Config],
    model_classes: Mapping[str, type],
    recipes: str,
    arguments: Sequence[str],
) -> tuple[Config, Path]:
    """A training command's config and run folder, from `--config RECIPE`, `--run RUN` and `--field value`.

    The recipe is a YAML file, or the bare name of one in the package folder configs/`recipes`. Its
    `model.kind` selects the class of `model` before anything else is read, so that every other field is
    checked against exactly that class. Raises UserError; `--help` prints and exits.
    """
    first, rest = split_config(command, arguments)
    asked_for_help = any(argument in ("-h", "--help") for argument in rest)
    if first.config is None and not asked_for_help:
        raise UserError(f"{command} needs a recipe, got none; {recipes_help(recipes)}")
    path = None if first.config is None else find_recipe(first.config, recipes)
    recipe = {} if path is None else read_yaml(path)
    kind = first.kind or model_kind(recipe) or next(iter(model_classes))
    if kind not in model_classes:
        raise UserError(f"model.kind: expected one of {', '.join(model_classes)}, got {kind!r}")
    model_class = model_classes[kind]

    parser = new_parser(command, config_class)
    parser.usage = f"zellige {command} --config RECIPE [--run RUN] [--FIELD VALUE ...]"
    parser.add_argument("--config", action="config", help=f"the recipe: {recipes_help(recipes)}")
    parser.add_argument("--run", type=str, help="run folder, begun or continued (default: runs/NAME OF THE RECIPE)")
    parser.add_class_arguments(config_class, skip={"model"})
    parser.add_class_arguments(model_class, "model")
    if others := [other for other in model_classes if other != kind]:
        parser.epilog = (
            f"The fields of `model` are those of kind {kind}; give --model.kind for those of {', '.join(others)}."
        )
    options = {"run": Option("str", ""), **options_of(config_class, {"model": model_class})}
    if path is not None:
        check_fields(recipe, options, f"{path}: ")
    given = ["--config", str(path)] if path is not None else []
    values = parse(parser, options, [*given, *rest])
    run = values.pop("run") or Path("runs") / (path.stem if path is not None else command)
    values.pop("config")
    return config_class(**values), Path(run)


def split_config(command: str, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """`--config` and `--model.kind` of the arguments, and the arguments without `--config`."""
    peek = ArgumentPeek(add_help=False, allow_abbrev=False)
    peek.add_argument("--config", action="append")
    first, rest = peek.parse_known_args(arguments)
    if first.config and len(first.config) > 1:
        raise UserError(f"{command} takes one --config, got {len(first.config)}: {', '.join(first.config)}")
    peek.add_argument("--model.kind", dest="kind")
    kind = peek.parse_known_args(rest)[0].kind
    return argparse.Namespace(config=first.config[0] if first.config else None, kind=kind), rest


class ArgumentPeek(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def find_recipe(name: str, recipes: str) -> Path:
    """The YAML file that `name` names: a path, or a recipe of the package folder configs/`recipes`."""
    packaged = Path(str(files("configs"))) / recipes / f"{name}.yaml"
    for path in (Path(name), packaged):
        if path.is_file():
            return path
    raise UserError(f"there is no recipe {name}; {recipes_help(recipes)}")


def recipes_help(recipes: str) -> str:
    folder = Path(str(files("configs"))) / recipes
    return f"give a YAML file or one of {', '.join(sorted(path.stem for path in folder.glob('*.yaml')))}"


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe as nested dicts. Raises UserError when it is not one."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {one_line(str(error))}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is not a recipe: expected fields such as `model:` and `train:`")
    return recipe


def model_kind(recipe: dict[str, Any]) -> str | None:
    model = recipe.get("model")
    return model.get("kind") if isinstance(model, dict) else None


def new_parser(command: str, config_class: type) -> ArgumentParser:
    return ArgumentParser(
        prog=f"zellige {command}", description=config_class.__doc__, exit_on_error=False, allow_abbrev=False
    )


def options_of(config_class: type, selected: Mapping[str, type] | None = None, prefix: str = "") -> dict[str, Option]:
    """All options of a dataclass by path, such as `train.steps`, those of nested dataclasses included.

    `selected` gives the class of a field that a kind selects.
    """
    hints, comments = get_type_hints(config_class), comments_of(config_class)
    options: dict[str, Option] = {}
    for field in fields(config_class):
        inner = (selected or {}).get(field.name, hints[field.name])
        if is_dataclass(inner) and isinstance(inner, type):
            options.update(options_of(inner, prefix=f"{prefix}{field.name}."))
        else:
            options[f"{prefix}{field.name}"] = Option(str(field.type), comments.get(field.name, ""))
    return options


def comments_of(config_class: type) -> dict[str, str]:
    """The comment on the last line of each field's definition: configs and their help are one thing."""
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


def parse(parser: ArgumentParser, options: Mapping[str, Option], arguments: Sequence[str]) -> dict[str, Any]:
    """The parsed values, nested configs built. Raises UserError."""
    document(parser, options)
    try:
        return vars(parser.instantiate(parser.parse_args(list(arguments))))
    except ArgumentError as error:
        raise UserError(explain(str(error), options)) from error


def document(parser: ArgumentParser, options: Mapping[str, Option]) -> None:
    """Puts the comments of the config classes into `--help`, and hides options that name files."""
    for action in parser._actions:
        if action.dest in options and options[action.dest].comment:
            action.help = options[action.dest].comment
        elif any(name.startswith(f"{action.dest}.") for name in options):
            action.help = argparse.SUPPRESS


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
    """Names the field that was probably meant: one of the same group, or one of the same name elsewhere."""
    groups = {name[:dot] for name in options for dot in range(len(name)) if name[dot] == "."}
    names = {name: name.rpartition(".") for name in sorted({*options, *groups})}
    parent, _, last = path.rpartition(".")
    siblings = {own: name for name, (group, _, own) in names.items() if group == parent}
    close = [siblings[own] for own in difflib.get_close_matches(last, siblings, n=1)]
    meant = close or [name for name, (_, _, own) in names.items() if own == last]
    return f"there is no field {path}; " + (f"did you mean {meant[0]}?" if meant else "see --help for all fields")


def explain(message: str, options: Mapping[str, Option]) -> str:
    """jsonargparse's message as one sentence with the field's path, what was expected and what was given."""
    if match := re.match(r'Parser key "([^"]+)":', message):
        path, given = match[1], re.search(r"(?:Got|Given) value: (.*)", message)
        if path in options and given:
            return f"{path}: expected {options[path].type}, got {given[1]!r}"
    if match := re.match(r"unrecognized arguments: (?:--)?([^ =]+)", message):
        return unknown_field(match[1], options)
    if match := re.match(r"the following arguments are required: (.*)", message):
        return f"missing: {', '.join('--' + name for name in match[1].split(', '))}; see --help"
    return one_line(message)


def one_line(message: str) -> str:
    return " ".join(message.split())
