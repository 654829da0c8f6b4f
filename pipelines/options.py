"""Command-line options and YAML recipes as frozen dataclasses: mistakes are told with the field's path."""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import io
import math
import re
import textwrap
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

import configs
from common.errors import UserError

Config = TypeVar("Config")


class Option(NamedTuple):
    type: str  # as the dataclass annotates it; of a Literal or a bool its choices
    comment: str  # as it stands beside the field


def read_options(command: str, config_class: type[Config], arguments: Sequence[str]) -> Config:
    """A command's options, `--field value`, as `config_class`. Raises UserError; `--help` exits."""
    parser = new_parser(command, config_class)
    parser.add_class_arguments(config_class)
    options = options_of(config_class)
    values = parse(parser, options, arguments)
    for name, option in options.items():
        if option.type == "str" and values.get(name) == "":  # they are paths, and Path("") is the working folder
            raise UserError(f"{name} is empty, expected: {option.comment}")
    return config_class(**values)


def read_recipe(
    command: str, config_class: type[Config], recipes: str, arguments: Sequence[str]
) -> tuple[Config, Path]:
    """A training command's config and run folder, from `--config RECIPE`, `--run RUN` and `--field value`.

    The recipe is a YAML file, or the bare name of one in the package folder configs/`recipes`. Where a field is one of
    several dataclasses, such as `model`, its `kind` selects the class before anything else is read, so that every
    other field is checked against exactly that class. `--PATH.kind` in place of the recipe's kind keeps those of its
    fields that both kinds have. Raises UserError; `--help` prints and exits.
    """
    named, rest = split_config(command, arguments)
    asked_for_help = any(argument in ("-h", "--help") for argument in rest)
    if named is None and not asked_for_help:
        raise UserError(f"{command} needs a recipe, got none; {recipes_help(recipes)}")
    path = None if named is None else find_recipe(named, recipes)
    recipe = {} if path is None else read_yaml(path)
    replaced = kinds_given(rest)
    selected = select_kinds(config_class, recipe, replaced)

    parser = new_parser(command, config_class)
    parser.usage = f"zellige {command} --config RECIPE [--run RUN] [--FIELD VALUE ...]"
    parser.add_argument("--config", action="config", help=f"the recipe: {recipes_help(recipes)}")
    parser.add_argument("--run", type=str, help="run folder, begun or continued (default: runs/NAME OF THE RECIPE)")
    add_config(parser, config_class, selected)
    parser.epilog = " ".join(
        f"The fields of `{name}` are those of kind {choice.kind}; give --{name}.kind for those of "
        f"{', '.join(choice.others)}."
        for name, choice in selected.items()
        if choice.others
    )
    options = {"run": Option("str", ""), **options_of(config_class, selected)}
    for kind_path, kind in replaced.items():
        keep_shared_fields(recipe, kind_path, kind, options)
    if path is not None:
        check_fields(recipe, options, f"{path}: ")
    given = [] if path is None else ["--config", yaml.safe_dump(recipe) if replaced else str(path)]
    values = parse(parser, options, [*given, *rest])
    run = values.pop("run")
    if run == "":
        raise UserError("run is empty, expected: a folder, begun or continued; leave --run out for one in runs/")
    values.pop("config")
    return config_class(**values), Path(run or Path("runs") / (path.stem if path is not None else command))


