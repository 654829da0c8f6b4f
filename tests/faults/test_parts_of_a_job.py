"""What belongs to a job and dies, vanishes or goes wrong: a process, a worker, images, the clock."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

from tests.faults.conftest import Workshop, assert_same
from tests.faults.workshop import line
from tests.processes import Process, Processes, run_zellige, signalled

LONG = ("--train.steps", "1000000", "--train.save_every", "1000", "--train.validate_every", "0")


def ends_with(process: Process, code: int) -> str:
    assert process.wait(60) == code, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    assert process.stderr.count("\n") == 1, process.stderr
    return process.stderr


def test_one_of_two_processes_dies_and_the_other_says_so(processes: Processes, workshop: Workshop):
    both = processes.job(run_zellige, *line("train-stage1", "broken"), *LONG)
    both[0].wait_for("step 4/")
    both[0].kill()  # the one that holds the folder and writes
    begin = time.monotonic()
    said = ends_with(both[1], 2)
    assert time.monotonic() - begin < 30
    assert "another process of this job has ended" in said
    processes.zellige(*line("train-stage1", "broken")).succeed()  # the folder is nobody's
    assert_same("train-stage1", Path("broken"))


def test_a_data_worker_dies(processes: Processes, workshop: Workshop):
    process = processes.zellige(*line("train-stage1", "broken"), *LONG, "--train.workers", "1")
    process.wait_for("step 4/")
    for worker in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    said = ends_with(process, 2)
    assert said.startswith("zellige: a data loader worker died (")
    assert "lower train.workers or train.prefetch" in said


def test_images_vanish_during_a_training(processes: Processes, workshop: Workshop):
    event = workshop.events["train-stage1"] // 2
    process = processes.start(
        signalled, ".", event, signal.SIGSTOP, run_zellige, *line("train-stage1", "broken"), "--train.steps", "12"
    )
    process.wait_until_stopped()
    for number in (2, 4, 6, 8, 10):
        Path(f"images/left/{number:02}.png").unlink()
    process.signal(signal.SIGCONT)
    said = ends_with(process, 2)
    assert re.search(r"images/left/\d\d\.png", said)
    assert "cannot be read" in said


def test_a_clock_that_goes_back_changes_nothing(processes: Processes, workshop: Workshop):
    """Files have times of a year ago, and later ones earlier times."""
    for job in ("compress", "encode"):
        event = workshop.events[job] // 2
        process = processes.start(signalled, ".", event, signal.SIGKILL, run_zellige, *line(job, "broken"))
        assert process.wait() == -signal.SIGKILL
        for number, path in enumerate(sorted(Path("broken").rglob("*"))):
            os.utime(path, (time.time() - 3e7 - number,) * 2)
        processes.zellige(*line(job, "broken")).succeed()
        assert_same(job, Path("broken"))
        Path("broken").rename(f"{job}-done")


def test_a_damaged_newest_checkpoint_costs_one_interval(processes: Processes, workshop: Workshop):
    newest = max(Path("train-stage1/checkpoints").iterdir())
    saved = sorted(int(path.name[5:]) for path in newest.parent.iterdir())
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = {path.name: path.read_bytes() for path in Path("train-stage1/model").iterdir()}
    said = processes.zellige(*line("train-stage1", "train-stage1")).succeed()
    assert f"checkpoint {newest} is damaged (the checksum of model.safetensors differs)" in said
    assert f"continuing from step {saved[-2]}" in said
    assert {path.name: path.read_bytes() for path in Path("train-stage1/model").iterdir()} == before
    steps = [json.loads(text)["step"] for text in Path("train-stage1/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
