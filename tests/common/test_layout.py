"""Layouts change where numbers lie, and no number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.layout import laid_as, laid_for_convolutions, lies_place_after_place, place_after_place


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (1, 1, 1, 1), (2, 3, 1, 1)])
def test_maps_are_laid_place_after_place_and_back(shape):
    maps = torch.randn(shape)
    last = place_after_place(maps)
    assert lies_place_after_place(last)
    assert torch.equal(last, maps)
    assert place_after_place(last) is last
    assert laid_as(None, last).is_contiguous()
    assert lies_place_after_place(laid_as(last, maps))
    assert lies_place_after_place(laid_for_convolutions(None, maps))  # on a CPU


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_keeps_the_layout_of_its_input(channels):
    network = nn.Sequential(nn.Conv2d(channels, 8, 4, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 4))
    images = torch.randn(2, channels, 8, 8)
    assert lies_place_after_place(network(place_after_place(images)))
    torch.testing.assert_close(network(place_after_place(images)), network(images))
