"""Products in blocks of columns are products."""

from __future__ import annotations

import pytest
import torch

from stage2_prior.priors.column_blocks import ColumnBlocks, add, join


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_blocks_join_to_the_product(batch, blocks):
    weight, x, bias = torch.randn(8, 5), torch.randn(batch, 5), torch.randn(batch, 8)
    product = ColumnBlocks(weight, blocks, torch.float32)
    assert product(x).shape == (blocks, batch, 8 // blocks)
    torch.testing.assert_close(join(product(x)), x @ weight.T)
    in_blocks = bias.view(batch, blocks, -1).transpose(0, 1)
    torch.testing.assert_close(join(product(x, plus=in_blocks)), x @ weight.T + bias)
    total = bias.clone()
    add(total, product(x))
    torch.testing.assert_close(total, x @ weight.T + bias)


def test_join_puts_blocks_side_by_side():
    assert join(torch.tensor([[[1, 2], [5, 6]], [[3, 4], [7, 8]]])).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
