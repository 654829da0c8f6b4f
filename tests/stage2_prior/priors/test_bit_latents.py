"""What a scale of Infinity sees of the bits before it, with and without mistakes among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from codes.spec import Codes, CodeSpec, Grid
from stage2_prior.condition import Condition
from stage2_prior.priors.bit_latents import BitLatents, places_on_last
from stage2_prior.train import Stage2Task
from tests.stage2_prior.tiny import CLASSES, random_codes
from tests.stage2_prior.tiny_infinity import made, quantizer, spec_of


@torch.no_grad()
def test_a_scale_sees_what_the_tokenizer_has_summed_before_it_bilinearly_on_its_grid():
    prior = made()
    codes = random_codes(3, prior)
    seen = prior.seen(codes)
    start = 0
    for scale, grids in enumerate(prior.scales[1:], start=1):
        total = quantizer().latents_of_first(codes[: 3 * scale], 6, 9)
        size = codes[grids.start].shape[1:]
        expected = rearrange(F.interpolate(total, size=size, mode="bilinear"), "b d h w -> b (h w) d")
        torch.testing.assert_close(seen[:, start : start + expected.shape[1]], expected, rtol=0, atol=1e-5)
        start += expected.shape[1]
    assert start == seen.shape[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prior.seen(codes), seen)  # float32 all the same


def test_places_stand_where_the_originals_stand():
    """Rows and columns of a 2x3 scale on one of 5x8: 0, 2.5 (rounded to the even 2) and 0, 2.67, 5.33."""
    grids = [Grid("a", 2, 3, 2), Grid("b", 5, 8, 2)]
    assert places_on_last(grids) == [0, 3, 5, 16, 19, 21, *range(40)]


def slowly_mended(latents: BitLatents, codes: Codes, flips: Sequence[Tensor], ties: Codes) -> list[Tensor]:
    """What is to be told, place by place and bit by bit; ties: codes whose bits hold where nothing is left of either
    sign."""
    told, given = list[Tensor](), list[Tensor]()
    for number, grid in enumerate(codes):
        wanted, channels = grid.clone(), latents.channels[number]
        places = range(channels.stop - channels.start - 1, -1, -1) if number else range(0)
        missing = plain_sum(latents, codes, number) - plain_sum(latents, given, number) if number else torch.zeros(())
        for b, y, x in torch.cartesian_prod(*(torch.arange(side) for side in grid.shape)).tolist():
            for channel, place in enumerate(places, start=channels.start):
                own = F.adaptive_avg_pool2d(missing, grid.shape[1:])[b, channel, y, x]
                rest = float(own) + (2 * (int(grid[b, y, x]) >> place & 1) - 1) / latents.width**0.5
                on = int(ties[number][b, y, x]) >> place & 1 if abs(rest) < 1e-5 else int(rest > 0)
                wanted[b, y, x] = (int(wanted[b, y, x]) & ~(1 << place)) | (on << place)
        told.append(wanted)
        given.append(wanted ^ flips[number])
    return told


def plain_sum(latents: BitLatents, codes: Sequence[Tensor], count: int) -> Tensor:
    total = None
    for number in range(count):
        total = latents.add(total, codes[number], number)
    assert total is not None
    return total


def test_bits_after_a_mistake_are_the_signs_of_what_is_missing():
    prior = made()
    codes = random_codes(4, prior)
    told, given = prior.with_mistakes(codes, 0.9)
    flips = [a ^ b for a, b in zip(told, given, strict=True)]
    assert all(map(torch.equal, told, slowly_mended(BitLatents(prior.code_spec), codes, flips, told)))
    assert all(map(torch.equal, told[:3], codes[:3]))
    assert not torch.equal(told[-3], codes[-3])
    prior.code_spec.check(given)
    told, given = prior.with_mistakes(codes, 0.0)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(told, given, codes, strict=True))


def test_what_is_told_after_mistakes_is_what_the_tokenizer_would_have_told():
    """Of real latents: nearly all labels are those that the tokenizer finds for them after the flipped bits."""
    tokenizer, prior = quantizer(6, 6), made(spec=spec_of(6, 6))
    z = torch.randn(64, 6, 6, 9, generator=torch.Generator().manual_seed(2)) * 0.4
    codes = tokenizer.codes(z)
    torch.manual_seed(0)
    told, given = prior.with_mistakes(codes, 0.6)
    for scale in range(1, 4):
        labels = tokenizer.codes_after(z, given[:scale])[scale]
        agree, alone = ((labels ^ some[scale]) for some in (told, codes))
        wrong, wrong_alone = (
            sum(float((number >> bit & 1).float().mean()) for bit in range(6)) / 6 for number in (agree, alone)
        )
        assert wrong < 0.5 * wrong_alone


def test_the_share_of_flipped_bits_is_drawn_evenly_for_each_image_and_scale():
    prior = made(spec=CodeSpec(tuple(Grid(f"{n}", n, n, 256) for n in (20, 30)), 60, 60))
    codes = random_codes(400, prior)
    told, given = prior.with_mistakes(codes, 0.3)
    for a, b in zip(told, given, strict=True):
        shares = torch.stack([((a ^ b) >> bit & 1).float().mean(dim=(1, 2)) for bit in range(8)])
        assert float(shares.mean()) == pytest.approx(0.15, abs=0.02)
        assert float(shares.mean(dim=0).std()) == pytest.approx(0.3 / 12**0.5, abs=0.01)


def test_a_training_step_with_mistakes_tells_what_mends_them():
    prior, seen = made(), []
    batch = {"codes": random_codes(20, prior), "labels": torch.arange(20) % CLASSES}

    def model(codes: Codes, condition: Condition, given: Codes) -> Any:
        seen.append((codes, condition, given))
        return prior(codes, condition, given)

    loss = Stage2Task(prior, 0.0, flipped_codes=0.9).step(model, batch, 0).loss
    ((told, condition, given),) = seen
    logits = prior.logits(given, condition)
    expected = F.cross_entropy(logits.transpose(1, 2), prior.sequence(told, condition))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
