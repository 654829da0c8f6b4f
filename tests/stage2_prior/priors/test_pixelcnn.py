"""The gated PixelCNN's own properties; those that all priors share are in test_conformance.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.drawing import inverse_cdf, noise
from stage2_prior.priors.pixelcnn import Layer, PixelCNN, PixelCNNConfig, gate
from stage2_prior.stepping import walk
from tests.stage2_prior.tiny import condition_for, labelled, random_codes, tiny_prior, tiny_spec


def test_gate_is_tanh_times_sigmoid():
    x = torch.randn(3, 8, 2)
    torch.testing.assert_close(gate(x, dim=1), x[:, :4].tanh() * torch.sigmoid(x[:, 4:]))


def test_one_layer_sees_exactly_its_kernels():
    """With positive weights every input that can reach an output has a gradient: a half disc without a blind spot."""
    layer = Layer(width=2, kernel_size=5, num_classes=0, given_width=0, dropout=0.0, residual=False)
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    vertical, horizontal = (torch.ones(1, 2, 7, 7, requires_grad=True) for _ in range(2))
    _, out = layer(vertical, horizontal, torch.tensor([0]), None)
    out[0, 0, 4, 3].backward()
    above, left = (x.grad[0].abs().sum(0) > 0 for x in (vertical, horizontal))
    expected_above, expected_left = (torch.zeros(7, 7, dtype=torch.bool) for _ in range(2))
    expected_above[2:5, 1:6] = True
    expected_left[4, 1:4] = True
    assert torch.equal(above, expected_above)
    assert torch.equal(left, expected_left)


def test_there_is_no_blind_spot():
    """The codes above to the right, which masked square kernels never see: all of them, up to the border."""
    torch.manual_seed(0)
    prior = PixelCNN(PixelCNNConfig(layers=4, width=16, first_kernel_size=3, kernel_size=3), tiny_spec(9, 9), 0)
    prior.embedding = torch.nn.Embedding(81, 16)  # a row for each place: its gradient tells whether the place was seen
    prior.logits((torch.arange(81).view(1, 9, 9),), Condition())[0, 4 * 9 + 4].sum().backward()
    seen = (prior.embedding.weight.grad.abs().sum(-1) > 0).view(9, 9)
    rows, columns = torch.arange(9)[:, None], torch.arange(9)
    expected = (rows < 4) | ((rows == 4) & (columns < 4))  # four layers of reach 1, and the first is moved by one
    assert torch.equal(seen, expected)


def test_an_image_costs_the_arithmetic_of_one_pass():
    prior = tiny_prior("pixelcnn", spec=tiny_spec(8, 8))
    codes, condition = random_codes(2, prior), condition_for(2, prior)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        prior.logits(codes, condition)
    with FlopCounterMode(display=False) as stepped:
        walk(prior.stepper(2, condition), 64, lambda position, logits: codes[0].flatten(1)[:, position : position + 1])
    assert stepped.get_total_flops() == whole.get_total_flops()


def test_sampling_equals_the_naive_loop_code_for_code():
    prior = tiny_prior("pixelcnn", spec=tiny_spec(6, 7))
    condition, uniforms = labelled(5, prior), noise(0, range(5), 42)

    def choose(position: int, logits: Tensor) -> Tensor:
        return inverse_cdf(logits[:, 0].double().softmax(-1), uniforms[:, position])[:, None]

    naive = torch.zeros(5, 42, dtype=torch.int64)
    with torch.no_grad():
        for position in range(42):
            logits = prior.logits((naive.view(5, 6, 7),), condition)[:, position : position + 1]
            naive[:, position : position + 1] = choose(position, logits)
    assert torch.equal(walk(prior.stepper(5, condition), 42, choose), naive)
    assert len(naive.unique()) > 5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kernel_size": 4}, "kernel_size=4, expected an odd number of at least 3"),
        ({"first_kernel_size": 1}, "first_kernel_size=1, expected an odd number of at least 3"),
        ({"width": 0}, "width=0, expected at least 1"),
        ({"given_width": 0}, "given_width=0, expected at least 1"),
        ({"given_blocks": -1}, "given_blocks=-1, expected 0 or more"),
        ({"dropout": -0.5}, "dropout=-0.5, expected a share from 0 to below 1"),
    ],
)
def test_impossible_configs_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        PixelCNNConfig(**setting)
