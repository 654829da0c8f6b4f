"""The properties of RandAR that not all priors share; the others are in test_conformance.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.cuda_graph import RecordedDraw
from stage2_prior.priors import PRIORS
from stage2_prior.priors.randar import RandAR, RandARConfig
from stage2_prior.sampling import SamplingConfig, draw_in_order, sample_codes, with_order
from tests.stage2_prior.tiny import condition_for, labelled, random_codes, tiny_prior

CONFIG = RandARConfig(layers=2, width=32, heads=4)


def test_windows_are_refused_where_several_codes_are_drawn_together():
    prior, condition = tiny_prior("randar"), labelled(2, tiny_prior("randar"))
    known = (torch.full((2, 3, 5), -1),)
    for sampling, kept in ((SamplingConfig(steps=4, lookahead=3), None), (SamplingConfig(lookahead=3), known)):
        with pytest.raises(UserError, match=r"got lookahead=3 and several codes at a step, .* leave lookahead out, or"):
            sample_codes(prior, range(2), condition, 0, sampling, kept)
    for lookahead in ("auto", "off", 1):
        prior.code_spec.check(sample_codes(prior, range(2), condition, 0, SamplingConfig(steps=4, lookahead=lookahead)))
    assert sample_codes(prior, range(2), condition, 0, SamplingConfig(steps=15, lookahead=3))


def order_for(batch: int) -> Tensor:
    return torch.rand(batch, 15, generator=torch.Generator().manual_seed(3)).argsort(dim=1)


@torch.no_grad()
def test_each_code_is_told_by_those_before_it_in_the_order_and_by_its_place():
    prior = tiny_prior("randar")
    (codes,) = random_codes(4, prior)
    condition = replace(condition_for(4, prior), order=order_for(4))
    expected = prior.logits((codes,), condition)
    for number in range(15):
        other = codes.flatten(1).clone()
        at = condition.order[:, number : number + 1]
        other.scatter_(1, at, (other.gather(1, at) + 1) % 11)
        change = (prior.logits((other.view_as(codes),), condition) - expected).abs().amax(dim=(0, 2))
        assert (change[: number + 1] == 0).all()
        assert (change[number + 1 :] > 0).all()
    swapped = condition.order.clone()
    swapped[:, [6, 7]] = condition.order[:, [7, 6]]
    others = prior.logits((codes,), replace(condition, order=swapped))
    assert torch.equal(expected[:, :6], others[:, :6])
    assert (expected[:, 6] - others[:, 6]).abs().amax(dim=1).min() > 0.01


def groups_slowly(prior: RandAR, sequence: Tensor, condition: Condition, done: int, width: int) -> Tensor:
    """The reference: instructions of a group in causal order, as they were the tokens of a sequence, in one whole pass:
    class, pairs of the codes before, then the instructions."""
    order = condition.order
    pairs = torch.stack([prior.instructions()[order], prior.embedding(sequence)], dim=2)[:, :done].flatten(1, 2)
    asked = prior.instructions()[order[:, done : done + width]]
    x = torch.cat([prior.class_tokens(len(order), condition)[:, None], pairs, asked], dim=1)
    rows = torch.cat([order[:, :done].repeat_interleave(2, dim=1), order[:, done : done + width]], dim=1) + 1
    turns = prior.turns()[torch.nn.functional.pad(rows, (1, 0))][:, None]
    for block in prior.blocks:
        x = block(x, turns, None)
    return prior.output(prior.norm(x[:, 1 + 2 * done :]))


@torch.no_grad()
def test_a_group_is_told_from_the_codes_before_it_though_samples_differ_in_their_number():
    prior = tiny_prior("randar")
    codes = random_codes(3, prior)
    condition = replace(condition_for(3, prior), order=order_for(3))
    sequence = prior.sequence(codes, condition)
    stepper = prior.stepper(3, condition)
    seen = [-1, -1, -1]
    for done, width in (([0, 4, 9], 3), ([3, 7, 12], 2), ([5, 8, 14], 1), ([6, 9, 14], 6)):
        logits = stepper.group(sequence, seen, done, width)
        for sample, number in enumerate(done):
            one = condition.map(lambda tensor, i=sample: tensor[i : i + 1])
            expected = groups_slowly(prior, sequence[sample : sample + 1], one, number, min(width, 15 - number))
            torch.testing.assert_close(logits[sample : sample + 1, : expected.shape[1]], expected, rtol=0, atol=1e-5)
        seen = done


def test_groups_of_one_code_draw_what_steps_draw():
    """15 steps for 15 codes are one at a time: by `group`, where a code is known, and by `next`, where none is."""
    prior, condition = tiny_prior("randar"), labelled(6, tiny_prior("randar"))
    sampling = SamplingConfig(temperature=0.8, guidance=2.0, guidance_schedule="linear")
    expected = sample_codes(prior, range(6), condition, 0, sampling)[0]
    nothing_known = (torch.full_like(expected, -1),)
    assert torch.equal(sample_codes(prior, range(6), condition, 0, sampling, nothing_known)[0], expected)
    few = sample_codes(prior, range(6), condition, 0, replace(sampling, steps=4))[0]
    assert not torch.equal(few, expected)
    assert not torch.equal(sample_codes(prior, range(6), condition, 1, sampling)[0], expected)


@pytest.mark.parametrize("steps", [None, 1, 4, 15, 40])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_samples_with_some_codes_known_do_not_depend_on_their_batch_and_keep_them(steps, guidance):
    prior = tiny_prior("randar")
    (codes,) = random_codes(12, prior)
    hidden = torch.rand(12, 3, 5, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 1, 12)[:, None, None]
    known = codes.masked_fill(hidden, -1)  # none hidden of the first, nearly all of the last
    sampling = SamplingConfig(steps=steps, guidance=guidance, guidance_schedule="linear", top_k=8)
    condition, passes = labelled(12, prior), list[int]()
    together = sample_codes(prior, range(12), condition, 0, sampling, (known,), tell_passes=passes.extend)[0]
    assert torch.equal(together[~hidden], codes[~hidden])
    assert passes == [min(steps or 15, int(count)) for count in hidden.flatten(1).sum(1)]
    for i in range(12):
        one = condition.map(lambda tensor, i=i: tensor[i : i + 1])
        assert torch.equal(sample_codes(prior, [i], one, 0, sampling, (known[i : i + 1],))[0][0], together[i])


def test_known_codes_come_first_and_the_others_in_an_order_of_each_sample():
    prior, known = tiny_prior("randar"), torch.full((3, 15), -1)
    known[:, 4:8] = 2
    condition, kept = with_order(prior, range(3), labelled(3, prior), 0, known)
    assert (condition.order[:, :4] == torch.arange(4, 8)).all()
    assert (kept[:, :4] == 2).all()
    assert (kept[:, 4:] == -1).all()
    assert (condition.order.sort(dim=1).values == torch.arange(15)).all()
    assert not torch.equal(condition.order[0], condition.order[1])
    alone, _ = with_order(prior, [2], labelled(1, prior), 0, known[:1])
    assert torch.equal(alone.order[0], condition.order[2])


def test_a_hole_is_filled_with_regard_to_what_comes_after_it():
    """The next code of the raster tells a hidden one, and nothing else does: whoever sees both sides fills it right."""
    torch.manual_seed(0)
    spec = CodeSpec((Grid("codes", 2, 3, 8),), 8, 12, 3)
    prior = PRIORS["randar"](replace(CONFIG, hidden_width=48), spec, 0)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for step in range(120):
        codes = torch.randint(8, (64, 6))
        codes[:, 3] = codes[:, 4]
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 120)
        optimizer.zero_grad()
        order = prior.training_order(64, step / 120, codes.device)
        prior((codes.view(-1, 2, 3),), Condition(order=order)).loss.mean().backward()
        optimizer.step()
    known = codes.clone()
    known[:, 3] = -1
    filled = sample_codes(prior.eval(), range(64), Condition(), 0, SamplingConfig(), (known.view(-1, 2, 3),))[0]
    assert (
        float((filled.flatten(1)[:, 3] == codes[:, 4]).float().mean()) > 0.5
    )  # before it nothing tells more than 1 of 8


def test_a_graph_holds_one_code_at_a_step_and_no_groups():
    prior, recorded = tiny_prior("randar"), RecordedDraw(draw_in_order)
    with pytest.raises(UserError, match="got cuda_graph and several codes at a step, or codes that are kept"):
        sample_codes(prior, range(2), labelled(2, prior), 0, SamplingConfig(steps=3), recorded=recorded)


def test_logits_that_are_not_finite_are_refused_in_groups_too():
    prior = tiny_prior("randar")
    with torch.no_grad():
        prior.output.weight[3] = torch.nan
    with pytest.raises(UserError, match="the prior's logits are not finite"):
        sample_codes(prior, range(2), labelled(2, prior), 0, SamplingConfig(steps=3))


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="width=32 with heads=5, expected a width that is a multiple of 20"):
        replace(CONFIG, heads=5)
