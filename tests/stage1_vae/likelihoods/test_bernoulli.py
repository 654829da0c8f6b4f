"""The Bernoulli likelihood: its value and gradients, whatever part of the images is computed at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_vae.likelihoods import bernoulli
from stage1_vae.likelihoods.bernoulli import Bernoulli, BernoulliConfig

LIKELIHOOD = Bernoulli(BernoulliConfig(), channels=2)
SHAPES = [((), ()), ((5,), (5,)), ((7, 3), (3,)), ((3,), (7, 3)), ((7, 1), (7, 3)), ((0, 3), (3,))]


def reference(outputs: Tensor, images: Tensor) -> Tensor:
    logits, targets = torch.broadcast_tensors(outputs, (images + 1) / 2)
    return -F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=(-3, -2, -1))


def gradients(function: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, images: Tensor) -> tuple[Tensor, ...]:
    outputs, images = outputs.clone().requires_grad_(), images.clone().requires_grad_()
    value = function(outputs, images)
    weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
    return value, *torch.autograd.grad((weights * value).sum(), (outputs, images))


@pytest.fixture(autouse=True, params=[1, 100, 2**17])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bernoulli, "PART", request.param)


@pytest.mark.parametrize(("of_outputs", "of_images"), SHAPES)
def test_value_and_gradients_are_those_of_binary_cross_entropy(
    of_outputs: tuple[int, ...], of_images: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = 20 * torch.randn(*of_outputs, 2, 3, 4, dtype=torch.float64, generator=generator)
    images = 2 * torch.rand(*of_images, 2, 3, 4, dtype=torch.float64, generator=generator) - 1
    found = gradients(LIKELIHOOD.log_prob, outputs, images)
    for ours, theirs in zip(found, gradients(reference, outputs, images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_of_gradients_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 2, 2, 2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    images = torch.rand(2, 2, 2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(LIKELIHOOD.log_prob, (outputs, images))
    assert torch.autograd.gradgradcheck(LIKELIHOOD.log_prob, (outputs, images))


def test_certain_pixels_cost_nothing_and_impossible_ones_their_logit() -> None:
    """In float32, where exp(l) overflows."""
    outputs = torch.tensor([-200.0, 200.0, -200.0, 200.0]).view(2, 1, 2).requires_grad_()
    images = torch.tensor([-1.0, 1.0, 1.0, -1.0]).view(2, 1, 2)
    value = LIKELIHOOD.log_prob(outputs, images)
    value.backward()
    assert value == -400
    assert outputs.grad is not None
    assert outputs.grad.flatten().tolist() == [0, 0, 1, -1]


def test_logits_of_a_smaller_type_count_as_float32_and_their_gradient_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = (5 * torch.randn(4, 3, 2, 5, 6, generator=generator)).bfloat16()
    images = 2 * torch.rand(3, 2, 5, 6, generator=generator) - 1
    value, of_outputs, of_images = gradients(LIKELIHOOD.log_prob, outputs, images)
    expected = gradients(LIKELIHOOD.log_prob, outputs.float(), images)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected[0])
    assert of_outputs.dtype == torch.bfloat16
    assert torch.equal(of_outputs, expected[1].bfloat16())
    assert torch.equal(of_images, expected[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_many_draws_no_tensor_but_the_logits_is_kept_for_the_backward_pass(dtype: torch.dtype) -> None:
    """Images are not repeated for each draw."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    outputs, images = torch.randn(50, 3, 2, 4, 4, dtype=dtype, requires_grad=True), torch.rand(3, 2, 4, 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        LIKELIHOOD.log_prob(outputs, images)
    assert sorted(kept) == [images.nbytes, outputs.nbytes]
