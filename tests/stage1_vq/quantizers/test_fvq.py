"""A codebook through a small transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.errors import UserError
from stage1_vq.quantizers.fvq import FVQConfig, FVQuantizer


def make(**settings: Any) -> FVQuantizer:
    torch.manual_seed(0)
    return FVQuantizer(FVQConfig(**{"codebook_size": 24, "dim": 5, "patch": 4, "width": 16, "heads": 2, **settings}))


@pytest.mark.parametrize("blocks", [0, 2])
def test_one_step_moves_every_code_vector_that_the_bridge_joins_to_a_used_one(blocks):
    """Two latents, 24 codes; a step on the bridge's weights moves all of them, also where tokens do not meet."""
    quantizer = make(blocks=blocks)
    before = quantizer.code_vectors().detach()
    z = torch.randn(1, 5, 1, 2, generator=torch.Generator().manual_seed(1))
    quantizer(z).losses["codebook_loss"].backward()
    reached = (quantizer.table.grad.abs().sum(1) > 0).sum()
    assert reached == (24 if blocks else 4 * len((quantizer.codes(z)[0] // 4).unique()))
    torch.optim.SGD(quantizer.parameters(), 0.1).step()
    assert ((quantizer.code_vectors() - before).abs().sum(1) > 0).all()


def test_the_bridge_begins_as_a_small_change_and_tells_places_apart():
    quantizer = make()
    table, vectors = quantizer.table.detach(), quantizer.code_vectors().detach()
    assert 0 < (vectors - table).norm() < 0.3 * table.norm()
    with torch.no_grad():
        quantizer.table.copy_(quantizer.table[:4].repeat(6, 1))  # all tokens alike, but for their positions
        assert len(quantizer.code_vectors().unique(dim=0)) == 24


def test_codes_are_of_the_nearest_bridged_vectors():
    quantizer = make().eval()
    z = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    rows = z.movedim(1, 3).reshape(-1, 5)
    expected = torch.cdist(rows, quantizer.code_vectors()).argmin(1).view(2, 3, 3)
    assert torch.equal(quantizer.codes(z)[0], expected)
    every = torch.arange(24).view(1, 4, 6)
    assert torch.equal(quantizer.codes(quantizer.codes_to_latents((every,)))[0], every)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 5}, "patch=5, expected a divisor of codebook_size"),
        ({"width": 15}, "width=15, expected a multiple of heads"),
        ({"blocks": -1}, "blocks=-1, expected 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)
