"""Ever finer grids of scalars."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from common.errors import UserError
from stage1_vq.quantizers.fsq import FSQConfig
from stage1_vq.quantizers.ibq import IBQConfig, IBQuantizer
from stage1_vq.quantizers.lfq import LFQConfig
from stage1_vq.quantizers.residual_scalar import ResidualScalarConfig, ResidualScalarQuantizer

SCALARS = FSQConfig(levels=(5, 5, 4), dim=3, preserve_symmetry=True)
SIGNS = LFQConfig(bits=4, dim=4, inverse_temperature=1)


def make(layer: Any, **settings: Any) -> ResidualScalarQuantizer:
    torch.manual_seed(0)
    return ResidualScalarQuantizer(ResidualScalarConfig(layer=layer, **settings))


def latents(d: int) -> torch.Tensor:
    return 2 * torch.rand(4, d, 5, 6, generator=torch.Generator().manual_seed(1)) - 1


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("layer", "factor"), [(SCALARS, 8), (SIGNS, 2)])
def test_each_layer_leaves_less_than_the_one_before(layer, factor, rotated):
    """In its cube a layer of L levels leaves an L-th, and one of signs a half: squared errors a quarter or less."""
    layer = type(layer)(**{**vars(layer), "orthogonal_rotation": rotated})
    errors = []
    for depth in (1, 2, 3):
        quantizer = make(layer, depth=depth).eval()
        z = latents(layer.dim)
        errors.append(float((quantizer(z).z_q - quantizer.narrow(z)).square().mean()))
    for one, next_one in pairwise(errors):
        assert next_one < one / (factor if not rotated else 1.5)


def test_the_layers_rotations_are_their_own_and_part_of_a_model():
    quantizer = make(FSQConfig(levels=(5, 5, 5), dim=3, preserve_symmetry=True, orthogonal_rotation=True), depth=3)
    turns = [layer.rotation for layer in quantizer.stack()]
    assert {f"layers.{number}.rotation" for number in range(3)} <= quantizer.state_dict().keys()
    for turn in turns:
        torch.testing.assert_close(turn @ turn.t(), torch.eye(3))
    assert (turns[0] - turns[1]).abs().max() > 0.1 < (turns[1] - turns[2]).abs().max()


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (ResidualScalarConfig, {"depth": 0}, "depth=0, expected at least 1"),
        (ResidualScalarConfig, {"layer": FSQConfig(levels=(5, 5), dim=3, preserve_symmetry=True)}, "layer.dim=3, exp"),
        (ResidualScalarConfig, {"layer": FSQConfig()}, "layer.preserve_symmetry=False, expected True"),
        (FSQConfig, {"noise_dropout": 0.5}, "noise_dropout=0.5, expected 0 where preserve_symmetry=false"),
        (FSQConfig, {"bound": "clamp"}, "bound=clamp, expected tanh where preserve_symmetry=false"),
        (FSQConfig, {"bound": "hard"}, "bound=hard, expected tanh or clamp"),
        (IBQConfig, {"codebook_weight": -1.0}, "codebook_weight=-1.0, expected 0 or more"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config, settings, message):
    with pytest.raises(UserError, match=message):
        config(**settings)


def test_each_side_of_ibqs_squared_error_has_its_weight():
    z = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    found = []
    for weights in ({}, {"codebook_weight": 0.25, "commitment_weight": 1.0}):
        torch.manual_seed(0)
        found.append(IBQuantizer(IBQConfig(codebook_size=12, dim=5, **weights))(z))
    one, other = found
    torch.testing.assert_close(other.losses["codebook_loss"], one.losses["codebook_loss"] / 4)
    torch.testing.assert_close(other.losses["commitment_loss"], one.losses["commitment_loss"] * 4)
    assert torch.equal(one.statistics["quantization_error"], other.statistics["quantization_error"])
