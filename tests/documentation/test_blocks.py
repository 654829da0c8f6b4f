"""Every code block of README and docs runs, or is read by the parser of what it calls, or says in a comment why not."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import shutil
from collections import Counter
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import tests.documentation.scenery as scenery
from pipelines import cli
from tests.documentation.blocks import KINDS, PAGES, ROOT, Block, blocks_of, commands_of
from tests.documentation.smaller import results_of, smaller

BLOCKS = {path: blocks_of(path) for path in PAGES}
RUN_ELSEWHERE = {
    "docs/python.md": "tests/zellige/test_python_page.py",
    "docs/claims.md": "make claims, tests/test_claims.py",
}
CODE = {
    path: [block for block in blocks if block.kind != "text" and block.page not in RUN_ELSEWHERE]
    for path, blocks in BLOCKS.items()
}


def names_at_hand(folder: Path) -> dict[str, Any]:
    """What the docs call things in Python, where the text says what they are."""
    from zellige import TwoStagePipeline

    def images() -> torch.Tensor:
        return torch.rand(3, 3, 16, 16).mul(255).round() / 127.5 - 1

    keep = torch.zeros(16, 16, dtype=torch.bool)
    keep[:, :8] = True
    model = folder / "model"
    pipeline = TwoStagePipeline.from_pretrained(model) if model.exists() else None
    codes = None if pipeline is None else tuple(grid.clone() for grid in pipeline.encode(images()))
    if codes is not None:
        codes[0][:, 0] = -1
    return {
        "np": np, "pipeline": pipeline, "images": images(), "keep": keep, "first": images()[0], "second": images()[1],
        "codes": codes, "labels": np.arange(3) % 2, "digits": torch.zeros(6, 1, 28, 28) - 1,
        "arrays": np.zeros((4, 8, 8, 3), dtype=np.uint8), "checkpoint": {"model": {"weight": torch.zeros(2, 3).T}},
    }  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def workshop(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the stand-ins are made, once for all pages that a process tests."""
    scenery.kept = tmp_path_factory.mktemp("scenery")
    scenery.made.cache_clear()


@pytest.mark.parametrize(
    "path", [path for path in PAGES if CODE[path]], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_the_code_of_a_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """From top to bottom in one folder, as a reader would, each block finding what those before it have made."""
    blocks = CODE[path]
    words = "\n".join(block.code for block in blocks)
    given = any(block.given for block in blocks)
    scenery.set_the_scene(tmp_path, words + "\nmnist.npz\ncifar10/train" + ("\nmodel" if given else ""))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in blocks:
        try:
            treat(block, names, tmp_path)
        except (Exception, SystemExit) as error:
            said = capfd.readouterr()
            raise AssertionError(
                f"{block.place} does not work: {error}\n{said.out[-2000:]}{said.err[-2000:]}"
            ) from error


def treat(block: Block, names: dict[str, Any], folder: Path) -> None:
    if block.treatment == "excused":
        return
    if block.kind == "yaml":
        assert yaml.safe_load(block.code)
        return
    if block.kind == "python":
        if block.treatment == "parsed":
            ast.parse(block.code)
            return
        at_hand = names_at_hand(folder) if block.given else {}
        names |= {name: at_hand[name] for name in block.given}
        exec(compile(block.code, block.place, "exec"), names)
        return
    commands = commands_of(block.code)
    if block.treatment == "parsed":
        for command in commands:
            parse(command)
        return
    for command in commands:
        if command[0] != "zellige":
            raise AssertionError(
                f"only zellige is run here, not {command[0]}; mark the block as parsed or excused, and why"
            )
        for result in results_of(command):  # stand-ins of what the block makes itself
            remove(folder / result)
    for command in commands:
        code = cli.main(smaller(command)[1:])
        assert code == 0, shlex.join(command)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class ParsedError(Exception):
    """The arguments were read."""


def parse(command: list[str]) -> None:
    """Reads a command's arguments as it does itself, and stops there. Raises for what it would refuse."""
    while "=" in command[0]:  # a variable of its environment
        command = command[1:]
    program, *arguments = command
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets), f"the Makefile has no target {arguments}"
    elif program == "zellige" or "zellige" in arguments:  # by itself, or behind torchrun and accelerate launch
        if program != "zellige":
            assert program in ("torchrun", "accelerate", "python"), f"{program} starts no zellige"
            arguments = arguments[arguments.index("zellige") + 1 :]
        arguments = arguments[arguments[0] == "--" :]
        cli.named(arguments[0], cli.COMMANDS, "command").prepare(arguments[1:])
    elif program == "python" and arguments[0] == "-m" and arguments[1].startswith("benchmarks."):
        parse_benchmark(arguments[1], arguments[2:])
    else:
        raise AssertionError(f"there is no parser here for {program}; mark the block as excused, and why")


