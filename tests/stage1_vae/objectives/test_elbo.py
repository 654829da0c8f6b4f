from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import UserError
from stage1_vae.objectives import ELBOConfig
from stage1_vae.objectives.elbo import gaussian_weight_prior
from stage1_vae.objectives.schedules import cyclical_rise, linear_rise
from tests.stage1_vae.objectives.reference import (
    DRAWS,
    GROUPS,
    IMAGES,
    GivenTerms,
    assert_same_with_gradient,
    facts,
    loss_of,
    objective,
    random_leaves,
    terms_of,
)

Numbers = dict[str, np.ndarray]


def negative_log_likelihood(numbers: Numbers) -> float:
    return -sum(numbers["log_likelihood"][k, b] for k in range(DRAWS) for b in range(IMAGES)) / (DRAWS * IMAGES)


def kl_of_image(numbers: Numbers, b: int) -> float:
    return sum(numbers[f"kl{group}"][b, j] for group, n in enumerate(GROUPS) for j in range(n))


def plain(numbers: Numbers, weight: float) -> float:
    return negative_log_likelihood(numbers) + weight * sum(kl_of_image(numbers, b) for b in range(IMAGES)) / IMAGES


@pytest.mark.parametrize(
    ("settings", "step", "weight"),
    [
        ({}, 0, 1.0),
        ({"beta": 4.0}, 0, 4.0),
        ({"annealing": "linear", "annealing_start": 0.2}, 25, 0.4),
        ({"annealing": "linear", "annealing_steps": 50, "beta": 2.0}, 25, 1.0),
        ({"annealing": "linear", "annealing_steps": 50, "beta": 2.0}, 70, 2.0),
        ({"annealing": "cyclical"}, 25, 0.0),
        ({"annealing": "cyclical", "annealing_cycles": 2}, 25 - 5, 0.8),
    ],
)
def test_the_weighted_bound(settings: dict[str, Any], step: int, weight: float):
    leaves = random_leaves()
    assert_same_with_gradient(
        loss_of(objective("elbo", **settings), leaves, step), leaves, lambda numbers: plain(numbers, weight)
    )


@pytest.mark.parametrize("of", ["dimension", "group"])
def test_free_bits_clamp_means_over_the_batch(of: str):
    leaves = random_leaves()
    nats = 0.5 if of == "dimension" else 0.9

    def reference(numbers: Numbers) -> float:
        total = 0.0
        for group, n in enumerate(GROUPS):
            means = [sum(numbers[f"kl{group}"][b, j] for b in range(IMAGES)) / IMAGES for j in range(n)]
            total += sum(max(nats, mean) for mean in means) if of == "dimension" else max(nats, sum(means))
        return negative_log_likelihood(numbers) + 0.7 * total

    numbers = {name: leaf.detach().numpy() for name, leaf in leaves.items()}
    means = [numbers[f"kl{group}"].mean(0) for group in range(len(GROUPS))]
    parts = np.concatenate(means) if of == "dimension" else np.array([mean.sum() for mean in means])
    assert (parts < nats).any()
    assert (parts > nats).any()
    loss = loss_of(objective("elbo", free_nats=nats, free_nats_of=of, beta=0.7), leaves)
    assert_same_with_gradient(loss, leaves, reference)


@pytest.mark.parametrize(("step", "capacity"), [(0, 0.0), (10, 2.0), (20, 4.0), (99, 4.0)])
def test_capacity_presses_each_image_to_its_kl(step: int, capacity: float):
    leaves = random_leaves()

    def reference(numbers: Numbers) -> float:
        distances = [abs(kl_of_image(numbers, b) - capacity) for b in range(IMAGES)]
        return negative_log_likelihood(numbers) + 3 * sum(distances) / IMAGES

    loss = loss_of(objective("elbo", capacity=4.0, capacity_steps=20, beta=3.0), leaves, step)
    assert_same_with_gradient(loss, leaves, reference)


