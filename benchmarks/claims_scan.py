"""Where figures stand in README and docs: numbers with a unit in prose, and numbers in tables.

A page is cut into places: paragraphs and rows of tables, their white space made single, so that a line that is broken
elsewhere stays the same text. Code, between backticks or indented by four columns, and addresses of links hold no
figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NUMBER = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?"
SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
MADE = ("docs/claims.md", "docs/benchmarks.md")
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: float(value) for value, word in enumerate(SMALL.split(" "))}
WORDS |= {word: 20.0 + 10 * value for value, word in enumerate(TENS.split(" "))}
UNITS = (
    r"dB|bits?|nats?|minutes?|seconds?|hours?|days|ms|weights|parameters|microseconds?|s|[KMG]i?B|(?:kilo|mega|giga)?bytes?|"
    r"times|standard errors|percent|(?:images|codes|steps)/s|(?:images|codes) (?:per|a|each) second|page faults"
)
AMOUNT = rf"(?:{NUMBER}|{'|'.join(WORDS)})"
FIGURE = re.compile(
    rf"(?<![\w.,^×·/-])(?:{AMOUNT}(?:, | and | or | to | ± )){{0,3}}(?:± )?{AMOUNT}"
    rf"(?:%|x(?![\w\d])| (?:million )?(?:{UNITS})(?![\w-])| of {NUMBER}(?![\w^]))"
)
BARE = re.compile(rf"^[±+-]*\s?{NUMBER}(?![\w×]*[xX×]\d)(?![\w^-]|,\d)(?! (?!and|to|of)[A-Za-z])")


@dataclass(frozen=True)
class Place:
    """A paragraph, or a row of a table with the table's head."""

    line: int
    text: str
    head: str | None = None

    def figures(self) -> list[tuple[int, int]]:
        """Where figures begin and end in the text."""
        plain = masked(self.text)
        found = [match.span() for match in FIGURE.finditer(plain) if not is_grid(plain, match)]
        if self.head is not None:
            at = 0
            for cell in self.text.split("|"):
                start = at + len(cell) - len(cell.lstrip())
                match = BARE.match(plain[at : at + len(cell)].strip())
                if match and not any(begin < start + match.end() and start < end for begin, end in found):
                    found.append((start, start + match.end()))
                at += len(cell) + 1
        return sorted(found)


def is_grid(text: str, match: re.Match[str]) -> bool:
    """`8x8 of 512`, or `7x7 of 128`, is a shape of codes."""
    return bool(re.search(r"[x×]\s?\d*$", text[: match.start() + 1]))


def masked(text: str) -> str:
    """The text without code and addresses, as long as before."""
    return re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->|https?://\S+", lambda found: " " * len(found[0]), text)


def places(page: str) -> Iterator[Place]:
    """All places of a page of Markdown."""
    paragraph: list[str] = []
    begin, head, fence, boxed = 0, None, None, False
    for number, line in enumerate([*page.splitlines(), ""], start=1):
        text = line.strip()
        if fence is not None:
            fence = None if text.startswith(fence) else fence
            continue
        is_row = text.startswith("|")
        opens = re.match(r"`{3,}|~{3,}", text)
        if paragraph and (not text or is_row or opens or re.match(r"#|[*-] |\d+\. ", text)):
            yield Place(begin, " ".join(paragraph))
            paragraph = []
        if text and not line.startswith(" "):
            boxed = text.startswith(("!!!", "???", "==="))  # what is indented below it is no code
        if opens:
            fence = opens[0]
        elif is_row and head is not None and not re.fullmatch(r"[|:\s-]+", text):
            yield Place(number, single(text), head)
        elif text and not is_row and (boxed or paragraph or not line.startswith("    ")):
            begin = begin if paragraph else number
            paragraph.append(single(text))
        head = (head or single(text)) if is_row else None


def single(text: str) -> str:
    """The text with single spaces and without emphasis."""
    return " ".join(text.replace("**", "").split())


def table(page: str, head: str) -> list[list[str]]:
    """The cells of the table, or tables, whose first line begins so; that line comes first."""
    found = [place for place in places(page) if place.head is not None and place.head.startswith(single(head))]
    lines = [found[0].head, *(place.text for place in found if place.head == found[0].head)] if found else []
    return [cells_of(line) for line in lines if line is not None]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line[1:-1].split("|")]


def numbers(text: str) -> list[float]:
    """The numbers in a text, in digits and in words."""
    return [value for value, _ in written(text)]


def written(text: str) -> list[tuple[float, int]]:
    """Each with its decimals."""
    found = re.findall(rf"(?<![\w.])(?:{NUMBER}|(?:{'|'.join(WORDS)})\b)", text)
    values = [WORDS[word] if word in WORDS else float(word.replace(",", "")) for word in found]
    return [(value, len(word.partition(".")[2])) for value, word in zip(values, found, strict=True)]


def pages(root: Path) -> dict[str, str]:
    """README and the pages of docs, but for those that are made: of the claims, and of what benchmarks printed."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in found
        if path.relative_to(root).as_posix() not in MADE
    }
