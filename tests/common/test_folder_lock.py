"""One process at a time writes to a folder, whatever becomes of those before it."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import folder_lock
from common.errors import UserError
from common.folder_lock import LOCK_NAME, gate, held, held_part

HOLDER = """
import sys, time
from pathlib import Path
from common.folder_lock import held
with held(Path(sys.argv[1]), "generate"):
    print("held", flush=True)
    time.sleep(60)
"""


def start_holder(folder: Path) -> subprocess.Popen[str]:
    """A process that has taken the folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def take_and_leave(folder: Path) -> None:
    with held(folder, "compress"):
        pass


def write_lock(folder: Path, machine: str) -> Path:
    """As a process on another machine has left, or holds, it."""
    folder.mkdir(exist_ok=True)
    holder = {
        "command": "zellige encode",
        "pid": 7,
        "host": "node3",
        "machine": machine,
        "since": "today",
    }
    (folder / LOCK_NAME).write_text(json.dumps(holder))
    return folder / LOCK_NAME


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.5)
    monkeypatch.setattr(folder_lock, "SETTLED", 0.05)
    monkeypatch.setattr(folder_lock, "BEAT", 0.05)


@pytest.fixture(params=[True, False], ids=["locks", "no locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Also as a file system without locks behaves."""

    def without(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if not request.param:
        monkeypatch.setattr(folder_lock.fcntl, "lockf", without)
    return request.param


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path: Path):
    folder = tmp_path / "out"
    holder = start_holder(folder)
    try:
        with pytest.raises(UserError) as refused:
            take_and_leave(folder)
    finally:
        holder.kill()
        holder.wait()
    assert re.fullmatch(
        rf"another process is writing to {folder} \(zellige generate, pid {holder.pid}, on \S+, since [\d: -]+\); "
        "wait for it to end, or name another folder",
        str(refused.value),
    )


def test_what_a_killed_process_held_is_free_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    holder = start_holder(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_NAME).exists()
    begin = time.monotonic()
    with held(tmp_path, "generate"):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert time.monotonic() - begin < 2
    assert list(tmp_path.iterdir()) == []
    assert re.fullmatch(
        rf"note: the process that was writing to {tmp_path} has ended without a word \(zellige generate, pid "
        rf"{holder.pid}, on \S+, since [\d: -]+\); it is continued\n",
        capfd.readouterr().err,
    )
    take_and_leave(tmp_path)
    assert capfd.readouterr().err == ""


def test_dead_processes_of_a_job_of_ranges_are_told_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    for process in range(3):
        lock = write_lock(tmp_path, folder_lock.machine())
        lock.rename(f"{lock}.0-10.{process}")
    with gate(tmp_path, "generate"), held_part(tmp_path, "generate", range(10, 20)):
        assert capfd.readouterr().err == ""  # they may be anybody's: these numbers are not theirs
    take_and_leave(tmp_path)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "(zellige encode, pid 7, on node3, since today), and 2 more; it is continued" in said
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_made_and_goes_again_if_nothing_came_into_it(tmp_path: Path):
    with held(tmp_path / "a" / "b", "generate"):
        assert (tmp_path / "a" / "b" / LOCK_NAME).exists()
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "there").mkdir()
    take_and_leave(tmp_path / "there")
    assert (tmp_path / "there").exists()
    with held(tmp_path / "kept", "generate"):
        (tmp_path / "kept" / "result").write_text("x")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["result"]


def test_a_process_does_not_share_a_folder_with_itself(tmp_path: Path):
    with held(tmp_path, "generate"), pytest.raises(UserError, match=r"this process is writing to .* already"):
        take_and_leave(tmp_path)
    take_and_leave(tmp_path)


def test_one_that_lives_on_another_machine_is_refused(tmp_path: Path, impatient, locks):
    """Its locks may not reach here, or there are none: its sign of life does."""
    path = write_lock(tmp_path, "another machine")
    beat = "import os, sys, time\nfor _ in range(100): os.utime(sys.argv[1]); time.sleep(0.1)"
    alive = subprocess.Popen([sys.executable, "-c", beat, str(path)])
    try:
        with pytest.raises(UserError, match=r"pid 7, on node3.*if that machine is down, delete .*\.zellige\.lock"):
            take_and_leave(tmp_path)
    finally:
        alive.kill()
        alive.wait()
    assert json.loads(path.read_text())["pid"] == 7


def test_one_that_died_on_another_machine_is_not_waited_for_for_ever(tmp_path: Path, impatient, locks):
    write_lock(tmp_path, "another machine")
    with held(tmp_path, "encode"):
        if locks:  # still, although the file was opened to watch it
            assert subprocess.run([sys.executable, "-c", TRY, str(tmp_path / LOCK_NAME)]).returncode == 3
        assert json.loads((tmp_path / LOCK_NAME).read_text())["command"] == "zellige encode"
    assert not (tmp_path / LOCK_NAME).exists()


TRY = """
import fcntl, os, sys
try:
    fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(3)
"""


def test_without_locks_a_living_process_is_still_seen(tmp_path: Path, impatient, monkeypatch: pytest.MonkeyPatch):
    path = write_lock(tmp_path, folder_lock.machine())

    def without(*arguments: object) -> None:
        os.utime(path)
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(folder_lock.fcntl, "lockf", without)
    times = iter(range(1000))
    monkeypatch.setattr(folder_lock, "time_of", lambda path: next(times))
    with pytest.raises(UserError, match="another process is writing to"):
        take_and_leave(tmp_path)


@pytest.mark.parametrize("written", ["", '{"pid": 1'], ids=["nothing yet", "cut short"])
def test_a_lock_without_a_name_is_taken_without_a_word(tmp_path: Path, written: str, capsys: pytest.CaptureFixture):
    """Its maker may live, and be about to find that another was faster: nobody is said to have ended."""
    (tmp_path / LOCK_NAME).write_text(written)
    take_and_leave(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


RACE = """
import sys, time
from pathlib import Path
from common.errors import UserError
from common.folder_lock import held
folder = Path(sys.argv[1])
made = 0
for _ in range(150):
    try:
        with held(folder, "generate"):
            mine = folder / "mine"
            mine.touch(exist_ok=False)  # fails where two are inside
            made += 1
            mine.unlink()
    except UserError:
        pass
print(made)
"""


def test_never_two_at_once(tmp_path: Path):
    (tmp_path / "out").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", RACE, str(tmp_path / "out")]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
              for _ in range(3)]  # fmt: skip
    total = 0
    for racer in racers:
        made, errors = racer.communicate(timeout=100)
        assert errors == ""
        total += int(made)
    assert total > 0
    assert list((tmp_path / "out").iterdir()) == []
