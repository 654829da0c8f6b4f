from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives import InfoVAEConfig
from stage1_vae.objectives.information import mmd
from stage1_vae.vae import VAE, VAEConfig
from tests.stage1_vae.objectives.reference import objective

SCALES = (0.5, 2.0)


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    small = DenseConfig(hidden=(7,))
    return VAE(VAEConfig(latents=2, encoder=small, decoder=small), (3, 3))


def binary_images(count: int = 6) -> Tensor:
    return torch.randint(0, 2, (count, 1, 3, 3), generator=torch.Generator().manual_seed(1)) * 2.0 - 1


def loss_of(model: VAE, kind: str, seed: int = 3, **settings: Any) -> Tensor:
    torch.manual_seed(seed)
    return objective(kind, **settings).loss(model, binary_images(), 0).loss


def slow_mmd(x: list[list[float]], y: list[list[float]], kernel: str, bandwidth: float) -> float:
    def value(one: list[float], other: list[float]) -> float:
        squared = sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
        c = 2 * len(one) * bandwidth**2
        if kernel == "rbf":
            return math.exp(-squared / c)
        return sum(c * scale / (c * scale + squared) for scale in SCALES)

    def within(points: list[list[float]]) -> float:
        values = [value(a, b) for i, a in enumerate(points) for j, b in enumerate(points) if i != j]
        return sum(values) / len(values)

    across = [value(a, b) for a in x for b in y]
    return within(x) + within(y) - 2 * sum(across) / len(across)


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_the_discrepancy_and_its_gradient(kernel: str):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(4, 3, generator=generator, dtype=torch.float64) * 0.5 + 1
    x.requires_grad_()
    found = mmd(x, y, kernel, 0.7, SCALES)
    points = x.tolist()
    assert found.item() == pytest.approx(slow_mmd(points, y.tolist(), kernel, 0.7))
    (gradient,) = torch.autograd.grad(found, x)
    for i in range(5):
        for j in range(3):
            at = points[i][j]
            sides = []
            for shift in (1e-5, -1e-5):
                points[i][j] = at + shift
                sides.append(slow_mmd(points, y.tolist(), kernel, 0.7))
            points[i][j] = at
            assert gradient[i, j].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-8)


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_the_discrepancy_is_unbiased_and_tells_distributions_apart(kernel: str):
    generator = torch.Generator().manual_seed(0)

    def values(shift: float) -> Tensor:
        draws = [torch.randn(2, 12, 2, generator=generator) for _ in range(500)]
        return torch.stack([mmd(x, y + shift, kernel, 1.0, SCALES) for x, y in draws])

    same, apart = values(0.0), values(1.0)
    assert abs(same.mean()) < 4 * same.std() / math.sqrt(len(same))  # 0, which a diagonal left in would raise
    assert (same < 0).any()
    assert apart.mean() > 10 * apart.std() / math.sqrt(len(apart))


def test_the_elbo_is_a_special_case(model: VAE):
    torch.testing.assert_close(
        loss_of(model, "info", alpha=0.0, discrepancy_weight=1.0), loss_of(model, "elbo"), rtol=1e-6, atol=1e-6
    )


def test_the_three_terms_have_their_weights(model: VAE):
    def at(alpha: float, weight: float) -> Tensor:
        return loss_of(model, "info", alpha=alpha, discrepancy_weight=weight)

    torch.manual_seed(3)
    output = objective("info").loss(model, binary_images(), 0)
    kl, discrepancy = output.metrics["kl"], output.metrics["mmd"]
    torch.testing.assert_close(at(1.0, 0.0), -output.metrics["log_likelihood"])
    torch.testing.assert_close(at(1.0, 3.0) - at(1.0, 0.0), 3 * discrepancy)
    torch.testing.assert_close(at(0.2, 0.8) - at(1.0, 0.0), 0.8 * kl)
    torch.testing.assert_close(at(-0.5, 4.0) - at(1.0, 0.0), 1.5 * kl + 2.5 * discrepancy)


def test_deterministic_latents_are_means(model: VAE):
    images = binary_images()
    expected = -model.decoder.log_likelihood(model.encode(images).unsqueeze(0), images).mean()
    torch.testing.assert_close(loss_of(model, "autoencoder"), expected)
    torch.testing.assert_close(loss_of(model, "info", deterministic=True, discrepancy_weight=0.0), expected)
    assert torch.equal(*(loss_of(model, "autoencoder", seed=seed) for seed in (1, 2)))  # nothing is drawn
    wae = objective("info", deterministic=True)
    assert wae.deterministic
    assert wae.best_metric == "negative_log_likelihood"


CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    "draws": ({}, 3),
    "alpha": ({}, 0.5),
    "discrepancy_weight": ({}, 5.0),
    "kernel": ({}, "rbf"),
    "bandwidth": ({}, 2.0),
    "scales": ({}, (1.0,)),
    "deterministic": ({}, True),
}


@pytest.mark.parametrize("field", sorted(InfoVAEConfig.__dataclass_fields__.keys() - {"kind"}))
def test_every_field_changes_the_loss(model: VAE, field: str):
    beside, value = CHANGES[field]
    assert not torch.isclose(loss_of(model, "info", **beside), loss_of(model, "info", **beside | {field: value}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": 1.5}, "alpha=1.5, expected at most 1"),
        ({"alpha": 0.5, "deterministic": True}, "alpha=0.5, expected 1 beside deterministic=true"),
        ({"scales": ()}, r"scales=\(\), expected one factor or more"),
        ({"alpha": 0.0, "discrepancy_weight": 0.5}, "discrepancy_weight=0.5, expected at least 1 - alpha"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        InfoVAEConfig(**settings)


def test_one_image_has_no_discrepancy(model: VAE):
    with pytest.raises(UserError, match="2 images or more"):
        objective("info").loss(model, binary_images(1), 0)
