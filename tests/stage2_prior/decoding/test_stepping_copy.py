from __future__ import annotations

import pytest
import torch
from torch import nn

from stage2_prior.decoding.stepping_copy import FewRows, stepping_copy


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5,)])
def test_a_linear_layer_over_few_rows(bias: bool, shape: tuple[int, ...]):
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 96, bias=bias), torch.randn(*shape, 24)
    torch.testing.assert_close(FewRows(linear, torch.float32)(x), linear(x))


def test_a_network_steps_as_it_is_and_stays_so():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.Dropout(0.5), nn.Linear(64, 4)).double().train()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    copied, x = stepping_copy(network, torch.float32), torch.randn(2, 8)
    assert [type(part) for part in copied] == [FewRows, nn.LayerNorm, nn.Dropout, FewRows]
    assert not copied.training
    assert network.training
    assert type(network[0]) is nn.Linear
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    expected = network.eval()(x.double()).float()
    torch.testing.assert_close(copied(x), expected)
    with torch.no_grad():
        copied[1].weight.mul_(2)
    assert torch.equal(network[1].weight, before["1.weight"])
