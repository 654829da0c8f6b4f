"""Planar and radial flows of Rezende and Mohamed 2015, "Variational Inference with Normalizing Flows"
(arXiv:1505.05770)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import check_fields
from stage1_vae.posteriors.base import Draws, LatentShape, Posterior, PosteriorLayer, vector_length
from stage1_vae.posteriors.diagonal import DiagonalGaussian, ScaleFunction, check_smallest_scale, log_scales

PlanarActivation = Literal["tanh", "elu"]
UNMOVED = math.log(math.e - 1)  # where softplus is 1
BISECTIONS = 60  # halvings: of float32 and float64 alike, less than a rounding is left


@dataclass(frozen=True, kw_only=True)
class LinearFlowsConfig:
    """Draws of a diagonal Gaussian pass through these flows, whose parameters the encoder says for each image. Each
    takes time linear in d, moves what lies along one direction (planar) or around one point (radial), and is
    invertible."""

    kind: Literal["linear_flows"] = "linear_flows"
    flows: tuple[Literal["planar", "radial"], ...] = ("planar",) * 8
    activation: PlanarActivation = "tanh"  # of the planar ones
    scale: ScaleFunction = "exp"  # of the Gaussian, as in `diagonal`
    smallest_scale: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "flows", tuple(self.flows))
        check_smallest_scale(self.smallest_scale)
        known = bool(self.flows) and all(flow in ("planar", "radial") for flow in self.flows)
        check_fields(self, (("flows", known, "a list of planar and radial"),))


class Flow(Protocol):
    """Parameters are `b d` and `b 1`, or of 1 for all images."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """k b d -> k b d, and the log of its derivative's determinant, k b."""
        ...

    def inverse(self, moved: Tensor) -> Tensor:
        """What `forward` moved."""
        ...

    def without_gradient(self) -> Flow: ...


