"""Inverse autoregressive flows: masks, inversion, and the steps written out number by number."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vae.posteriors import InverseAutoregressiveConfig, PosteriorLayer, build_posterior
from stage1_vae.posteriors.base import LatentShape
from stage1_vae.posteriors.inverse_autoregressive import InverseAutoregressive
from stage1_vae.posteriors.masked_convolution import MaskedConvolutional, order_of

SHAPES = [(6,), (3, 2, 4)]


def layer_of(shape: LatentShape, **changes: object) -> PosteriorLayer:
    torch.manual_seed(0)
    settings = {"steps": 3, "hidden": (24,), "context": 4, "gate_bias": 1.0, **changes}
    return build_posterior(InverseAutoregressiveConfig(**settings), shape)


def posterior_of(layer: PosteriorLayer, batch: int = 2) -> InverseAutoregressive:
    generator = torch.Generator().manual_seed(1)
    return layer(torch.randn(batch, layer.features, *layer.shape[1:], generator=generator))


def dependence(function: Callable[[Tensor], Tensor], shape: LatentShape) -> Tensor:
    """Whether each number that the function makes of one image's depends on each, `n n`, both in our order."""
    z = torch.randn(1, 1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    jacobian = torch.autograd.functional.jacobian(function, z)
    place = order_of(shape, z.device).flatten().argsort()
    n = len(place)
    return jacobian.reshape(-1, n, n)[:, place][:, :, place].abs().sum(0) != 0


def test_numbers_come_by_rows_columns_and_channels():
    assert order_of((4,), torch.device("cpu")).tolist() == [0, 1, 2, 3]
    order = order_of((2, 2, 3), torch.device("cpu"))
    assert order[:, 0, 0].tolist() == [0, 1]
    assert order[0].tolist() == [[0, 2, 4], [6, 8, 10]]


@pytest.mark.parametrize("hidden", [(), (12,), (12, 9), (1, 12)])
@pytest.mark.parametrize("channels", [1, 3])
def test_masked_convolutions_read_what_comes_before(hidden: tuple[int, ...], channels: int):
    torch.manual_seed(0)
    shape = (channels, 3, 4)
    network = MaskedConvolutional(channels, hidden, 2, context=2, activation=torch.tanh).double()
    context = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    reads = dependence(lambda z: network(z, context).sum(2), shape)
    assert not reads.triu().any()
    if hidden == (12, 9):  # enough of them
        assert reads[-1, :-1].float().mean() > 0.6  # kernels of 3, and there is a blind spot to the right
        if channels > 1:  # of one place, the channels before
            assert reads[channels - 1, : channels - 1].all()
    zeros = torch.zeros(1, 1, *shape, dtype=torch.float64)
    by_context = torch.autograd.functional.jacobian(lambda context: network(zeros, context), context)
    for place in range(3 * 4):
        row, column = divmod(place, 4)
        assert (by_context[0, 0, :, :, row, column, 0, :, row, column] != 0).any(-1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_other_step_has_the_reverse_order(shape: LatentShape):
    one, two = layer_of(shape, steps=1, kernel=7).double(), layer_of(shape, steps=2, kernel=7).double()

    def flow(layer: PosteriorLayer) -> Callable[[Tensor], Tensor]:
        posterior = posterior_of(layer, 1)
        context = posterior.context.double()
        return lambda z: InverseAutoregressive(posterior.base, posterior.networks, context).flow(z)[0]

    first, both = dependence(flow(one), shape), dependence(flow(two), shape)
    assert not first.triu(1).any()
    assert first.diagonal().all()
    assert first.tril(-1).any()
    assert both.triu(1).any()
    if len(shape) == 1:
        assert both.all()


@pytest.mark.parametrize("shape", SHAPES)
def test_draws_are_those_of_the_steps_written_out(shape: LatentShape):
    """One number after the other, of which those not drawn yet are not there, in float64."""
    layer = layer_of(shape)
    posterior = posterior_of(layer)
    noise = posterior.noise(3, torch.Generator().manual_seed(3))
    latents, log_density = posterior.draw(noise)

    exact = copy.deepcopy(layer).double()
    order = order_of(shape, noise.device)
    z = (posterior.base.mean + posterior.base.scale * noise).double()
    expected = torch.distributions.Normal(posterior.base.mean.double(), posterior.base.scale.double()).log_prob(z)
    for step, network in enumerate(exact.networks):
        turned = z.flip(tuple(range(2, z.ndim))) if step % 2 else z
        moved, gates = torch.zeros_like(turned), torch.zeros_like(turned)
        for number in range(order.numel()):
            before = torch.where(order < number, turned, 1e3)
            m, s = network(before, posterior.context.double()).unbind(2)
            gate = 1 / (1 + (-s).exp())
            moved = torch.where(order == number, gate * turned + (1 - gate) * m, moved)
            gates = torch.where(order == number, gate, gates)
        z = moved.flip(tuple(range(2, z.ndim))) if step % 2 else moved
        expected = expected - (gates.flip(tuple(range(2, z.ndim))) if step % 2 else gates).log()
    torch.testing.assert_close(latents.double(), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_density.double(), expected.flatten(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(32,), (3, 4, 4)])
def test_it_inverts(shape: LatentShape):
    posterior = posterior_of(layer_of(shape, steps=4, hidden=(64, 64)))
    start = 2 * posterior.noise(5, torch.Generator().manual_seed(3))
    with torch.no_grad():
        latents, log_gates = posterior.flow(start)
        again, log_gates_again = posterior.inverse(latents)
    assert (latents - start).abs().max() > 0.3
    torch.testing.assert_close(again, start, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_gates_again, log_gates, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_open_gates_leave_the_gaussian_as_it_is(shape: LatentShape):
    posterior = posterior_of(layer_of(shape, gate_bias=30.0))
    noise = posterior.noise(3)
    torch.testing.assert_close(posterior.draw(noise), posterior.base.draw(noise))
    torch.testing.assert_close(posterior.mean, posterior.base.mean)


def test_closed_gates_are_stable():
    layer = layer_of((6,), gate_bias=-200.0)
    posterior = posterior_of(layer)
    latents, log_density = posterior.draw(posterior.noise(3))
    assert torch.isfinite(latents).all()
    assert torch.isfinite(log_density).all()
    log_density.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_context_reaches_every_number(shape: LatentShape):
    layer = layer_of(shape, steps=1)
    features = torch.randn(1, layer.features, *shape[1:], generator=torch.Generator().manual_seed(1))
    changed = features.clone()
    changed[:, 2 * shape[0] :] += 1
    noise = layer(features).noise(1)
    assert ((layer(features).draw(noise).latents - layer(changed).draw(noise).latents).abs() > 1e-4).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0, expected at least 1"),
        ({"hidden": (3, 0)}, r"hidden=\(3, 0\), expected numbers of units"),
        ({"context": -1}, "context=-1, expected 0 or more"),
        ({"kernel": 2}, "kernel=2, expected an odd number"),
        ({"smallest_scale": -1}, "smallest_scale=-1, expected 0 or more"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        InverseAutoregressiveConfig(**changes)
