"""An adversary of small networks, and a player that teaches it as the loop does."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from stage1_vq.losses.adversarial import (
    AdversarialConfig,
    Adversary,
)
from stage1_vq.losses.discriminators import (
    DiscriminatorConfig,
    PatchGANConfig,
    StyleGANDiscriminatorConfig,
)
from training.optimizers import Learner

SIDE, STEPS = 16, 100
PATCHES = PatchGANConfig(width=4, layers=2, norm="group")  # no statistics of the batch
ALWAYS = AdversarialConfig(
    weight=0.8, start=0.0, warmup=0.0, ramp=0.0, adaptive=False, learning_rate=1e-3, discriminator=PATCHES
)
EVERYTHING: dict[str, Any] = {"lecam_weight": 0.5, "r1_weight": 1.0, "r1_every": 2}
DISCRIMINATORS: dict[str, DiscriminatorConfig] = {
    "patchgan": PATCHES,
    "stylegan": StyleGANDiscriminatorConfig(width=4, max_width=8),
}


def make_adversary(**changes: Any) -> Adversary:
    torch.manual_seed(0)
    return Adversary(replace(ALWAYS, **changes), 3, (SIDE, SIDE), STEPS)


def images(b: int = 4, seed: int = 1) -> Tensor:
    return torch.rand(b, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Player:
    """An adversary that learns as the loop lets it."""

    def __init__(self, adversary: Adversary) -> None:
        self.adversary = adversary
        self.learner = Learner(adversary, adversary.optimizer, adversary.learning_rate)

    def learn(self, pairs: list[tuple[Tensor, Tensor]], step: int) -> dict[str, Tensor]:
        """pairs: reconstructions and images of each micro-batch. Returns the figures of the last one."""
        for fake, real in pairs:
            losses, figures = self.adversary.observe(fake, real, step)
            for loss in losses.values():
                (loss / len(pairs)).backward()
        if self.learner.has_gradients():
            self.learner.average()
            self.learner.clip(None)
            self.learner.move(step)
            self.learner.forget()
        self.adversary.update()
        return figures


def state(adversary: Adversary) -> dict[str, Tensor]:
    return copy.deepcopy(adversary.state_dict())


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=tolerance, atol=tolerance, msg=name)
