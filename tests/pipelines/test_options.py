"""Options and recipes: help comes from the config classes, and each mistake is named with its field."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest

from common.errors import UserError
from pipelines import options
from pipelines.cli import main
from pipelines.fields import Option, type_in_words
from pipelines.options import read_recipe, with_bare_flags
from stage1_vq.train import Stage1Config
from stage2_prior.sampling_config import SamplingConfig

GROUPED = "cifar10_vqvae --model.quantizer.kind grouped"


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Inner settings."""

    size: int = 4  # how large; 100% is 8
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"size={self.size}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class RoundModel:
    """A round model."""

    kind: Literal["round"] = "round"
    radius: int = 1  # in pixels
    colour: str = "blue"
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True, kw_only=True)
class SquareModel:
    """A square model."""

    kind: Literal["square"] = "square"
    side: int = 2
    colour: str = "blue"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run."""

    model: RoundModel | SquareModel
    inner: Inner = field(default_factory=Inner)
    size: int | tuple[int, int] = 8
    name: str | None = None  # what it is called
    tint: Literal["none", "red", "blue"] = "none"
    step_size_factor: float | None = None
    quick: bool = False


KINDS = {"round": RoundModel, "square": SquareModel}


def read(tmp_path: Path, recipe: str, *arguments: str) -> tuple[RunConfig, Path]:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    return options.read_recipe("train", RunConfig, "stage1", ["--config", str(path), *arguments])


def test_a_recipe_its_overrides_and_its_run_folder(tmp_path: Path):
    recipe = "model: {kind: round, radius: 3, inner: {ratio: 1.0e-3}}\nsize: [4, 6]\n"
    config, run = read(tmp_path, recipe, "--model.inner.size", "9", "--name=it")
    assert config == RunConfig(model=RoundModel(radius=3, inner=Inner(size=9, ratio=1e-3)), size=(4, 6), name="it")
    assert run == Path("runs/recipe")
    assert read(tmp_path, recipe, "--run", "elsewhere")[1] == Path("elsewhere")


def test_recipes_of_one_name_have_a_run_folder_for_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names = {stage: set(options.recipe_names(stage)) for stage in ("stage1", "stage2")}
    shared = names["stage1"] & names["stage2"]
    assert {"folder", "mnist_quickstart", "imagenet256_vqvae2", "faces1024_vqvae2"} <= shared
    for stage in names:
        for name in names[stage]:
            expected = f"runs/{name}_prior" if stage == "stage2" and name in shared else f"runs/{name}"
            assert options.default_run(name, stage) == Path(expected)
    runs = [options.default_run(name, stage) for stage in names for name in names[stage]]
    assert len(set(runs)) == len(runs)


def test_a_run_of_stage_two_that_an_earlier_version_put_in_the_folder_of_its_name_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/folder")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model: {kind: vqvae}\ndata: {path: photos}\n")  # of stage one
    assert options.default_run("folder", "stage2") == Path("runs/folder_prior")
    assert options.default_run("folder", "stage1") == run
    (run / "config.yaml").write_text("model: {kind: transformer}\nlabel_dropout: 0.1\n")
    assert options.default_run("folder", "stage2") == run
    Path("runs/folder_prior").mkdir()
    assert options.default_run("folder", "stage2") == Path("runs/folder_prior")


def test_the_kind_selects_the_class_of_the_model(tmp_path: Path):
    assert read(tmp_path, "model: {kind: square, side: 5}\n")[0].model == SquareModel(side=5)
    assert read(tmp_path, "inner: {size: 2}\n", "--model.kind", "square")[0].model == SquareModel()
    assert read(tmp_path, "inner: {size: 2}\n")[0].model == RoundModel()  # the first of the table


def test_another_kind_on_the_command_line_keeps_what_both_kinds_have(tmp_path: Path):
    recipe = "model: {kind: round, radius: 3, colour: red}\nsize: 4\n"
    config, run = read(tmp_path, recipe, "--model.kind", "square", "--model.side=9")
    assert (config.model, config.size, run.name) == (SquareModel(side=9, colour="red"), 4, "recipe")
    with pytest.raises(UserError, match=r"there is no field model.colors"):
        read(tmp_path, "model: {kind: round, colors: red}\n")
    with pytest.raises(UserError, match=r"there is no field model.colors"):  # the same kind hides no mistake
        read(tmp_path, "model: {kind: round, colors: red}\n", "--model.kind", "round")


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("model: {kind: oval}", [], "model.kind: expected one of round, square, got 'oval'"),
        (
            "model: {kind: square, radius: 1}",
            [],
            "RECIPE: there is no field model.radius; see --help for all fields",
        ),
        ("model: {radiu: 1}", [], "RECIPE: there is no field model.radiu; did you mean model.radius?"),
        ("modl: {radius: 1}", [], "RECIPE: there is no field modl; did you mean model?"),
        (
            "model: {inner: {radius: 1}}",
            [],
            "RECIPE: there is no field model.inner.radius; did you mean model.radius?",
        ),
        (
            "model: {inner: {rato: 1}}",
            [],
            "RECIPE: there is no field model.inner.rato; did you mean model.inner.ratio?",
        ),
        ("model: 5", [], "RECIPE: model: expected fields below it, got 5"),
        ("inner: {size: many}", [], "inner.size: expected a whole number, got 'many'"),
        ("inner: {size: 1.5}", [], "inner.size: expected a whole number, got '1.5'"),
        ("size: [1, 2, 3]", [], "size: expected a whole number or two whole numbers, got '[1, 2, 3]'"),
        ("size: 1", ["--inner.size", "x"], "inner.size: expected a whole number, got 'x'"),
        ("size: 1", ["--inner.siz", "3"], "there is no field inner.siz; did you mean inner.size?"),
        ("size: 1", ["--inner.size"], "inner.size: expected a whole number, got nothing"),
        ("size: 1", ["stray"], "unexpected argument 'stray'; options are given as --NAME VALUE, see --help"),
        ("size: 1", ["--size", "2", "3"], "unexpected argument '3'; options are given as --NAME VALUE, see --help"),
        ("quick: 3", [], "quick: expected true or false, got '3'"),
        ("tint: green", [], "tint: expected none, red or blue, got 'green'"),
        ("size: 1", ["--tint", "5"], "tint: expected none, red or blue, got '5'"),
        ("size: 1", ["--inner.ratio", "nan"], "inner.ratio: expected a finite number, got nan"),
        ("size: 1", ["--step_size_factor=-inf"], "step_size_factor: expected a finite number, got -inf"),
        ("inner: {ratio: .nan}", [], "inner.ratio: expected a finite number, got nan"),
        ("size: 1", ["--ssf", "3"], "there is no field ssf; did you mean step_size_factor?"),
        ("size: 1", ["--factor", "3"], "there is no field factor; did you mean step_size_factor?"),
        ("size: 1", ["--model.rad", "3"], "there is no field model.rad; did you mean model.radius?"),
        (
            "size: 1",
            ["--model.rat", "3"],
            "there is no field model.rat; did you mean inner.ratio or model.inner.ratio?",
        ),
        (
            "size: 1",
            ["--run="],
            "run is empty, expected: a folder, begun or continued; leave --run out for one in runs/",
        ),
        ("inner: {size: 0}", [], "size=0, expected at least 1"),
        ("just text", [], "RECIPE is not a recipe: expected fields such as `model:` and `train:`"),
        ("size: 1", ["--config", "other"], "train takes one --config, got 2: RECIPE, other"),
        ("size: 1", ["--config"], "argument --config: expected one argument; see --help"),
    ],
)
def test_mistakes_are_one_sentence_with_the_fields_path(tmp_path: Path, recipe, arguments, message):
    with pytest.raises(UserError) as refused:
        read(tmp_path, recipe, *arguments)
    assert str(refused.value) == message.replace("RECIPE", str(tmp_path / "recipe.yaml"))


def test_broken_yaml_is_named_with_its_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"recipe.yaml is not valid YAML: .*line 2"):
        read(tmp_path, "model: {kind: round\nsize: 1\n")


def test_a_missing_recipe_names_those_there_are():
    with pytest.raises(UserError, match=r"there is no recipe nope; give a YAML file or one of .*cifar10_vqvae, "):
        options.find_recipe("nope", "stage1")


def test_the_bare_name_of_a_packaged_recipe_is_enough():
    assert options.find_recipe("cifar10_vqvae", "stage1").is_file()


def test_no_recipe_at_all_names_those_there_are():
    with pytest.raises(UserError, match=r"train needs a recipe, got none; give a YAML file or one of .*folder"):
        options.read_recipe("train", RunConfig, "stage1", ["--inner.size", "3"])


def test_help_shows_the_comments_of_the_config_classes(capsys):
    with pytest.raises(SystemExit) as left:
        options.read_recipe("train", RunConfig, "stage1", ["--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--model.radius RADIUS in pixels (whole number; default 1)",
        "how large; 100% is 8 (whole number; default 4)",
        "--name NAME what it is called --",
        "--size SIZE (whole number or two whole numbers; default 8)",
        "--quick QUICK (true or false; default false)",
        "--step_size_factor STEP_SIZE_FACTOR (number)",
        "--run RUN",
        "model: A round model.",
        "the fields that follow are those of round (round or square; default round)",
        "model.inner: Inner settings.",
    ):
        assert part in text
    assert "--model.side" not in text
    assert "--model.inner INNER" not in text


def test_help_shows_the_defaults_of_the_recipe(tmp_path, capsys):
    with pytest.raises(SystemExit):
        read(tmp_path, "model: {kind: square, side: 5}\nsize: [4, 6]\ninner: {ratio: 0.25}\nquick: true\n", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "The defaults are those of",
        "--model.side SIDE (whole number; default 5)",
        "--model.colour COLOUR (default blue)",
        "two whole numbers; default [4,6])",
        "--inner.ratio RATIO (number; default 0.25)",
        "(true or false; default true)",
        "those of square (square or round; default square)",
    ):
        assert part in text


def test_help_names_what_is_required(capsys):
    with pytest.raises(SystemExit):
        options.read_options("work", Demanding, ["-h"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: zellige work --model MODEL --out OUT [--OPTION VALUE ...]"
    assert "  --out OUT               where to write (required)" in lines


def test_plain_options_need_no_recipe():
    assert options.read_options("work", Inner, ["--size", "7"]) == Inner(size=7)
    with pytest.raises(UserError, match=r"there is no field sice; did you mean size\?"):
        options.read_options("work", Inner, ["--sice", "7"])


@dataclass(frozen=True, kw_only=True)
class Demanding:
    """Needs things."""

    model: str
    out: str  # where to write


def test_an_empty_path_is_not_the_working_folder():
    with pytest.raises(UserError, match=r"^out is empty, expected: where to write$"):
        options.read_options("work", Demanding, ["--model", "m", "--out", ""])


def test_what_is_missing_is_listed():
    with pytest.raises(UserError, match="missing: --model, --out; see --help"):
        options.read_options("work", Demanding, [])


def test_a_flag_by_itself_is_true():
    options = {"archive": Option("true or false", ""), "out": Option("str", "")}
    for given, completed in (
        (["--archive", "--out", "x"], ["--archive", "true", "--out", "x"]),
        (["--out", "x", "--archive"], ["--out", "x", "--archive", "true"]),
        (["--archive", "false", "--out", "x"], ["--archive", "false", "--out", "x"]),
        (["--archive=false", "--out"], ["--archive=false", "--out"]),
    ):
        assert with_bare_flags(given, options) == completed


@dataclass(frozen=True, kw_only=True)
class OfClass:
    """Draws."""

    label: int | str | None = None  # class


@pytest.mark.parametrize(
    ("given", "label"),
    [("3", 3), ("-3", -3), ("0", 0), ("007", "007"), ("-07", "-07"), ("1_000", "1_000"), ("0x1F", "0x1F"),
     ("1:30", "1:30"), ("tench", "tench"), ("3D", "3D"), ("null", None)],
)  # fmt: skip
def test_a_name_that_reads_like_a_number_stays_as_it_is_written(given, label):
    """Folders are called 001, 002 and so on, and `--label 001` is no class of number 1, which is 002."""
    for arguments in (["--label", given], [f"--label={given}"]):
        assert options.read_options("work", OfClass, arguments) == OfClass(label=label)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (float | None, "a number"),
        (tuple[float, float], "two numbers"),
        (tuple[int, ...] | None, "a list of whole numbers"),
        (int | str | None, "a whole number or text"),
        (Literal["a", "b", "c"] | None, "a, b or c"),
        (Literal[1, 3], "1 or 3"),
    ],
)
def test_types_are_told_in_words(annotation, words):
    assert type_in_words(annotation) == words


def test_no_option_of_any_command_is_told_as_python_writes_types():
    made = ("quickstart", "encode", "import", "generate")
    judged = ("evaluate", "diagnose", "report", "demo", "compress", "decompress")
    for command in made + judged:
        text = help_text(command)
        assert not re.search(r"<class|Optional|Union|Literal|\||tuple\[|\bNone\b|\bint\b|\bfloat\b|\bbool\b", text), (
            command
        )


def help_text(command: str) -> str:
    shown = io.StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit):
        main([command, "--help"])
    return shown.getvalue()


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    warmth: float = 1.0  # of the oven
    depth: int = 2  # of the tin


@dataclass(frozen=True, kw_only=True)
class BakingConfig(SharedOptions):
    """Bakes."""

    flour: str  # which
    depth: int = 3  # of the dish


def test_inherited_fields_have_their_help_and_come_after_the_own_ones():
    shown = io.StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit):
        options.read_options("bake", BakingConfig, ["--help"])
    places = [shown.getvalue().index(part) for part in ("which", "of the dish", "of the oven")]
    assert places == sorted(places)
    assert "of the tin" not in shown.getvalue()
    baking = options.read_options("bake", BakingConfig, ["--flour", "rye", "--warmth", "2"])
    assert baking == BakingConfig(flour="rye", warmth=2)


@pytest.mark.parametrize("command", ["generate", "inpaint", "vary", "interpolate", "assemble"])
def test_all_commands_that_sample_take_the_same_settings_and_explain_them(command):
    text = " ".join(help_text(command).split())
    for name in (each.name for each in fields(SamplingConfig)):
        assert re.search(rf"--{name} [A-Z_]+ [a-z0-9]", text), name  # a comment, not the type in brackets


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("cifar10_vqvae --model.quantizer.decay 2", "model.quantizer.decay=2.0, expected from 0 to below 1"),
        ("cifar10_multiscale --model.quantizer.decay 2", "model.quantizer.decay=2.0, expected from 0 to below 1"),
        ("cifar10_residual --model.quantizer.layer.decay 2", "model.quantizer.layer.decay=2.0, expected"),
        ("cifar10_residual --model.quantizer.depth 0", "model.quantizer.depth=0, expected at least 1"),
        ("cifar10_residual --model.quantizer.codebook_sizes [4,1,4,4]", r"model.quantizer.codebook_sizes=\(4"),
        ("cifar10_residual --model.quantizer.layer.l2_normalise true", "model.quantizer.layer.l2_normalise=True, exp"),
        (f"{GROUPED} --model.quantizer.layer.decay 2", "model.quantizer.layer.decay=2.0, expected"),
        (f"{GROUPED} --model.quantizer.layer.kind lfq --model.quantizer.layer.corner 0", "model.quantizer.layer.corn"),
        (f"{GROUPED} --model.quantizer.layer.kind fsq --model.quantizer.layer.levels [1]", "model.quantizer.layer.lev"),
        (
            f"{GROUPED} --model.quantizer.layer.kind residual --model.quantizer.layer.layer.decay 2",
            "model.quantizer.layer.layer.decay=2.0, expected",
        ),
    ],
)  # fmt: skip
def test_a_refused_field_is_named_by_its_whole_path(arguments, message):
    with pytest.raises(UserError, match=f"^{message}"):
        read_recipe("train-stage1", Stage1Config, "stage1", ["--config", *arguments.split()])
