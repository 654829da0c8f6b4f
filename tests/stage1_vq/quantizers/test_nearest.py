"""Exact small answers, exact gradients, and what the codebook does and does not do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers import soft_codes
from stage1_vq.quantizers.multiscale import MultiscaleQuantizerConfig
from stage1_vq.quantizers.nearest import NearestQuantizer, NearestQuantizerConfig
from stage1_vq.quantizers.usage import REVIVE_AFTER, usage_remedies


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


# ---- the codebook by EMA --------------------------------------------------------------------------------------------


def test_an_ema_update_gives_the_numbers_of_the_formula():
    quantizer, z = hand_made(decay=0.9, epsilon=1e-5, revive_after=0)
    quantizer.entries.vector_sums.copy_(quantizer.codebook)
    quantizer(z)
    quantizer.update()
    health = quantizer.health(steps_per_epoch=1)
    sizes = torch.tensor([0.9 + 0.1, 0.9, 0.9 + 0.1])
    sums = torch.tensor([[0.02, 0.0], [4.5, 4.5], [0.9 + 0.1, 0.9 + 0.15]])
    smoothed = (sizes + 1e-5) / (sizes.sum() + 3e-5) * sizes.sum()
    torch.testing.assert_close(quantizer.codebook, sums / smoothed.unsqueeze(1))
    torch.testing.assert_close(health["perplexity"].item(), 2.0)  # two codes, once each
    assert health["dead_codes"] == 1


def test_a_codebook_on_fixed_clusters_converges_to_their_means():
    quantizer = make(codebook_size=3, dim=2, decay=0.8, kmeans_iterations=0, revive_after=0)
    quantizer.codebook.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]))
    quantizer.entries.vector_sums.copy_(quantizer.codebook)
    centres = torch.tensor([[0.0, 3.0], [3.0, 0.0], [-3.0, 0.0]])
    for step in range(60):
        noise = 0.1 * torch.randn(1, 2, 30, 3, generator=torch.Generator().manual_seed(step))
        quantizer(noise + rearrange(centres, "w d -> 1 d 1 w"))
        quantizer.update()
    torch.testing.assert_close(quantizer.codebook, centres, atol=0.05, rtol=0)


def test_l2_normalised_codes_stay_at_length_one():
    quantizer = make(l2_normalise=True)
    quantizer(latents())
    quantizer.update()
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(16))


# ---- dead codes -----------------------------------------------------------------------------------------------------


def collapsed(update: str = "ema", **settings: Any) -> NearestQuantizer:
    """Codes 0 and 1 are near the latents, the others far away."""
    quantizer = make(codebook_update=update, revive_after=3, **settings)
    with torch.no_grad():
        quantizer.codebook[2:] += 100
        if update == "ema":
            quantizer.entries.vector_sums.copy_(quantizer.codebook)
    return quantizer


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_codes_are_revived_as_latents_of_the_step_and_stay_alive(update):
    quantizer = collapsed(update)
    revived = []
    for step in range(3):
        z = latents(seed=step)
        before = quantizer.codebook.detach().clone()
        quantizer(z)
        quantizer.update()
        revived.append(int(quantizer.health(steps_per_epoch=10)["revived_codes"]))
    assert revived == [0, 0, 14]
    rows = rearrange(z, "b d h w -> (b h w) d")
    codes = quantizer.codebook.detach()[2:]
    assert (codes.unsqueeze(1) == rows).all(-1).any(1).all()  # each is one of the latents
    assert len(codes.unique(dim=0)) == 14  # and each another one
    assert (quantizer.codebook[:2] - before[:2]).abs().max() < 1  # the living go on as they were

    used = torch.zeros(16, dtype=torch.bool)
    for step in range(3, 13):
        used[quantizer(latents(seed=step)).codes[0].unique()] = True
        quantizer.update()
    assert used.all()


def test_a_revived_code_does_not_fall_back_to_its_old_averages():
    quantizer = collapsed()
    for step in range(4):
        quantizer(latents(seed=step))
        quantizer.update()
    assert quantizer.codebook.abs().max() < 10  # the old averages are around 100


# ---- refreshed codes ------------------------------------------------------------------------------------------------


def refreshed(**settings: Any) -> NearestQuantizer:
    return make(codebook_update="gradient", revive_after=0, refresh=True, **settings)


def test_a_code_goes_as_far_to_the_latent_nearest_to_it_as_it_is_out_of_use():
    """Beside the equations of CVQ-VAE, code by code, over several steps."""
    quantizer, ways = refreshed(codebook_size=5, decay=0.9), list[float]()
    first = rearrange(latents(seed=0), "b d h w -> (b h w) d")
    with torch.no_grad():
        quantizer.codebook[3] += 100  # of no latent
        quantizer.codebook[4] = 1.5 * first[first.norm(dim=1).argmax()]  # of few
    vectors, shares = quantizer.codebook.detach().clone(), torch.zeros(5)
    for step in range(3):
        z = latents(seed=step)
        rows = rearrange(z, "b d h w -> (b h w) d")
        codes = torch.cdist(rows, vectors).argmin(1)
        assert torch.equal(quantizer(z).codes[0].flatten(), codes)
        assert torch.equal(quantizer.codebook.detach(), vectors)  # not before the step
        quantizer.update()
        for code in range(5):
            share = float((codes == code).float().mean())
            shares[code] = 0.9 * shares[code] + 0.1 * share
            way = math.exp(-float(shares[code]) * 5 * 10 / 0.1 - 1e-3)
            ways.append(way)
            nearest = rows[(rows - vectors[code]).square().sum(1).argmin()]
            vectors[code] = vectors[code] * (1 - way) + nearest * way
        torch.testing.assert_close(quantizer.codebook.detach(), vectors)
        vectors = quantizer.codebook.detach().clone()
    assert quantizer.codebook.abs().max() < 10
    assert max(ways) > 0.99
    assert min(ways) < 0.01
    assert any(0.1 < way < 0.9 for way in ways)  # else any constant in the exponent would do
    assert not quantizer.entries.recent


def test_codes_out_of_use_are_used_after_a_step_and_the_others_stay():
    quantizer = refreshed()
    with torch.no_grad():
        quantizer.codebook[2:] += 100
    before = quantizer.codebook.detach().clone()
    quantizer(latents())
    quantizer.update()
    assert (quantizer.codebook - before)[:2].abs().max() < 1e-3
    assert quantizer.codebook.abs().max() < 10
    assert len(quantizer(latents()).codes[0].unique()) > 2


def test_parts_of_a_batch_refresh_as_the_whole_and_a_skipped_step_does_not():
    whole, parts, skipped = refreshed(), refreshed(), refreshed()
    z = latents()
    whole(z)
    whole.update()
    for part in z.split(1):
        parts(part)
    parts.update()
    torch.testing.assert_close(parts.codebook, whole.codebook)
    before = skipped.codebook.detach().clone()
    skipped(z)
    skipped.discard()
    assert not skipped.entries.recent
    skipped.update()
    assert torch.equal(skipped.codebook, before)


@pytest.mark.parametrize("settings", [{"codebook_update": "ema", "revive_after": 0}, {"codebook_update": "gradient"}])
def test_refreshing_beside_what_moves_or_revives_codes_otherwise_is_refused(settings):
    with pytest.raises(UserError, match="refresh=True, expected false unless codebook_update=gradient and revive_aft"):
        NearestQuantizerConfig(refresh=True, **settings)


def test_with_fewer_latents_than_dead_codes_no_latent_is_used_twice():
    quantizer = collapsed()
    z = latents(b=1, h=1, w=5)
    for _ in range(3):
        quantizer(z)
        quantizer.update()
        health = quantizer.health(steps_per_epoch=10)
    assert health["revived_codes"] == 5


def test_nothing_is_revived_when_it_is_switched_off_and_no_latents_are_kept():
    quantizer = make(revive_after=0)
    for step in range(5):
        quantizer(latents(seed=step) + 50)
        assert not quantizer.entries.recent
        quantizer.update()
        assert quantizer.health(steps_per_epoch=10)["revived_codes"] == 0


def test_forward_passes_without_an_update_keep_a_bounded_number_of_batches():
    quantizer = make(revive_after=5)
    for _ in range(200):
        quantizer(latents(b=1, h=1, w=1))
    assert len(quantizer.entries.recent) == 64


# ---- health ---------------------------------------------------------------------------------------------------------


def use(quantizer: NearestQuantizer, *codes: int, steps_per_epoch: int) -> dict[str, float]:
    """One step that uses just these codes; returns the health."""
    z = rearrange(quantizer.codebook.detach()[list(codes)], "w d -> 1 d 1 w")
    quantizer(z)
    quantizer.update()
    return {name: float(value) for name, value in quantizer.health(steps_per_epoch).items()}


def test_usage_counts_the_codes_of_the_last_epoch():
    quantizer = make(codebook_size=4, codebook_update="gradient", revive_after=0)
    steps = [(0,), (0, 1), (2,), (2,), (2,), (0, 1, 2, 3)]
    health = [use(quantizer, *codes, steps_per_epoch=3) for codes in steps]
    assert [line["codes_used_share"] for line in health] == [0.25, 0.5, 0.75, 0.75, 0.25, 1]
    assert [line["dead_codes"] for line in health] == [3, 2, 1, 1, 3, 0]
    torch.testing.assert_close([line["perplexity"] for line in health], [1.0, 2.0, 1.0, 1.0, 1.0, 4.0])


def test_a_revived_code_counts_as_used_only_once_it_is():
    quantizer = collapsed("gradient")
    far = latents() * 0 + 200  # all of them at one place: one code serves all that are revived there
    for _ in range(4):
        quantizer(far)
        quantizer.update()
        health = quantizer.health(steps_per_epoch=100)
    assert health["codes_used_share"] < 0.5


def test_low_usage_is_told_with_its_remedies_after_a_whole_epoch():
    quantizer = make(codebook_size=10, codebook_update="gradient", revive_after=0, warn_usage_below=0.3)
    health = use(quantizer, 0, 1, steps_per_epoch=2)
    assert quantizer.warnings(health, steps_per_epoch=2) == []
    health = use(quantizer, 0, 1, steps_per_epoch=2)
    (warning,) = quantizer.warnings(health, steps_per_epoch=2)
    assert "only 20% of 10 codes were used in the last epoch, below warn_usage_below=30%" in warning
    assert "model.quantizer.revive_after=100" in warning
    health = use(quantizer, 2, steps_per_epoch=2)
    assert quantizer.warnings(health, steps_per_epoch=2) == []


@pytest.mark.parametrize(
    ("revive_after", "steps_per_epoch", "recommended"),
    [(0, 5, 100), (0, 300, 300), (0, 9000, 500), (100, 5, None), (500, 9000, None), (500, 5, 100), (501, 9000, 500)],
)
def test_revival_is_recommended_where_it_is_later_than_an_epoch_and_the_default(
    revive_after, steps_per_epoch, recommended
):
    assert NearestQuantizerConfig().revive_after == REVIVE_AFTER == MultiscaleQuantizerConfig().revive_after
    remedies = usage_remedies(revive_after, 10, steps_per_epoch, "model.quantizer")
    revival = [] if recommended is None else [f"model.quantizer.revive_after={recommended}"]
    assert remedies == ["a smaller model.quantizer.codebook_size", *revival]


# ---- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_kmeans_starts_the_codebook_among_the_latents_and_updates_keep_it_there(update):
    quantizer = make(codebook_size=8, codebook_update=update)
    z = latents(b=16) * 0.1 + 30
    quantizer.initialise([z])
    assert (quantizer.codebook - 30).abs().max() < 1
    quantized = quantizer(z)
    assert len(quantized.codes[0].unique()) == 8
    quantizer.update()
    assert (quantizer.codebook - 30).abs().max() < 1


def test_no_kmeans_iterations_leave_the_random_start():
    quantizer = make(kmeans_iterations=0)
    before = quantizer.codebook.clone()
    quantizer.initialise([latents()])
    assert torch.equal(quantizer.codebook, before)


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


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_code_that_is_used_now_and_then_is_revived_if_its_share_is_below_the_bar(share):
    """Code 0 is for one odd latent in each second step, and 15 codes share 63 others."""
    quantizer = make(decay=0.8, revive_after=3, revive_below=share, kmeans_iterations=0)
    centres = torch.randn(15, 6, generator=torch.Generator().manual_seed(3))
    odd = torch.full((6,), 50.0)
    quantizer.codebook.copy_(torch.cat([odd.unsqueeze(0), centres]))
    quantizer.entries.vector_sums.copy_(quantizer.codebook)
    moved = False
    for step in range(20):
        rows = centres[torch.arange(63) % 15] + 0.01 * torch.randn(63, 6)
        last = odd if step % 2 else centres[0]
        quantizer(rearrange(torch.cat([rows, last.unsqueeze(0)]), "w d -> 1 d 1 w"))
        quantizer.update()
        moved |= bool((quantizer.codebook[0] - odd).norm() > 50)
    assert moved == (share > 0)
    if share:  # and the code is of use where it is now
        assert quantizer.entries.cluster_sizes[0] > 0.25 * quantizer.entries.cluster_sizes.mean()


def test_latents_of_another_width_are_refused():
    quantizer = make()
    with pytest.raises(UserError, match=r"got latents of shape \(2, 5, 3, 3\), expected \(batch, 6, height, width\)"):
        quantizer(torch.zeros(2, 5, 3, 3))
