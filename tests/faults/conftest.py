"""Each job done once without a fault: what every fault is held against."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.workshop import FILES, JOBS, contents, lay_out, line
from tests.processes import Processes, counted, run_zellige


class Workshop(NamedTuple):
    folder: Path  # images, recipes, and the result of each job under its name
    events: dict[str, int]  # what each job did to files


@pytest.fixture(scope="session")
def undisturbed(process_server: Processes, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """All jobs, one after the other where one takes another's result."""
    folder = tmp_path_factory.mktemp("workshop")
    lay_out(folder)
    here = os.getcwd()
    os.chdir(folder)
    try:
        for together in (
            ("train-stage1", "train-vae"),
            ("encode", "reconstruct", "lossless"),
            ("train-stage2",),
            ("assemble", "report"),
            ("generate", "inpaint", "vary"),
            ("compress", "archive", "evaluate"),
        ):
            started = [
                process_server.start(counted, str(folder), f"{job}.events", run_zellige, *line(job, result(job)))
                for job in together
            ]
            for process in started:
                process.succeed()
    finally:
        os.chdir(here)
    return Workshop(folder, {job: int((folder / f"{job}.events").read_text()) for job in JOBS})


def result(job: str) -> str:
    return FILES.get(job, job)


@pytest.fixture
def workshop(undisturbed: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """The test is in a folder with images, recipes and the results of all jobs, which it may break."""
    for path in undisturbed.folder.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    return Workshop(tmp_path, undisturbed.events)


def assert_same(job: str, out: Path) -> None:
    """What a job made is, byte for byte, what it makes undisturbed."""
    made, expected = contents(out), contents(Path(result(job)))
    assert sorted(made) == sorted(expected)
    differing = {name: (made[name], content) for name, content in expected.items() if made[name] != content}
    assert differing == {}
