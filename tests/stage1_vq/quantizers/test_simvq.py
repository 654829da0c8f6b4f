"""A frozen codebook through a learned map."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from stage1_vq.quantizers.simvq import SimVQConfig, SimVQuantizer


def make(**settings) -> SimVQuantizer:
    torch.manual_seed(0)
    return SimVQuantizer(SimVQConfig(**{"codebook_size": 16, "dim": 5, **settings}))


def test_one_step_moves_every_code_vector_and_leaves_the_frozen_codebook_alone():
    quantizer = make(frozen_dim=7)
    before, frozen = quantizer.code_vectors().detach(), quantizer.frozen_codebook.clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.1)
    z = torch.randn(1, 5, 1, 2, generator=torch.Generator().manual_seed(1))  # two latents, sixteen codes
    quantizer(z).losses["codebook_loss"].backward()
    optimizer.step()
    assert ((quantizer.code_vectors() - before).abs().sum(1) > 0).all()
    assert torch.equal(quantizer.frozen_codebook, frozen)
    assert "frozen_codebook" in quantizer.state_dict()


def test_beta_weighs_the_term_of_the_encoder():
    z = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    once, twice = make(commitment_weight=0.25)(z).losses, make(commitment_weight=0.5)(z).losses
    torch.testing.assert_close(2 * once["commitment_loss"], twice["commitment_loss"])
    torch.testing.assert_close(once["codebook_loss"], twice["codebook_loss"])
    assert set(make(commitment_weight=0)(z).losses) == {"codebook_loss"}


def test_a_hidden_layer_makes_the_map_bend():
    linear, bent = make(), make(hidden_dim=9)
    for quantizer, straight in ((linear, True), (bent, False)):
        one, other = quantizer.frozen_codebook[:2]
        middle, ends = quantizer.code_transform((one + other) / 2), quantizer.code_transform(torch.stack([one, other]))
        assert torch.allclose(middle, ends.mean(0), atol=1e-6) == straight
    z = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    sum(bent(z).losses.values()).backward()
    assert all(weight.grad.any() for weight in bent.parameters())
    torch.testing.assert_close(bent.codes_to_latents(bent.codes(z)), bent(z).z_q)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook_size": 1}, "codebook_size=1, expected at least 2"),
        ({"hidden_dim": 0}, "hidden_dim=0, expected at least 1, or null for a linear map"),
        ({"frozen_dim": 0}, "frozen_dim=0, expected at least 1, or null for dim"),
    ],
)
def test_a_config_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SimVQConfig(**settings)
