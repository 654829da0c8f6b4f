"""Mean and covariance of features, in float64, from as many batches and processes as there are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import atomic_file
from common.packed_files import opened_npz

ROWS = 2048  # that are multiplied at a time: they bound the memory of a large array of features in float64


@dataclass(frozen=True)
class Moments:
    """Of a set of features."""

    count: int  # n; 0 where it is not known
    mean: Tensor  # d, float64
    squares: Tensor  # d d, float64, the sum of products of deviations; where n is not known, their mean


class FeatureStatistics:
    """Count, mean and covariance of features `d`.

    Deviations from the mean of each batch are summed and the sums of batches joined (Chan, Golub and LeVeque 1983,
    "Algorithms for Computing the Sample Variance"), so that nothing large is subtracted from something as large: sums
    of plain squares lose all digits of a feature whose mean is 10**8 times its deviation. While there are no more
    features than dimensions, all of them are kept: a covariance of low rank is best told by them.
    """

    def __init__(self, width: int) -> None:
        """width: d, of the features."""
        self.width = width
        self._waiting: list[Tensor] = []  # b d each, float64, not summed up yet
        self._summed: Moments | None = None  # of all others

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Of all features of a set, n d: the same bits whatever batches and processes they came from."""
        statistics = cls(features.shape[1])
        statistics.add(features)
        return statistics

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor, count: int) -> FeatureStatistics:
        """mean: d; covariance: d d, with n - 1 below the sum; count: n, 0 where it is not known, and then
        nothing can be added. Raises UserError for other shapes and for what is no covariance."""
        mean, covariance = mean.double(), covariance.double()
        if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
            raise UserError(
                f"a mean of shape {tuple(mean.shape)} and a covariance of {tuple(covariance.shape)}, "
                "expected (d,) and (d, d): they are of different features"
            )
        largest = float(covariance.abs().max())
        if not (torch.isfinite(mean).all() and np.isfinite(largest)):
            raise UserError("the mean or the covariance of features holds numbers that are not finite; make them anew")
        asymmetry = float((covariance - covariance.T).abs().max())
        if asymmetry > 1e-4 * largest or float(covariance.diagonal().min()) < -1e-6 * largest:
            raise UserError(
                "what should be a covariance of features is not symmetric or has negative variances; make it anew"
            )
        statistics = cls(len(mean))
        statistics._summed = Moments(count, mean, (covariance + covariance.T) / 2 * max(1, count - 1))
        return statistics

    @property
    def count(self) -> int:
        """n; 0 also for statistics of another's file, which does not tell it."""
        return (self._summed.count if self._summed else 0) + sum(map(len, self._waiting))

    def add(self, features: Tensor) -> None:
        """features: b d, on any device; float64 is computed where they are, or on the CPU if that device has none.
        Raises UserError for features of another width, for some that are not finite, and where the count is not
        known."""
        if features.ndim != 2 or features.shape[1] != self.width:
            raise UserError(f"features of shape {tuple(features.shape)}, expected (b, {self.width}): another network's")
        check_finite(features)
        for batch in features.split(ROWS) if len(features) else ():
            self._add(in_float64(batch).clone())

    def _add(self, rows: Tensor) -> None:
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) > self.width:
            self._sum_up()

    def _sum_up(self) -> None:
        if self._waiting:
            rows, self._waiting = torch.cat(self._waiting), []
            self._summed = joined(self._summed, moments(rows))

    def merge(self, other: FeatureStatistics) -> None:
        """Adds what another process has seen. Raises UserError where the widths differ or a count is not known."""
        if other.width != self.width:
            raise UserError(f"statistics of {other.width} features and of {self.width} cannot be merged")
        if other._summed is not None:
            self._sum_up()
            self._summed = joined(self._summed, other._summed)
        for rows in other._waiting:
            self._add(rows)

    @property
    def mean(self) -> Tensor:
        """d, float64. Raises UserError before any feature was added."""
        return self._moments().mean

    @property
    def covariance(self) -> Tensor:
        """d d, float64, with n - 1 below the sum. Raises UserError for fewer than two features."""
        found = self._moments()
        if found.count == 1:
            raise UserError("a covariance of a single feature, expected two at least; give more images")
        return found.squares / max(1, found.count - 1)

    def _moments(self) -> Moments:
        if self._summed is None and self._waiting:
            return moments(torch.cat(self._waiting))
        self._sum_up()
        if self._summed is None:
            raise UserError("statistics of no features at all; there were no images")
        return self._summed

    def deviations(self) -> Tensor | None:
        """F, n d, float64, with F'F the covariance, as long as there are no more features than dimensions; else None.
        Raises UserError for fewer than two features."""
        if self._summed is not None:
            return None
        if self.count < 2:
            raise UserError(f"a covariance of {self.count} features, expected two at least; give more images")
        rows = torch.cat(self._waiting)
        return (rows - rows.mean(dim=0)) / (self.count - 1) ** 0.5

    def save_npz(self, path: str | Path) -> None:
        """Writes `mu` (d) and `sigma` (d d), float64, as the evaluator of ADM (Dhariwal and Nichol 2021,
        arXiv:2105.05233) and the FID scripts of TTUR and EDM read them, and beside them our own `count`."""
        arrays = {
            "mu": self.mean.cpu().numpy(),
            "sigma": self.covariance.cpu().numpy(),
            "count": np.array(self.count),
        }
        path = Path(path)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def from_npz(cls, path: str | Path) -> FeatureStatistics:
        """Reads `mu` and `sigma`, and `count` if it is there: others' files do not tell of how many images they are,
        and 0 stands for that. Raises UserError."""
        arrays = read_npz(Path(path))
        if not {"mu", "sigma"} <= arrays.keys():
            images = "; it holds images: their features are to be computed" if "arr_0" in arrays else ""
            raise UserError(f"{path} holds the arrays {', '.join(arrays) or 'none'}, expected mu and sigma{images}")
        try:
            mean, covariance = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
            if mean.numel() == 1:  # of a single feature numpy's mean and covariance may be mere numbers
                mean, covariance = mean.reshape(1), covariance.reshape(1, 1)
            else:
                mean = mean.squeeze()  # some files have it as one row
            return cls.from_moments(mean, covariance, max(0, int(arrays.get("count", np.array(0)))))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} cannot be used: {error}") from error


