"""Numbers and choices in messages."""

from __future__ import annotations

from common.wording import an, counted, either, one_line


def test_one_is_singular_and_anything_else_plural():
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [counted(number, "batch", "batches") for number in (1, 21)] == ["1 batch", "21 batches"]


def test_a_kind_has_the_article_that_it_is_read_with():
    assert [an(kind) for kind in ("transformer", "infinity")] == ["a transformer", "an infinity"]


def test_the_last_of_several_choices_comes_after_or():
    assert [either(names) for names in ("a", "ab", "abc")] == ["a", "a or b", "a, b or c"]


def test_a_message_of_several_lines_becomes_one_and_is_cut():
    assert one_line("a\n  b\tc ") == "a b c"
    assert one_line(ValueError("not\nfound"), 5) == "not f"