def test_the_prior_of_the_generators_weights_is_a_density():
    weights = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    together = torch.cat([weight.flatten() for weight in weights])
    expected = -torch.distributions.Normal(0.0, math.sqrt(0.3)).log_prob(together).sum()
    torch.testing.assert_close(gaussian_weight_prior([w.float() for w in weights], 0.3).double(), expected)
    generator = tuple(nn.Parameter(weight) for weight in weights)
    one = objective("elbo", facts(generator=generator, images=50), generator_prior_variance=0.3)
    leaves = random_leaves()
    more = loss_of(one, leaves) - loss_of(objective("elbo"), leaves)
    torch.testing.assert_close(more, expected / 50, rtol=1e-6, atol=1e-6)
    more.backward()
    for weight in generator:  # the gradient of weight decay 1 / (n kappa)
        torch.testing.assert_close(weight.grad, weight.detach() / (50 * 0.3), rtol=1e-5, atol=1e-6)


CHANGES: dict[str, tuple[dict[str, Any], Any]] = {  # settings beside it, and another value of the field
    "draws": ({}, 5),
    "beta": ({}, 0.5),
    "annealing": ({"annealing_start": 0.1}, "linear"),
    "annealing_start": ({"annealing": "linear"}, 0.5),
    "annealing_steps": ({"annealing": "linear"}, 50),
    "annealing_cycles": ({"annealing": "cyclical"}, 3),
    "annealing_rise": ({"annealing": "cyclical"}, 0.9),
    "free_nats": ({}, 1.0),
    "free_nats_of": ({"free_nats": 1.0}, "group"),
    "capacity": ({}, 10.0),
    "capacity_steps": ({"capacity": 10.0}, 50),
    "generator_prior_variance": ({}, 1.0),
}


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_loss(field: str):
    beside, value = CHANGES[field]
    known, leaves = facts(generator=(nn.Parameter(torch.ones(3, 3)),)), random_leaves()
    if field == "draws":  # the model makes of it what it will
        model = GivenTerms(terms_of(leaves))
        objective("elbo", known, draws=value).loss(model, torch.zeros(IMAGES, 1, 2, 2), 0)
        assert model.asked == [(value, None)]
        return
    before, after = (loss_of(objective("elbo", known, **s), leaves, 10) for s in (beside, beside | {field: value}))
    assert not torch.isclose(before, after)


def test_the_table_of_changes_names_every_field():
    assert set(CHANGES) == set(ELBOConfig.__dataclass_fields__) - {"kind"}


def test_figures_are_the_terms_of_the_bound_whatever_is_done_to_the_loss():
    leaves = random_leaves()
    model = GivenTerms(terms_of(leaves))
    output = objective("elbo", beta=3.0, free_nats=2.0).loss(model, torch.zeros(IMAGES, 1, 2, 2), 0)
    numbers = {name: leaf.detach().numpy() for name, leaf in leaves.items()}
    kl = sum(kl_of_image(numbers, b) for b in range(IMAGES)) / IMAGES
    assert {name: pytest.approx(float(value)) for name, value in output.metrics.items()} == {
        "log_likelihood": -negative_log_likelihood(numbers),
        "kl": kl,
        "elbo": -negative_log_likelihood(numbers) - kl,
        "weight": 3.0,
    }
    assert not any(value.requires_grad for value in output.metrics.values())


def test_rises():
    assert [linear_rise(step, 0.0, 2.0, 4) for step in (0, 1, 4, 9)] == [0.0, 0.5, 2.0, 2.0]
    four = [cyclical_rise(step, 0.0, 40, 4, 0.5) for step in range(41)]
    assert four[:11] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 0])
    assert four[:10] * 4 == pytest.approx(four[:40])
    assert four[40] == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": -1.0}, "beta=-1.0, expected 0 or more"),
        ({"annealing_rise": 0.0}, "annealing_rise=0.0, expected a share of a cycle above 0"),
        ({"capacity": 5.0, "free_nats": 1.0}, "capacity=5.0, expected 0 beside free_nats"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        ELBOConfig(**settings)
