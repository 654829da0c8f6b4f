"""Index backpropagation beside the dense formula that autograd differentiates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers import ibq, soft_codes
from stage1_vq.quantizers.bits import entropy
from stage1_vq.quantizers.ibq import IBQConfig, IBQuantizer

K, D = 24, 5


def make(**settings: Any) -> IBQuantizer:
    torch.manual_seed(0)
    return IBQuantizer(IBQConfig(**{"codebook_size": K, "dim": D, "temperature": 0.2, **settings}))


def latents() -> Tensor:
    return torch.randn(3, D, 4, 5, generator=torch.Generator().manual_seed(1))


def dense(quantizer: IBQuantizer, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z_q, codes and the loss, with the table of all latents by all codes."""
    config = quantizer.config
    rows = rearrange(z, "b d h w -> (b h w) d")
    logits = rows @ quantizer.codebook.t()
    codes, soft = logits.argmax(1), logits.softmax(1)
    hard = F.one_hot(codes, K).float()
    z_q = (hard - soft.detach() + soft) @ quantizer.codebook
    code_vectors = hard @ quantizer.codebook
    probabilities = (logits / config.temperature).softmax(1)
    entropies = entropy(probabilities).mean() - config.diversity * entropy(probabilities.mean(0))
    loss = (
        F.mse_loss(z_q, rows)
        + F.mse_loss(code_vectors, rows.detach())
        + config.commitment_weight * F.mse_loss(rows, code_vectors.detach())
        + config.entropy_weight * entropies
    )
    return rearrange(z_q, "(b h w) d -> b d h w", b=3, h=4), codes.view(3, 4, 5), loss


@pytest.mark.parametrize("tile", [1, 2**20])
def test_codes_values_losses_and_gradients_are_those_of_the_dense_formula(tile, monkeypatch):
    monkeypatch.setattr(soft_codes, "CPU_TILE", tile)
    monkeypatch.setattr(soft_codes, "CPU_ROWS", 7)
    ours, reference = make(diversity=0.5), make(diversity=0.5)
    z, dense_z = latents().requires_grad_(), latents().requires_grad_()
    upstream = torch.randn(3, D, 4, 5, generator=torch.Generator().manual_seed(2))
    quantized, loss = ours(z), torch.zeros(())
    loss = torch.stack(list(quantized.losses.values())).sum()
    z_q, codes, dense_loss = dense(reference, dense_z)
    assert torch.equal(quantized.codes[0], codes)
    torch.testing.assert_close(quantized.z_q, z_q)
    torch.testing.assert_close(loss, dense_loss)

    ((quantized.z_q * upstream).sum() + loss).backward()
    ((z_q * upstream).sum() + dense_loss).backward()
    torch.testing.assert_close(z.grad, dense_z.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.codebook.grad, reference.codebook.grad, rtol=1e-4, atol=1e-6)


def test_one_latent_moves_every_code_vector():
    quantizer = make(entropy_weight=0)
    z = torch.randn(1, D, 1, 1, generator=torch.Generator().manual_seed(1))
    (quantizer(z).z_q * torch.randn(1, D, 1, 1)).sum().backward()
    assert (quantizer.codebook.grad.abs().sum(1) > 0).all()


def test_terms_of_weight_0_are_not_computed(monkeypatch):
    without = make(diversity=0, commitment_weight=0)
    assert set(without(latents()).losses) == {"index_loss", "codebook_loss", "entropy_loss"}

    def refuse(*_: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(ibq, "soft_statistics", refuse)
    expected = {"index_loss", "codebook_loss", "commitment_loss"}
    assert set(make(entropy_weight=0)(latents()).losses) == expected
    assert set(make().eval()(latents()).losses) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook_size": 1}, "codebook_size=1, expected at least 2"),
        ({"temperature": 0}, "temperature=0, expected above 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        IBQConfig(**settings)
