"""PixelSNAIL of Chen et al. 2017 (arXiv:1712.09763), the prior of VQ-VAE-2, over one grid of codes in raster order.

Causal convolutions see what is near, and attention all codes before a position:

    codes -> [ gated residual blocks -> attention -> ] ... -> logits
                 |                         |
        given codes, class           row and column

The layers are those of the most used open implementation, vq-vae-2-pytorch, so that its weights fit
(stage2_prior/imports/pixelsnail.py). It has no classes: here a class shifts the gates, as a given code does.

None of its layers sees its own position, attention included. So what the first places of a row know of the last code in
the row above is what the kernels reach; all other codes before them they see.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec
from stage2_prior.condition import Condition
from stage2_prior.priors.base import AutoregressivePrior
from stage2_prior.priors.gated_convolutions import CodeConvolution, Convolution, GatedResidual, place_features
from stage2_prior.priors.given_codes import GivenCodes
from stage2_prior.priors.pixelsnail_layers import Block, PixelSNAILConfig
from stage2_prior.priors.pixelsnail_stepper import PixelSNAILStepper


class PixelSNAIL(AutoregressivePrior):
    """Raises UserError when the codes have more than one grid, or when given codes do not fit it; see `GivenCodes`."""

    kind = "pixelsnail"
    config_class = PixelSNAILConfig
    config: PixelSNAILConfig

    def __init__(self, config: PixelSNAILConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        self.grid = self.only_grid()
        reach = config.kernel_size // 2
        kernels = (reach, config.kernel_size), (reach + 1, reach)  # rows and columns
        self.above = CodeConvolution(self.grid.vocabulary, config.width, kernels[0], (reach, reach, reach - 1, 0))
        self.left = CodeConvolution(self.grid.vocabulary, config.width, kernels[1], (reach - 1, 0, reach, 0))
        self.given_codes: GivenCodes | None = None
        if self.given:
            self.given_codes = GivenCodes(
                self.given, self.grid, config.given_width, config.given_blocks, config.given_kernel_size, config.dropout
            )
        given_width = 0 if self.given_codes is None else self.given_codes.width
        self.blocks = nn.ModuleList(Block(config, num_classes, given_width) for _ in range(config.blocks))
        self.output_blocks = nn.Sequential(
            *(
                GatedResidual(config.width, config.residual_width, Convolution, config.dropout)
                for _ in range(config.output_blocks)
            )
        )
        self.output = Convolution(config.width, self.grid.vocabulary)

    def seen(self, codes: Tensor) -> Tensor:
        """What each position sees of the codes near it: b h w -> b d h w."""
        # Moved by a row and by a column: a kernel ends at its own position, which must not see its own code.
        return F.pad(self.above(codes), (0, 0, 1, -1)) + F.pad(self.left(codes), (1, -1))

    def features(self, condition: Condition) -> Tensor | None:
        """Of the given codes, b d h w; None where there are none."""
        return None if self.given_codes is None else self.given_codes(cast(Codes, condition.codes))

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        batch = len(self.sequence(codes, condition))
        features = self.features(condition)
        x = self.seen(codes[0])
        places = repeat(place_features(self.grid, x), "two h w -> b two h w", b=batch)
        for block in self.blocks:
            x = block(x, places, condition.labels, features)
        logits = self.output(F.elu(self.output_blocks(x)))
        return rearrange(logits, "b k h w -> b (h w) k")

    def stepper(self, batch: int, condition: Condition) -> PixelSNAILStepper:
        return PixelSNAILStepper(self, batch, condition)
