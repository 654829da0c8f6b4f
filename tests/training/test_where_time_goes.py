"""The log says what the wall time of a run goes to."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from accelerate import Accelerator

from common.tensor_files import save_tensors
from tests.training.toy import ToyData, ToyModel, toy_config, toy_fit, toy_task
from training.clock import OTHER, Clock
from training.metrics_log import (
    COMMUNICATION,
    COMPUTING,
    SAVING,
    VALIDATION,
    WAITING,
    RunLog,
    StepReport,
    Timing,
    in_bytes,
    peak_memory,
)
from training.setup import communication_seconds


class SleepyData(ToyData):
    def fetch(self, indices, draws):
        time.sleep(0.05)
        return super().fetch(indices, draws)


class SleepyModel(ToyModel):
    def save_pretrained(self, *args, **kwargs):
        time.sleep(0.1)
        return super().save_pretrained(*args, **kwargs)


def timing_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]


def fail_after(clock: Clock, activity: str, seconds: float) -> None:
    with clock.on(activity):
        time.sleep(seconds)
        raise RuntimeError(activity)


def test_an_activity_has_the_seconds_that_pass_in_it_but_for_those_of_others():
    clock, begin = Clock(), time.perf_counter()
    with clock.on(VALIDATION):
        time.sleep(0.05)
        with pytest.raises(RuntimeError, match=SAVING):
            fail_after(clock, SAVING, 0.06)
    seconds = dict(clock.seconds())
    assert sum(seconds.values()) == pytest.approx(time.perf_counter() - begin, abs=2e-3)
    assert seconds[VALIDATION] >= 0.02
    assert seconds[SAVING] >= 0.06
    assert seconds[OTHER] < 0.02


def test_shares_of_the_wall_time_add_up_to_1_and_data_that_are_slow_are_waited_for(tmp_path: Path):
    toy_fit(tmp_path, toy_config(steps=6, save_every=6), train=SleepyData(37))
    lines = timing_of(tmp_path)
    for line in lines:
        assert sum(line["shares"].values()) == pytest.approx(1)
        assert line["memory_bytes"] > 1e7
    first, second = lines[:2]  # no validation and no checkpoint between them
    waited = second["waiting_seconds"] - first["waiting_seconds"]
    assert waited >= 2 * 0.05
    assert second["shares"][WAITING] == pytest.approx(waited / (second["seconds"] - first["seconds"]))
    parts = ("training_seconds", "validation_seconds", "preview_seconds", "saving_seconds")
    assert sum(lines[-1][name] for name in parts) <= lines[-1]["seconds"]
    assert lines[-1]["validation_seconds"] > 0


def test_a_slow_save_is_told_as_saving_also_where_a_validation_asks_for_it(tmp_path: Path, capsys):
    task = toy_task()
    task.model = SleepyModel()
    toy_fit(tmp_path, toy_config(steps=6, validate_every=2, ema_decay=0.0), task)
    before, line = timing_of(tmp_path)[-2:]
    saved = line["saving_seconds"] - before["saving_seconds"]
    assert saved > 0.1
    assert line["saving_seconds"] > line["validation_seconds"]
    assert line["shares"][SAVING] == pytest.approx(saved / (line["seconds"] - before["seconds"]))
    assert f", saving {line['shares'][SAVING]:.0%}" in capsys.readouterr().out


def test_the_last_checkpoint_is_waited_for_as_saving_where_it_is_written_beside_the_steps(
    tmp_path: Path, monkeypatch, capsys
):
    def slowly(*arguments):
        time.sleep(0.3)
        save_tensors(*arguments)

    monkeypatch.setattr("training.checkpoint.save_tensors", slowly)
    monkeypatch.setattr("training.metrics_log.MEASURED_SECONDS", 0.0)
    toy_fit(tmp_path, toy_config(steps=2, validate_every=0, save_every=2, save_in_background=True))
    found = re.search(r"time of the run: .*, saving (\d+)%", capsys.readouterr().out)
    assert found is not None
    assert int(found[1]) > 30


def test_a_run_whose_log_knows_less_goes_on_and_counts_from_there(tmp_path: Path):
    old = {"step": 1, "images": 8, "seconds": 5.0, "training_seconds": 2.0, "waiting_seconds": 1.0}
    (tmp_path / "timing.jsonl").write_text(json.dumps({**old, "images_per_second": 4.0, "waiting_share": 0.5}) + "\n")
    clock = Clock()
    log = RunLog(tmp_path, Accelerator(cpu=True), "none", 1, 10, clock=clock)
    with clock.on(SAVING):
        time.sleep(0.01)
    log.step_done(StepReport(loss=1.0, images=8, seconds=1.0, waiting_seconds=0.0, communication_seconds=0.25))
    log.train(2, {"loss": 1.0}, [])
    log.close()
    line = timing_of(tmp_path)[-1]
    assert line["seconds"] >= 5
    assert (line["images"], line["training_seconds"], line["waiting_seconds"]) == (16, 3.0, 1.0)
    assert line["saving_seconds"] >= 0.01
    assert line["shares"][COMMUNICATION] / line["shares"][COMPUTING] == pytest.approx(1 / 3)


def test_a_long_run_ends_with_what_its_time_went_to(tmp_path: Path, capsys):
    log = RunLog(tmp_path, Accelerator(cpu=True), "none", 0, 10)
    log.ended()
    assert capsys.readouterr().out == ""
    log.total = Timing(training_seconds=80.0, waiting_seconds=20.0)
    log._before, log._begin = Timing(validation_seconds=20.0), time.perf_counter() - 100
    log.ended()
    said = capsys.readouterr().out
    assert said.startswith("time of the run: computing 60%, waiting for data 20%, validation 20%; at most ")


class Timed:
    """What DistributedDataParallel tells, in nanoseconds."""

    def __init__(self, **told: int):
        self.told = told

    def _get_ddp_logging_data(self):
        return self.told


def test_the_exchange_counts_where_the_backward_pass_waits_for_it():
    told = {"backward_comm_time": 500_000_000, "backward_compute_comm_overlap_time": 200_000_000}
    assert communication_seconds(Timed(**told), 0.0) == pytest.approx(0.3)
    assert communication_seconds(Timed(**told), 0.1) == pytest.approx(0.2)  # another process waited for data
    assert communication_seconds(Timed(**told), 1.0) == 0
    assert communication_seconds(Timed(), 0.0) is None
    assert communication_seconds(None, 0.0) is None


def test_memory_in_words():
    assert [in_bytes(count) for count in (2.5e6, 12e6, 1.44e9)] == ["2.5 MB", "12 MB", "1.4 GB"]
    accelerator = Accelerator(cpu=True)
    held = peak_memory(accelerator.device)
    more = bytearray(10**9 // 4)
    assert held is not None
    assert peak_memory(accelerator.device) >= len(more)
