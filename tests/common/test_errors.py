from __future__ import annotations

import pickle
from dataclasses import dataclass

import pytest

from common.errors import FieldError, UserError, check_fields, fields_at


@dataclass(frozen=True)
class Inner:
    size: int = 3

    def __post_init__(self) -> None:
        check_fields(self, [("size", self.size >= 1, "at least 1")])


@dataclass(frozen=True)
class Outer:
    inner: Inner


def test_a_field_is_named_by_the_path_as_far_as_it_is_known():
    with pytest.raises(FieldError, match=r"^size=0, expected at least 1$"):
        Inner(0)
    message = r"^model\.outer\.inner\.size=0, expected at least 1$"
    with pytest.raises(UserError, match=message), fields_at("model.outer"), fields_at("inner"):
        Inner(0)
    assert str(FieldError(Outer(Inner(5)), "inner.size", "at most 4").at("model")) == (
        "model.inner.size=5, expected at most 4"
    )


def test_it_reaches_other_processes():
    error = FieldError(Inner(5), "size", "at most 4", "model")
    assert str(pickle.loads(pickle.dumps(error))) == "model.size=5, expected at most 4"
