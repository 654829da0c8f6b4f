"""How messages put numbers and choices into words."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 image`, `2 images`; with a plural that does not end in s: `2 batches`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def one_line(text: object, length: int | None = None) -> str:
    """A text, such as the message of an error, without its line breaks, cut at `length` characters."""
    return " ".join(str(text).split())[:length]


def an(name: str) -> str:
    """`a transformer`, `an infinity`: the name of a kind with its article."""
    return f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"


def either(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`"""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
