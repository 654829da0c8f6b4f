"""Command-line options and YAML recipes as frozen dataclasses: mistakes are told with the field's path."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

import configs
from common.errors import FieldError, UserError
from common.files import read_json
from common.own_code import refuse_code
from common.runs import RUN_CONFIG_NAME, SEQUENCE, TABLE, VAE, stage_of_recipe, stage_of_run
from common.safe_yaml import load_yaml
from common.wording import either, one_line
from pipelines.fields import Choice, Option, options_of, select_kinds
from pipelines.help import help_of
from pipelines.mistakes import check_arguments, check_fields, explain, is_given

Config = TypeVar("Config")

NUMBER_OR_NAME = "a whole number or text"  # type of an option in words
ODD_NUMBER = re.compile(r"(?!-?(?:0|[1-9]\d*)$)[+-]?\d[\da-fA-FxXo_:]*")  # 007, 1_000, 0x1f, +7: names, if anything
OF_CODE = ("train.evaluate_features",)  # options that may name a function, MODULE:FUNCTION
STAGES = {  # by the folder of their recipes: the command that trains them, and what they are
    "stage1": ("train-stage1", "stage one"),
    "vae": ("train-vae", VAE),
    "tables": ("train-table", TABLE),
    "sequences": ("train-sequence", SEQUENCE),
    "stage2": ("train-stage2", "stage two"),
}


def read_options(
    command: str,
    config_class: type[Config],
    arguments: Sequence[str],
    listed: str | None = None,
    first: str | None = None,
) -> Config:
    """A command's options, `--field value`, as `config_class`. listed: the field that takes all words which are no
    options and no values of them; first: the field that the first word is where it is no option. Raises UserError;
    `--help` exits."""
    options = options_of(config_class)
    if asks_for_help(arguments):
        needed = "".join(
            {listed: f"{path.upper()} [...] ", first: f"{path.upper()} "}.get(
                path, f"--{path} {path.rpartition('.')[2].upper()} "
            )
            for path in options
            if options[path].required
        )
        print(help_of(f"zellige {command} {needed}[--OPTION VALUE ...]", config_class, options))
        sys.exit(0)
    if first is not None and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{first}", *arguments]
    if listed is not None:
        arguments = with_list(listed, arguments)
        if not is_given(listed, arguments):
            raise UserError(f"{command} got no {listed}, expected {options[listed].comment}; see --help")
    parser = new_parser()
    parser.add_class_arguments(config_class)
    values = parse(parser, options, arguments)
    for name, option in options.items():
        if option.type == "text" and values.get(name) == "":  # they are paths, and Path("") is the working folder
            raise UserError(f"{name} is empty, expected: {option.comment}")
    return config_class(**values)


def read_recipe(
    command: str, config_class: type[Config], recipes: str, arguments: Sequence[str]
) -> tuple[Config, Path]:
    """A training command's config and run folder, from `--config RECIPE`, `--run RUN` and `--field value`.

    The recipe is a YAML file, or the bare name of one in the package folder configs/`recipes`. Where a field is one of
    several dataclasses, such as `model`, its `kind` selects the class before anything else is read, so that every
    other field is checked against exactly that class. `--PATH.kind` in place of the recipe's kind keeps those of its
    fields that both kinds have. `--from MODEL` is `--start_from MODEL` with what MODEL is in place of the recipe's
    `model`. Raises UserError; `--help` prints and exits.
    """
    named, rest = split_config(command, arguments)
    begun, rest = split_start(rest, recipes, named)
    if named is None and not asks_for_help(rest):
        meant = next((word for word in rest if word in recipe_names(recipes)), None)
        hint = f"did you mean --config {meant}?" if meant else recipes_help(recipes)
        raise UserError(f"{command} needs a recipe, got none; {hint}")
    path = None if named is None else find_recipe(named, recipes)
    recipe = {} if path is None else read_yaml(path)
    check_stage(recipe, str(path), recipes)
    if begun is not None:
        recipe |= placed(begun, recipe)
    replaced = kinds_given(rest)
    try:
        selected = select_kinds(config_class, recipe, replaced)
    except UserError as error:
        if begun is None:
            raise
        raise UserError(f"{command} --from {begun['start_from']}: {error}") from None
    suffix = {"stage2": "_prior", "vae": "_vae"}.get(recipes)
    behind = f", and {suffix} behind it where stage one has a recipe of that name" if suffix else ""
    options = {
        "config": Option("text", f"the recipe: {recipes_help(recipes)}", required=True),
        "run": Option("text", f"run folder, begun or continued; left out: runs/NAME OF THE RECIPE{behind}"),
        "device": Option("text", "cpu, cuda, cuda:1, mps ...; left out: the fastest there is, each process its own"),
        **options_of(config_class, selected),
    }
    if "start_from" in options:
        options["from"] = Option("text", "run or model folder to begin with: start_from, and model is what it is")
    elif begun is not None:
        raise UserError(f"{command} --from {begun['start_from']}: such a training begins from nothing; leave it out")
    for kind_path, kind in replaced.items():
        keep_shared_fields(recipe, kind_path, kind, options)
    if path is not None:
        fields = {name: option for name, option in options.items() if name not in ("config", "device", "from")}
        check_fields(recipe, fields, f"{path}: ")
        for name, value in leaves(recipe):
            if name in OF_CODE and not is_given(name, rest):
                refuse_code(value, name, str(path))
    if asks_for_help(rest):
        usage = f"zellige {command} --config RECIPE [--run RUN] [--FIELD VALUE ...]"
        note = f"The defaults are those of {named}." if named else "With --config the defaults are the recipe's."
        print(help_of(usage, config_class, options, selected, recipe, note))
        sys.exit(0)

    parser = new_parser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--run", type=str)
    add_config(parser, config_class, selected)
    given = [] if path is None else ["--config", yaml.safe_dump(recipe) if replaced or begun is not None else str(path)]
    values = parse(parser, options, [*given, *rest], selected)
    run = values.pop("run")
    if run == "":
        raise UserError("run is empty, expected: a folder, begun or continued; leave --run out for one in runs/")
    values.pop("config")
    name = path.stem if path is not None else command
    return config_class(**values), Path(run) if run else default_run(name, recipes)


def kind_of_model(command: str, recipes: str, arguments: Sequence[str]) -> str | None:
    """The `model.kind` of the recipe that the arguments name, or what they give in its place; None where neither says
    it, or where there is no such recipe, which `read_recipe` tells."""
    named, rest = split_config(command, arguments)
    if (given := kinds_given(rest).get("model.kind")) is not None:
        return given
    begun, rest = split_start(rest, recipes, named)
    if begun is not None:
        return begun["model"]["kind"]
    try:
        recipe = {} if named is None else read_yaml(find_recipe(named, recipes))
    except UserError:
        return None
    model = recipe.get("model")
    return model.get("kind") if isinstance(model, dict) else None


def default_run(name: str, recipes: str) -> Path:
    """The run folder of a recipe: runs/NAME. Where stage one has a recipe of that name too, that of stage two is
    runs/NAME_prior, unless an earlier version has begun a run of stage two in runs/NAME, and that of a VAE
    runs/NAME_vae."""
    run = Path("runs") / name
    if recipes == "stage1" or name not in recipe_names("stage1"):
        return run
    if recipes == "vae":
        return run.with_name(f"{name}_vae")
    prior = run.with_name(f"{name}_prior")
    return run if stage_of_run(run) == "stage two" and not prior.exists() else prior


def with_list(name: str, arguments: Sequence[str]) -> list[str]:
    """`A B --out C` as `--out C --NAME ["A", "B"]`. Each option but the last of a line takes one value."""
    words: list[str] = []
    options: list[str] = []
    for position, argument in enumerate(arguments):
        before = arguments[position - 1] if position else ""
        is_value = before.startswith("--") and "=" not in before
        (options if argument.startswith("--") or is_value else words).append(argument)
    return [*options, *([f"--{name}={json.dumps(words)}"] if words else [])]


def asks_for_help(arguments: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help") for argument in arguments)


def split_device(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The `--device` of a training, if any, and the other arguments: where a run computes is no part of its recipe, for
    it may go on elsewhere. Raises UserError."""
    peek = ArgumentPeek(add_help=False, allow_abbrev=False)
    peek.add_argument("--device")
    named, rest = peek.parse_known_args(arguments)
    return named.device, rest