def split_config(command: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The `--config` of the arguments, if any, and the others."""
    peek = ArgumentPeek(add_help=False, allow_abbrev=False)
    peek.add_argument("--config", action="append", default=[])
    named, rest = peek.parse_known_args(arguments)
    if len(named.config) > 1:
        raise UserError(f"{command} takes one --config, got {len(named.config)}: {', '.join(named.config)}")
    return named.config[0] if named.config else None, rest


def kinds_given(arguments: Sequence[str]) -> dict[str, str]:
    """Each `--PATH.kind VALUE` of the arguments."""
    paths = {match[1] for argument in arguments if (match := re.match(r"--([\w.]+\.kind)(=|$)", argument))}
    peek = ArgumentPeek(add_help=False, allow_abbrev=False)
    for path in paths:
        peek.add_argument(f"--{path}")
    return vars(peek.parse_known_args(arguments)[0])


def keep_shared_fields(recipe: dict[str, Any], kind_path: str, kind: str, options: Mapping[str, Option]) -> None:
    """Where the recipe has another kind at `kind_path`, removes its fields that `kind` does not have."""
    *groups, _ = kind_path.split(".")
    values: Any = recipe
    for name in groups:
        values = values.get(name) if isinstance(values, dict) else None
    if isinstance(values, dict) and values.get("kind") != kind:
        prefix = ".".join(groups)
        for name in list(values):
            if not any(option == f"{prefix}.{name}" or option.startswith(f"{prefix}.{name}.") for option in options):
                del values[name]
        values.pop("kind", None)


class ArgumentPeek(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


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


def add_config(parser: ArgumentParser, config_class: type, selected: Mapping[str, Choice], prefix: str = "") -> None:
    """Adds the fields of a config class, those of the kinds selected inside it each as a group of its own."""
    inner = {path: choice for path, choice in selected.items() if path.startswith(prefix)}
    own = {path.removeprefix(prefix).split(".")[0] for path in inner}
    parser.add_class_arguments(config_class, prefix.removesuffix(".") or None, skip=own)
    for name in sorted(own):
        path = f"{prefix}{name}"
        choice = selected.get(path)
        add_config(parser, choice.config_class if choice else get_type_hints(config_class)[name], selected, f"{path}.")
        if choice:
            flat = {f"{path}.{field}": value for field, value in choice.defaults.items()}
            parser.set_defaults({field: value for field, value in flat.items() if not is_dataclass(value)})


def find_recipe(name: str, recipes: str) -> Path:
    """The YAML file that `name` names: a path, or a recipe of the package folder configs/`recipes`."""
    packaged = Path(str(files(configs))) / recipes / f"{name}.yaml"
    for path in (Path(name), packaged):
        if path.is_file():
            return path
    raise UserError(f"there is no recipe {name}; {recipes_help(recipes)}")


def recipes_help(recipes: str) -> str:
    folder = Path(str(files(configs))) / recipes
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


def new_parser(command: str, config_class: type) -> ArgumentParser:
    return ArgumentParser(
        prog=f"zellige {command}", description=config_class.__doc__, exit_on_error=False, allow_abbrev=False
    )


def options_of(config_class: type, selected: Mapping[str, Choice] | None = None, prefix: str = "") -> dict[str, Option]:
    """All options of a dataclass by path, such as `train.steps`, those of nested dataclasses included.

    `selected` gives the class of a field that a kind selects.
    """
    hints, comments = get_type_hints(config_class), comments_of(config_class)
    options: dict[str, Option] = {}
    for field in fields(config_class):
        path = f"{prefix}{field.name}"
        inner = selected[path].config_class if selected and path in selected else hints[field.name]
        if is_dataclass(inner) and isinstance(inner, type):
            options.update(options_of(inner, selected, f"{path}."))
        else:
            options[path] = Option(choices_of(hints[field.name]) or str(field.type), comments.get(field.name, ""))
    return options


def choices_of(annotation: Any) -> str | None:
    """`no, bf16 or fp16` for a Literal, by itself or beside other types; None for what has no named choices."""
    if annotation is bool:
        return "true or false"
    members = (annotation,) if get_origin(annotation) is Literal else get_args(annotation)
    if not any(get_origin(member) is Literal for member in members):
        return None
    names: list[str] = []
    for member in members:
        if get_origin(member) is Literal:
            names += map(str, get_args(member))
        else:
            names.append("None" if member is NoneType else getattr(member, "__name__", str(member)))
    return either(names)


def either(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`"""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


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
        values = parser.parse_args(with_bare_flags(arguments, options))
        for path, value in vars(values.as_flat()).items():
            for number in value if isinstance(value, list | tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise UserError(f"{path}: expected a finite number, got {number}")
        return vars(parser.instantiate(values))
    except ArgumentError as error:
        raise UserError(explain(str(error), options)) from error


def with_bare_flags(arguments: Sequence[str], options: Mapping[str, Option]) -> list[str]:
    """`--archive` by itself means `--archive true`."""
    completed = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        completed.append(argument)
        option = options.get(argument.removeprefix("--")) if argument.startswith("--") else None
        if option is not None and option.type == "true or false" and following.startswith("--"):
            completed.append("true")
    return completed


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


def explain(message: str, options: Mapping[str, Option]) -> str:
    """jsonargparse's message as one sentence with the field's path, what was expected and what was given."""
    if match := re.match(r'Parser key "([^"]+)":', message):
        path, given = match[1], re.search(r"(?:Got|Given) value: (.*)", message)
        if path in options and given:
            if "float" in options[path].type and re.fullmatch(r"[+-]?(nan|inf|infinity)", given[1].lower()):
                return f"{path}: expected a finite number, got {given[1]}"
            return f"{path}: expected {options[path].type}, got {given[1]!r}"
    if (match := re.match(r"argument --(\S+): expected one argument", message)) and match[1] in options:
        return f"{match[1]}: expected {options[match[1]].type}, got nothing"
    if match := re.match(r"unrecognized arguments: --([^ =]+)", message):
        return unknown_field(match[1], options)
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        return f"unexpected argument {match[1]!r}; options are given as --NAME VALUE, see --help"
    if match := re.match(r"the following arguments are required: (.*)", message):
        return f"missing: {', '.join('--' + name for name in match[1].split(', '))}; see --help"
    return one_line(message)


def one_line(message: str) -> str:
    return " ".join(message.split())
