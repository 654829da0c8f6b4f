"""Similarity of pairs of images: torchmetrics' numbers, definitions, and images that are too small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.vgg import cfgs, make_layers

from common.errors import UserError
from metrics.lpips import LPIPS
from metrics.similarity import decibels, lpips, ms_ssim, psnr, ssim

N = 2 * 13 * 14
X = torch.sin(torch.arange(N).float()).view(1, 2, 13, 14)
Y = torch.cos(torch.arange(N).float() * 1.3).view(1, 2, 13, 14) * 0.5


@pytest.mark.parametrize(
    ("decoded", "original", "expected"),  # of torchmetrics 1.9.0, data_range=2.0
    [(X, Y, 0.0060182596), (X, 0.8 * X, 0.9590420723), (X, X.flip(-1), -0.0064913775), (X, X + 0.5 * Y, 0.7549231648)],
)
def test_ssim_is_that_of_torchmetrics(decoded, original, expected):
    (found,) = ssim(decoded, original.clamp(-1, 1)).tolist()
    assert found == pytest.approx(expected, abs=1e-6)


def test_ssim_of_a_pixel_is_the_papers_formula_in_its_window():
    """An image of which one pixel differs, seen in the one window that does not reach beyond the border."""
    x, y = torch.zeros(1, 1, 11, 11), torch.zeros(1, 1, 11, 11)
    x[0, 0, 3, 4], y[0, 0, 3, 4], y[0, 0, 6, 6] = 0.8, 0.4, -0.5
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / 4.5)
    window = np.outer(line, line) / np.outer(line, line).sum()
    padded = [np.pad(image[0, 0].double().numpy(), 5, mode="reflect") for image in (x, y)]
    total = 0.0
    for row in range(11):
        for column in range(11):
            a, b = (image[row : row + 11, column : column + 11] for image in padded)
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + 0.02**2) / (mean_a**2 + mean_b**2 + 0.02**2)
            total += luminance * (2 * both + 0.06**2) / (var_a + var_b + 0.06**2)
    assert float(ssim(x, y)) == pytest.approx(total / 121, abs=1e-6)


def test_ssim_is_of_each_image_and_none_has_one_below_its_window():
    both = ssim(torch.cat([X, Y]), torch.cat([X, X]))
    assert both[0] == pytest.approx(1)
    assert torch.equal(both[1:], ssim(Y, X))
    assert ssim(X[..., :10, :], X[..., :10, :]) is None


LARGE = 2 * 180 * 200
U = torch.sin(torch.arange(LARGE).float() / 7) * 0.6 + torch.cos(torch.arange(LARGE).float() / 901) * 0.4
U = U.view(1, 2, 180, 200)
V = torch.cos(torch.arange(LARGE).float() * 1.3).view(1, 2, 180, 200) * 0.5


@pytest.mark.parametrize(
    ("decoded", "original", "expected"),  # of torchmetrics 1.9.0, data_range=2.0
    [
        (U, V, 0.0674138963),
        (U, 0.8 * U, 0.9767121673),
        (U, U.flip(-1), 0.8412769437),
        (U, (U + 0.5 * V).clamp(-1, 1), 0.9796096683),
        (U, -U, 0.0),
    ],
)
def test_ms_ssim_is_that_of_torchmetrics(decoded, original, expected):
    (found,) = ms_ssim(decoded, original).tolist()
    assert found == pytest.approx(expected, abs=1e-5)


def test_ms_ssim_is_of_each_image_and_none_has_one_below_five_scales():
    both = ms_ssim(torch.cat([U, V]), torch.cat([U, U]))
    assert both[0] == pytest.approx(1)
    torch.testing.assert_close(both[1:], ms_ssim(V, U))
    assert ms_ssim(U[..., :176, :176], V[..., :176, :176]) is not None
    assert ms_ssim(U[..., :175, :], V[..., :175, :]) is None


def test_an_image_has_its_ssim_whatever_stands_beside_it():
    """torchmetrics takes the range of values from the batch, if it is not told."""
    dark, bright = 0.05 * X, X
    alone = ssim(dark, 0.9 * dark)
    together = ssim(torch.cat([dark, bright]), torch.cat([0.9 * dark, bright]))
    torch.testing.assert_close(together[:1], alone)


def test_psnr_is_in_decibels_of_the_span_of_two():
    assert psnr(torch.tensor([4.0, 0.04, 0.0])).tolist() == pytest.approx([0, 20, 100])
    zeros = np.zeros((4, 4, 3), np.uint8)
    assert decibels(zeros, zeros + 51) == pytest.approx(20 * np.log10(5))
    assert decibels(zeros, zeros) is None


def test_lpips_is_of_each_image_without_gradients_and_none_has_one_below_16_pixels(tmp_path: Path):
    torch.manual_seed(0)
    layers = make_layers(cfgs["D"]).state_dict()
    torch.save({f"features.{name}": value for name, value in layers.items()}, tmp_path / "vgg16.pth")
    network = LPIPS(str(tmp_path / "vgg16.pth"))  # with the linear weights that torchmetrics ships
    one = torch.rand(2, 3, 16, 16).mul(2).sub(1).requires_grad_()
    other = torch.rand(2, 3, 16, 16) * 2 - 1
    found = lpips(network, one, other)
    assert found.shape == (2,)
    assert not found.requires_grad
    assert (found > 0).all()
    torch.testing.assert_close(lpips(network, one[1:], other[1:]), found[1:])
    assert lpips(network, one, one.detach()).tolist() == [0, 0]
    assert lpips(network, one[..., :15, :], other[..., :15, :]) is None


def test_lpips_without_weights_says_which_file_goes_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"lpips needs .* VGG16, .* name it by weights, .* or leave lpips out"):
        LPIPS()
