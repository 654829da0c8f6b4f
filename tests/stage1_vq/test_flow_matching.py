"""Noise as a function of codes, beside whole numbers without bounds; times of a training step, and guidance, beside the
original implementation's own numbers."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_vq import flow_matching
from stage1_vq.flow_matching import Guidance, drawn_times, noise_by_codes, scrambled
from tests.golden import golden_frontier

# ---- noise of codes -------------------------------------------------------------------------------------------------


def slow_scrambled(x: int) -> int:
    wrap = 2**64
    x = (x * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % wrap
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % wrap
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % wrap
    return x ^ (x >> 31)


def test_scrambled_numbers_are_those_of_whole_numbers_without_bounds():
    numbers = [0, 1, 2, 12345, 2**62, 2**63 - 1, 2**64 - 1, 2**63]
    found = scrambled(torch.tensor([number - 2**64 if number >= 2**63 else number for number in numbers]))
    assert [int(number) % 2**64 for number in found] == [slow_scrambled(number) for number in numbers]


def test_noise_is_that_of_a_slow_way():
    codes = torch.arange(6).view(1, 2, 3), torch.arange(16).view(1, 4, 4) % 5  # the second divides no side of 6
    noise = noise_by_codes(codes, (2, 4, 6), seed=5)
    everywhere = sum(
        slow_scrambled(int(codes[1][0, r, c]) + slow_scrambled(4 * r + c)) for r in range(4) for c in range(4)
    )
    for channel, row, column in ((0, 0, 0), (1, 0, 0), (0, 3, 5), (1, 2, 4)):
        key = slow_scrambled(5)
        key = slow_scrambled(key ^ slow_scrambled(int(codes[0][0, row // 2, column // 2])))
        key = slow_scrambled(key ^ slow_scrambled(everywhere + 1))
        key = slow_scrambled(key ^ slow_scrambled(row ^ slow_scrambled(column))) + channel
        uniform = ((slow_scrambled(key) >> 41) + 0.5) / 2**23
        assert abs(float(noise[0, channel, row, column]) - NormalDist().inv_cdf(uniform)) < 1e-4


def test_noise_is_what_it_was():
    """What files decode to hangs on it."""
    noise = noise_by_codes((torch.arange(6).view(1, 2, 3),), (2, 4, 6), seed=5)
    torch.testing.assert_close(noise.flatten()[:4], torch.tensor([1.874, -1.615, 0.887, 0.455]), rtol=0, atol=1e-3)


def test_noise_is_standard_normal_and_of_places_alone():
    noise = noise_by_codes((torch.arange(200 * 16).view(200, 4, 4),), (3, 16, 16), seed=0).flatten(1)
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.var()) - 1) < 0.01
    assert abs(float((noise**4).mean()) - 3) < 0.1
    correlations = (noise[:, :-1] * noise[:, 1:]).mean(), (noise[:-1] * noise[1:]).mean()
    assert max(map(abs, map(float, correlations))) < 0.01
    same = noise_by_codes((torch.zeros(2, 4, 4, dtype=torch.int64),), (3, 16, 16), seed=0)
    assert torch.equal(same[0], same[1])  # of the codes alone
    tiles = same[0].unfold(1, 4, 4).unfold(2, 4, 4).reshape(3, 16, 16)
    assert len(tiles.flatten().unique()) > 700  # and of the place, where codes are equal


def test_a_code_that_is_changed_changes_noise_in_its_tile_alone():
    codes = torch.zeros(1, 2, 3, dtype=torch.int64)
    other = codes.clone()
    other[0, 1, 2] = 1
    noise, changed = (noise_by_codes((each,), (1, 8, 12), seed=0) for each in (codes, other))
    same = noise == changed
    assert same[:, :, :4].all()
    assert same[:, :, :, :8].all()
    assert not same[:, :, 4:, 8:].any()
    assert not (noise == noise_by_codes((codes,), (1, 8, 12), seed=1)).any()


def test_of_grids_that_do_not_divide_the_image_every_code_counts_everywhere():
    coarse, fine = torch.zeros(2, 5, 5, dtype=torch.int64), torch.zeros(2, 2, 2, dtype=torch.int64)
    coarse[1, 3, 4] = 1
    noise = noise_by_codes((coarse, fine), (1, 8, 8), seed=0)
    assert not (noise[0] == noise[1]).any()
    swapped = coarse.clone()
    swapped[1, 3, 4], swapped[1, 4, 3] = 0, 1
    assert not (noise_by_codes((swapped, fine), (1, 8, 8), seed=0)[1] == noise[1]).any()


# ---- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("logit-normal", "ln"), ("stratified", "stratified"), ("mode", "mode")])
def test_times_are_the_originals_of_the_same_draws(monkeypatch: pytest.MonkeyPatch, kind: Any, name: str):
    original = golden_frontier("flextok")
    normal, drawn = original.inputs["flow_normal"], original.inputs["flow_uniform"]
    monkeypatch.setattr(flow_matching, "normal_like", lambda _: normal)
    monkeypatch.setattr(flow_matching, "uniform", lambda *_, device: drawn)
    monkeypatch.setattr(flow_matching, "stratified", lambda count, _: (torch.arange(count) + drawn) / count)
    times = drawn_times(kind, 2, torch.device("cpu"))
    torch.testing.assert_close(times, original.outputs[f"flow/{name}/sigmas"], rtol=0, atol=1e-5)
    images, noise = original.inputs["flow_x"], original.inputs["flow_noise"]
    noised = torch.lerp(images, noise, times[:, None, None, None])
    torch.testing.assert_close(noised, original.outputs[f"flow/{name}/noised"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", ["logit-normal", "stratified", "mode"])
def test_times_have_the_density_that_they_name(kind: Any):
    """How many lie below each of a few, beside the closed form; of the mode's, its inverse by bisection."""
    torch.manual_seed(0)
    times = drawn_times(kind, 40_000, torch.device("cpu"))
    assert 0 <= times.min() < 0.05
    assert 0.95 < times.max() <= 1
    for bound in (0.1, 0.3, 0.5, 0.8):
        if kind == "mode":
            low, high = 0.0, 1.0  # the time falls with u
            for _ in range(40):
                u = (low + high) / 2
                above = 1 - u - 1.29 * (math.cos(math.pi / 2 * u) ** 2 - 1 + u) > bound
                low, high = (u, high) if above else (low, u)
            expected = 1 - u
        else:
            expected = NormalDist().cdf(math.log(bound / (1 - bound)))
        assert abs(float((times < bound).float().mean()) - expected) < (2e-4 if kind == "stratified" else 0.01)


