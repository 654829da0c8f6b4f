"""Priors that begin with the weights of another: of the same codes, of other classes, of other grids."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from codes.spec import CodeSpec, Grid
from common.starting import take_weights
from stage2_prior.priors import PRIORS, MinGPTConfig
from stage2_prior.train import Stage2Config, train_stage2
from tests.stage2_prior.tiny import TINY, condition_for, random_codes, spec_of, tiny_prior
from training.loop import TrainConfig


@pytest.mark.parametrize("kind", TINY)
def test_a_prior_of_the_same_codes_takes_all_and_says_the_same(kind: str):
    prior = tiny_prior(kind)
    torch.manual_seed(1)
    fresh = PRIORS[kind](TINY[kind], spec_of(kind), prior.num_classes).eval()
    if kind == "var":  # whose code vectors are those of the codes
        fresh.latents.load_state_dict(prior.latents.state_dict())
    taken = take_weights(fresh, prior)
    assert set(taken.kept) == set(prior.state_dict())
    assert (taken.new, taken.resized, taken.left, taken.settings) == ((), (), (), ())
    codes, condition = random_codes(3, prior), condition_for(3, prior)
    assert torch.equal(fresh.nll(codes, condition), prior.nll(codes, condition))


@pytest.mark.parametrize(
    "kind",
    [
        "transformer",
        "maskgit",
        "pixelcnn",
        "llamagen",
        "open_magvit2_gpt",
        "infinity",
        "halton_maskgit",
        "titok_maskgit",
        "mdm_prime",
    ],
)
def test_classes_are_found_by_their_names_and_new_ones_begin_as_any(kind: str):
    prior = tiny_prior(kind, num_classes=3, class_names=("cat", "dog", "owl"))
    other = tiny_prior(kind, num_classes=4, class_names=("owl", "ant", "cat", "bee"))
    taken = take_weights(other, prior)
    assert taken.resized
    assert not taken.new
    codes = random_codes(4, prior)
    for name, label in (("owl", 2), ("ant", 3), ("cat", 0), ("bee", 3), ("any", 3)):
        now = other.class_names.index(name) if name in (other.class_names or ()) else 4
        ours, theirs = (torch.full((4,), number) for number in (now, label))
        expected = prior.nll(codes, condition_for(4, prior).map(lambda _, theirs=theirs: theirs))
        found = other.nll(codes, condition_for(4, other).map(lambda _, ours=ours: ours))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("kind", "name", "grids"),
    [
        ("maskgit", "places.weight", ((2, 3), (4, 6))),
        ("mdm_prime", "places.weight", ((2, 3), (4, 6))),
        ("var", "places", ((1, 2), (2, 4), (4, 8))),
        ("mingpt", "positions", ((6, 4),)),
    ],
)
def test_places_of_another_grid_are_interpolated(kind: str, name: str, grids: tuple[tuple[int, int], ...]):
    """A table that is constant over each grid stays so; rows before the grids are as they were."""
    prior = tiny_prior(kind)
    places = prior.place_tables()[name]
    table = prior.state_dict()[name].view(-1, prior.state_dict()[name].shape[-1])
    sizes = [places.before, *(h * w for h, w in places.grids)]
    begins = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    with torch.no_grad():
        for number, (begin, end) in enumerate(pairwise(begins[1:])):
            table[begin:end] = number + 1.0
    own = prior.code_spec.grids
    larger = tuple(replace(grid, height=h, width=w) for grid, (h, w) in zip(own, grids, strict=True))
    spec = CodeSpec(larger, 4 * larger[-1].height, 4 * larger[-1].width, 3)
    other = tiny_prior(kind, spec=spec)
    taken = take_weights(other, prior)
    assert name in taken.resized
    found = other.state_dict()[name].view(-1, table.shape[-1])
    torch.testing.assert_close(found[: places.before], table[: places.before])
    expected = torch.cat([torch.full((h * w,), number + 1.0) for number, (h, w) in enumerate(grids)])
    rows = found[places.before : places.before + len(expected)]
    torch.testing.assert_close(rows, expected[: len(rows), None].expand_as(rows))


def test_a_row_for_each_place_but_the_last_is_made_up():
    """minGPT has none for the last code."""
    config = MinGPTConfig(layers=1, width=8, heads=2)
    one = tiny_prior("mingpt", spec=CodeSpec((Grid("codes", 2, 2, 5),), 8, 8, 3), config=config)
    two = tiny_prior("mingpt", spec=CodeSpec((Grid("codes", 3, 3, 5),), 12, 12, 3), config=config)
    assert "positions" in take_weights(two, one).resized


def test_a_run_begins_with_a_prior_and_its_codes_are_compared(pair: tuple[Path, Path], tmp_path: Path, capsys):
    settings = {"batch_size": 8, "workers": 0, "tracker": "none", "preview_every": 0, "save_every": 2}
    config = Stage2Config(
        model=TINY["transformer"], train=TrainConfig(steps=2, validate_every=2, **settings), codes=str(pair[0])
    )
    train_stage2(config, pair[0], tmp_path / "first")
    start = replace(config, start_from=str(tmp_path / "first"))
    still = replace(start, train=replace(config.train, steps=1, learning_rate=1e-12), frozen=("blocks",))
    train_stage2(still, pair[0], tmp_path / "second")
    first, second = (PRIORS["transformer"].from_pretrained(tmp_path / name) for name in ("first", "second"))
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], weight, rtol=0, atol=1e-7)
    said = capsys.readouterr().out
    assert "tensors kept" in said
    assert "codes of another autoencoder" not in said
    other = PRIORS["transformer"].from_pretrained(tmp_path / "first")
    other.stage1_fingerprint = "another"
    other.save_pretrained(tmp_path / "third")
    train_stage2(replace(still, start_from=str(tmp_path / "third")), pair[0], tmp_path / "fourth")
    assert "third knows the codes of another autoencoder" in capsys.readouterr().out
