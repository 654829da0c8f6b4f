"""Noise as a function of codes, beside whole numbers without bounds."""

from __future__ import annotations

from statistics import NormalDist

import torch

from stage1_vq.flow_matching import noise_by_codes, scrambled


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
