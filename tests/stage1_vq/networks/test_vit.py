"""Each token has its patch; positions fit the grid of training and are interpolated for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stage1_vq.networks.vit import Positions, ViTDecoder, ViTEncoder

SETTINGS: dict[str, Any] = {"channels": 2, "patch": 4, "grid": (3, 5), "width": 16, "heads": 2, "positions": "learned"}


def moved(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Where, h w, two tensors b d h w differ."""
    return (before - after).abs().amax(dim=(0, 1)) > 1e-6


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_token_sees_its_own_patch_and_through_attention_all_others(blocks):
    torch.manual_seed(0)
    encoder = ViTEncoder(blocks=blocks, width_out=7, **SETTINGS).eval()
    images = torch.randn(1, 2, 12, 20)
    z = encoder(images)
    assert z.shape == (1, 7, 3, 5)
    images[:, :, 4:8, 16:20] += 1  # the patch in row 1, column 4
    expected = torch.ones(3, 5, dtype=torch.bool)
    if not blocks:
        expected[:] = False
        expected[1, 4] = True
    assert torch.equal(moved(z, encoder(images)), expected)


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_token_becomes_its_own_patch_and_through_attention_moves_all_others(blocks):
    torch.manual_seed(0)
    decoder = ViTDecoder(blocks=blocks, width_in=7, **SETTINGS).eval()
    z_q = torch.randn(1, 7, 3, 5)
    images = decoder(z_q)
    assert images.shape == (1, 2, 12, 20)
    z_q[:, :, 2, 1] = torch.randn(7)
    expected = torch.ones(12, 20, dtype=torch.bool)
    if not blocks:
        expected[:] = False
        expected[8:12, 4:8] = True
    assert torch.equal(moved(images, decoder(z_q)), expected)


def test_pixels_of_a_patch_are_read_and_written_in_the_same_order():
    """Channel, row, column: the first weights of a convolution and the last of the head."""
    decoder = ViTDecoder(blocks=0, width_in=16, **SETTINGS)
    with torch.no_grad():
        decoder.head[2].weight.zero_()
        decoder.head[2].bias.copy_(torch.arange(32.0))
    images = decoder(torch.zeros(1, 16, 3, 5))
    torch.testing.assert_close(images[0, :, 4:8, 8:12], torch.arange(32.0).view(2, 4, 4))


@pytest.mark.parametrize("kind", ["learned", "sincos"])
def test_positions_tell_all_places_apart_and_are_the_table_on_the_grid_of_training(kind):
    positions = Positions((3, 5), 16, kind)
    added = positions(torch.zeros(1, 16, 3, 5))[0]
    assert torch.equal(added, positions.table)
    distances = torch.cdist(added.flatten(1).t(), added.flatten(1).t())
    assert distances[~torch.eye(15, dtype=torch.bool)].min() > 1e-3
    assert len(list(positions.parameters())) == (kind == "learned")


def test_positions_are_interpolated_along_rows_and_columns_for_other_grids():
    positions = Positions((4, 8), 2, "learned")
    with torch.no_grad():
        positions.table[0] = torch.arange(4.0)[:, None].expand(4, 8)  # the row
        positions.table[1] = torch.arange(8.0).expand(4, 8)  # the column
    row, column = positions(torch.zeros(1, 2, 12, 16))[0]
    assert (row.diff(dim=0) > 0)[1:-1].all()
    assert row.diff(dim=1).abs().max() < 1e-5
    assert (column.diff(dim=1) > 0)[:, 1:-1].all()
    torch.testing.assert_close(row[4:8, 0], torch.tensor([1.0, 4 / 3, 5 / 3, 2.0]), rtol=0, atol=0.05)