def check_finite(*features: Tensor) -> None:
    """Raises UserError: a distance of these would be no number, or, made of comparisons, 0 without a word."""
    if not all(bool(torch.isfinite(part).all()) for part in features):
        raise UserError("some features are not finite: the network, or the images that it was given, are broken")


def moments(rows: Tensor) -> Moments:
    """Of rows n d, float64."""
    mean = rows.mean(dim=0)
    away = rows - mean
    return Moments(len(rows), mean, away.T @ away)


def joined(one: Moments | None, other: Moments) -> Moments:
    """Of the features of both. Raises UserError where a count is not known."""
    if one is None:
        return other
    if not (one.count and other.count):
        raise UserError("statistics that do not tell of how many images they are cannot be joined with others")
    total = one.count + other.count
    away = other.mean.to(one.mean.device) - one.mean
    squares = one.squares + other.squares.to(one.squares.device)
    squares.addr_(away, away, alpha=one.count * other.count / total)
    return Moments(total, one.mean + away * (other.count / total), squares)


def in_float64(features: Tensor) -> Tensor:
    """On the CPU if their device knows no float64."""
    return (features.cpu() if features.device.type == "mps" else features).detach().double()


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, none of Python objects, which may run code. Raises UserError."""
    with opened_npz(path) as file:
        return {name: file[name] for name in file.files}


def names_in_npz(path: Path) -> list[str]:
    """Of the arrays of a file, without reading them. Raises UserError."""
    with opened_npz(path) as file:
        return list(file.files)


def read_npz_images(path: str | Path) -> np.ndarray:
    """Images as ADM's evaluator exchanges them: `arr_0`, uint8 n H W 3. Returns them as they lie in the file, n H W c.
    Raises UserError."""
    arrays = read_npz(Path(path))
    images = arrays.get("arr_0")
    if images is None:
        raise UserError(f"{path} holds the arrays {', '.join(arrays) or 'none'}, expected arr_0, images uint8 n H W 3")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise UserError(f"arr_0 of {path} is {images.dtype} {images.shape}, expected uint8 (n, H, W, 3)")
    return images


def save_npz_images(path: str | Path, images: np.ndarray) -> None:
    """Writes `arr_0`, for ADM's evaluator; images: uint8 n H W c, grey ones get three equal channels, as it takes
    only such."""
    with atomic_file(Path(path)) as temporary, open(temporary, "wb") as file:
        np.savez(file, images if images.shape[3] == 3 else np.repeat(images, 3, axis=3))
