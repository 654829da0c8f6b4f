"""All distances of sets on CIFAR-10 images: torch-fidelity's figures, and answers that are written down here."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from images.datasets import to_float, to_uint8
from metrics.features import FeatureNetwork, rounding
from metrics.frechet import frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel import kernel_distance, kernel_distance_of_all
from metrics.manifolds import density_coverage, precision_recall
from metrics.statistics import FeatureStatistics
from zellige.shadowing import ROOT

CIFAR = ROOT.parent / "shared" / "data" / "cifar10.tar.gz"
COUNT = 300  # images of each set


class Projection(nn.Module):
    """64 features and ten classes of the pixels, by weights of NumPy's generator, which never changes."""

    def __init__(self) -> None:
        super().__init__()
        random = np.random.RandomState(0)
        self.weight = nn.Parameter(torch.from_numpy(random.standard_normal((3072, 64)) / 3072**0.5))
        self.classes = nn.Parameter(torch.from_numpy(random.standard_normal((64, 10))))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = torch.nn.functional.adaptive_avg_pool2d(images.double() / 255, 32)
        features = (pixels.flatten(1) @ self.weight).relu()
        return features, features @ self.classes


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return FeatureNetwork("test:projection", Projection(), {"resize": "none"})


@pytest.fixture(scope="module")
def sets() -> tuple[Tensor, Tensor]:
    """The first 300 aeroplanes of the test set and the next 300: uint8 b 3 32 32."""
    if not CIFAR.is_file():
        pytest.skip(f"needs {CIFAR}")
    return read(CIFAR)


def read(path: Path) -> tuple[Tensor, Tensor]:
    images = []
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name.startswith("cifar10/test/airplane/") and member.isfile():
                file = archive.extractfile(member)
                assert file is not None
                images.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
            if len(images) == 2 * COUNT:
                break
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels[:COUNT], pixels[COUNT:]


def test_all_figures_are_torch_fidelitys_and_those_written_down(network: FeatureNetwork, sets: tuple[Tensor, Tensor]):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, made = (network.see(images) for images in sets)
    x, y = real.features, made.features
    statistics = [fid_features_to_statistics(features.double()) for features in (x, y)]
    # In float32 its kernel distance is another in the fourth digit already.
    kid = kid_features_to_metric(y.double(), x.double(), kid_subsets=20, kid_subset_size=100, verbose=False)
    prc = prc_features_to_metric(y, x, verbose=False)
    score = isc_features_to_metric(network.network(sets[1])[1], 10)
    theirs = {
        "fd": fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"],
        "kd": kid["kernel_inception_distance_mean"],
        "precision": prc["precision"],
        "recall": prc["recall"],
        "score": score["inception_score_mean"],
    }
    precision, recall = precision_recall(x, y)
    ours = {
        "fd": frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y)),
        "kd": kernel_distance(y, x, 20, 100).mean,
        "precision": precision,
        "recall": recall,
        "score": inception_score(made.probabilities).mean,
    }
    assert ours == pytest.approx(theirs, rel=1e-4)
    density, coverage = density_coverage(x, y)
    found = {**ours, "kd of all": kernel_distance_of_all(x, y), "density": density, "coverage": coverage}
    assert found == pytest.approx(KNOWN, rel=1e-4, abs=1e-8)


KNOWN = {
    "fd": 0.09852755688,
    "kd": -0.0001324620443,
    "precision": 211 / 300,
    "recall": 196 / 300,
    "score": 1.140773294,
    "kd of all": 0.0002127975471,
    "density": 1.144,
    "coverage": 293 / 300,
}


def test_reconstructions_have_another_distance_before_they_are_rounded(
    network: FeatureNetwork, sets: tuple[Tensor, Tensor]
):
    """rFID of files is not that of a decoder's numbers, and each says what it is."""
    images, _ = sets
    decoded = nn.functional.avg_pool2d(to_float(images), 3, 1, 1, count_include_pad=False)  # what a blurring one gives
    real = FeatureStatistics.of(network(images))

    def distance(reconstructions: Tensor) -> float:
        return frechet_distance(real, FeatureStatistics.of(network(reconstructions)))

    assert (rounding(decoded), rounding(to_uint8(decoded))) == ("none", "8 bits")
    assert distance(decoded) != pytest.approx(distance(to_uint8(decoded)), rel=1e-6)
    assert distance(decoded) == pytest.approx(distance(to_uint8(decoded)), rel=1e-3)


def test_a_decoder_that_loses_nothing_is_at_distance_zero(network: FeatureNetwork, sets: tuple[Tensor, Tensor]):
    """With decimals cut off, as torchmetrics' normalize=True has it, it is not: a fourth of the levels fall by one."""
    images, _ = sets
    real, decoded = FeatureStatistics.of(network(images)), to_float(images)
    assert frechet_distance(real, FeatureStatistics.of(network(to_uint8(decoded)))) == 0
    assert frechet_distance(real, FeatureStatistics.of(network(decoded))) < 1e-8
    cut = ((decoded + 1) / 2 * 255).byte()
    assert frechet_distance(real, FeatureStatistics.of(network(cut))) > 1e-5
