"""Mean and covariance: the same whatever the batches and processes, exact where plain sums are not; others' files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from metrics.frechet import frechet_distance
from metrics.statistics import FeatureStatistics, read_npz_images, save_npz_images


def statistics_of(*batches: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.add(batch)
    return statistics


@pytest.mark.parametrize("count", [2, 7, 8, 9, 300, 2100])
def test_moments_are_those_of_numpy_whatever_the_batches(count: int):
    features = torch.randn(count, 8) @ torch.randn(8, 8) + torch.randn(8)
    for size in (1, 3, 64, count):
        found = statistics_of(*features.split(size))
        assert found.count == count
        np.testing.assert_allclose(found.mean, features.double().mean(dim=0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(found.covariance, np.cov(features.double(), rowvar=False), rtol=1e-11, atol=1e-13)
        assert found.covariance.dtype == torch.float64


@pytest.mark.parametrize("sizes", [(3, 4), (3, 500), (500, 3), (400, 103), (0, 9), (9, 0)])
def test_processes_merge_to_what_one_has(sizes: tuple[int, int]):
    features = torch.randn(sum(sizes), 8) + 5
    mine, theirs = (FeatureStatistics(8) for _ in sizes)
    for statistics, part in zip((mine, theirs), features.split(list(sizes)), strict=True):
        for batch in part.split(50):
            statistics.add(batch)
    mine.merge(theirs)
    whole = FeatureStatistics.of(features)
    assert mine.count == sum(sizes) == whole.count
    torch.testing.assert_close(mine.mean, whole.mean, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(mine.covariance, whole.covariance, rtol=1e-12, atol=1e-13)


def test_small_deviations_from_a_large_mean_are_kept():
    """Sums of squares of 1e8 have no digit left for a variance of 1."""
    features = torch.randn(1000, 4, dtype=torch.float64)
    found = statistics_of(*(features + 1e8).split(64)).covariance
    torch.testing.assert_close(found, FeatureStatistics.of(features).covariance, rtol=1e-6, atol=1e-7)
    plain = (features + 1e8).T @ (features + 1e8) / 1000 - 1e16
    assert (plain - found).abs().max() > 0.1


def test_all_features_at_once_give_the_same_bits_however_they_were_collected():
    features = torch.randn(700, 16)
    one = FeatureStatistics.of(features)
    other = FeatureStatistics.of(torch.cat(features.split(33)))
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.covariance, other.covariance)


def test_files_of_adm_are_written_and_read(tmp_path: Path):
    written = FeatureStatistics.of(torch.randn(100, 6))
    written.save_npz(tmp_path / "statistics.npz")
    with np.load(tmp_path / "statistics.npz") as file:
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        assert (file["mu"].shape, file["sigma"].shape) == ((6,), (6, 6))
    read = FeatureStatistics.from_npz(tmp_path / "statistics.npz")
    assert read.count == 100
    assert frechet_distance(read, written) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(read.covariance, written.covariance, rtol=1e-14, atol=1e-15)


def test_a_file_without_count_is_a_reference_to_which_nothing_can_be_added(tmp_path: Path):
    covariance = np.cov(np.random.default_rng(0).normal(size=(50, 3)), rowvar=False)
    np.savez(tmp_path / "others.npz", mu=np.zeros(3, np.float32), sigma=covariance.astype(np.float32))
    read = FeatureStatistics.from_npz(tmp_path / "others.npz")
    assert read.count == 0
    np.testing.assert_allclose(read.covariance, covariance, rtol=1e-6)
    with pytest.raises(UserError, match="do not tell of how many images they are"):
        read.merge(FeatureStatistics.of(torch.randn(9, 3)))
    with pytest.raises(UserError, match="do not tell of how many images they are"):
        FeatureStatistics.of(torch.randn(9, 3)).merge(read)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "holds the arrays arr_0, expected mu and sigma; it holds images"),
        ({"mu": np.zeros(3), "sigma": np.zeros((4, 4))}, r"a mean of shape \(3,\) and a covariance of \(4, 4\)"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 1], [0, 1]])}, "not symmetric"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 0], [0, -1]])}, "negative variances"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "not finite"),
    ],
)
def test_what_are_no_statistics_is_refused(tmp_path: Path, arrays: dict, message: str):
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(UserError, match=message):
        FeatureStatistics.from_npz(tmp_path / "file.npz")


@pytest.mark.parametrize("numpys", [True, False])
def test_a_single_feature_has_statistics_too(tmp_path: Path, numpys: bool):
    rows = torch.randn(9, 1)
    if numpys:
        np.savez(tmp_path / "one.npz", mu=rows.numpy().mean(), sigma=np.cov(rows.numpy(), rowvar=False))
    else:
        FeatureStatistics.of(rows).save_npz(tmp_path / "one.npz")
    read = FeatureStatistics.from_npz(tmp_path / "one.npz")
    assert float(read.mean) == pytest.approx(float(rows.mean()), abs=1e-6)
    assert float(read.covariance) == pytest.approx(float(rows.var()), abs=1e-6)


def test_damaged_and_missing_files_are_refused(tmp_path: Path):
    FeatureStatistics.of(torch.randn(100, 6)).save_npz(tmp_path / "good.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:300])
    (tmp_path / "page.npz").write_text("<!doctype html>")
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name, message in (
        ("cut.npz", "cannot be read as .npz"),
        ("page.npz", "is a web page, not the file itself"),
        ("none.npz", "there is no such file"),
        ("single.npy", "is a single array"),
    ):
        with pytest.raises(UserError, match=message):
            FeatureStatistics.from_npz(tmp_path / name)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(2, 5), r"features of shape \(2, 5\), expected \(b, 4\)"),
        (torch.tensor([[0, 0, 0, torch.nan]]), "some features are not finite"),
    ],
)
def test_features_that_do_not_fit_are_refused(features: torch.Tensor, message: str):
    with pytest.raises(UserError, match=message):
        FeatureStatistics(4).add(features)


def test_no_feature_and_a_single_one_have_no_covariance():
    with pytest.raises(UserError, match="there were no images"):
        _ = FeatureStatistics(4).mean
    for of_one in (FeatureStatistics.of(torch.ones(1, 4)), FeatureStatistics.of(torch.ones(1, 1)[:, :0])):
        with pytest.raises(UserError, match="expected two at least"):
            _ = of_one.covariance


def test_images_of_adm_are_written_with_three_channels_and_read(tmp_path: Path):
    grey = np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1)
    save_npz_images(tmp_path / "images.npz", grey)
    read = read_npz_images(tmp_path / "images.npz")
    assert read.shape == (2, 4, 4, 3)
    assert (read == grey).all()
    np.savez(tmp_path / "floats.npz", grey / 255)
    with pytest.raises(UserError, match=r"arr_0 of .* is float64 \(2, 4, 4, 1\), expected uint8"):
        read_npz_images(tmp_path / "floats.npz")
