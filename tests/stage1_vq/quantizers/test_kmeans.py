"""k-means finds separated clusters, and copes with too few vectors."""

from __future__ import annotations

import pytest
import torch

from stage1_vq.quantizers.kmeans import kmeans


def test_separated_clusters_are_found_exactly():
    torch.manual_seed(0)
    truth = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    vectors = truth.repeat_interleave(40, 0) + torch.randn(80, 2)
    clusters = kmeans([vectors], 2, iterations=10)
    order = clusters.centres[:, 0].argsort()
    torch.testing.assert_close(clusters.centres[order], torch.stack([vectors[:40].mean(0), vectors[40:].mean(0)]))
    assert clusters.sizes.tolist() == [40, 40]


def test_iterations_lower_the_error():
    vectors = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))

    def error(iterations: int) -> float:
        torch.manual_seed(1)
        centres = kmeans([vectors], 20, iterations).centres
        return float(torch.cdist(vectors, centres).min(1).values.square().mean())

    errors = [error(iterations) for iterations in (0, 1, 3, 10)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_fewer_vectors_than_centres_give_different_centres():
    torch.manual_seed(0)
    vectors = torch.randn(5, 3)
    centres = kmeans([vectors], 12, iterations=5).centres
    assert centres.shape == (12, 3)
    assert len(centres.unique(dim=0)) == 12
    assert torch.cdist(centres, vectors).min(1).values.max() < 0.2


@pytest.mark.parametrize("vectors", [200, 3])  # and fewer than centres
@pytest.mark.parametrize("iterations", [0, 3])
def test_spherical_centres_have_length_one(vectors, iterations):
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(vectors, 3), dim=1)
    centres = kmeans([rows], 7, iterations, spherical=True).centres
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(7))


def test_the_same_random_state_gives_the_same_centres():
    vectors = torch.randn(100, 3)
    torch.manual_seed(5)
    first = kmeans([vectors], 10, iterations=4).centres
    torch.manual_seed(5)
    assert torch.equal(kmeans([vectors], 10, iterations=4).centres, first)
