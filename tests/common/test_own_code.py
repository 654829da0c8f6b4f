"""What runs code stands on the command line, and in no file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.own_code import names_code
from pipelines.options import read_recipe
from stage1_vq.train import Stage1Config

OWN = "no_such_module_of_ours:network"


@pytest.mark.parametrize(
    ("value", "expected"), [("inception", False), ("timm:resnet18", False), (None, False), (OWN, True)]
)
def test_what_names_code(value: object, expected: bool):
    assert names_code(value) == expected


@pytest.mark.parametrize("text", ["train: {steps: 3, evaluate_features: '%s'}\n", "train.evaluate_features: '%s'\n"])
def test_a_recipe_cannot_name_code_and_the_command_line_can(text: str, tmp_path: Path):
    recipe = tmp_path / "config.yaml"
    recipe.write_text(text % OWN)
    with pytest.raises(
        UserError, match=r"config.yaml sets train.evaluate_features to no_such_module_of_ours:network, wh"
    ):
        read_recipe("train-stage1", Stage1Config, "stage1", ["--config", str(recipe)])
    given = ["--config", str(recipe), "--train.evaluate_features", "another:one"]
    config, _ = read_recipe("train-stage1", Stage1Config, "stage1", given)
    assert config.train.evaluate_features == "another:one"
    recipe.write_text(text % "timm:resnet18")
    config, _ = read_recipe("train-stage1", Stage1Config, "stage1", ["--config", str(recipe)])
    assert config.train.evaluate_features == "timm:resnet18"
    assert "no_such_module_of_ours" not in sys.modules
