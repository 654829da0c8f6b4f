"""YAML of others: what it costs, and what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from common import safe_yaml
from common.errors import UserError
from common.foreign_weights import read_original_config
from common.safe_yaml import load_yaml
from pipelines.options import read_yaml

# Each line stands for twice what the one before it does: 2**12 values here, small enough for any reader.
DOUBLING = "a0: &a0 [0, 0]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 12))


@pytest.mark.parametrize("text", ["", "a: 1", "[1, 2.5, x]", "a: &x {b: 1}\nc: *x", "a: {b: null}\nd: 2020-01-02"])
def test_plain_values_are_those_of_pyyaml(text: str):
    assert load_yaml(text) == yaml.safe_load(text)


def test_aliases_that_stand_for_too_many_values_are_refused(monkeypatch: pytest.MonkeyPatch):
    assert len(load_yaml(DOUBLING)) == 12
    monkeypatch.setattr(safe_yaml, "LARGEST", 4000)
    with pytest.raises(yaml.YAMLError, match="its aliases stand for more than 4,000 values"):
        load_yaml(DOUBLING)
    merged = DOUBLING + "m: {<<: [{x: *a11}, {y: *a11}]}"
    with pytest.raises(yaml.YAMLError, match="stand for more"):
        load_yaml(merged)


def test_an_alias_of_what_it_is_a_part_of_is_refused():
    with pytest.raises(yaml.YAMLError, match="stands for what it is a part of"):
        load_yaml("a: &a [1, *a]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 500 + "]" * 500, "nested too deeply"),
        ("a: 2020-13-45", "a value that cannot be"),
        ("a: " + "9" * 5000, "a value that cannot be"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: !!python/name:os.getcwd", "could not determine a constructor"),
    ],
)
def test_what_is_no_plain_yaml_is_told_and_nothing_is_made_of_it(text: str, message: str, tmp_path: Path):
    with pytest.raises(yaml.YAMLError, match=message):
        load_yaml(text)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml is not valid YAML"):
        read_yaml(path)
    with pytest.raises(UserError, match=r"recipe\.yaml is neither YAML nor JSON"):
        read_original_config(path)
