"""Products in blocks of columns are products."""

from __future__ import annotations

import pytest
import torch

from stage2_prior.decoding.column_blocks import ColumnBlocks, in_blocks, join


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_blocks_join_to_the_product(batch, blocks):
    weight, x, bias = torch.randn(8, 5), torch.randn(batch, 5), torch.randn(batch, 8)
    product = ColumnBlocks(weight, blocks, torch.float32)
    assert product(x).shape == (blocks, batch, 8 // blocks)
    torch.testing.assert_close(join(product(x)), x @ weight.T)
    out = torch.empty(product.shape(batch))
    assert product(x, out=out) is out
    torch.testing.assert_close(join(out), x @ weight.T)
    total = in_blocks(bias.clone(), blocks)
    product.add_product(total, x)
    torch.testing.assert_close(join(total), x @ weight.T + bias)


def test_what_is_written_in_blocks_stands_in_the_rows():
    rows = torch.zeros(2, 4, dtype=torch.int64)
    in_blocks(rows, 2).copy_(torch.tensor([[[1, 2], [5, 6]], [[3, 4], [7, 8]]]))
    assert rows.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_join_puts_blocks_side_by_side():
    assert join(torch.tensor([[[1, 2], [5, 6]], [[3, 4], [7, 8]]])).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
