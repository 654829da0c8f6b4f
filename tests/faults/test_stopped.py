"""Signals that ask for an end, and commands that meet on one folder."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Workshop, assert_same
from tests.faults.workshop import line
from tests.processes import Processes, run_zellige, signalled
from training.checkpoint import Checkpoints


@pytest.mark.parametrize(
    ("job", "number", "beside"),
    [("train-vae", signal.SIGTERM, "false"), ("train-stage1", signal.SIGUSR1, "true")],
    ids=["sigterm", "sigusr1-beside"],
)
def test_a_signal_ends_a_training_after_its_step_and_the_same_command_continues(
    processes: Processes, workshop: Workshop, job: str, number: signal.Signals, beside: str
):
    """Also where checkpoints are written beside the steps: it ends when the last one is whole."""
    words = (*line(job, "broken"), "--train.save_in_background", beside)
    process = processes.start(signalled, ".", workshop.events[job] // 3, number, run_zellige, *words)
    assert process.wait() == 75, process.stderr
    said = re.search(rf"{number.name}: step (\d+) is done and saved", process.stdout)
    assert said is not None, process.stdout
    assert f"continue with: zellige {' '.join(words)}" in process.stdout
    assert Checkpoints(Path("broken") / "checkpoints", 1).newest_good() == (int(said[1]), [])
    assert not list(Path("broken").rglob(".*"))
    processes.zellige(*line(job, "broken")).succeed()
    assert_same(job, Path("broken"))


@pytest.mark.parametrize("job", ["generate", "archive"])
def test_ctrl_c_is_one_sentence_and_the_same_command_continues(processes: Processes, workshop: Workshop, job: str):
    event = workshop.events[job] * 2 // 3
    process = processes.start(signalled, ".", event, signal.SIGINT, run_zellige, *line(job, "broken"))
    assert process.wait() == 130
    assert process.stderr == "zellige: interrupted; the same command continues where it stopped\n"
    assert not [path for path in Path("broken").rglob(".*") if path.name != ".units"]  # records of what is whole
    processes.zellige(*line(job, "broken")).succeed()
    assert_same(job, Path("broken"))


@pytest.mark.parametrize("job", ["train-stage1"])
def test_of_two_on_one_folder_the_second_is_refused_and_a_dead_one_hinders_nobody(
    processes: Processes, workshop: Workshop, job: str
):
    event = workshop.events[job] // 2
    first = processes.start(signalled, ".", event, signal.SIGSTOP, run_zellige, *line(job, "broken"))
    first.wait_until_stopped()
    before = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in Path("broken").rglob("*")}
    second = processes.zellige(*line(job, "broken"))
    assert second.wait() == 2
    assert re.fullmatch(
        rf"zellige: another process is writing to \S+/broken \(zellige \w+, pid {first.pid}, on \S+, since [\d: -]+\); "
        "wait for it to end, or name another folder\n",
        second.stderr,
    )
    after = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in Path("broken").rglob("*")}
    assert after == before
    first.kill()
    first.wait()
    assert (Path("broken") / ".zellige.lock").exists()
    processes.zellige(*line(job, "broken")).succeed()
    assert_same(job, Path("broken"))


def test_the_first_of_two_goes_on_when_the_second_was_refused(processes: Processes, workshop: Workshop):
    first = processes.start(
        signalled, ".", workshop.events["generate"] // 2, signal.SIGSTOP, run_zellige, *line("generate", "broken")
    )
    first.wait_until_stopped()
    assert processes.zellige(*line("generate", "broken")).wait() == 2
    first.signal(signal.SIGCONT)
    first.succeed()
    assert_same("generate", Path("broken"))
