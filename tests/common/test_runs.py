"""Which stage a recipe or a run is of."""

from __future__ import annotations

import json
from pathlib import Path

from common.runs import config_of_run, is_config_of_run, stage_of_recipe, stage_of_run

EARLIER = Path(__file__).parents[1] / "earlier_builds" / "begun"


def test_the_stage_of_a_recipe():
    assert stage_of_recipe({"model": {}, "data": {}}) == "stage one"
    assert stage_of_recipe({"model": {}, "label_dropout": 0.1}) == "stage two"
    assert stage_of_recipe({"model": {}, "data": {}, "codes": "x"}) is None
    assert stage_of_recipe({"model": {}}) is None
    assert stage_of_recipe("text") is None


def test_runs_of_the_build_before_are_told_by_their_config():
    stages = {name: stage_of_run(EARLIER / name) for name in ("stage1", "adversarial", "stage2")}
    assert stages == {"stage1": "stage one", "adversarial": "stage one", "stage2": "stage two"}
    assert all(is_config_of_run(config_of_run(EARLIER / name)) for name in stages)


def test_what_is_recorded_goes_first_where_it_says_something(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("model: {}\ndata: {}\n")
    for recorded, stage in (
        ({"stage": "stage two"}, "stage two"),
        ({"stage": ""}, "stage one"),
        ({"stage": "live"}, "stage one"),
    ):
        (tmp_path / "run.json").write_text(json.dumps(recorded))
        assert stage_of_run(tmp_path) == stage
    (tmp_path / "run.json").write_text("{")
    assert stage_of_run(tmp_path) == "stage one"


def test_a_config_of_something_else_is_of_no_run(tmp_path: Path):
    for text in ("a: {\n", "- a\n", "train: 3\n", "\xff"):
        (tmp_path / "config.yaml").write_text(text, encoding="latin-1")
        assert not is_config_of_run(config_of_run(tmp_path))
        assert stage_of_run(tmp_path) is None
    assert config_of_run(tmp_path / "nowhere") == {}
