"""How a codebook begins, moves with its latents, brings dead codes back and tells of its health."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers.multiscale import MultiscaleQuantizerConfig
from stage1_vq.quantizers.nearest import NearestQuantizer, NearestQuantizerConfig
from stage1_vq.quantizers.usage import REVIVE_AFTER, usage_remedies


def make(**settings: Any) -> NearestQuantizer:
    torch.manual_seed(0)
    return NearestQuantizer(NearestQuantizerConfig(**{"codebook_size": 16, "dim": 6, **settings}))


def latents(b: int = 4, d: int = 6, h: int = 3, w: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(b, d, h, w, generator=torch.Generator().manual_seed(seed))


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


# ---- the codebook by EMA --------------------------------------------------------------------------------------------


def test_an_ema_update_gives_the_numbers_of_the_formula():
    quantizer = make(codebook_size=3, dim=2, decay=0.9, epsilon=1e-5, revive_after=0)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [5.0, 5.0], [1.0, 1.0]]))
    quantizer.entries.vector_sums.copy_(quantizer.codebook)
    quantizer(torch.tensor([[[[0.2, 1.0]], [[0.0, 1.5]]]]))  # the first is nearest to code 0, the second to code 2
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
