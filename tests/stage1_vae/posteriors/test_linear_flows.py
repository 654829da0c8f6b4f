"""Planar and radial flows: the paper's formulas, invertibility at the edge, and inverses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from stage1_vae.posteriors import LinearFlowsConfig, build_posterior
from stage1_vae.posteriors.linear_flows import Planar, PlanarActivation, Radial, increasing_root

BATCH, D = 3, 4


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def some_flow(kind: str, size: float = 1.0) -> Planar | Radial:
    if kind == "radial":
        return Radial(numbers(BATCH, D), size * numbers(BATCH, 1, seed=1), size * numbers(BATCH, 1, seed=2))
    activation: PlanarActivation = "elu" if kind == "planar, elu" else "tanh"
    return Planar(size * numbers(BATCH, D), numbers(BATCH, D, seed=1), numbers(BATCH, 1, seed=2), activation)


KINDS = ["planar", "planar, elu", "radial"]


def test_planar_flows_are_those_of_the_paper():
    """But for the constant in their constraint."""
    flow = some_flow("planar")
    z = numbers(5, BATCH, D, seed=3)
    along = (flow.w * flow.u).sum(-1, keepdim=True)
    v = flow.u + (-1 + torch.log1p((math.e - 1) * along.exp()) - along) * flow.w / flow.w.square().sum(-1, keepdim=True)
    a = (z * flow.w).sum(-1, keepdim=True) + flow.bias
    psi = (1 - a.tanh() ** 2) * flow.w
    moved, log_determinant = flow.forward(z)
    torch.testing.assert_close(moved, z + v * a.tanh())
    torch.testing.assert_close(log_determinant, (1 + (psi * v).sum(-1)).abs().log())


def test_radial_flows_are_those_of_the_paper():
    flow = some_flow("radial")
    z = numbers(5, BATCH, D, seed=3)
    alpha = flow.log_alpha.exp()
    beta = -alpha + torch.log1p(flow.raw_beta.exp())
    r = (z - flow.centre).norm(dim=-1, keepdim=True)
    h, slope = 1 / (alpha + r), -1 / (alpha + r) ** 2
    moved, log_determinant = flow.forward(z)
    torch.testing.assert_close(moved, z + beta * h * (z - flow.centre))
    expected = (D - 1) * (1 + beta * h).log() + (1 + beta * h + beta * slope * r).log()
    torch.testing.assert_close(log_determinant, expected[..., 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.1, 1.0, 5.0])
def test_they_invert(kind: str, size: float):
    flow = some_flow(kind, size)
    z = 3 * numbers(50, BATCH, D, seed=3)
    moved, _ = flow.forward(z)
    torch.testing.assert_close(flow.inverse(moved), z, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(flow.forward(flow.inverse(z))[0], z, rtol=1e-7, atol=1e-7)  # of any latents


@pytest.mark.parametrize("kind", KINDS)
def test_float32_inverts(kind: str):
    config = LinearFlowsConfig(
        flows=("radial" if kind == "radial" else "planar",) * 4, activation="elu" if "elu" in kind else "tanh"
    )
    layer = build_posterior(config, (D,))
    posterior = layer(0.5 * numbers(BATCH, layer.features).float())
    latents, _ = posterior.draw(posterior.noise(50, torch.Generator().manual_seed(3)))
    again, _ = posterior.flow(posterior.inverse(latents))
    torch.testing.assert_close(again, latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["tanh", "elu"])
@pytest.mark.parametrize("along", [-20.0, -3.0, 0.0, 50.0])
def test_planar_flows_keep_the_order_of_what_they_move(activation: PlanarActivation, along: float):
    """Whatever w^T u: where -1 and less, the paper's flow without its constraint would fold."""
    w = F.normalize(numbers(1, D), dim=-1)
    flow = Planar(along * w, w, torch.zeros(1, 1).double(), activation)
    line = torch.linspace(-4, 4, 401, dtype=torch.float64)[:, None, None] * w
    moved, log_determinant = flow.forward(line)
    assert ((moved * w).sum(-1)[:, 0].diff() > 0).all()
    assert torch.isfinite(log_determinant).all()
    lift = torch.log1p((math.e - 1) * torch.tensor(along, dtype=torch.float64).exp())
    torch.testing.assert_close(log_determinant[200, 0], lift.log(), rtol=1e-6, atol=1e-6)  # h'(0) = 1


def test_planar_flows_of_nothing_move_nothing():
    z = numbers(5, BATCH, D)
    flow = Planar(torch.zeros(BATCH, D).double(), numbers(BATCH, D, seed=1), numbers(BATCH, 1, seed=2))
    moved, log_determinant = flow.forward(z)
    torch.testing.assert_close(moved, z)
    torch.testing.assert_close(log_determinant, torch.zeros(5, BATCH).double())


@pytest.mark.parametrize("flow", [
    Planar(torch.ones(1, D), torch.zeros(1, D, requires_grad=True), torch.ones(1, 1)),
    Radial(torch.zeros(1, D, requires_grad=True), torch.zeros(1, 1), torch.ones(1, 1)),
])  # fmt: skip
def test_no_direction_and_no_distance_have_gradients(flow: Planar | Radial):
    z = torch.zeros(2, 1, D)
    moved, log_determinant = flow.forward(z)
    parameter = flow.w if isinstance(flow, Planar) else flow.centre
    gradient = torch.autograd.grad(moved.sum() + log_determinant.sum() + flow.inverse(moved).sum(), parameter)[0]
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(flow.inverse(moved), z)


def test_roots_are_found_however_far():
    target = torch.tensor([-1e6, -1.0, 0.0, 3.0, 1e6], dtype=torch.float64)
    for slope in (1e-3, 1.0, 1e3):
        found = increasing_root(lambda a, slope=slope: slope * a, target)
        torch.testing.assert_close(slope * found, target, rtol=1e-9, atol=1e-6)
    assert increasing_root(lambda a: a, torch.tensor([float("nan")])).isnan().all()


def test_impossible_settings_are_refused():
    for flows in ((), ("planar", "sylvester")):
        with pytest.raises(UserError, match=r"flows=\(.*\), expected a list of planar and radial"):
            LinearFlowsConfig(flows=flows)
    with pytest.raises(UserError, match=r"kind=linear_flows for latents of the shape \(2, 3, 4\)"):
        build_posterior(LinearFlowsConfig(), (2, 3, 4))