def split_config(command: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The `--config` of the arguments, if any, and the others."""
    peek = ArgumentPeek(add_help=False, allow_abbrev=False)
    peek.add_argument("--config", action="append", default=[])
    named, rest = peek.parse_known_args(arguments)
    if len(named.config) > 1:
        raise UserError(f"{command} takes one --config, got {len(named.config)}: {', '.join(named.config)}")
    return named.config[0] if named.config else None, rest


def split_start(arguments: Sequence[str], recipes: str, recipe: str | None) -> tuple[dict[str, Any] | None, list[str]]:
    """What `--from MODEL`, if it is given, puts into the recipe, `model` and `start_from`, and the other arguments.
    recipes: of the stage that it is to be of, where the folder holds both; recipe: the `--config`. Raises UserError
    where there is no model and no run that began with it."""
    peek = ArgumentPeek(add_help=False, allow_abbrev=False)
    peek.add_argument("--from", dest="starts", action="append", default=[])
    named, rest = peek.parse_known_args(arguments)
    if not named.starts:
        return None, rest
    from pipelines.model_folders import stage_folder  # torch, which most commands need not wait for

    if len(named.starts) > 1:
        raise UserError(f"got {len(named.starts)} models to begin with, expected one: {', '.join(named.starts)}")
    (start,) = named.starts
    if not start:
        raise UserError("from is empty, expected: a run or model folder to begin with; leave --from out to begin anew")
    if is_given("start_from", rest):
        raise UserError(f"got --from {start} and --start_from, expected one of them; leave --start_from out")
    try:
        folder = stage_folder(start, {"stage2": "stage2"}.get(recipes, "stage1"))
    except UserError:
        if (recorded := begun_with(start, run_of(rest, recipes, recipe))) is None:
            raise
        return recorded, rest
    return {"model": settings_of(folder), "start_from": str(folder)}, rest


def placed(begun: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Where MODEL of `--from` goes: for the recipe's model; or, where that is a decoder on the codes of another kind of
    model, for its `tokenizer`."""
    model = recipe.get("model")
    if not isinstance(model, dict) or "tokenizer" not in model or model.get("kind") == begun["model"]["kind"]:
        return begun
    return {**begun, "model": {**model, "tokenizer": begun["model"]}}


def run_of(arguments: Sequence[str], recipes: str, recipe: str | None) -> Path | None:
    """The run folder of a training, as `read_recipe` tells it, before the rest is read; None without a recipe."""
    peek = ArgumentPeek(add_help=False, allow_abbrev=False)
    peek.add_argument("--run")
    named, _ = peek.parse_known_args(arguments)
    if named.run or recipe is None:
        return Path(named.run) if named.run else None
    return default_run(find_recipe(recipe, recipes).stem, recipes)


def begun_with(start: str, run: Path | None) -> dict[str, Any] | None:
    """What `--from` once put into the recipe of a run, which goes on from its own checkpoints; None where none begun
    with this model is there."""
    from training.run_folder import has_begun  # torch

    if run is None or not has_begun(run) or not (run / RUN_CONFIG_NAME).is_file():
        return None
    recorded = read_yaml(run / RUN_CONFIG_NAME)
    from_there, model = recorded.get("start_from"), recorded.get("model")
    if not isinstance(from_there, str) or not isinstance(model, dict) or "kind" not in model:
        return None
    return {"model": model, "start_from": from_there} if Path(from_there).is_relative_to(start) else None


def settings_of(folder: Path) -> dict[str, Any]:
    """The `model` of a recipe that makes such a model as the folder holds. Raises UserError."""
    from common.model_io import CONFIG_NAME  # likewise

    description = read_json(folder / CONFIG_NAME)
    config = description.get("arguments", {}).get("config")
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG_NAME} tells no settings of a model; name a folder that a training wrote")
    return {"kind": description.get("kind"), **config}


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
    """The YAML file that `name` names: a path, or a recipe of the package folder configs/`recipes`. Raises UserError
    with the nearest name where there is none."""
    packaged = Path(str(files(configs))) / recipes / f"{name}.yaml"
    for path in (Path(name), packaged):
        if path.is_file():
            return path
    for other in STAGES.keys() - {recipes}:
        if name in recipe_names(other):
            raise wrong_stage(name, other)
    if Path(name).is_dir():
        raise UserError(f"{name} is a folder, expected a recipe; {recipes_help(recipes)}")
    close = difflib.get_close_matches(name, recipe_names(recipes), n=2)
    hint = f"did you mean {either(close)}?" if close else recipes_help(recipes)
    raise UserError(f"there is no recipe {name}; {hint}")


