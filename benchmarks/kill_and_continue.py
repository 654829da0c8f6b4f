"""Is a run that was killed, five times over, the run that was not?

    python -m benchmarks.kill_and_continue --kills 5

Trains `zellige train-stage1` on the bundled digits twice with one config: once in peace, once killed with SIGKILL at
random moments and continued by the same command. Then compares final weights and metrics byte for byte, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = "mnist_quickstart"
SHORTENED = (
    "--train.steps",
    "300",
    "--train.log_every",
    "10",
    "--train.validate_every",
    "60",
    "--train.save_every",
    "20",
)
COMPARED = ("model/model.safetensors", "metrics.jsonl")


def command(run: Path) -> list[str]:
    train = [sys.executable, "-m", "pipelines", "train-stage1", "--config", RECIPE, "--run", str(run)]
    return [*train, *SHORTENED]


def step_of(run: Path) -> int:
    """The last step that the run has logged."""
    try:
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (FileNotFoundError, IndexError, json.JSONDecodeError):
        return 0


def run_killed(run: Path, kills: int, chance: random.Random) -> list[int]:
    """Trains to the end with `kills` SIGKILLs on the way; returns the last step logged before each."""
    killed_at: list[int] = []
    while True:
        process = subprocess.Popen(command(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if len(killed_at) == kills:
            if process.wait():
                raise SystemExit(f"the continued run failed with exit code {process.returncode}")
            return killed_at
        target = step_of(run) + chance.randrange(10, 60)  # beyond where it stands, so that it gets on
        while process.poll() is None and step_of(run) < target:
            time.sleep(0.01)
        time.sleep(chance.random())  # within a step, a validation or the writing of a checkpoint
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed_at.append(step_of(run))
        elif process.returncode:
            raise SystemExit(f"the run failed with exit code {process.returncode}")
        else:
            raise SystemExit(f"the run ended after {len(killed_at)} kills: give fewer, or train.steps more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        subprocess.run(command(whole), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        steps = run_killed(killed, arguments.kills, random.Random(arguments.seed))
        print(f"killed after steps {', '.join(map(str, steps))}, and continued")
        all_equal = True
        for name in COMPARED:
            equal = (whole / name).read_bytes() == (killed / name).read_bytes()
            print(f"{name}: {'equal, byte for byte' if equal else 'DIFFERENT'}")
            all_equal &= equal
    sys.exit(not all_equal)


if __name__ == "__main__":
    main()
