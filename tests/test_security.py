"""SECURITY.md: the tests that it names are there, and what it says of all code is so of all code."""

from __future__ import annotations

import ast
import json
import re
import re._constants as kinds
import re._parser as parser
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from codes.shard_folder import map_tensors
from common.errors import UserError
from common.files import json_value, read_json
from common.own_code import names_code
from pipelines.evaluation.against import repeating
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.written import written
from pipelines.opening import write_model_card
from stage2_prior.text import captions_of
from tests.pipelines.conftest import make_pipeline

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "common",
    "training",
    "codes",
    "images",
    "metrics",
    "stage1_vae",
    "stage1_vq",
    "stage2_prior",
    "pipelines",
    "zellige",
)

# What runs code, or reads what could, and the files that may call it: each looks at what it is given before.
DANGEROUS = {
    "eval": set(),
    "exec": set(),
    "compile": set(),
    "__import__": set(),
    "os.system": set(),
    "os.popen": set(),
    "pickle.load": set(),
    "pickle.loads": set(),
    "pickle.Unpickler": set(),
    "marshal.loads": set(),
    "shelve.open": set(),
    "yaml.load": set(),
    "yaml.safe_load": set(),
    "yaml.full_load": set(),
    "yaml.unsafe_load": set(),
    "np.load": {"common/packed_files.py", "common/cache.py"},  # the latter of what we wrote ourselves, without objects
    "torch.jit.load": set(),
    "torch.hub.load": set(),
    # With weights_only=True; that of DALL-E by an unpickler that knows a fixed list of names.
    "torch.load": {"common/foreign_weights.py", "metrics/lpips.py", "stage1_vq/imports/dalle.py"},
    # Of names in our own code, and of MODULE:FUNCTION from the command line (metrics/features.py).
    "import_module": {"pipelines/cli.py", "zellige/__init__.py", "zellige/__main__.py", "zellige/shadowing.py"},
    "importlib.import_module": {"metrics/features.py"},
}
PATTERNS = {f"re.{name}" for name in ("compile", "match", "fullmatch", "search", "sub", "split", "findall", "finditer")}
BY_METHOD = {"extractall", "extract", "unpack_archive"}  # of any archive: nothing is unpacked by the names in it


@cache
def sources() -> dict[str, str]:
    """Our modules by their paths."""
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


@cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """Of what is looked for here: path, name and call. Modules that do not have its last word are not parsed."""
    words = {name.rpartition(".")[2] for name in (*DANGEROUS, *BY_METHOD, *PATTERNS)}
    seldom = re.compile(
        rf"(?<!\.)\b(?:eval|exec|compile)\(|\b(?:{'|'.join(words - {'eval', 'exec', 'compile'})})\(|\bre\.compile\("
    )
    found = []
    for path, text in sources().items():
        for node in ast.walk(ast.parse(text)) if seldom.search(text) else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                word = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                if word in words:
                    found.append((path, ast.unparse(node.func), node))
    return found


def test_what_could_run_code_is_called_only_where_it_is_looked_at():
    """A file of yours that stands here: read by common/foreign_weights.py, packed_files.py or safe_yaml.py instead."""
    found = [
        (path, name)
        for path, name, _ in calls()
        if path not in DANGEROUS.get(name, {path}) or name.rpartition(".")[2] in BY_METHOD
    ]
    assert not found


def test_pickles_are_read_as_weights_alone():
    said = {
        path: [ast.unparse(word.value) for word in call.keywords if word.arg == "weights_only"]
        for path, name, call in calls()
        if name == "torch.load"
    }
    assert said.pop("stage1_vq/imports/dalle.py") == ["False"]  # by an unpickler of its own
    assert all(one == ["True"] for one in said.values())


def repeats(pattern: parser.SubPattern) -> Iterator[tuple[parser.SubPattern, bool]]:
    """What a pattern repeats without bound, and whether a fixed character begins it, so that it divides a text in one
    way only."""
    for kind, value in pattern:
        if kind in (kinds.MAX_REPEAT, kinds.MIN_REPEAT) and value[1] == kinds.MAXREPEAT:
            yield (
                value[2],
                value[2][0][0] == kinds.LITERAL
                or (value[2][0][0] == kinds.SUBPATTERN and value[2][0][1][3][0][0] == kinds.LITERAL),
            )
        yield from (one for part in parts_of(kind, value) for one in repeats(part))


def parts_of(kind: object, value: object) -> list[parser.SubPattern]:
    if isinstance(value, parser.SubPattern):
        return [value]
    if isinstance(value, tuple | list):
        return [part for one in value for part in parts_of(kind, one)]
    return []