def recipe_names(recipes: str) -> list[str]:
    return sorted(path.stem for path in (Path(str(files(configs))) / recipes).glob("*.yaml"))


def recipes_help(recipes: str) -> str:
    return f"give a YAML file or one of {', '.join(recipe_names(recipes))}"


def check_stage(recipe: Mapping[str, Any], title: str, recipes: str) -> None:
    """Raises UserError for a recipe of another stage."""
    for other, (_, stage) in STAGES.items():
        if other != recipes and stage_of_recipe(recipe) == stage:
            raise wrong_stage(title, other)


def wrong_stage(title: str, recipes: str) -> UserError:
    command, stage = STAGES[recipes]
    return UserError(f"{title} is a recipe of {stage}; use {command}, or name another --config")


def leaves(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a recipe by path, and their values."""
    for key, value in recipe.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe as nested dicts. Raises UserError when it is not one."""
    try:
        recipe = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # no UTF-8, or a date that there is not
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is not a recipe: expected fields such as `model:` and `train:`")
    return recipe


def new_parser() -> ArgumentParser:
    return ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)


def parse(
    parser: ArgumentParser,
    options: Mapping[str, Option],
    arguments: Sequence[str],
    selected: Mapping[str, Choice] | None = None,
) -> dict[str, Any]:
    """The parsed values, nested configs built; selected: of `select_kinds`. Raises UserError."""
    check_arguments(arguments, options)
    try:
        values = parser.parse_args(with_bare_flags(arguments, options))
        for path, value in vars(values.as_flat()).items():
            for number in value if isinstance(value, list | tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise UserError(f"{path}: expected a finite number, got {number}")
        with naming_paths(selected or {}, vars(values.as_flat())):
            return {**vars(parser.instantiate(values)), **names_as_written(arguments, options)}
    except ArgumentError as error:
        raise UserError(explain(str(error), options, arguments)) from error


@contextmanager
def naming_paths(selected: Mapping[str, Choice], values: Mapping[str, Any]) -> Iterator[None]:
    """Puts the path before a field that a config refuses: that of a config of its class which has these values."""
    try:
        yield
    except FieldError as error:
        own = {field.name: getattr(error.config, field.name) for field in fields(error.config)}  # type: ignore[arg-type]
        for path, choice in selected.items():
            given = {name: values.get(f"{path}.{name}", value) for name, value in own.items()}
            if choice.config_class is type(error.config) and all(same(given[name], own[name]) for name in own):
                raise error.at(path) from error
        raise


def same(given: Any, value: Any) -> bool:
    """Whether a config's value is the given one, which may be a list where configs have tuples."""
    return bool(given == (list(value) if isinstance(given, list) and isinstance(value, tuple) else value))


def with_bare_flags(arguments: Sequence[str], options: Mapping[str, Option]) -> list[str]:
    """`--archive` by itself means `--archive true`."""
    completed = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        completed.append(argument)
        option = options.get(argument.removeprefix("--")) if argument.startswith("--") else None
        if option is not None and option.type == "true or false" and following.startswith("--"):
            completed.append("true")
    return completed


def names_as_written(arguments: Sequence[str], options: Mapping[str, Option]) -> dict[str, str]:
    """The 007 of `--label 007`, by its option, where a number or a name may stand: YAML takes it for 7, another class.
    Only of a command's own options: no recipe has such a field."""
    written = {}
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, _, value = argument.partition("=") if argument.startswith("--") else (before, "", argument)
        path = option.removeprefix("--")
        known = options.get(path) if option.startswith("--") else None
        if known is not None and known.type == NUMBER_OR_NAME and ODD_NUMBER.fullmatch(value):
            written[path] = value
    return written