PEERS = ("vector_quantize_pytorch", "transformers", "pythae", "flax", "jax")  # that benchmarks import


def parse_benchmark(module: str, arguments: list[str], whole: bool = True) -> None:
    """By the module's own argparse; where its peers are not installed, that there is such a module. whole: what it
    requires must be there."""
    assert find_spec(module) is not None, f"there is no {module}"
    try:
        code = import_module(module)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in PEERS:
            return
        raise
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *_: Any) -> None:
        for action in self._actions:
            action.required &= whole
        original(self, arguments)
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with suppress(ParsedError):
            code.main()
            raise AssertionError(f"{module} reads no arguments")


INLINE = re.compile(r"`(python -m benchmarks\.[^`]+)`")


def test_benchmarks_named_in_a_sentence_have_these_options():
    for path in PAGES:
        for line in INLINE.findall(path.read_text(encoding="utf-8")):
            _, _, module, *arguments = shlex.split(line)
            parse_benchmark(module, arguments, whole=False)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("```sh\nls\n", "page.md:1: this block never ends"),
        ("<!-- block: parsed, why -->\n\n```sh\nls\n```\n", "a marker stands in the line before a block"),
        ("<!-- block: parsed -->\n```sh\nls\n```\n", "expected 'parsed, WHY'"),
        ("<!-- block: skipped, why -->\n```sh\nls\n```\n", "expected 'parsed, WHY'"),
    ],
)
def test_a_block_or_marker_that_is_none_is_told(tmp_path, page, said):
    path = tmp_path / "page.md"
    path.write_text(page)
    with pytest.raises(ValueError, match=said):
        blocks_of(path)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (Block("page.md", 1, "sh", "rm -r folder"), "only zellige is run here"),
        (Block("page.md", 1, "sh", "zellige info --file none.zlg"), "zellige info"),
        (Block("page.md", 1, "sh", "zellige generate --modle m", "parsed", "why"), "modle"),
        (Block("page.md", 1, "sh", "make dinner", "parsed", "why"), "no target"),
        (Block("page.md", 1, "sh", "python -m benchmarks.codec --modle m", "parsed", "why"), "2"),
        (Block("page.md", 1, "sh", "python -m benchmarks.none", "parsed", "why"), "there is no benchmarks.none"),
        (Block("page.md", 1, "python", "1 / 0"), "division"),
    ],
)
def test_a_block_that_does_not_work_is_told(tmp_path, monkeypatch, block, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((Exception, SystemExit), match=said):
        treat(block, {}, tmp_path)


def test_every_block_says_what_it_is():
    unknown = [block.place for blocks in BLOCKS.values() for block in blocks if block.kind not in KINDS]
    assert unknown == [], f"blocks that are none of {KINDS}, or do not say so"


def test_what_is_not_run_is_counted(record_property):
    """A new block that is not run changes these numbers, and whoever adds it sees so."""

    def kind(block: Block) -> str:
        if block.kind == "text":
            return "shown"
        return "run by another test" if block.page in RUN_ELSEWHERE else block.treatment

    count = Counter(kind(block) for blocks in BLOCKS.values() for block in blocks)
    record_property("blocks", dict(count))
    print(dict(count))
    assert count["run"] > 2 * (count["parsed"] + count["excused"]), count
    assert all(block.why for blocks in BLOCKS.values() for block in blocks if block.treatment != "run")
