"""FID from features: ours beside torchmetrics', by turns in one process, and whether the values agree.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluation_speed
    OMP_NUM_THREADS=1 python -m benchmarks.evaluation_speed --root               # and scipy's matrix square root
    OMP_NUM_THREADS=1 python -m benchmarks.evaluation_speed --count 1000         # fewer features than dimensions

Both are given all features of both sets, count x width, and end with a number: torchmetrics by `update` in batches of
100 and `compute`, ours by `FeatureStatistics` in the same batches and `frechet_distance`. The two parts are timed
apart: adding up a covariance is the same products for both. `compute` of torchmetrics 1.9 takes the eigenvalues of a
general matrix; earlier versions, pytorch-fid and ADM's evaluator take the root of that matrix by `scipy.linalg.sqrtm`.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from torch import Tensor, nn

from benchmarks.timing import medians
from metrics.frechet import frechet_distance
from metrics.statistics import FeatureStatistics

BATCH = 100


class Given(nn.Module):
    """A network whose images are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def make_features(count: int, width: int, seed: int) -> Tensor:
    """Like Inception's: not negative, a few of them large, their covariance far from the identity. float32."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(256, width, generator=torch.Generator().manual_seed(0)) / 16
    hidden = torch.randn(count, 256, generator=generator) * torch.linspace(1, 0.05, 256)
    noise = 0.2 * torch.randn(count, width, generator=generator)
    return (hidden @ mixing + noise + 0.05 * seed).relu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--root", action="store_true", help="time scipy.linalg.sqrtm of the product, too")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, made = (make_features(args.count, args.width, seed) for seed in (1, 2))

    def fill_theirs() -> FrechetInceptionDistance:
        metric = FrechetInceptionDistance(feature=Given(args.width))
        for features, is_real in ((real, True), (made, False)):
            for batch in features.split(BATCH):
                metric.update(batch, real=is_real)
        return metric

    def fill_ours() -> tuple[FeatureStatistics, FeatureStatistics]:
        both = FeatureStatistics(args.width), FeatureStatistics(args.width)
        for features, statistics in zip((real, made), both, strict=True):
            for batch in features.split(BATCH):
                statistics.add(batch)
        return both

    theirs, ours = fill_theirs(), fill_ours()
    values: dict[str, float] = {}

    def compute_theirs() -> None:
        theirs._computed = None
        values["torchmetrics"] = float(theirs.compute())

    def compute_ours() -> None:
        values["ours"] = frechet_distance(*ours)

    works = {
        "add, torchmetrics": fill_theirs,
        "add, ours": fill_ours,
        "compute, torchmetrics": compute_theirs,
        "compute, ours": compute_ours,
    }
    if args.root:
        from scipy.linalg import sqrtm

        product = (ours[0].covariance @ ours[1].covariance).numpy()
        works["root alone, scipy"] = lambda: sqrtm(product)
    seconds = medians(works, args.repeats)
    print(f"{args.count:,} x {args.width:,} features of each set, {torch.get_num_threads()} threads, seconds:")
    for name, value in seconds.items():
        print(f"  {name:<24}{value:8.3f}")
    for part in ("add", "compute"):
        print(f"  {part}: {seconds[f'{part}, torchmetrics'] / seconds[f'{part}, ours']:.1f} times as fast")
    if args.root:
        print(f"  compute: {seconds['root alone, scipy'] / seconds['compute, ours']:.1f} times as fast as that root")
    print(f"values: torchmetrics {values['torchmetrics']:.9g} (float32), ours {values['ours']:.9g}")
    print(f"relative difference {abs(values['torchmetrics'] / values['ours'] - 1):.1e}")


if __name__ == "__main__":
    main()