# ---- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_is_the_originals_step_after_step():
    original = golden_frontier("flextok")
    scale = original.config["guidance"]
    steps = [[original.inputs[f"pred_{side}_{step}"] for side in ("cond", "uncond")] for step in range(2)]
    normalised = Guidance(scale, "normalised", 2.5)
    for number, pair in enumerate(steps):
        expected = original.outputs[f"guidance/apg_{number}"]
        torch.testing.assert_close(normalised(*pair), expected, rtol=1e-5, atol=5e-5)
    plain = Guidance(scale, "plain", 2.5)(*steps[0])
    torch.testing.assert_close(plain, original.outputs["guidance/cfg"], rtol=1e-5, atol=5e-5)


def test_normalised_guidance_goes_across_the_velocity_and_no_further_than_it_may():
    given, without = torch.randn(2, 5, 1, 2, 3, generator=torch.Generator().manual_seed(1))
    added = (Guidance(3.0, "normalised", 0.5)(given, without) - given).flatten(1)
    assert (added * given.flatten(1)).sum(1).abs().max() < 1e-5
    assert (added.norm(dim=1) <= 2 * 0.5 + 1e-5).all()
    long = (Guidance(3.0, "normalised", 1e6)(given, without) - given).flatten(1)

    def slow(v: Tensor, v0: Tensor) -> Tensor:
        difference = v - v0
        return 2 * (difference - (difference @ v) / (v @ v) * v)

    expected = torch.stack([slow(*pair) for pair in zip(given.flatten(1), without.flatten(1), strict=True)])
    torch.testing.assert_close(long, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "normalised"])
def test_a_guidance_of_1_or_of_no_difference_changes_nothing(form: Any):
    given, without = torch.randn(2, 5, 1, 2, 3)
    torch.testing.assert_close(Guidance(1.0, form, 2.5)(given, without), given)
    torch.testing.assert_close(Guidance(7.5, form, 2.5)(given, given), given)
    assert torch.isfinite(Guidance(7.5, form, 2.5)(torch.zeros(1, 3), torch.ones(1, 3))).all()
