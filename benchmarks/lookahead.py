"""Lookahead side by side with the step-by-step loop, of this build and of another.

    python -m benchmarks.lookahead --model runs/quickstart/stage2 --before FOLDER
    python -m benchmarks.lookahead                  # an untrained prior
    python -m benchmarks.lookahead --model runs/quickstart/stage2 --device cuda --threads 1

Prints two Markdown tables. The first: passes per image and how many times as fast as this build's steps, and as the
other build's (a checkout in FOLDER), batches are drawn: with windows of several lengths, and with what `auto` has found
after some batches. Each build has a process of its own; all take turns, and a figure is the median of the rounds. The
second: how many of 1,000 samples have other codes than step by step, and of those how far the first one's uniform
number lies from the border between two codes. Exits with 1 where a sample differs, or `auto` is slower than the bound.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WINDOWS = (4, 8, 16)
WARM_UP = 40  # batches, by the end of which `auto` has decided
SLOWEST = 0.97  # of this build's steps, where nothing is gained


def worker(model: str | None, threads: int, device: str) -> None:
    """Answers each line, a request, with seconds, passes and codes."""
    import torch

    from common.memory import keep_freed_memory
    from common.model_io import load_pretrained
    from stage2_prior.condition import Condition
    from stage2_prior.priors import PRIORS
    from stage2_prior.sampling import SamplingConfig, sample_codes

    torch.set_num_threads(threads)
    keep_freed_memory()
    prior = (untrained() if model is None else load_pretrained(model, PRIORS)).to(device)

    for line in sys.stdin:
        asked = json.loads(line)
        sampling = SamplingConfig(**asked["sampling"])
        passes: list[int] = []
        told = {"tell_passes": passes.extend} if "lookahead" in asked["sampling"] else {}
        codes = []
        begin = time.perf_counter()
        for start in range(asked["first"], asked["first"] + asked["count"], asked["batch"]):
            numbers = torch.arange(start, start + asked["batch"])
            condition = Condition(numbers.to(device) % prior.num_classes if prior.num_classes else None)
            grids = sample_codes(prior, numbers.tolist(), condition, 0, sampling, **told)
            codes.append(prior.sequence(grids, condition).cpu())  # waits for a GPU
        seconds = time.perf_counter() - begin
        found = torch.cat(codes).tolist() if asked["codes"] else None
        print(json.dumps([seconds, sum(passes) / max(1, len(passes)), found]), flush=True)


def untrained() -> Any:
    import torch

    from codes.spec import CodeSpec, Grid
    from stage2_prior.priors import Transformer, TransformerConfig

    torch.manual_seed(0)
    spec = CodeSpec((Grid("codes", 8, 8, 512),), 32, 32)
    return Transformer(TransformerConfig(layers=4, width=128, heads=4), spec, 10).eval()


class Build:
    """A process with the modules of one checkout."""

    def __init__(self, tree: Path, model: str | None, threads: int, device: str):
        command = [sys.executable, __file__, "--worker", "--threads", str(threads), "--device", device]
        command += ["--model", str(Path(model).resolve())] if model else []
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def draw(
        self, batch: int, count: int, first: int = 0, *, codes: bool = False, **sampling: Any
    ) -> tuple[float, float, list[list[int]]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = {"batch": batch, "count": count, "first": first, "codes": codes, "sampling": sampling}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))


def measured(now: Build, before: Build | None, batch: int, rounds: int, images: int, guidance: float) -> dict[str, Any]:
    """Median seconds and mean passes of each way."""
    choices: list[str | int] = ["off", *WINDOWS, "auto", *([] if before is None else ["before"])]
    for number in range(WARM_UP):
        now.draw(batch, batch, 10_000 + number * batch, lookahead="auto", guidance=guidance)
    seconds: dict[str, list[float]] = {}
    passes: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        # Who comes first finds the caches full of another's: each does in turn.
        turn = number % len(choices)
        for choice in choices[turn:] + choices[:turn]:
            if choice == "before":
                assert before is not None
                each, of_image, _ = before.draw(batch, images, number * images, guidance=guidance)
            else:
                each, of_image, _ = now.draw(batch, images, number * images, lookahead=choice, guidance=guidance)
            name = str(choice)
            if number:  # the first round does not count
                seconds.setdefault(name, []).append(each)
                passes.setdefault(name, []).append(of_image)
    return {name: (statistics.median(seconds[name]), statistics.mean(passes[name])) for name in map(str, choices)}


def differing(now: Build, model: str | None, count: int, batch: int) -> tuple[int, list[str]]:
    """How many samples a window of 8 draws otherwise than steps, and what is to be said of each."""
    import torch

    from benchmarks.sampling_invariance import distance_to_border
    from common.model_io import load_pretrained
    from stage2_prior.priors import PRIORS
    from stage2_prior.sampling import SamplingConfig

    ahead = torch.tensor(now.draw(batch, count, codes=True, lookahead=8)[2])
    steps = torch.tensor(now.draw(batch, count, codes=True, lookahead="off")[2])
    said = []
    for index in (ahead != steps).any(dim=1).nonzero()[:, 0].tolist():
        place = int((ahead[index] != steps[index]).int().argmax())
        prior = untrained() if model is None else load_pretrained(model, PRIORS)
        distance = distance_to_border(prior, index, steps[index], place, SamplingConfig())
        said.append(f"sample {index} from code {place} on: {distance:.1e} from the border between two codes")
    return len(said), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="run or model folder of a prior; default: an untrained one")
    parser.add_argument("--before", type=Path, help="checkout of another build")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=8, help="of a round, at least one batch")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=1000, help="whose codes are compared; 0 for none")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.model, args.threads[0], args.device)
    missed = []
    name = Path(args.model).name if args.model else "untrained"  # a page says it, and no path of a machine
    print(f"prior: {name}, guidance {args.guidance:g}, medians of {args.rounds} rounds\n")
    print("| batch | threads | lookahead | passes per image | times as fast as steps | as the build before |")
    print("|---:|---:|---|---:|---:|---:|", flush=True)
    for threads in args.threads:
        now = Build(Path.cwd(), args.model, threads, args.device)
        before = None if args.before is None else Build(args.before.resolve(), args.model, threads, args.device)
        for batch in args.batches:
            found = measured(now, before, batch, args.rounds, max(batch, args.images // batch * batch), args.guidance)
            steps = found["off"][0]
            for name, (seconds, passes) in found.items():
                if name == "before":
                    continue
                other = "" if before is None else f"{found['before'][0] / seconds:.2f}"
                ratio = steps / seconds
                print(f"| {batch} | {threads} | {name} | {passes:.1f} | {ratio:.2f} | {other} |", flush=True)
                if name == "auto" and ratio < SLOWEST:
                    missed.append(f"auto at batch {batch} with {threads} threads: {ratio:.2f} times as fast as steps")
        if args.samples and threads == args.threads[0]:
            told = {batch: differing(now, args.model, args.samples, batch) for batch in (1, 8)}
        for build in (now, before):
            if build is not None:
                build.process.communicate()
    if args.samples:
        print(f"\n| batch | other codes of {args.samples} samples, windows of 8 against steps |\n|---:|---:|")
        for batch, (count, said) in told.items():
            print(f"| {batch} | {count} |" + "".join(f"\n  {line}" for line in said))
            missed += [f"batch {batch}: {line}" for line in said]
    print("\n" + ("\n".join(missed) if missed else "the bounds are met"))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
