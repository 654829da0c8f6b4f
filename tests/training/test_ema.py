from __future__ import annotations

import torch

from tests.training.toy import ToyModel
from training.ema import EMA


def test_average_is_the_sum_it_is_defined_as():
    model = ToyModel()
    ema = EMA(model, decay=0.6)
    expected = {name: weight.detach().double() for name, weight in model.named_parameters()}
    for step in range(20):
        decay = min(0.6, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.add_(torch.randn_like(weight))
                expected[name] = decay * expected[name] + (1 - decay) * weight.double()
        ema.update(step)
    for name, average in ema.model.named_parameters():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_buffers_of_the_state_dict_are_copied_and_pending_ones_are_left_alone():
    model = ToyModel()
    ema = EMA(model, decay=0.99)
    model.input_mean.fill_(3)
    model.pending.fill_(5)
    ema.update(1000)
    assert ema.model.input_mean.tolist() == [3] * 4
    assert ema.model.pending.tolist() == [0] * 4


def test_the_copy_is_apart_at_rest_and_takes_no_gradients():
    model = ToyModel().train()
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        model.layers[0].weight.zero_()
    assert ema.model.layers[0].weight.abs().sum() > 0
    assert not ema.model.training
    assert not any(weight.requires_grad for weight in ema.model.parameters())
    ema.reset()
    assert ema.model.layers[0].weight.abs().sum() == 0


def test_tied_weights_stay_tied_and_move_once():
    model = ToyModel(width=4)
    model.layers[4].weight = torch.nn.Parameter(model.layers[0].weight.detach()[:1].clone())
    model.layers[1].weight = model.layers[1].bias  # any two of one shape
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        model.layers[1].bias.fill_(1)
    ema.update(1000)
    assert ema.model.layers[1].weight is ema.model.layers[1].bias
    assert ema.model.layers[1].bias.tolist() == [0.5] * 4


class Jumping(ToyModel):
    """One bias of its last layer has jumped."""

    def amend_average(self, average: ToyModel) -> None:
        average.layers[4].bias.copy_(self.layers[4].bias)


def test_a_module_says_of_what_no_average_is_taken():
    model = Jumping()
    ema = EMA(model, decay=0.999)
    with torch.no_grad():
        model.layers[4].bias.fill_(7)
        model.layers[0].bias.fill_(7)
    ema.update(100_000)
    assert ema.model.layers[4].bias.tolist() == [7.0]
    assert (ema.model.layers[0].bias < 1).all()
