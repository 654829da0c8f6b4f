"""Exact small answers and exact gradients; how the codebook moves is in test_codebook_updates.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers import soft_codes
from stage1_vq.quantizers.nearest import NearestQuantizer, NearestQuantizerConfig


def make(**settings: Any) -> NearestQuantizer:
    torch.manual_seed(0)
    return NearestQuantizer(NearestQuantizerConfig(**{"codebook_size": 16, "dim": 6, **settings}))


def latents(b: int = 4, d: int = 6, h: int = 3, w: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(b, d, h, w, generator=torch.Generator().manual_seed(seed))


def hand_made(**settings: Any) -> tuple[NearestQuantizer, Tensor]:
    """Three codes in the plane, and two latents: (0.2, 0) is nearest to code 0, (1, 1.5) to code 2."""
    quantizer = make(codebook_size=3, dim=2, **settings)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [5.0, 5.0], [1.0, 1.0]]))
    z = torch.tensor([[0.2, 0.0], [1.0, 1.5]])
    return quantizer, rearrange(z, "w d -> 1 d 1 w").requires_grad_()


# ---- codes, vectors, losses, gradients ------------------------------------------------------------------------------


def test_exact_small_answer():
    quantizer, z = hand_made()
    quantized = quantizer(z)
    assert quantized.codes[0].tolist() == [[[0, 2]]]
    assert rearrange(quantized.z_q, "1 d 1 w -> w d").tolist() == [[0, 0], [1, 1]]
    error = (0.2**2 + 0.5**2) / 4  # per element
    torch.testing.assert_close(quantized.statistics["quantization_error"].item(), error)
    torch.testing.assert_close(quantized.losses["commitment_loss"].item(), 0.25 * error)
    assert set(quantized.losses) == {"commitment_loss"}


@pytest.mark.parametrize("settings", [{}, {"codebook_update": "gradient"}, {"l2_normalise": True}])
def test_quantizing_what_is_quantized_changes_nothing(settings):
    quantizer = make(**settings)
    quantized = quantizer(latents())
    again = quantizer(quantized.z_q.detach())
    assert torch.equal(again.codes[0], quantized.codes[0])
    torch.testing.assert_close(again.z_q, quantized.z_q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_the_straight_through_gradient_is_the_identity(update):
    quantizer, z = make(codebook_update=update), latents().requires_grad_()
    upstream = latents(seed=2)
    quantizer(z).z_q.backward(upstream)
    assert torch.equal(z.grad, upstream)


def test_the_commitment_loss_pulls_the_latent_to_its_code_and_not_the_code_to_the_latent():
    quantizer, z = hand_made(codebook_update="gradient", commitment_weight=0.5)
    quantizer(z).losses["commitment_loss"].backward()
    expected = 0.5 * 2 / 4 * torch.tensor([[0.2, 0.0], [0.0, 0.5]])
    torch.testing.assert_close(rearrange(z.grad, "1 d 1 w -> w d"), expected)
    assert quantizer.codebook.grad is None


def test_the_codebook_loss_pulls_the_code_to_its_latents_and_not_the_latent_to_the_code():
    quantizer, z = hand_made(codebook_update="gradient")
    loss = quantizer(z).losses["codebook_loss"]
    torch.testing.assert_close(loss.item(), (0.2**2 + 0.5**2) / 4)
    loss.backward()
    torch.testing.assert_close(quantizer.codebook.grad, 2 / 4 * torch.tensor([[-0.2, 0.0], [0.0, 0.0], [0.0, -0.5]]))
    assert z.grad is None


def test_the_decoder_does_not_move_the_codebook():
    quantizer, z = hand_made(codebook_update="gradient")
    quantizer(z).z_q.sum().backward()
    assert quantizer.codebook.grad is None


def test_the_rotation_gradient_equals_the_papers_formula_vector_by_vector():
    quantizer, z = make(gradient="rotation"), latents().requires_grad_()
    upstream = latents(seed=2)
    quantized = quantizer(z)
    quantized.z_q.backward(upstream)
    columns = [rearrange(x.detach().double(), "b d h w -> (b h w) d") for x in (z, quantized.z_q, upstream, z.grad)]
    for e, q, gradient, found in zip(*columns, strict=True):
        e_unit, q_unit = e / e.norm(), q / q.norm()
        r = (e_unit + q_unit) / (e_unit + q_unit).norm()
        rotation = torch.eye(6, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(q_unit, e_unit)
        transform = q.norm() / e.norm() * rotation
        torch.testing.assert_close(transform @ e, q)  # it does take e to q
        torch.testing.assert_close(found, transform.T @ gradient, rtol=1e-4, atol=1e-5)


def test_the_rotation_gradient_is_finite_at_zero_and_opposite_vectors():
    quantizer, z = hand_made(gradient="rotation")
    with torch.no_grad():
        z.zero_()
    quantizer(z).z_q.sum().backward()
    assert z.grad.isfinite().all()
    opposite = torch.tensor([-1.0, -1.0]).view(1, 2, 1, 1).requires_grad_()
    with torch.no_grad():
        quantizer.codebook[0] = 99
    quantizer(opposite).z_q.sum().backward()
    assert opposite.grad.isfinite().all()


def test_l2_normalised_lookup_compares_directions_only():
    quantizer, z = make(l2_normalise=True), latents()
    near, far = quantizer(z), quantizer(7 * z)
    assert torch.equal(near.codes[0], far.codes[0])
    torch.testing.assert_close(near.z_q.norm(dim=1), torch.ones(4, 3, 5))
    cosines = F.normalize(rearrange(z, "b d h w -> b h w d"), dim=-1) @ F.normalize(quantizer.codebook, dim=1).T
    assert torch.equal(near.codes[0], cosines.argmax(-1))


def test_lookup_dim_projects_there_and_back_and_learns_both():
    quantizer, z = make(lookup_dim=2, codebook_update="gradient"), latents().requires_grad_()
    assert quantizer.codebook.shape == (16, 2)
    quantized = quantizer(z)
    assert quantized.z_q.shape == z.shape
    (quantized.z_q.square().mean() + sum(quantized.losses.values())).backward()
    for weight in [z, *quantizer.parameters()]:
        assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("settings", [{}, {"lookup_dim": 3, "l2_normalise": True}])
def test_codes_under_bfloat16_autocast_are_those_of_float32(settings):
    quantizer, z = make(codebook_size=512, **settings), latents(b=16)
    plain = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        under = quantizer(z)
    assert torch.equal(plain.codes[0], under.codes[0])
    assert torch.equal(plain.losses["commitment_loss"], under.losses["commitment_loss"])
    assert quantizer(z.bfloat16()).z_q.dtype == torch.bfloat16


def test_compiled_equals_eager():
    quantizer, other = make(revive_after=3), make(revive_after=3)
    compiled = torch.compile(other, backend="eager")
    for seed in range(2):
        z, same = latents(seed=seed).requires_grad_(), latents(seed=seed).requires_grad_()
        ours, theirs = quantizer(z), compiled(same)
        for output, latent in ((ours, z), (theirs, same)):
            (output.z_q.square().sum() + output.losses["commitment_loss"]).backward()
            assert latent.grad is not None
        assert torch.equal(ours.z_q, theirs.z_q)
        assert torch.equal(z.grad, same.grad)
        quantizer.update(), other.update()
    assert torch.equal(quantizer.codebook, other.codebook)


# ---- further losses -------------------------------------------------------------------------------------------------


def rows_of(z: Tensor) -> Tensor:
    return rearrange(z, "b d h w -> (b h w) d")


def test_the_orthogonal_loss_is_the_mean_squared_cosine_of_pairs_of_codes():
    quantizer = make(codebook_update="gradient", orthogonal_weight=3)
    loss = quantizer(latents()).losses["orthogonal_loss"]
    cosines = F.cosine_similarity(quantizer.codebook.unsqueeze(0), quantizer.codebook.unsqueeze(1), dim=-1)
    torch.testing.assert_close(loss, 3 * (cosines.square().mean() - 1 / 16))
    before = cosines.square().mean()
    loss.backward()
    with torch.no_grad():
        quantizer.codebook.sub_(quantizer.codebook.grad)
    assert (
        F.normalize(quantizer.codebook, dim=1).matmul(F.normalize(quantizer.codebook, dim=1).T).square().mean() < before
    )
    square = make(codebook_size=6, codebook_update="gradient", orthogonal_weight=1)
    with torch.no_grad():
        square.codebook.copy_(5 * torch.eye(6))
    torch.testing.assert_close(square(latents()).losses["orthogonal_loss"].item(), 0.0)


@pytest.mark.parametrize("tile", [2**20, 64])
def test_losses_of_soft_assignments_are_those_of_the_whole_table(tile, monkeypatch):
    monkeypatch.setattr(soft_codes, "CPU_TILE", tile)
    monkeypatch.setattr(soft_codes, "CPU_ROWS", 4)
    settings = {"diversity_weight": 0.3, "diversity_temperature": 0.5, "commitment": "cross-entropy"}
    quantizer = make(codebook_update="gradient", commitment_weight=0.7, **settings)
    z, same = latents().requires_grad_(), latents().requires_grad_()
    quantized = quantizer(z)
    table = torch.cdist(rows_of(same), quantizer.codebook)
    use = (-table / 0.5).softmax(1).mean(0)
    diversity = -0.3 * torch.special.entr(use).sum()
    fixed = torch.cdist(rows_of(same), quantizer.codebook.detach())
    commitment = 0.7 * F.cross_entropy(-fixed, quantized.codes[0].flatten())
    torch.testing.assert_close(quantized.losses["diversity_loss"], diversity)
    torch.testing.assert_close(quantized.losses["commitment_loss"], commitment)
    (quantized.losses["diversity_loss"] + quantized.losses["commitment_loss"]).backward()
    ours = quantizer.codebook.grad.clone()
    quantizer.codebook.grad = None
    (diversity + commitment).backward()
    torch.testing.assert_close(z.grad, same.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours, quantizer.codebook.grad, rtol=1e-4, atol=1e-6)


def test_losses_without_weight_are_not_there_nor_is_the_diversity_loss_at_rest():
    assert set(make()(latents()).losses) == {"commitment_loss"}
    diverse = make(diversity_weight=1)
    assert set(diverse(latents()).losses) == {"commitment_loss", "diversity_loss"}
    assert set(diverse.eval()(latents()).losses) == {"commitment_loss"}


# ---- a mask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"codebook_update": "gradient", "commitment": "cross-entropy"}])
def test_masked_places_might_as_well_not_be_there(settings):
    masked, alone = (make(revive_after=1, **settings) for _ in range(2))
    z = latents().requires_grad_()
    mask = torch.zeros(4, 3, 5, dtype=torch.bool)
    mask[:, :, :3] = True
    quantized, expected = masked(z, mask), alone(z[..., :3])
    assert torch.equal(quantized.codes[0][..., :3], expected.codes[0])
    assert (quantized.codes[0][..., 3:] == -1).all()
    assert torch.equal(quantized.z_q[..., :3], expected.z_q)
    assert not quantized.z_q[..., 3:].any()
    torch.testing.assert_close(quantized.losses, expected.losses)
    (quantized.z_q.sum() + sum(quantized.losses.values())).backward()
    assert z.grad[..., :3].all()
    assert not z.grad[..., 3:].any()
    for quantizer in (masked, alone):
        torch.manual_seed(0)
        quantizer.update()
    torch.testing.assert_close(masked.state_dict(), alone.state_dict())


@pytest.mark.parametrize("mask", [torch.ones(4, 3, 4, dtype=torch.bool), torch.ones(4, 3, 5)])
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(UserError, match=r"got a mask of shape .* expected one bool for each place of the latents"):
        make()(latents(), mask)


# ---- what a user can get wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook_size": 1}, "codebook_size=1, expected at least 2: one code carries no bits"),
        ({"dim": 0}, "dim=0, expected at least 1"),
        ({"decay": 1.0}, "decay=1.0, expected from 0 to below 1"),
        ({"commitment_weight": -1.0}, "commitment_weight=-1.0, expected 0 or more"),
        ({"gradient": "none"}, "gradient=none, expected straight-through or rotation"),
        ({"codebook_update": "adam"}, "codebook_update=adam, expected ema or gradient"),
        ({"warn_usage_below": 50}, "warn_usage_below=50, expected a share from 0 to 1"),
        ({"lookup_dim": 0}, "lookup_dim=0, expected at least 1"),
        ({"revive_after": -1}, "revive_after=-1, expected 0"),
        ({"revive_below": 1.0}, "revive_below=1.0, expected 0 .no use at all is dead. to below 1"),
        ({"revive_below": 0.5, "revive_after": 0}, "revive_below=0.5, expected 0 unless revive_after"),
        ({"commitment": "l1"}, "commitment=l1, expected squared-error or cross-entropy"),
        ({"orthogonal_weight": 1.0}, "orthogonal_weight=1.0, expected 0 where codebook_update=ema: give codebook_up"),
        ({"orthogonal_weight": -1.0}, "orthogonal_weight=-1.0, expected 0 or more"),
        ({"diversity_weight": -1.0}, "diversity_weight=-1.0, expected 0 or more"),
        ({"diversity_temperature": 0.0}, "diversity_temperature=0.0, expected above 0"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        NearestQuantizerConfig(**settings)


def test_latents_of_another_width_are_refused():
    quantizer = make()
    with pytest.raises(UserError, match=r"got latents of shape \(2, 5, 3, 3\), expected \(batch, 6, height, width\)"):
        quantizer(torch.zeros(2, 5, 3, 3))
