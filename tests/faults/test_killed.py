"""kill -9 at any instant, again and again: the same command, given again, ends with what it would have made."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Workshop, assert_same, result
from tests.faults.workshop import line
from tests.processes import Processes, instants, run_zellige, signalled

KILLS = {"train-stage1": 3}
CASES = ["train-stage1", "train-vae", "train-stage2", "encode", "compress", "archive", "lossless", "generate"]
CASES += ["inpaint", "vary", "evaluate", "reconstruct", "assemble"]


@pytest.mark.parametrize("job", CASES)
def test_killed_and_repeated_is_undisturbed_byte_for_byte(processes: Processes, workshop: Workshop, job: str):
    out = f"broken-{result(job)}"
    kills = 0
    for event in instants(job, workshop.events[job] // 2, KILLS.get(job, 1)):  # a start that continues does less
        process = processes.start(signalled, ".", event, signal.SIGKILL, run_zellige, *line(job, out))
        kills += process.wait() == -signal.SIGKILL
    processes.zellige(*line(job, out)).succeed()
    assert kills >= 1
    assert_same(job, Path(out))
