"""The properties of RAR that not all priors share; the others are in test_conformance.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.priors.rar import RAR, RARConfig
from stage2_prior.train import Stage2Task
from tests.stage2_prior.tiny import CLASSES, condition_for, random_codes, tiny_prior

CONFIG = RARConfig(layers=2, width=24, heads=3)


def random_orders(batch: int, places: int) -> torch.Tensor:
    return torch.rand(batch, places, generator=torch.Generator().manual_seed(3)).argsort(dim=1)


@torch.no_grad()
def test_each_code_is_told_by_those_before_it_in_the_order_alone():
    prior = tiny_prior("rar")
    (codes,) = random_codes(4, prior)
    condition = replace(condition_for(4, prior), order=random_orders(4, 15))
    expected = prior.logits((codes,), condition)
    for number in range(15):
        other = codes.flatten(1).clone()
        at = condition.order[:, number : number + 1]
        other.scatter_(1, at, (other.gather(1, at) + 1) % 11)
        change = (prior.logits((other.view_as(codes),), condition) - expected).abs().amax(dim=(0, 2))
        assert (change[: number + 1] == 0).all()
        assert (change[number + 1 :] > 0).all()


@torch.no_grad()
def test_a_place_knows_which_code_comes_next():
    """The target-aware embedding: with the same codes known, another next place is told otherwise."""
    prior = tiny_prior("rar")
    codes, labels = random_codes(1, prior), torch.zeros(1, dtype=torch.int64)
    order = torch.arange(15)[None]
    swapped = order.clone()
    swapped[0, [6, 7]] = order[0, [7, 6]]
    logits, others = (prior.logits(codes, Condition(labels, order=each)) for each in (order, swapped))
    assert torch.equal(logits[:, :6], others[:, :6])
    assert (logits[:, 6] - others[:, 6]).abs().max() > 0.1


@torch.no_grad()
def test_stepper_and_likelihood_go_by_an_order():
    prior = tiny_prior("rar")
    codes, condition = random_codes(5, prior), condition_for(5, prior)
    ordered = replace(condition, order=random_orders(5, 15))
    sequence = prior.sequence(codes, ordered)
    assert torch.equal(prior.in_raster(sequence, ordered), codes[0].flatten(1))
    stepper, previous, logits = prior.stepper(5, ordered), None, []
    for number in range(15):
        logits.append(stepper.next(previous))
        previous = sequence[:, number : number + 1]
    torch.testing.assert_close(torch.cat(logits, dim=1), prior.logits(codes, ordered), rtol=0, atol=1e-5)
    raster = replace(condition, order=torch.arange(15).expand(5, -1))
    torch.testing.assert_close(prior.nll(codes, raster), prior.nll(codes, condition), rtol=0, atol=1e-6)
    assert (prior.nll(codes, ordered).sum(1) - prior.nll(codes, condition).sum(1)).abs().min() > 0.01


def test_the_share_of_random_orders_falls_to_none():
    shares = [CONFIG.permuted_share(done) for done in (0.0, 0.49, 0.5, 0.6, 0.7, 0.75, 1.0)]
    assert shares == pytest.approx([1, 1, 1, 0.6, 0.2, 0, 0])
    assert replace(CONFIG, permuted_until=0.5, raster_from=0.5).permuted_share(0.5) == 0


def test_orders_of_a_step_are_permutations_of_which_a_share_is_raster():
    prior = RAR(CONFIG, CodeSpec((Grid("codes", 3, 5, 11),), 12, 20, 3), 0)
    raster = torch.arange(15)
    for progress, share in ((0.2, 1.0), (0.625, 0.5)):
        order = prior.training_order(2000, progress, torch.device("cpu"))
        assert (order.sort(dim=1).values == raster).all()
        assert float((order != raster).any(dim=1).float().mean()) == pytest.approx(share, abs=0.04)
    assert prior.training_order(8, 0.75, torch.device("cpu")) is None


def test_a_step_goes_by_the_number_that_the_loop_gives():
    """Nobody else counts: the same number, asked for again or after others, has the same share."""
    prior = tiny_prior("rar").train()
    task = Stage2Task(prior, label_dropout=0.0, steps=100)
    batch = {"codes": random_codes(64, prior), "labels": torch.arange(64) % CLASSES}
    seen = []

    def model(codes, condition):
        seen.append(condition.order)
        return prior(codes, condition)

    for step in (0, 99, 62, 0):
        task.step(model, batch, step)
    raster = torch.arange(15)
    permuted = [0.0 if order is None else float((order != raster).any(dim=1).float().mean()) for order in seen]
    assert permuted[0] == permuted[3] == 1
    assert permuted[1] == 0
    assert 0.25 < permuted[2] < 0.75


def test_a_fresh_block_adds_nothing():
    prior = RAR(CONFIG, CodeSpec((Grid("codes", 3, 5, 11),), 12, 20, 3), 4)
    x, condition = torch.randn(2, 4, 24), torch.randn(2, 4, 24)
    assert torch.equal(prior.blocks[0](x, condition), x)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layers": 0}, "layers=0, expected at least 1"),
        ({"heads": 5}, "width=24, expected a multiple of heads=5"),
        ({"hidden_width": 0}, "hidden_width=0, expected at least 1; leave it out for 4 times the width"),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0, expected a share from 0 to below 1"),
        ({"permuted_until": 0.8}, r"permuted_until=0.8 and raster_from=0.75, expected shares of the run"),
    ],
)
def test_impossible_configs_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **setting)


def test_an_order_is_refused_by_priors_of_an_order_of_their_own_and_where_it_does_not_fit():
    order = torch.arange(15).expand(2, -1)
    other = tiny_prior("transformer")
    with pytest.raises(UserError, match="got an order for a transformer prior, which has one of its own; leave it out"):
        other.nll(random_codes(2, other), replace(condition_for(2, other), order=order))
    prior = tiny_prior("rar")
    with pytest.raises(UserError, match=r"got an order of shape \(2, 14\), expected \(2, 15\)"):
        prior.nll(random_codes(2, prior), replace(condition_for(2, prior), order=order[:, 1:]))
