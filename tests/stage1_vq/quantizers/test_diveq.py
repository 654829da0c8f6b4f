"""A quantization error with a length that learns and a direction that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers.diveq import DiVeQConfig, DiVeQuantizer


def make(**settings: Any) -> DiVeQuantizer:
    torch.manual_seed(0)
    return DiVeQuantizer(DiVeQConfig(**{"codebook_size": 12, "dim": 5, "revive_after": 0, **settings}))


def latents(seed: int = 1) -> Tensor:
    return torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(seed))


def test_without_noise_training_sees_the_code_vectors_themselves():
    quantizer = make(noise=0.0)
    torch.testing.assert_close(quantizer(latents()).z_q, quantizer.eval()(latents()).z_q)


@pytest.mark.parametrize("settings", [{}, {"direction": "random"}, {"depth": 2}, {"noise": 0.5}])
def test_the_step_is_as_long_as_the_error(settings):
    quantizer, z = make(**settings), latents()
    expected = (quantizer.codes_to_latents(quantizer.codes(z)) - z).norm(dim=1)
    torch.testing.assert_close((quantizer(z).z_q - z).norm(dim=1), expected)


def test_gradients_are_those_of_the_formula():
    """Of |e - z| u with u held constant, by hand: (I - n u') g at z and n u' g at e, n the direction of e - z."""
    quantizer, z = make(noise=0.3), latents().requires_grad_()
    torch.manual_seed(3)
    z_q = quantizer(z).z_q
    upstream = torch.randn(z_q.shape, generator=torch.Generator().manual_seed(2))
    z_q.backward(upstream)
    way = (quantizer.codes_to_latents(quantizer.codes(z)) - z).detach()
    n, u = way / way.norm(dim=1, keepdim=True), (z_q - z).detach() / way.norm(dim=1, keepdim=True)
    to_code = n * (u * upstream).sum(1, keepdim=True)
    torch.testing.assert_close(z.grad, upstream - to_code, rtol=1e-4, atol=1e-5)
    rows = to_code.movedim(1, 3).reshape(-1, 5)
    expected = torch.zeros(12, 5).index_add_(0, quantizer.codes(z)[0].flatten(), rows)
    torch.testing.assert_close(quantizer.stack()[0].codebook.grad, expected, rtol=1e-4, atol=1e-5)


def test_the_line_runs_through_the_code_vectors_in_their_order():
    """Without noise the space-filling variant gives points of its segments, and both ends of one learn."""
    quantizer, z = make(space_filling=True, noise=0.0), latents()
    z_q = quantizer(z).z_q
    vectors = quantizer.stack()[0].codebook.detach()
    points = z_q.detach().movedim(1, 3).reshape(-1, 1, 5)
    first, way = vectors[:-1], vectors[1:] - vectors[:-1]
    share = (((points - first) * way).sum(2) / way.square().sum(1)).clamp(0, 1).unsqueeze(2)
    distance = (first + share * way - points).norm(dim=2)  # of each point to each segment
    assert distance.min(1).values.max() < 1e-5
    assert (z_q - quantizer.eval()(z).z_q).abs().max() > 0.01, "and not the code vectors"
    quantizer.train()(z[:1, :, :1, :1]).z_q.sum().backward()
    learning = quantizer.stack()[0].codebook.grad.abs().sum(1).nonzero().flatten().tolist()
    assert learning == [learning[0], learning[0] + 1], "both ends of one segment"


@pytest.mark.parametrize("space_filling", [False, True])
def test_a_codebook_learns_where_the_latents_are_without_a_loss_of_its_own(space_filling):
    quantizer = make(space_filling=space_filling, noise=0.01, kmeans_iterations=0, codebook_size=4, init="normal")
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.05)
    centres = 3 * torch.randn(4, 5, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(6)

    def batch() -> Tensor:
        chosen = torch.randint(4, (64,), generator=generator)
        return (centres[chosen] + 0.1 * torch.randn(64, 5, generator=generator)).view(64, 5, 1, 1)

    def error() -> float:
        return float((quantizer.eval()(z := batch()).z_q - z).square().mean().detach())

    before = error()
    for _ in range(200):
        z = batch()
        loss = (quantizer.train()(z).z_q - z).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error() < before / 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": -1.0}, "noise=-1.0, expected 0"),
        ({"depth": 0}, "depth=0, expected at least 1"),
        ({"groups": 5}, "groups=5, expected a divisor of dim="),
        ({"direction": "down"}, "direction=down, expected code or random"),
        ({"space_filling": True, "depth": 2}, "space_filling=True, expected False where depth or groups are above 1"),
        ({"space_filling": True, "direction": "random"}, "space_filling=True, expected False where direction=random"),
    ],
)
def test_a_config_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DiVeQConfig(**settings)
