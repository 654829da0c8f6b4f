"""The reconstruction loss of VQ-GAN and of most after it: absolute and squared errors of pixels, weighted."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError


class ErrorWeights(Protocol):
    """Two fields of the config of an autoencoder."""

    @property
    def l1_weight(self) -> float: ...  # of the absolute error
    @property
    def l2_weight(self) -> float: ...  # of the squared error


def check_error_weights(config: ErrorWeights, common: str) -> None:
    """Raises UserError for a weight below 0, and where both are 0. common: what to give then, such as l1_weight=1."""
    for name in ("l1_weight", "l2_weight"):
        if getattr(config, name) < 0:
            raise UserError(f"model.{name}={getattr(config, name)}, expected 0 or more")
    if not config.l1_weight + config.l2_weight:
        raise UserError(f"model.l1_weight and model.l2_weight are both 0: give one of them, {common}")


def pixel_errors(config: ErrorWeights, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
    """`reconstruction_loss`: the weighted sum of the mean absolute and the mean squared error."""
    weights = {F.l1_loss: config.l1_weight, F.mse_loss: config.l2_weight}
    terms = [weight * error(decoded, images) for error, weight in weights.items() if weight]
    return {"reconstruction_loss": sum(terms[1:], terms[0])}
