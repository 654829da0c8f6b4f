"""Memory of sampling 64 images of 32x32 codes: this build beside another.

    python -m benchmarks.sampling_memory --before FOLDER

A transformer of 8 layers of width 256 with a vocabulary of 1,024 draws 64 images at once, as `generate` asks for them.
Each build has a process of its own; a figure is the peak of its resident memory above what it had before the first
image. FOLDER is a checkout of the other build. Prints a Markdown table; it takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

BOUND = 0.6  # of the other build's memory


def resident() -> float:
    """MiB."""
    fields = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    return int(fields[1]) * resource.getpagesize() / 2**20


def worker(side: int, count: int) -> None:
    """Prints MiB and seconds."""
    from codes.spec import CodeSpec, Grid
    from stage2_prior.condition import Condition
    from stage2_prior.priors import Transformer, TransformerConfig
    from stage2_prior.sampling import SamplingConfig, sample_codes

    spec = CodeSpec((Grid("codes", side, side, 1024),), 8 * side, 8 * side)
    prior = Transformer(TransformerConfig(layers=8, width=256, heads=8), spec, num_classes=0).eval()
    before, begin = resident(), time.perf_counter()
    sample_codes(prior, range(count), Condition(), 0, SamplingConfig(top_k=100))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    print(peak - before, time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of another build")
    parser.add_argument("--side", type=int, default=32, help="of the grid of codes")
    parser.add_argument("--count", type=int, default=64, help="images")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.side, arguments.count)
    print("| build | peak above the start, MiB | seconds |")
    print("|---|---:|---:|")
    found = {}
    for name, tree in (("before", arguments.before), ("now", Path.cwd())):
        if tree is None:
            continue
        command = [sys.executable, __file__, "--worker", "--side", str(arguments.side), "--count", str(arguments.count)]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        found[name], seconds = (float(number) for number in output.split())
        print(f"| {name} | {found[name]:,.0f} | {seconds:.0f} |", flush=True)
    if "before" in found:
        share = found["now"] / found["before"]
        print(f"\n{share:.2f} of the other build's, {'within' if share <= BOUND else 'beyond'} the bound of {BOUND}")
        sys.exit(share > BOUND)
    return None


if __name__ == "__main__":
    main()
