"""Are samples that were made through twenty kills those of one undisturbed run, byte for byte?

    python -m benchmarks.kills --out /scratch/kills             # 10,000 images, into a folder and tars
    python -m benchmarks.kills --out /scratch/kills --bucket    # and into a bucket of moto's server
    python -m benchmarks.kills --out /scratch/kills --model runs/quickstart/model --num 2000

Jobs of one, two or three processes run `zellige generate` on one place; at a random moment SIGKILL ends one of them,
after another moment the rest, until all kills are spent; then a job of two processes ends the work. States how many
processes were killed while they worked, and whether what is there (images, record, sheet, records of units) equals,
file by file, what one process makes without being disturbed. Without --model an untrained model of 28x28 pixels draws.
--bucket needs `pip install "moto[s3]" flask flask-cors s3fs`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

from benchmarks.million import write_model
from pipelines.cli import main as zellige

FORK = multiprocessing.get_context("fork")  # a new Python that imports torch takes seconds
BUCKET = "samples"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run_rank(arguments: list[str], rank: int, processes: int, port: int) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    if processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    os._exit(zellige(arguments))


def start(arguments: list[str], processes: int) -> list[ForkProcess]:
    port = free_port()
    job = [FORK.Process(target=run_rank, args=(arguments, rank, processes, port)) for rank in range(processes)]
    for process in job:
        process.start()
    return job


def kill(process: ForkProcess) -> bool:
    """Whether it was alive."""
    alive = process.is_alive()
    if alive:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive


def disturbed(arguments: list[str], kills: int, longest: float, chance: random.Random) -> int:
    """Kills jobs so many times, then lets one end. Returns how many processes were killed at work."""
    killed = 0
    for _ in range(kills):
        job = start(arguments, chance.choice([1, 2, 2, 3]))
        time.sleep(chance.uniform(0, longest))
        killed += kill(chance.choice(job))
        time.sleep(chance.uniform(0, longest / 4))
        killed += sum(kill(process) for process in job if process.is_alive())
    job = start(arguments, 2)
    for process in job:
        process.join()
    if any(process.exitcode for process in job):
        raise SystemExit(f"the last job ended with {[process.exitcode for process in job]}")
    return killed


def of_folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of_bucket(place: str) -> dict[str, bytes]:
    import s3fs

    files = s3fs.S3FileSystem()
    names = files.find(place)
    return {name.removeprefix(f"{place}/"): data for name, data in files.cat(names).items()}


def start_server() -> tuple[subprocess.Popen[bytes], str]:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.1)
    made = [sys.executable, "-c", f"import s3fs; s3fs.S3FileSystem().mkdir({BUCKET!r})"]
    subprocess.run(made, check=True)
    return server, address


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--per_shard", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=8.0, help="seconds until a kill, at most")
    parser.add_argument("--bucket", action="store_true")
    options = parser.parse_args()
    if options.model is None:
        write_model(model := options.out / "model", size=28)
    else:
        model = options.model
    given = ["--num", str(options.num), "--images_per_shard", str(options.per_shard), "--device", "cpu"]
    arguments = ["generate", "--model", str(model), *given]
    chance = random.Random(0)
    peace: dict[str, dict[str, bytes]] = {}
    for kind in ("png", "tar"):
        out = options.out / f"peace_{kind}"
        begin = time.perf_counter()
        for process in start([*arguments, "--format", kind, "--out", str(out)], 1):
            process.join()
        peace[kind] = of_folder(out)
        print(f"{kind}: {options.num} images in peace, {time.perf_counter() - begin:.0f} s, {len(peace[kind])} files")
    print("place    killed at work  files  missing  besides  other bytes", flush=True)
    for place, kind in [("folder", "png"), ("tars", "tar"), *([("bucket", "png")] if options.bucket else [])]:
        server, out = None, str(options.out / place)
        if place == "bucket":
            server, _ = start_server()
            out = f"s3://{BUCKET}/place"
        try:
            killed = disturbed([*arguments, "--format", kind, "--out", out], options.kills, options.longest, chance)
            made = of_bucket(f"{BUCKET}/place") if server else of_folder(Path(out))
        finally:
            if server is not None:
                server.terminate()
                server.wait()
        differing = [name for name, data in peace[kind].items() if name in made and made[name] != data]
        print(
            f"{place:<8} {killed:<15} {len(made):<6} {len(peace[kind].keys() - made.keys()):<8} "
            f"{len(made.keys() - peace[kind].keys()):<8} {len(differing)} {differing[:3] or ''}",
            flush=True,
        )


if __name__ == "__main__":
    main()
