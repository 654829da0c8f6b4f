"""What lookahead would bring a prior that has none: passes that windows would take, and what a pass would.

    python -m benchmarks.lookahead_estimate --models runs/pixelcnn runs/pixelsnail runs/rq

Passes are counted, not guessed: this build's lookahead draws images with the logits of whole teacher-forced passes, of
which it is shown no more than a window. Windows of PixelCNN and PixelSNAIL end with a row of the grid: what they know
of the rows above is computed once for a row, and would have to be anew for every guess.

A pass over w places of one image does the arithmetic of a step of w images, whose time stands for it; of an
RQ-Transformer, that of a spatial step of as many places and of one pass over all depths of each. Both are the least
that such a pass can take: nothing is counted for guesses, and for what is kept of places that turn out wrong.

The last column is how many times as fast as steps the windows would be, at best: below 1.1 or so they do not pay.
Whole images by steps and passes take turns, on one thread, whose own time is read, as others may have the core in
between; medians. Batch 1, where lookahead has most to gain, and `--batch`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from common.memory import keep_freed_memory
from common.model_io import load_pretrained
from stage2_prior.condition import Condition
from stage2_prior.decoding.engine import Decoder
from stage2_prior.drawing import uniforms_of
from stage2_prior.lookahead import Ahead, Memory
from stage2_prior.priors import PRIORS, AutoregressivePrior, PixelCNN, PixelSNAIL, RQTransformer
from stage2_prior.sampling import SamplingConfig

WINDOWS = (2, 4, 8, 16)
PASSES = 20  # of a prior that are timed together
GUESSED_BY = 16  # images at least, by the codes of which first guesses are made


class TeacherForced:
    """A stage2_prior.stepping.WindowStepper that computes everything anew."""

    def __init__(self, prior: AutoregressivePrior, condition: Condition):
        self.prior, self.condition = prior, condition
        self.sequence = torch.zeros(1, prior.code_spec.codes_per_image, dtype=torch.int64)

    def next(self, previous: Tensor | None) -> Tensor:
        raise NotImplementedError

    def window(self, first: Tensor, previous: Tensor) -> Tensor:
        begin, end = int(first), int(first) + previous.shape[1]
        self.sequence[:, max(begin - 1, 0) : end - 1] = previous[:, int(begin == 0) :]
        return self.prior.logits(self.prior.grids_of(self.sequence), self.condition)[:, begin:end]


class Windows(Ahead):
    """Those of one image that end with its rows."""

    row: int

    def window(self, length: int) -> None:
        super().window(min(length, self.row - self.settled[0] % self.row))


def row_of(prior: AutoregressivePrior) -> int:
    """Places after which a window must end."""
    return prior.code_spec.grids[0].width if isinstance(prior, PixelCNN | PixelSNAIL) else prior.steps


@torch.inference_mode()
def passes_of(prior: AutoregressivePrior, length: int, images: int) -> float:
    """Mean passes of an image, with guesses by the images before it."""
    memory, sampling, counts = Memory(), SamplingConfig(), []
    vocabularies = [grid.vocabulary for grid in prior.code_spec.grids for _ in range(grid.size)]
    if isinstance(prior, RQTransformer):
        vocabularies = [k for _ in range(prior.code_spec.grids[0].size) for k in prior.vocabularies]
    for number in range(GUESSED_BY + images):
        condition = Condition(torch.tensor([number % prior.num_classes]) if prior.num_classes else None)
        uniforms = uniforms_of(0, [number], prior.steps, torch.device("cpu"))
        ahead = Windows(TeacherForced(prior, condition), uniforms, sampling, None, memory, vocabularies)
        ahead.row = row_of(prior)
        drawn = ahead.walk(length, prior.steps)
        memory.remember(drawn.codes)
        if number >= GUESSED_BY:
            counts.append(int(drawn.passes))
    return statistics.mean(counts)


def condition_of(prior: AutoregressivePrior, batch: int) -> Condition:
    return Condition(torch.zeros(batch, dtype=torch.int64) if prior.num_classes else None)


def by_turns(works: Sequence[Callable[[], Sequence[float]]], repeats: int) -> list[tuple[float, ...]]:
    """Of each work the medians of what it returns, taken in turns after one run that does not count."""
    found: list[list[Sequence[float]]] = [[] for _ in works]
    for repeat in range(repeats + 1):
        for own, work in zip(found, works, strict=True):
            times = work()
            if repeat:
                own.append(times)
    return [tuple(map(statistics.median, zip(*own, strict=True))) for own in found]


def seconds_of_rows(prior: AutoregressivePrior, batch: int) -> tuple[float, float]:
    """Of a step inside a row, a mean over an image, and how much longer the first one of a row takes."""
    codes, columns, seconds = torch.zeros(batch, 1, dtype=torch.int64), row_of(prior), [0.0, 0.0]
    stepper, previous = prior.stepper(batch, condition_of(prior, batch)), None
    for place in range(prior.steps):
        begin = time.process_time()
        stepper.next(previous)
        seconds[place % columns == 0] += time.process_time() - begin
        previous = codes
    rows = -(-prior.steps // columns)
    inside = seconds[0] / (prior.steps - rows)
    return inside, seconds[1] / rows - inside


@torch.inference_mode()
def pass_over_places(prior: RQTransformer, batch: int, places: int) -> Callable[[], tuple[float]]:
    """All depths of so many places of each image: a spatial step, a pass over depths, logits."""
    rows, middle = batch * places, prior.code_spec.grids[0].size // 2
    stepper = prior.stepper(rows, condition_of(prior, rows))
    weights, width = stepper.weights, prior.config.width
    spatial, dtype = stepper.spatial, stepper.sum.dtype
    spatial.read(torch.zeros(rows, middle, width, dtype=dtype))
    over_depth = Decoder(weights.over_depth.weights, rows, prior.depth, dtype, stepper.sum.device)
    x, first = torch.zeros(rows, prior.depth, width, dtype=dtype), torch.zeros(rows, dtype=torch.int64)

    @torch.inference_mode()
    def passing() -> tuple[float]:
        begin = time.process_time()
        for _ in range(PASSES):
            x[:, 0] = spatial.step(x[:, 0], middle) * weights.spatial_gain
            states = over_depth.window(x, first)
            for depth, output in enumerate(weights.over_depth.outputs):
                output.joined(states[:, depth].contiguous()).float()
        return ((time.process_time() - begin) / PASSES,)

    return passing


def windows_of(prior: AutoregressivePrior) -> list[int]:
    """Up to a row, or of whole places of an RQ-Transformer."""
    depth = prior.depth if isinstance(prior, RQTransformer) else 1
    return [length for length in WINDOWS if length <= min(prior.steps, 2 * row_of(prior)) and length % depth == 0]


def rows_of_table(prior: AutoregressivePrior, batch: int, passes_of: Mapping[int, float], repeats: int) -> list[str]:
    """passes_of: each length of a window."""
    rows, n = [], prior.steps
    for length, passes in passes_of.items():
        steps = partial(seconds_of_rows, prior, batch)
        if isinstance(prior, RQTransformer):
            works: list[Callable[[], Sequence[float]]] = [steps, pass_over_places(prior, batch, length // prior.depth)]
        else:
            works = [steps, partial(seconds_of_rows, prior, batch * min(length, row_of(prior)))]
        (step, begin), (each, *_) = by_turns(works, repeats)
        of_rows = begin * -(-n // row_of(prior))
        ratio = (n * step + of_rows) / (passes * each + of_rows)
        cells = [prior.kind, str(batch), str(length), str(n), f"{passes:.1f}", f"{each / step:.2f}", f"{ratio:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="run or model folders of priors")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--images", type=int, default=64, help="whose passes are counted")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"torch {torch.__version__}, one thread, medians of {options.repeats}\n")
    print("| prior | batch | window | codes | passes | a pass, in steps | times as fast as steps, at best |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for model in options.models:
        prior = cast(AutoregressivePrior, load_pretrained(model, PRIORS)).eval()
        passes = {length: passes_of(prior, length, options.images) for length in windows_of(prior)}
        for batch in options.batch:
            print("\n".join(rows_of_table(prior, batch, passes, options.repeats)), flush=True)


if __name__ == "__main__":
    main()
