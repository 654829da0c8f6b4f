"""Known bugs of the field, each with a test that a quantizer which has it would fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_vq.quantizers import (
    BSQConfig,
    GumbelQuantizerConfig,
    IBQConfig,
    LFQConfig,
    NearestQuantizerConfig,
    SimVQConfig,
    build_quantizer,
)

K, D = 16, 6
NEAREST: dict[str, Any] = {"codebook_size": K, "dim": D, "kmeans_iterations": 0, "revive_after": 0}
WITH_CODEBOOK: dict[str, Any] = {
    "nearest, by EMA": NearestQuantizerConfig(**NEAREST),
    "nearest, by gradient": NearestQuantizerConfig(**NEAREST, codebook_update="gradient"),
    "nearest, rotation": NearestQuantizerConfig(**NEAREST, gradient="rotation", codebook_update="gradient"),
    "simvq": SimVQConfig(codebook_size=K, dim=D),
    "ibq": IBQConfig(codebook_size=K, dim=D),
    "gumbel": GumbelQuantizerConfig(codebook_size=K, dim=D),
    "gumbel, straight-through": GumbelQuantizerConfig(codebook_size=K, dim=D, sample="straight-through"),
}
WITH_BETA = ["nearest, by EMA", "nearest, by gradient", "simvq", "ibq"]
WITH_BATCH_LOSSES: dict[str, Any] = {
    "lfq": LFQConfig(bits=D, dim=D, inverse_temperature=1),
    "bsq": BSQConfig(bits=D, dim=D, inverse_temperature=1, commitment_weight=1),
    "ibq": IBQConfig(codebook_size=K, dim=D, temperature=0.5),
    "gumbel": GumbelQuantizerConfig(codebook_size=K, dim=D, kl_warmup_steps=0),
}


def make(config: Any) -> Any:
    torch.manual_seed(0)
    return build_quantizer(config)


def latents(b: int = 3) -> Tensor:
    return torch.randn(b, D, 4, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", WITH_CODEBOOK)
def test_the_codebook_learns_although_the_decoder_sees_the_straight_through_value(name):
    quantizer = make(WITH_CODEBOOK[name])
    every = (torch.arange(K).view(1, 1, K),)
    before = quantizer.codes_to_latents(every).detach().clone()
    weights = list(quantizer.parameters())
    quantized = quantizer(latents())
    if weights:
        loss = quantized.z_q.square().mean() + torch.stack(list(quantized.losses.values())).sum()
        loss.backward()
        torch.optim.SGD(weights, 0.1).step()
    quantizer.update()
    moved = (quantizer.codes_to_latents(every) - before).abs().sum(1).flatten() > 0
    assert moved[quantized.codes[0].unique()].all(), "codes that were used"


@pytest.mark.parametrize("name", WITH_BETA)
def test_beta_weighs_what_pulls_the_encoder_and_nothing_else(name):
    config = WITH_CODEBOOK[name]
    settings = {field: getattr(config, field) for field in config.__dataclass_fields__}
    found = []
    for beta in (0.25, 0.5):
        quantizer, z = make(type(config)(**{**settings, "commitment_weight": beta})), latents().requires_grad_()
        losses = quantizer(z).losses
        losses["commitment_loss"].backward(retain_graph=True)
        assert all(weight.grad is None or not weight.grad.any() for weight in quantizer.parameters())
        found.append((z.grad, losses))
    torch.testing.assert_close(2 * found[0][0], found[1][0])
    for other in set(found[0][1]) - {"commitment_loss"}:
        assert torch.equal(found[0][1][other], found[1][1][other])


@pytest.mark.parametrize("name", WITH_BATCH_LOSSES)
def test_losses_of_a_training_step_do_not_depend_on_the_batch_size(name):
    quantizer = make(WITH_BATCH_LOSSES[name])
    one, many = quantizer(latents()).losses, quantizer(latents().repeat(4, 1, 1, 1)).losses
    assert one
    torch.testing.assert_close(one, many)
