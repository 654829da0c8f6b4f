"""What every prior over the latents of a VAE is that is learned after it: p(z), fitted on encoded images."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from codes.latents import LatentSpec
from common.errors import UserError
from common.model_io import PretrainedModel

SMALLEST_SCALE = 1e-4  # of a number of the latents, for the largest one: what hardly varies is not blown up beyond it


class LatentPriorModel(PretrainedModel):
    """A distribution over latents, `b *shape`. A subclass says what it is of vectors z, `b d`, which are the latents
    shifted and scaled so that each number has mean 0 and variance 1 over the training images."""

    config_class: ClassVar[type]
    exact: ClassVar[bool] = True  # whether `log_density` is the density, and not an estimate that lies below it

    shift: Tensor
    scale: Tensor

    def __init__(self, config: Any, latent_spec: LatentSpec, stage1_fingerprint: str | None = None) -> None:
        """stage1_fingerprint: of the VAE whose latents it learned; None: not recorded."""
        super().__init__()
        self.config = config
        self.latent_spec = latent_spec
        self.stage1_fingerprint = stage1_fingerprint
        self.register_buffer("shift", torch.zeros(latent_spec.size))
        self.register_buffer("scale", torch.ones(latent_spec.size))

    def arguments(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "latent_spec": self.latent_spec.to_json(),
            "stage1_fingerprint": self.stage1_fingerprint,
        }

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        spec = LatentSpec.from_json(arguments["latent_spec"])
        return cls(cls.config_class(**arguments["config"]), spec, arguments.get("stage1_fingerprint"))

    def traits(self) -> list[str]:
        return [self.latent_spec.describe()]

    def log_density(self, latents: Tensor) -> Tensor:
        """log p(z) in nats: b *shape -> b. Raises UserError for latents of another shape."""
        return self.log_density_of_standard(self.standardised(latents)) - self.scale.log().sum()

    def forward(self, latents: Tensor) -> Tensor:
        """What training minimises, in nats of each image: b *shape -> b."""
        return self.loss_of_standard(self.standardised(latents)) + self.scale.log().sum()

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """count *shape, on the prior's device."""
        z = self.sample_standard(count, generator)
        return (z * self.scale + self.shift).unflatten(1, self.latent_spec.shape)

    def standardised(self, latents: Tensor) -> Tensor:
        """b *shape -> b d."""
        if tuple(latents.shape[1:]) != self.latent_spec.shape:
            raise UserError(
                f"got latents of shape {tuple(latents.shape[1:])}, expected {self.latent_spec.describe()}: those of "
                "the VAE that this prior was trained for"
            )
        return (latents.flatten(1).float() - self.shift) / self.scale

    def start(self, mean: Tensor, variance: Tensor, latents: Tensor) -> None:
        """Before the first step of a run: the mean and the variance, d each, of every number of the training images'
        latents, and latents of many of them, n *shape. The same on all processes."""
        self.shift.copy_(mean)
        scale = variance.sqrt()
        self.scale.copy_(scale.clamp(min=max(SMALLEST_SCALE * float(scale.max()), 1e-12)))
        self.start_from_standard(self.standardised(latents))

    def update(self) -> None:
        """After each step of the optimiser: takes up what forward passes noted since the last one."""

    def forget(self) -> None:
        """In place of `update`, when the step was skipped."""

    # What a subclass says of vectors z, b d.

    def log_density_of_standard(self, z: Tensor) -> Tensor:
        """b d -> b, in nats."""
        raise NotImplementedError

    def loss_of_standard(self, z: Tensor) -> Tensor:
        """b d -> b, in nats: the negative log-density, or a bound above it."""
        return -self.log_density_of_standard(z)

    def sample_standard(self, count: int, generator: torch.Generator | None) -> Tensor:
        """count d."""
        raise NotImplementedError

    def start_from_standard(self, z: Tensor) -> None:
        """What it takes from training latents, n d, before the first step."""
