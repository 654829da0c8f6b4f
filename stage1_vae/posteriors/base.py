"""What every posterior is: q(z|x), a distribution over the latents of each image of a batch.

Shapes: k draws of b images, whose latents have the shape `*shape`: (d,), or (c, h, w) of a map.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from common.errors import UserError

LatentShape = tuple[int, ...]


class Draws(NamedTuple):
    """Latents drawn from a posterior, and how likely it was to draw them."""

    latents: Tensor  # k b *shape
    log_density: Tensor  # k b n, nats: log q(z|x) as n terms that add up, one for each number of z where it parts so


class Posterior:
    """q(z|x) of a batch of images, as a function of what an encoder found."""

    @property
    def mean(self) -> Tensor:
        """b *shape: the mean, or, where that has no closed form, what the posterior makes of the mean of its noise."""
        raise NotImplementedError

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """What `draw` turns into latents: `count b *shape`, float32, whose distribution depends on nothing learned."""
        raise NotImplementedError

    def draw(self, noise: Tensor) -> Draws:
        """Latents as a differentiable function of the posterior's parameters and of noise, k b *shape."""
        raise NotImplementedError

    def log_density(self, latents: Tensor) -> Tensor:
        """log q(z|x) of given latents, k b *shape -> k b n, as `Draws` has it."""
        raise NotImplementedError

    def log_marginals(self, latents: Tensor) -> Tensor | None:
        """log q(z_d|x) of each of the d numbers of given latents alone, k b *shape -> k b d, in nats; None where there
        is no closed form. They add up to log q(z|x) only where the numbers are independent."""
        return None

    def kl_to_standard_normal(self) -> Tensor | None:
        """KL(q(z|x) || N(0, I)) as terms that add up, b n, in nats; None where there is no closed form."""
        return None

    def kl_to_uniform_sphere(self) -> Tensor | None:
        """Likewise, to the uniform distribution on the unit sphere, of a posterior of unit vectors."""
        return None

    def without_gradient(self) -> Self:
        """The same distribution, whose parameters have no gradient: log q of draws is then a function of the draws."""
        raise NotImplementedError


class PosteriorLayer(nn.Module):
    """Turns what the encoder's network says of each image into its posterior. `features` is how many numbers it reads:
    `b features` for latents (d,), and `b features h w` for a map (c, h, w)."""

    features: int

    def __init__(self, config: Any, shape: LatentShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape

    def forward(self, features: Tensor) -> Posterior:
        raise NotImplementedError


def flat_terms(terms: Tensor, axes: int) -> Tensor:
    """`... *shape`, of `axes` axes before the latents' own, -> `... n`."""
    return terms.flatten(axes)


def without_autocast(tensor: Tensor) -> torch.autocast:
    """In it, products on the tensor's device are of its own precision: a draw in bfloat16 has another density than the
    one that its noise says."""
    return torch.autocast(tensor.device.type, enabled=False)


def vector_length(kind: str, shape: LatentShape) -> int:
    """d of latents of the shape (d,). Raises UserError for those of another, which this kind of posterior has not."""
    if len(shape) != 1:
        raise UserError(
            f"posterior.kind={kind} for latents of the shape {shape}, expected (d,): use an encoder that gives "
            "vectors, or another kind, such as diagonal"
        )
    return shape[0]
