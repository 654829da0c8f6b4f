"""A minGPT that walks its codes in an order of its own."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from stage2_prior.priors import MinGPT, MinGPTConfig
from tests.stage2_prior.tiny import condition_for, random_codes, tiny_prior

ORDER = (7, 2, 0, 14, 4, 1, 3, 13, 6, 5, 8, 12, 10, 9, 11)


def ordered(order: tuple[int, ...] = ORDER) -> MinGPT:
    prior = tiny_prior("mingpt", config=MinGPTConfig(layers=2, width=24, heads=3, order=order))
    assert isinstance(prior, MinGPT)
    return prior


def test_it_is_the_raster_prior_of_shuffled_codes(tmp_path):
    prior, raster = ordered(), ordered(())
    raster.load_state_dict(prior.state_dict())
    codes, condition = random_codes(3, prior), condition_for(3, prior)
    shuffled = (codes[0].flatten(1)[:, list(ORDER)].view_as(codes[0]),)
    assert torch.equal(prior.nll(codes, condition), raster.nll(shuffled, condition))
    prior.save_pretrained(tmp_path / "model")
    again = MinGPT.from_pretrained(tmp_path / "model")
    assert again.config == prior.config
    assert torch.equal(again.nll(codes, condition), prior.nll(codes, condition))


@pytest.mark.parametrize("order", [(0, 1), (*ORDER[:-1], 7), (*ORDER[:-1], 15)])
def test_an_order_that_misses_a_place_is_refused(order: tuple[int, ...]):
    with pytest.raises(UserError, match=r"expected each of 0 to 14 once, as 3x5 codes of 11"):
        ordered(order)