def is_linear(pattern: str) -> bool:
    """Whether no repetition stands in a repetition, unless a fixed character parts its turns: no text makes it slow."""
    return all(fixed or not list(repeats(inner)) for inner, fixed in repeats(parser.parse(pattern)))


@pytest.mark.parametrize(
    ("pattern", "linear"), [(r"a+b*", True), (r"(?:\.[a-z]\w*)+", True), (r"(a+)+", False), (r"(\w*x?)*", False)]
)
def test_patterns_that_some_text_makes_slow_are_told(pattern: str, linear: bool):
    assert is_linear(pattern) == linear


def test_no_pattern_of_ours_is_slow_for_any_text():
    patterns = [
        call.args[0].value for _, name, call in calls() if name in PATTERNS and isinstance(call.args[0], ast.Constant)
    ]
    assert len(patterns) > 20
    assert [pattern for pattern in patterns if not is_linear(pattern)] == []


def test_options_that_name_code_are_known():
    """A new field of the kind has to be refused in files: pipelines.options.OF_CODE, evaluation/against.py."""
    fields = {
        (path, line.split(":")[0].strip())
        for path, text in sources().items()
        for line in text.splitlines()
        if re.match(r"    \w+: str.*#.*MODULE:FUNCTION", line)
    }
    assert fields == {
        ("training/config.py", "evaluate_features"),  # of recipes
        ("pipelines/evaluation/config.py", "features"),  # of evaluations, which --against repeats
        ("pipelines/evaluation/config.py", "judge"),
        ("pipelines/commands/generate.py", "judge"),  # of the command line alone
    }


@pytest.mark.parametrize("option", ["features", "judge"])
def test_an_evaluation_that_is_repeated_cannot_name_code(option: str):
    record = {"protocol": {"asked": {option: "networks:mine"}}}
    with pytest.raises(UserError, match=rf"against=e\.json sets {option} to networks:mine, which would import"):
        repeating(EvaluateConfig(against="e.json"), record)
    given: dict[str, str] = {option: "networks:other"}
    assert getattr(repeating(EvaluateConfig(against="e.json", **given), record), option) == "networks:other"
    assert not names_code(repeating(EvaluateConfig(), {"protocol": {"asked": {option: "timm:a"}}}).features)


@pytest.mark.parametrize("text", ['{"a": ' + "[" * 20_000, '{"a": ' + "9" * 5000 + "}", "{", b"\xff".decode("latin1")])
def test_json_that_python_cannot_take_is_damaged_json(text: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(text, encoding="latin1")
    with pytest.raises(ValueError, match=r"nested too deeply|Exceeds the limit|Expecting|Extra data"):
        json_value(text)
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("file", ["../secret.png", "/secret.png", 7])
def test_a_record_of_samples_names_files_of_its_own_folder(file: object, tmp_path: Path):
    (tmp_path / "settings.json").write_text(json.dumps({"command": "generate"}))
    (tmp_path / "samples.jsonl").write_text(json.dumps({"file": file, "label": 0}) + "\n")
    with pytest.raises(UserError, match=r"samples\.jsonl names .*, expected files of its own folder"):
        written(str(tmp_path))


def test_a_header_of_a_shard_claims_no_more_than_the_file_has(tmp_path: Path):
    header = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    for length, data, message in (
        (len(header) + 9, 8, "claims a header"),
        (len(header), 3, "reshape"),
        (2**63, 8, "cl"),
    ):
        (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + header + bytes(data))
        with pytest.raises(ValueError, match=message):
            map_tensors(tmp_path / "a")
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert map_tensors(tmp_path / "a")["a"].tolist() == [0, 0, 0, 0]


def test_a_cell_of_captions_that_is_too_long_is_told(tmp_path: Path):
    (tmp_path / "captions.csv").write_text("file,caption\na.png," + "x" * 200_000 + "\n")
    with pytest.raises(UserError, match="field larger than field limit"):
        captions_of(str(tmp_path / "captions.csv"), ["a.png"])


def test_names_of_classes_are_no_markup_in_a_model_card(tmp_path: Path):
    pipeline = make_pipeline()
    pipeline.prior.class_names = ("<img src=x onerror=alert(1)>", "a & b", "two\n\n# lines")
    folder = pipeline.save_pretrained(tmp_path / "model")
    Image.new("L", (8, 8)).save(tmp_path / "picture.png")
    text = write_model_card(folder, picture=tmp_path / "picture.png").read_text(encoding="utf-8")
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;, a &amp; b, two # lines" in text


def test_every_test_that_the_page_names_is_there():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    assert len(named) > 20
    defined: dict[str, set[str]] = {}
    for file, name in named:
        if file not in defined:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            defined[file] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in defined[file], f"{file} has no {name}"


def test_every_file_that_the_page_names_is_there():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z]\w*/[\w/]+\.\w+)`", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []
