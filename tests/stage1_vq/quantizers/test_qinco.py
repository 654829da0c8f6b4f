"""Codebooks that depend on the codes before: the slow loop; the published numbers are in
../published/test_residual.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers import ResidualQuantizer, ResidualQuantizerConfig
from stage1_vq.quantizers.nearest import NearestQuantizerConfig
from stage1_vq.quantizers.qinco import QINCoConfig, QINCoQuantizer


def make(**settings: Any) -> QINCoQuantizer:
    torch.manual_seed(0)
    defaults = {"depth": 3, "codebook_size": 12, "dim": 5, "hidden": 7}
    return QINCoQuantizer(QINCoConfig(**{**defaults, **settings}))


def shaken(quantizer: QINCoQuantizer) -> QINCoQuantizer:
    """With networks that are far from the identity."""
    for parameter in quantizer.networks.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return quantizer


def latents(b: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(b, 5, 3, 4, generator=torch.Generator().manual_seed(seed))


def test_codes_and_latents_are_those_of_the_slow_loop(monkeypatch):
    quantizer, z = shaken(make()), latents()[:1]
    monkeypatch.setattr("stage1_vq.quantizers.beam.TILE", 300)  # a few places at a time
    quantized = quantizer(z)
    rows = rearrange(z, "b d h w -> (b h w) d")
    total = torch.zeros_like(rows)
    for number, grid in enumerate(quantized.codes):
        found = []
        for place in range(len(rows)):
            vectors = quantizer.layers[number].codebook
            if number:
                vectors = quantizer.networks[number - 1](vectors, total[place].expand(len(vectors), -1))
            code = int((rows[place] - total[place] - vectors).square().sum(1).argmin())
            assert code == grid.flatten()[place]
            found.append(vectors[code])
        total = total + torch.stack(found)
    torch.testing.assert_close(rearrange(quantized.z_q, "b d h w -> (b h w) d"), total)


def test_losses_teach_what_they_are_for():
    quantizer, z = shaken(make()), latents().requires_grad_()
    losses = quantizer(z).losses
    losses["commitment_loss"].backward(retain_graph=True)
    assert all(weight.grad is None for weight in quantizer.parameters())
    assert z.grad.abs().min() > 0
    losses["codebook_loss"].backward()
    assert all(weight.grad.abs().sum() > 0 for weight in quantizer.parameters())


def test_it_begins_near_a_residual_quantizer_and_learns_to_be_better():
    """Latents on a ring: what is left at a place depends on where it is, which a plain second layer cannot know."""
    angle = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 6.2832
    radius = 1 + 0.02 * torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    z = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
    quantizer = make(depth=2, dim=2, codebook_size=8, hidden=32)
    layer = NearestQuantizerConfig(codebook_size=8, dim=2)
    plain = ResidualQuantizer(ResidualQuantizerConfig(depth=2, layer=layer))
    for each in (plain, quantizer):
        torch.manual_seed(0)
        each.initialise([z])
    before = [float(each.eval()(z).statistics["quantization_error"]) for each in (plain, quantizer)]
    assert before[1] < 1.2 * before[0]
    optimizer = torch.optim.Adam(quantizer.train().parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        quantizer(z).losses["codebook_loss"].backward()
        optimizer.step()
        plain.train()(z)
        plain.update()
    after = [float(each.eval()(z).statistics["quantization_error"]) for each in (plain, quantizer)]
    assert after[1] < 0.95 * after[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth=0, expected at least 1"),
        ({"hidden": 0}, "hidden=0, expected at least 1"),
        ({"beam": 0}, "beam=0, expected at least 1"),
        ({"gradient": "none"}, "gradient=none, expected straight-through or rotation"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)


def test_a_config_survives_json_and_health_names_the_layer():
    quantizer = make(codebook_size=500)
    assert QINCoQuantizer.config_from(asdict(quantizer.config)) == quantizer.config
    quantizer(latents())
    quantizer.update()
    health = quantizer.health(steps_per_epoch=1)
    assert {"perplexity", "depth2_perplexity"} <= set(health)
    lines = quantizer.warnings({name: float(value) for name, value in health.items()}, 1)
    assert [line.split(": only")[0] for line in lines] == ["depth0", "depth1", "depth2"]
