"""Which codes are kept: by pixels, by a share, on a walk."""

from __future__ import annotations

import itertools

import torch

from pipelines.known_codes import codes_at, codes_but_a_share, codes_of_kept_pixels, random_places


def test_a_code_is_kept_where_all_its_pixels_are():
    codes = (torch.arange(4).view(1, 2, 2), torch.arange(16).view(1, 4, 4))  # of 8x8 pixels
    keep = torch.ones(8, 8, dtype=torch.bool)
    keep[0, 5] = False  # one pixel: coarse place (0, 1), fine place (0, 2)
    coarse, fine = codes_of_kept_pixels(codes, keep)
    assert coarse.tolist() == [[[0, -1], [2, 3]]]
    assert fine[0, 0].tolist() == [0, 1, -1, 3]
    assert (fine[0, 1:] == codes[1][0, 1:]).all()


def test_each_image_may_have_its_own_mask():
    codes = (torch.zeros(2, 2, 2, dtype=torch.int64),)
    keep = torch.stack([torch.ones(4, 4), torch.zeros(4, 4)]).bool()
    assert codes_of_kept_pixels(codes, keep)[0].flatten(1).tolist() == [[0] * 4, [-1] * 4]


def test_a_share_of_each_grid_is_drawn_and_a_larger_share_draws_more():
    codes = (torch.ones(3, 2, 2, dtype=torch.int64), torch.ones(3, 5, 4, dtype=torch.int64))
    uniforms = torch.rand(3, 24, generator=torch.Generator().manual_seed(0))
    drawn = {share: codes_but_a_share(codes, share, uniforms) for share in (0.0, 0.25, 0.5, 1.0)}
    for share, (small, large) in drawn.items():
        assert ((small == -1).flatten(1).sum(1) == round(share * 4)).all()
        assert ((large == -1).flatten(1).sum(1) == round(share * 20)).all()
    assert (drawn[0.5][1][drawn[0.25][1] == -1] == -1).all()
    assert len((drawn[0.5][1] == -1).flatten(1).unique(dim=0)) == 3  # each image has its own places


def test_a_walk_changes_every_place_once():
    first, second = (torch.zeros(1, 4, 5, dtype=torch.int64),), (torch.ones(1, 4, 5, dtype=torch.int64),)
    uniforms = torch.rand(1, 20, generator=torch.Generator().manual_seed(0))
    places = [random_places(first, step / 4, uniforms) for step in range(5)]
    stages = [codes_at(passed, second, first)[0] for passed in places]
    assert [int(stage.sum()) for stage in stages] == [0, 5, 10, 15, 20]
    assert all((after >= before).all() for before, after in itertools.pairwise(stages))


def test_grids_of_the_same_sides_share_their_places():
    grid, fine = torch.zeros(2, 4, 4, dtype=torch.int64), torch.zeros(2, 8, 8, dtype=torch.int64)
    uniforms = torch.rand(2, 16 + 64 + 16, generator=torch.Generator().manual_seed(0))
    first, between, last = random_places((grid, fine, grid), 0.5, uniforms)
    assert torch.equal(first, last)
    assert torch.equal(between, random_places((grid, fine), 0.5, uniforms[:, :80])[1])
