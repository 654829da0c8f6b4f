from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.masked_dense import MaskedDense, hidden_degrees
from tests.golden import golden_vae


def reads(network: MaskedDense, inputs: int, context: int = 0) -> tuple[Tensor, Tensor]:
    """Whether any output for an input depends on each input, `inputs inputs`, and on the context, `inputs`."""
    x = torch.randn(inputs, dtype=torch.float64)
    h = torch.randn(context, dtype=torch.float64)
    by_x, by_h = torch.autograd.functional.jacobian(
        lambda x, h: network(x, h if context else None), (x, h), strict=False
    )
    return (by_x != 0).any(0), (by_h != 0).any(0).any(-1)


@pytest.mark.parametrize("hidden", [(), (24,), (24, 18), (3, 24)])
@pytest.mark.parametrize("context", [0, 2])
def test_an_output_depends_on_the_inputs_before_it(hidden: tuple[int, ...], context: int):
    torch.manual_seed(0)
    network = MaskedDense(6, hidden, 2, context, torch.tanh).double()
    by_inputs, by_context = reads(network, 6, context)
    strictly_lower = torch.ones(6, 6).tril(-1).bool()
    assert not by_inputs[~strictly_lower].any()
    if 3 not in hidden:  # 3 units have too few degrees to let everything through
        assert by_inputs[strictly_lower].all()
    assert by_context.all() == (context > 0)


def test_one_input_depends_on_the_context_alone():
    torch.manual_seed(0)
    network = MaskedDense(1, (8,), 2, 3, torch.tanh).double()
    by_inputs, by_context = reads(network, 1, 3)
    assert not by_inputs.any()
    assert by_context.all()
    without = MaskedDense(1, (8,), 2)
    assert torch.equal(without(torch.randn(5, 1)), without(torch.randn(1)).expand(5, 2, 1))


def test_outputs_of_one_kind_lie_together():
    torch.manual_seed(0)
    network = MaskedDense(3, (8,), 2)
    network.layers[-1].weight.data.zero_()
    network.layers[-1].bias.data = torch.arange(6.0)
    assert network(torch.randn(4, 3))[0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_leading_axes_of_the_context_broadcast():
    torch.manual_seed(0)
    network = MaskedDense(4, (9,), 2, 3)
    x, context = torch.randn(5, 2, 4), torch.randn(2, 3)
    torch.testing.assert_close(network(x, context), network(x, context.expand(5, 2, 3)))


def test_degrees_are_taken_in_turn_or_spread():
    assert hidden_degrees(7, 1, 4).tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert hidden_degrees(5, 0, 4).tolist() == [0, 1, 2, 3, 0]
    assert hidden_degrees(3, 1, 10).tolist() == [1, 5, 9]
    assert hidden_degrees(1, 0, 10).tolist() == [0]
    assert hidden_degrees(3, 1, 1).tolist() == [1, 1, 1]


def test_masks_are_not_saved():
    assert set(MaskedDense(4, (9,), 2, 3).state_dict()) == {
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.weight",
        "layers.1.bias",
        "context.weight",
    }


def test_equals_the_published_network():
    """Its masks are random numbers in the file, as its weights are."""
    reference = golden_vae("pythae_flow_modules")
    network = MaskedDense(reference.config["dim"], reference.config["hidden_sizes"], 2)
    for place, layer in enumerate(network.layers):
        for name in ("weight", "bias", "mask"):
            getattr(layer, name).data = reference.weights[f"made.net.{2 * place}.{name}"]
    shift, log_scale = network(reference.inputs["x"]).unbind(-2)
    reference.check("made/mu", shift)
    reference.check("made/log_var", log_scale)  # which is what theirs is, though it is called so
