#!/usr/bin/env bash
# torchrun: SIGUSR1 ends it and leaves its processes running, and the codes by which these end are lost.
#
# Guess 1: a launcher passes on the signals by which schedulers tell that time is up, SIGUSR1 among them (SLURM's
# `--signal=USR1@300`). Seen in torch 2.15.0: SIGTERM is passed on; of SIGUSR1 torchrun itself dies, while its
# processes are not told and go on without it, so a job script takes the job for ended. Way out: `--signals-to-handle
# SIGTERM,SIGINT,SIGUSR1`.
#
# Guess 2: where all processes end with the same code, such as 75 (EX_TEMPFAIL, "try again", by which SLURM's
# RequeueExit goes), that is torchrun's code. Seen: it is 1, as for any failure, after a signal or without one. Way
# out: to tell the job script by a file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cd "$folder"
cat > job.py <<'PYTHON'
import signal
import sys
import time
from pathlib import Path

got = []
for asked in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(asked, lambda number, frame: got.append(signal.Signals(number).name))
Path("ready").touch()
end = time.monotonic() + float(sys.argv[1])
while not got and time.monotonic() < end:
    time.sleep(0.1)
Path("written").write_text(got[0] if got else "nothing")
Path("written").rename("got")
sys.exit(75)
PYTHON
export OMP_NUM_THREADS=1
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import signal
import subprocess
import sys
import time
from pathlib import Path

print(f"torch {importlib.metadata.version('torch')}")
torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node", "1"]
handle = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
for options, sent, expected in (
    ([], None, (1, "nothing", True)),
    ([], signal.SIGTERM, (1, "SIGTERM", True)),
    ([], signal.SIGUSR1, (-signal.SIGUSR1, "nothing", False)),
    (handle, signal.SIGUSR1, (1, "SIGUSR1", True)),
):
    for name in ("ready", "got"):
        Path(name).unlink(missing_ok=True)
    job = subprocess.Popen([*torchrun, *options, "job.py", "15" if sent else "0"], stderr=subprocess.DEVNULL)
    while sent and not Path("ready").exists():
        time.sleep(0.1)
    if sent:
        job.send_signal(sent)
    code = job.wait()
    ended = Path("got").exists()
    while not Path("got").exists():
        time.sleep(0.1)
    got = Path("got").read_text()
    print(f"{options}, {sent and sent.name} sent: torchrun ended with {code}; process got {got}, ended first: {ended}")
    assert (code, got, ended) == expected, "this has changed"
PYTHON
