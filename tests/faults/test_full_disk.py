"""A disk that is full: one sentence, nothing half-written, and the same command continues when there is room."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Workshop, assert_same, result
from tests.faults.workshop import contents, line
from tests.processes import Processes

JOBS = {"train-stage1": (0.1, 0.6), "encode": (0.6,), "archive": (0.6,), "generate": (0.6,)}
PAGE = 4096


class Disk:
    """A small file system of its own, in memory."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        self.is_mounted = self.mount("size=16k")

    def mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.place)]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False

    def resize(self, size: int) -> None:
        assert self.mount(f"remount,size={size}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    if not disk.is_mounted:
        pytest.skip("mounting a file system needs root")
    yield disk
    os.chdir(tmp_path)
    subprocess.run(["umount", str(disk.place)], check=True)


def space_of(job: str) -> int:
    """What the result of a job takes, in bytes of whole pages."""
    return sum(-(-len(content) // PAGE) * PAGE for content in contents(Path(result(job))).values())


@pytest.mark.parametrize("job", JOBS)
def test_a_full_disk_is_one_sentence_and_the_same_command_continues(
    processes: Processes, workshop: Workshop, disk: Disk, job: str
):
    out = disk.place / "broken"
    for share in JOBS[job]:  # of what the result takes
        disk.resize(max(int(share * space_of(job)), 2 * PAGE))
        process = processes.zellige(*line(job, str(out)))
        assert process.wait() == 2, process.stdout + process.stderr
        assert process.stderr.startswith("zellige: the disk is full"), process.stderr
        assert process.stderr.count("\n") == 1
        assert not [path for path in out.rglob(".*") if path.name.endswith((".tmp", ".lock"))]
    disk.resize(64 << 20)
    processes.zellige(*line(job, str(out))).succeed()
    assert_same(job, out)


@pytest.mark.parametrize("job", ["train-stage1"])
def test_a_limit_on_the_size_of_files_is_one_sentence_and_the_same_command_continues(
    processes: Processes, workshop: Workshop, job: str
):
    largest = max(map(len, contents(Path(result(job))).values()))
    process = processes.zellige(*line(job, "broken"), limits={resource.RLIMIT_FSIZE: largest // 2})
    assert process.wait() == 2, process.stdout + process.stderr
    assert "was not written: it is larger than a file may be here" in process.stderr
    assert process.stderr.count("\n") == 1
    assert not [path for path in Path("broken").rglob(".*") if path.name.endswith((".tmp", ".lock"))]
    processes.zellige(*line(job, "broken")).succeed()
    assert_same(job, Path("broken"))