class LinearFlows(Posterior):
    """base: the Gaussian before the first flow. A density is one term."""

    def __init__(self, base: DiagonalGaussian, flows: Sequence[Flow]) -> None:
        self.base, self.flows = base, flows

    @property
    def mean(self) -> Tensor:
        """What the flows make of the Gaussian's mean: their own has no closed form."""
        return self.flow(self.base.mean[None])[0][0]

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return self.base.noise(count, generator)

    def draw(self, noise: Tensor) -> Draws:
        start, log_density = self.base.draw(noise)
        latents, log_determinant = self.flow(start)
        return Draws(latents, log_density.sum(-1, keepdim=True) - log_determinant[..., None])

    def log_density(self, latents: Tensor) -> Tensor:
        """Undoes the flows: each is the root of one equation for an image, whatever d."""
        start = self.inverse(latents)
        _, log_determinant = self.flow(start)
        return self.base.log_density(start).sum(-1, keepdim=True) - log_determinant[..., None]

    def flow(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Draws of the Gaussian, k b d -> latents, and the log-determinant of all flows, k b."""
        total = torch.zeros_like(z[..., 0])
        for flow in self.flows:
            z, log_determinant = flow.forward(z)
            total = total + log_determinant
        return z, total

    def inverse(self, latents: Tensor) -> Tensor:
        for flow in reversed(self.flows):
            latents = flow.inverse(latents)
        return latents

    def without_gradient(self) -> Self:
        return type(self)(self.base.without_gradient(), [flow.without_gradient() for flow in self.flows])


@dataclass(frozen=True)
class Planar:
    """z + v h(w^T z + b), where v is u with as much of w added as makes w^T v > -1, and so the flow invertible, since
    0 < h' <= 1 (appendix A.1): w^T v = softplus(w^T u + log(e - 1)) - 1. Without that constant, which is not in the
    paper, v would not be 0 where u is, and without bounds where w is near 0. u, w: b d; bias (b): b 1."""

    u: Tensor
    w: Tensor
    bias: Tensor
    activation: PlanarActivation = "tanh"

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        moved, slope = planar(z, self.direction, self.w, self.bias, self.activation)
        return moved, torch.log((1 - slope) + slope * self.lift)[..., 0]

    @property
    def lift(self) -> Tensor:
        """1 + w^T v, b 1."""
        return F.softplus(inner(self.w, self.u) + UNMOVED)

    @property
    def direction(self) -> Tensor:
        """v, b d."""
        along = inner(self.w, self.u)
        return self.u + (self.lift - 1 - along) * self.w / inner(self.w, self.w).clamp(min=1e-12)

    def inverse(self, moved: Tensor) -> Tensor:
        """a = w^T z + b solves a + w^T v h(a) = w^T moved + b, whose left side rises with a. Its root is found without
        gradients; a Newton step from there has those of the root."""
        target = inner(self.w, moved) + self.bias
        rise = self.lift - 1
        with torch.no_grad():
            middle = increasing_root(lambda a: a + rise * activated(a, self.activation)[0], target)
        value, slope = activated(middle, self.activation)
        a = middle + (target - middle - rise * value) / ((1 - slope) + slope * self.lift)
        return moved - self.direction * activated(a, self.activation)[0]

    def without_gradient(self) -> Self:
        return type(self)(self.u.detach(), self.w.detach(), self.bias.detach(), self.activation)


@dataclass(frozen=True)
class Radial:
    """z + beta (z - centre) / (alpha + |z - centre|), alpha = exp(log_alpha) and beta = softplus(raw_beta) - alpha, so
    that the flow is invertible (appendix A.2). centre: b d; log_alpha, raw_beta: b 1."""

    centre: Tensor
    log_alpha: Tensor
    raw_beta: Tensor

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative has the eigenvalue 1 + beta / (alpha + r) across the radius r, d - 1 times, and along it
        1 + alpha beta / (alpha + r)^2, here as sums of what is above 0."""
        alpha, lift = self.log_alpha.exp(), F.softplus(self.raw_beta)
        offsets = z - self.centre
        r = distance(offsets)
        across = ((r + lift) / (r + alpha)).log()
        along = ((r * r + 2 * alpha * r + alpha * lift) / (r + alpha).square()).log()
        return z + (lift - alpha) / (r + alpha) * offsets, ((z.shape[-1] - 1) * across + along)[..., 0]

    def inverse(self, moved: Tensor) -> Tensor:
        """The radius r before the flow solves r^2 + (lift - s) r = alpha s, s the one after it."""
        alpha, lift = self.log_alpha.exp(), F.softplus(self.raw_beta)
        offsets = moved - self.centre
        s = distance(offsets)
        linear = lift - s
        root = (linear.square() + 4 * alpha * s).sqrt()
        r = torch.where(linear > 0, 2 * alpha * s / (linear.clamp(min=0) + root), (root - linear) / 2)
        return self.centre + (r + alpha) / (r + lift) * offsets

    def without_gradient(self) -> Self:
        return type(self)(*(getattr(self, field.name).detach() for field in fields(self)))


def planar(
    z: Tensor, u: Tensor, w: Tensor, bias: Tensor, activation: PlanarActivation = "tanh"
) -> tuple[Tensor, Tensor]:
    """z + u h(w^T z + b) of any u, k b d, and h' there, k b 1: the determinant is 1 + h' w^T u."""
    value, slope = activated(inner(w, z) + bias, activation)
    return z + u * value, slope


def activated(a: Tensor, activation: PlanarActivation) -> tuple[Tensor, Tensor]:
    """h(a) and h'(a), which is above 0 and at most 1."""
    if activation == "tanh":
        return a.tanh(), 1 - a.tanh().square()
    return F.elu(a), a.clamp(max=0).exp()


def increasing_root(function: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """The a at which an increasing function is `target`, by bisection."""
    width = torch.ones_like(target)
    low, high = target - width, target + width
    while (short := (function(low) > target) | (function(high) < target)).any():
        width = torch.where(short, 2 * width, width)
        low, high = target - width, target + width
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = function(middle) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def inner(a: Tensor, b: Tensor) -> Tensor:
    """`... d` -> `... 1`."""
    return (a * b).sum(-1, keepdim=True)


def distance(offsets: Tensor) -> Tensor:
    """`... d` -> `... 1`, with a derivative of 0 at 0."""
    squared = inner(offsets, offsets)
    return torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)


class LinearFlowsLayer(PosteriorLayer):
    """Features: means and scales of the Gaussian; of each planar flow u, w and b; of each radial one its centre,
    log alpha and beta before its constraint."""

    config: LinearFlowsConfig

    def __init__(self, config: LinearFlowsConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        d = vector_length(config.kind, shape)
        self.sizes = [d, d]
        for flow in config.flows:
            self.sizes += [d, d, 1] if flow == "planar" else [d, 1, 1]
        self.features = sum(self.sizes)

    def forward(self, features: Tensor) -> LinearFlows:
        mean, raw, *parameters = features.float().split(self.sizes, dim=1)
        base = DiagonalGaussian(mean, log_scales(raw, self.config.scale, self.config.smallest_scale))
        flows: list[Flow] = []
        for place, flow in enumerate(self.config.flows):
            first, second, third = parameters[3 * place : 3 * place + 3]
            if flow == "planar":
                flows.append(Planar(first, second, third, self.config.activation))
            else:
                flows.append(Radial(first, second, third))
        return LinearFlows(base, flows)
