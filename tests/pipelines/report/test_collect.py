"""What is read of folders, whole and damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from common.errors import UserError
from pipelines.report.charts import MOST_POINTS, Series, bars, heat_map, line_chart, nice_ticks, thinned
from pipelines.report.collect import read_lines, short_names, subject_of, subjects_of
from pipelines.report.curves import curves_of
from pipelines.report.settings import commands_of, settings_of
from tests.pipelines.report.conftest import stage1_lines, write_run


def test_logs_that_were_cut_at_any_byte_are_read_up_to_there(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step, "split": "train", "loss": 0.5, "é": 1}) + "\n" for step in (1, 2, 3))
    data, needed = whole.encode(), {"step": int, "split": str}
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        lines, unread = read_lines(path, needed)
        ends = data[:length].count(b"\n")
        assert [line["step"] for line in lines[:ends]] == [1, 2, 3][:ends]
        assert len(lines) + unread == ends + bool(data[:length].split(b"\n")[-1])
    path.write_bytes(b'[1]\n{}\n\xff\xfe\n{"step": 1e9, "split": "a"}\n{"step": -1, "split": "a"}\n' + data)
    lines, unread = read_lines(path, needed)
    assert (len(lines), unread) == (3, 5)
    assert read_lines(tmp_path / "none", needed) == ([], 0)


def test_each_kind_of_folder_is_known(folders: Path):
    quick, other, vae, prior, model, single = (
        subject_of(str(folders / path))
        for path in ("quick & <b>", "other", "vae", "quick & <b>/stage2", "quick & <b>/model", "other/model")
    )
    assert [run.stage for run in quick.runs] == ["stage one", "stage two"]
    assert quick.codes == folders / "quick & <b>" / "codes"
    assert [other.what, vae.what, prior.what] == [
        "a run of stage one",
        "a run of stage one (VAE)",
        "a run of stage two",
    ]
    assert prior.codes == quick.codes  # named by the run's config
    assert (model.what, model.runs) == ("an assembled model", ())
    assert single.what == "a run of stage one"  # a run's model stands for the run


def test_what_is_no_run_and_no_model_is_refused(folders: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "empty", "holds neither a run nor a model, expected a run folder"),
        (folders / "quick & <b>" / "codes", "is a folder of code shards, expected a run folder"),
        (folders / "other" / "run.json", "is a file, expected a run folder"),
        (tmp_path / "none", "there is no folder"),
    ):
        with pytest.raises(UserError, match=said):
            subjects_of([str(path)])
    with pytest.raises(UserError, match="is given twice"):
        subjects_of([str(folders / "other"), f"{folders}/./other"])


def test_a_run_without_a_model_or_a_config_is_a_subject_all_the_same(tmp_path: Path):
    run = write_run(tmp_path / "run", "stage one", {}, stage1_lines(20.0))
    (run / "config.yaml").unlink()
    (run / "run.json").unlink()
    subject = subject_of(str(run))
    assert subject.model is None
    assert len(subject.runs[0].metrics) == 5
    assert "no model yet" in subject.notes[0]


def test_names_are_as_short_as_tells_them_apart():
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_names(["one/run", "two/run", "c"]) == ["one/run", "two/run", "c"]


def test_runs_of_one_stage_share_each_plot_and_a_value_that_is_no_number_is_a_gap(folders: Path):
    subjects = subjects_of([str(folders / "other"), str(folders / "quick & <b>")])
    first, second = curves_of(subjects)
    assert (first.stage, second.stage) == ("stage one", "stage two")
    charts = {chart.title: chart for chart in (*first.charts, *first.more)}
    loss, psnr = charts["Loss"], charts["Reconstruction, PSNR"]
    assert [line.name for line in loss.lines] == ["other, train", "quick & <b>, train"]
    assert [line.name for line in psnr.lines] == ["other, validation", "quick & <b>, validation"]
    assert loss.lines[0].path.count("M") == 2
    assert len(loss.lines[0].lost) == 1
    assert loss.data["series"][0]["values"] == [0.1, None, pytest.approx(1 / 30)]
    json.dumps(loss.data, allow_nan=False)
    assert "1 values are not numbers" in loss.said
    assert [line.colour for line in loss.lines] == [0, 1]


def test_a_long_curve_keeps_its_spikes():
    values = [1.0] * 10_000
    values[6_543], values[1_234], values[8_000] = 77.0, -5.0, math.nan
    short = thinned(Series("a", 0, False, list(range(10_000)), values))
    assert len(short.steps) <= 1.5 * MOST_POINTS
    assert {77.0, -5.0} <= set(short.values)
    assert dict(zip(short.steps, short.values, strict=True))[6_543] == 77.0
    assert any(math.isnan(value) for value in short.values)


def test_axes_and_bars():
    assert nice_ticks(0, 1500, 5) == [0, 500, 1000, 1500]
    assert nice_ticks(0.31, 0.92, 5) == [0.4, 0.6, 0.8]
    assert line_chart("a", [Series("a", 0, False, [1, 2], [math.nan, math.inf])]) is None
    huge = line_chart("a", [Series("a", 0, False, [1, 2, 3], [1e308, -1e308, 2.0])])
    assert huge is not None
    assert len(huge.lines[0].lost) == 2
    one = line_chart("a", [Series("a", 0, False, [5], [3.0])])
    assert one is not None
    assert "nan" not in one.lines[0].path
    steep = line_chart("a", [Series("a", 0, False, list(range(9)), [1000.0, *[1.0] * 8])])
    assert steep is not None
    assert steep.logarithmic
    drawn = bars("use", [5.0, 0.0, 1.0], "codes", "%", "said")
    heights = [float(point.split(",")[1]) for point in drawn.outline.split()]
    assert min(heights) == drawn.top
    assert max(heights) == drawn.bottom
    cells = heat_map("entropy", [[0.0, 2.0], [4.0, 1.0]], 4.0, "bits").rows
    assert (cells[0][0][0], cells[1][0][0]) == ("#000004", "#fcffa4")
    assert (cells[0][0][2], cells[1][0][2]) == (True, False)


def test_settings_that_differ_are_found_and_commands_repeat_the_run(folders: Path):
    subjects = subjects_of([str(folders / "quick & <b>"), str(folders / "other")])
    table = settings_of(subjects)[0]
    assert [(row.path, row.values) for row in table.differing] == [
        ("model.width", ["8", "16"]),
        ("train.steps", ["30", "40"]),
    ]
    lines = [command.line for command in commands_of(subjects[0], seed=3, drawn=6, measured=None)]
    quick = folders / "quick & <b>"
    assert f"zellige train-stage1 --config '{quick}/stage1/config.yaml' --run '{quick}/stage1-again'" in lines
    assert f"zellige generate --model '{quick}/model' --num 6 --seed 3 --out samples" in lines
    assert any(line.startswith("zellige encode --model") for line in lines)
