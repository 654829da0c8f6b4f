"""docs/reliability.md: the tests that it names exist, and what it says that the program says, the program says."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
CODE = ("common", "training", "codes", "images", "pipelines", "stage1_vq", "stage1_vae", "stage2_prior")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "::" in line]


def texts_of_the_code() -> list[str]:
    """The code, file by file, with strings that stand beside each other as one."""
    files = [path for package in CODE for path in (ROOT / package).rglob("*.py")]
    return [re.sub(r'"\s*f?"', "", path.read_text(encoding="utf-8")) for path in files]


def test_every_test_that_is_named_exists():
    named = re.findall(r"([\w/.]+\.py)::(\w+)", PAGE)
    assert len(named) >= len(ROWS) > 20
    for file, test in named:
        path = ROOT / file if "/" in file else ROOT / "tests" / "faults" / file
        assert re.search(rf"^def {test}\(", path.read_text(encoding="utf-8"), re.MULTILINE), f"{file}::{test}"


def test_every_sentence_is_one_of_the_program():
    texts = texts_of_the_code()
    for row in ROWS:
        sentences = [
            said for said in re.findall(r"`([^`]+)`", row[1]) if " " in said and not said.startswith("zellige ")
        ]
        for sentence in sentences:
            pieces = [re.escape(piece) for piece in re.split(r" ?… ?", sentence) if piece.strip()]
            if sentence == "skipped steps":  # a metric's name without its underscore
                pieces = ["skipped_steps"]
            pattern = re.compile("(?s:.{,300})".join(pieces))
            assert pieces, sentence
            assert any(pattern.search(text) for text in texts), sentence
