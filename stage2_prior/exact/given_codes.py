"""`GivenCodes` in exact arithmetic."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from codes.spec import Codes
from stage2_prior.exact.convolution import convolved_codes, residual
from stage2_prior.priors.gated_convolutions import CodeConvolution, GatedResidual
from stage2_prior.priors.given_codes import GivenCodes


def given_features(module: GivenCodes, codes: Codes) -> Tensor:
    """h w b d, d the features of all given grids."""
    height, width = module.size
    features = []
    for stack, given in zip(cast("list[nn.Sequential]", module.stacks), codes, strict=True):
        first, *blocks = stack
        x = convolved_codes(given.permute(1, 2, 0), cast(CodeConvolution, first))
        for block in blocks:
            x = residual(x, cast(GatedResidual, block))
        rows, columns, _, _ = x.shape
        features.append(x.repeat_interleave(height // rows, dim=0).repeat_interleave(width // columns, dim=1))
    return torch.cat(features, dim=3)
