"""The code blocks of README and docs: what each holds, and what its marker says of how it is tested.

A block is fenced and says what it is: `sh`, `python`, `yaml`, or `text` for what is no code (diagrams, listings,
equations). Commands and Python are run, YAML is read. A block of which a part cannot run has a marker in the line
before it, which readers do not see:

    <!-- block: parsed, WHY -->     its commands are read by their own parsers, and not run
    <!-- block: excused, WHY -->    it is not tested
    <!-- block: given NAMES -->     Python that uses names which the page explains in words
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
KINDS = ("sh", "python", "yaml", "text")
TREATMENTS = ("run", "parsed", "excused")

FENCE = re.compile(r"^ *```(?P<kind>[^`\n]*)$")
MARKER = re.compile(r"^ *<!-- block: (?P<what>.*?) -->$")


class Block(NamedTuple):
    page: str  # relative to the project
    line: int  # of its first line of code
    kind: str  # one of KINDS, or whatever stands behind the fence
    code: str
    treatment: str = "run"
    why: str = ""  # it is not run
    given: tuple[str, ...] = ()  # names that Python finds there

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """All fenced blocks of a page. Raises ValueError for a fence that never closes and a marker that says nothing."""
    lines = path.read_text(encoding="utf-8").splitlines()
    page = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    blocks: list[Block] = []
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        if opening is None:
            if MARKER.match(lines[number]) and not (number + 1 < len(lines) and FENCE.match(lines[number + 1])):
                raise ValueError(f"{page}:{number + 1}: a marker stands in the line before a block")
            number += 1
            continue
        end = next((n for n in range(number + 1, len(lines)) if lines[n].strip() == "```"), None)
        if end is None:
            raise ValueError(f"{page}:{number + 1}: this block never ends")
        indent = len(lines[number]) - len(lines[number].lstrip())
        code = "\n".join(line[indent:] for line in lines[number + 1 : end])
        block = Block(page, number + 2, opening["kind"].strip(), code)
        marker = MARKER.match(lines[number - 1]) if number else None
        blocks.append(block if marker is None else marked(block, marker["what"]))
        number = end + 1
    return blocks


def marked(block: Block, what: str) -> Block:
    word, _, rest = what.partition(" ")
    if word == "given" and rest:
        return block._replace(given=tuple(rest.split()))
    if word in ("parsed,", "excused,") and rest:
        return block._replace(treatment=word.rstrip(","), why=rest)
    raise ValueError(
        f"{block.place}: the marker says {what!r}, expected 'parsed, WHY', 'excused, WHY' or 'given NAMES'"
    )


def commands_of(code: str) -> list[list[str]]:
    """The commands of a shell block as words: lines joined at backslashes, comments left out."""
    joined = re.sub(r"\\\n", " ", code)
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]
