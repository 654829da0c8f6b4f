"""The properties of Open-MAGVIT2's transformer that not all priors share; the others are in test_conformance.py, its
original's own numbers in imports/test_open_magvit2_gpt.py."""

from __future__ import annotations

import pytest
import torch

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.exact import exact_stepper
from stage2_prior.priors import OpenMAGVIT2GPT, OpenMAGVIT2GPTConfig
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.stage2_prior.test_conformance import joined, step_through
from tests.stage2_prior.tiny import condition_for, labelled, random_codes, tiny_prior


def spec_of(height: int, width: int, *vocabularies: int) -> CodeSpec:
    grids = tuple(Grid(f"factor{i}", height, width, k) for i, k in enumerate(vocabularies))
    return CodeSpec(grids, 4 * height, 4 * width, 3)


def test_the_codes_of_a_place_stand_side_by_side_and_come_back():
    prior = tiny_prior("open_magvit2_gpt")
    codes, condition = random_codes(2, prior), condition_for(2, prior)
    sequence = prior.sequence(codes, condition)
    for number, (row, column) in enumerate((row, column) for row in range(2) for column in range(3)):
        here = [grid[:, row, column] for grid in codes]
        assert torch.equal(sequence[:, 3 * number : 3 * number + 3], torch.stack(here, dim=1))
    assert all(map(torch.equal, prior.grids_of(sequence), codes))


@pytest.mark.parametrize(
    "spec", [spec_of(1, 1, 5, 3, 4), spec_of(1, 2, 4, 8), spec_of(3, 2, 7), spec_of(2, 1, 3, 3, 3, 3)]
)
def test_any_number_of_factors_on_any_grid(spec):
    """Also more than there are places, whose rows the factors are turned by."""
    prior = tiny_prior("open_magvit2_gpt", spec=spec)
    codes, condition = random_codes(3, prior), condition_for(3, prior)
    with torch.no_grad():
        expected = prior.logits(codes, condition)
    stepped = joined(step_through(prior, codes, condition))
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-5)
    exactly = exact_stepper(prior, 3, condition).next(None)
    assert torch.allclose(exactly[:, 0].float(), expected[:, 0, : exactly.shape[2]], atol=0.05)
    spec.check(sample_codes(prior, range(3), labelled(3, prior), 0, SamplingConfig(guidance=1.5)))


def test_a_place_sees_the_sum_of_those_before_and_its_own_codes_one_by_one():
    """Two codes of an earlier place that are exchanged change nothing where their tables are one; those of the place
    itself do."""
    prior = tiny_prior("open_magvit2_gpt", spec=spec_of(2, 2, 6, 6, 6))
    assert isinstance(prior, OpenMAGVIT2GPT)
    with torch.no_grad():
        for table in prior.code_embeddings[1:]:
            table.weight.copy_(prior.code_embeddings[0].weight)
        codes, condition = random_codes(4, prior), Condition(torch.arange(4))
        codes[1][:] = (codes[0] + 1) % 6
        other = (codes[1], codes[0], codes[2])
        ours, theirs = prior.logits(codes, condition), prior.logits(other, condition)
        firsts = torch.arange(0, 12, 3)
        torch.testing.assert_close(ours[:, firsts], theirs[:, firsts], rtol=0, atol=1e-5)
        assert ((ours - theirs)[:, firsts + 2].abs().amax(dim=2) > 1e-3).all()


def test_grids_of_several_sides_are_refused():
    spec = CodeSpec((Grid("top", 1, 2, 5), Grid("bottom", 2, 4, 5)), 8, 16, 3)
    with pytest.raises(
        UserError, match=r"got codes of 1x2 .*, expected grids of equal sides: an open_magvit2_gpt prior"
    ):
        OpenMAGVIT2GPT(OpenMAGVIT2GPTConfig(layers=1, width=16, heads=2), spec, 0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layers": 0}, "layers=0, expected at least 1"),
        ({"factor_layers": 0}, "factor_layers=0, expected at least 1"),
        ({"width": 20, "heads": 2}, "width=20 with heads=2, expected a width that is a multiple of 8"),
        ({"dropout": 1.0}, "dropout=1.0, expected a share from 0 to below 1"),
    ],
)
def test_impossible_configs_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        OpenMAGVIT2GPTConfig(**setting)
