"""Terms of a model that is none, in float64, and gradients of plain Python by differences: what objectives are held
against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stage1_vae.objectives import OBJECTIVES, Objective, TrainingFacts
from stage1_vae.objectives.terms import Terms

DRAWS, IMAGES, GROUPS = 3, 4, (2, 3)  # k, b, and the numbers n of each group


def random_leaves(seed: int = 0) -> dict[str, Tensor]:
    """float64 leaves: log_likelihood k b, and of each group log_prior and log_posterior k b n, kl b n, above 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = {"log_likelihood": normal(DRAWS, IMAGES) * 2 - 5}
    for group, numbers in enumerate(GROUPS):
        leaves[f"log_prior{group}"] = normal(DRAWS, IMAGES, numbers) - 1
        leaves[f"log_posterior{group}"] = normal(DRAWS, IMAGES, numbers) - 0.5
        leaves[f"kl{group}"] = normal(IMAGES, numbers).square()
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def terms_of(leaves: dict[str, Tensor]) -> Terms:
    groups = range(len(GROUPS))
    return Terms(
        latents=tuple(torch.zeros(DRAWS, IMAGES, numbers, dtype=torch.float64) for numbers in GROUPS),
        log_likelihood=leaves["log_likelihood"],
        log_prior=tuple(leaves[f"log_prior{group}"] for group in groups),
        log_posterior=tuple(leaves[f"log_posterior{group}"] for group in groups),
        exact_kl=tuple(leaves[f"kl{group}"] for group in groups),
    )


class GivenTerms(nn.Module):
    """Gives the same terms whatever it is asked, and notes what it was asked."""

    def __init__(self, terms: Terms) -> None:
        super().__init__()
        self.terms = terms
        self.asked: list[tuple[int, Tensor | None]] = []

    def forward(self, images: Tensor, draws: int = 1, noise: Tensor | None = None) -> Terms:
        self.asked.append((draws, noise))
        return self.terms


def facts(**changes: Any) -> TrainingFacts:
    return TrainingFacts(**{"images": 50, "steps": 100, "latent_shape": (5,), "generator": ()} | changes)


def objective(kind: str, known: TrainingFacts | None = None, **settings: Any) -> Objective:
    made, config = OBJECTIVES[kind]
    return made(config(**settings), known or facts())


def loss_of(one: Objective, leaves: dict[str, Tensor], step: int = 0) -> Tensor:
    return one.loss(GivenTerms(terms_of(leaves)), torch.zeros(IMAGES, 1, 2, 2), step).loss


def assert_same_with_gradient(
    loss: Tensor, leaves: dict[str, Tensor], reference: Callable[[dict[str, np.ndarray]], float], h: float = 1e-6
) -> None:
    """The loss is what the reference says, and so is its gradient at every leaf, by central differences."""
    numbers = {name: leaf.detach().numpy().copy() for name, leaf in leaves.items()}
    torch.testing.assert_close(loss.item(), float(reference(numbers)), rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found = torch.zeros_like(leaf) if gradient is None else gradient
        expected = np.zeros(leaf.shape)
        for place in np.ndindex(*leaf.shape):
            kept = numbers[name][place]
            numbers[name][place] = kept + h
            above = reference(numbers)
            numbers[name][place] = kept - h
            below = reference(numbers)
            numbers[name][place] = kept
            expected[place] = (above - below) / (2 * h)
        error = (found - torch.from_numpy(expected)).abs().max().item()
        assert error < 1e-6 * (1 + np.abs(expected).max()), f"the gradient at {name} is {error} off"
