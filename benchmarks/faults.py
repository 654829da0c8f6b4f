"""Is what was killed twenty times, anywhere, byte for byte what was never disturbed? Is a flipped bit found?

    python -m benchmarks.faults --kills 20 --flips 10

Trains both stages and a VAE on toys, encodes, compresses, generates and evaluates, each once in peace and once killed
by SIGKILL at random moments and continued by the same command. Then flips bits of each kind of file that Zellige writes
and says what the commands that read them did. tests/faults, which has the jobs and the processes, does the same at a
size for every day, at instants that it chooses.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.conftest import result
from tests.faults.test_damage import KINDS
from tests.faults.workshop import contents, lay_out, line
from tests.processes import Processes

ORDER = (
    "train-stage1", "train-vae", "encode", "reconstruct", "lossless", "train-stage2", "assemble", "generate",
    "compress", "archive", "evaluate",
)  # fmt: skip
LONGER = {
    **dict.fromkeys(
        ("train-stage1", "train-vae", "train-stage2"),
        ("--train.steps", "400", "--train.save_every", "10", "--train.validate_every", "50"),
    ),
    "generate": ("--num", "200"),
}


def command(job: str, out: str) -> tuple[str, ...]:
    return (*line(job, out), *LONGER.get(job, ()))


def in_peace(processes: Processes, job: str) -> float:
    begin = time.perf_counter()
    processes.zellige(*command(job, result(job))).succeed(600)
    return time.perf_counter() - begin


def killed(processes: Processes, job: str, kills: int, seconds: float, chance: random.Random) -> tuple[int, int]:
    """How often it was killed, and in how many starts; seconds: that it takes in peace."""
    out, starts, done = f"killed-{result(job)}", 0, 0
    # So many kills in one go; what keeps nothing until its end is killed anywhere in it.
    longest = seconds * (1.0 if job in ("evaluate", "assemble", "reconstruct") else 3.0 / kills + 0.3)
    while done < kills:
        starts += 1
        process = processes.zellige(*command(job, out))
        time.sleep(chance.uniform(0, longest))
        process.kill()
        if process.wait() == -signal.SIGKILL:
            done += 1
        elif starts > 3 * kills:
            break
        else:  # it had ended: from the beginning, once more
            assert process.wait() == 0, process.stderr
            assert contents(Path(out)) == contents(Path(result(job))), job
            shutil.rmtree(out) if Path(out).is_dir() else Path(out).unlink()
    processes.zellige(*command(job, out)).succeed(600)
    return done, starts


def flip(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def flipped(processes: Processes, pattern: str, job: str, flips: int, chance: random.Random) -> Counter[str]:
    """What the job did of as many files with one flipped bit."""
    found: Counter[str] = Counter()
    here = Path.cwd()
    for _ in range(flips):
        with tempfile.TemporaryDirectory() as place:
            shutil.copytree(here, place, dirs_exist_ok=True)
            os.chdir(place)
            (path,) = Path().glob(pattern)
            path.write_bytes(flip(path.read_bytes(), chance))
            out = job if pattern.startswith(f"{job}/") else f"new-{result(job)}"
            process = processes.zellige(*line(job, out))
            code = process.wait()
            if code == 0:
                same = contents(Path(out)) == contents(here / result(job))
                found["harmless or mended" if same else "WRONG"] += 1
            else:
                one_sentence = code == 2 and process.stderr.count("\n") == 1
                found["said" if one_sentence else "TRACEBACK"] += 1
            os.chdir(here)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--flips", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    processes = Processes()
    try:
        with tempfile.TemporaryDirectory() as folder:
            lay_out(Path(folder))
            os.chdir(folder)
            print("| job | kills | starts | as undisturbed |\n|---|---|---|---|", flush=True)
            for job in ORDER:
                seconds = in_peace(processes, job)
                kills, starts = killed(processes, job, arguments.kills, seconds, chance)
                same = contents(Path(f"killed-{result(job)}")) == contents(Path(result(job)))
                print(f"| {job} | {kills} | {starts + 1} | {'byte for byte' if same else 'NO'} |", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            lay_out(Path(folder))
            os.chdir(folder)
            for job in ORDER:
                processes.zellige(*line(job, result(job))).succeed()
            print("\n| file | read by | of flipped bits |\n|---|---|---|", flush=True)
            total: Counter[str] = Counter()
            for pattern, job in KINDS if arguments.flips else ():
                found = flipped(processes, pattern, job, arguments.flips, chance)
                total += found
                print(f"| {pattern} | {job} | {dict(found)} |", flush=True)
            print(f"all: {dict(total)}")
    finally:
        processes.close()


if __name__ == "__main__":
    main()
