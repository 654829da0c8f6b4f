"""Re-masking: chances as published, in the schedules of both priors, and what is known stays."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stage2_prior.drawing import draw, noise
from stage2_prior.masked_sampling import cosine_share, linear_share, unmask
from stage2_prior.remasking import (
    ReMasking,
    hidden_shares,
    most_remasked,
    remasked,
    spread_by_confidence,
    stays_hidden,
)
from stage2_prior.sampling_config import SamplingConfig
from tests.golden import Golden, golden_frontier

KINDS = ["cap", "rescale", "confidence", "loop"]


def published(golden: Golden, name: str) -> SamplingConfig:
    """The settings of a published sampler."""
    config = golden.config["samplers"][name]
    kind = {"conf": "confidence"}.get(name, name.partition("_")[0])
    sampling = SamplingConfig(remask=kind, remask_rate=config.get("eta"))
    if kind == "loop":
        start, end = 1 - config["t_on"], 1 - config["t_off"]
        sampling = replace(sampling, remask_start=start, remask_end=end, remask_filled=config["alpha_on"])
    return sampling


@pytest.mark.parametrize("name", ["cap", "cap_small", "rescale", "conf"])
def test_chances_on_a_grid_of_times_are_the_published_ones(name):
    golden = golden_frontier("remdm")
    sampling, mask = published(golden, name), golden.config["vocab"] - 1
    filled = golden.inputs["grid_x"][0] != mask
    pairs = zip(golden.inputs["grid_t"].tolist(), golden.inputs["grid_s"].tolist(), strict=True)
    for i, (before, after) in enumerate(pairs):
        sigma = remasked(sampling, 0, 1, before, after)
        confidence = golden.inputs["grid_confidence"].masked_fill(~filled, math.inf)
        spread = spread_by_confidence(sigma, confidence)[0] if name == "conf" else torch.tensor(sigma)
        of_hidden = 0.0 if name == "conf" else sigma
        expected = golden.outputs[f"grid/{name}/sigma"][i]
        torch.testing.assert_close(spread.expand(10)[filled], expected[filled], rtol=1e-5, atol=1e-5)
        stays = torch.tensor(stays_hidden(before, after, of_hidden))
        expected = golden.outputs[f"grid/{name}/stay_masked"][i][~filled]
        torch.testing.assert_close(stays.expand_as(expected), expected, rtol=1e-5, atol=1e-5)


def test_the_formula_holds_for_a_sigma_of_another_paper():
    """forward-backward: sigma = (a_s - a_t) / a_t"""
    golden = golden_frontier("remdm")
    hidden = golden.inputs["grid_x"][0] == golden.config["vocab"] - 1
    pairs = zip(golden.inputs["grid_t"].tolist(), golden.inputs["grid_s"].tolist(), strict=True)
    for i, (before, after) in enumerate(pairs):
        if before < 1:
            expected = golden.outputs["grid/forward_backward/stay_masked"][i][hidden]
            stays = torch.tensor(stays_hidden(before, after, (before - after) / (1 - before)))
            # There is no bound on it elsewhere: a chance below 0 is one of 0.
            torch.testing.assert_close(stays.expand_as(expected), expected.clamp(min=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cap", "cap_small", "rescale", "conf", "loop"])
def test_a_chain_of_ten_steps_has_the_published_chances(name):
    """Along the published codes, at the published times, which begin at 1 and end a little above 0."""
    golden = golden_frontier("remdm")
    config, sampling, mask = golden.config, published(golden, name), golden.config["vocab"] - 1
    sequence = torch.full((config["batch"], config["length"]), mask)
    confidence = torch.full(sequence.shape, math.inf)
    times = torch.linspace(1, config["eps"], config["steps"] + 1).tolist()
    seen = 0
    for i, (before, after) in enumerate(itertools.pairwise(times)):
        done, whole = 1 - before, 1.0  # by its time, which is a little late, a step is in the loop or not
        filled, expected = sequence != mask, golden.outputs[f"{name}/sigma"][i]
        stays = golden.outputs[f"{name}/stay_masked"][i]
        if name == "loop":
            variant = config["samplers"]["loop"]
            on, off, level = variant["t_on"], variant["t_off"], variant["alpha_on"]
            if before > on:
                whole = 1 - (1 - before) * level / (1 - on)  # outside of the loop all chances are times this
                before, after = (1 - (1 - t) * level / (1 - on) for t in (before, after))
            elif before <= off:
                whole = before * (1 - level) / off
                before, after = (t * (1 - level) / off for t in (before, after))
            else:
                before = after = 1 - level
        sigma = remasked(sampling, done, 1, before, after)
        spread: Tensor | float = sigma
        if name == "conf":
            spread, sigma = spread_by_confidence(sigma, confidence), 0.0
        if name != "loop" or sigma:  # outside of the loop the published entry is unused
            where = torch.as_tensor(spread).expand_as(expected)[filled]
            torch.testing.assert_close(where, expected[filled], rtol=1e-5, atol=1e-5)
            seen += int(filled.sum())
        of_hidden = torch.tensor(stays_hidden(before, after, sigma) * whole).expand_as(stays)[~filled]
        torch.testing.assert_close(of_hidden, stays[~filled], rtol=1e-5, atol=1e-5)
        sequence = golden.outputs[f"{name}/x"][i]
        if name == "conf":
            confidence = -golden.outputs["conf/conf"][i]
            confidence = confidence.masked_fill(confidence > 1e8, math.inf)
    assert seen > 20


def test_a_loop_stops_where_so_many_codes_are_filled():
    sampling = SamplingConfig(remask="loop", remask_start=0.4, remask_end=0.7, remask_filled=0.7)
    shares = hidden_shares(10, linear_share, sampling)
    expected = [1, 0.825, 0.65, 0.475, 0.3, 0.3, 0.3, 0.3, 0.2, 0.1, 0]
    torch.testing.assert_close(torch.tensor(shares), torch.tensor(expected))
    cosine = hidden_shares(10, cosine_share, sampling)
    torch.testing.assert_close(torch.tensor(cosine[4:8]), torch.full((4,), 0.3))
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[2] > 0.8  # few at first, as without a loop
    rates = [remasked(sampling, step, 10, shares[step], shares[step + 1]) for step in range(10)]
    assert rates == [0.0] * 4 + [0.05] * 3 + [0.0] * 3


@pytest.mark.parametrize("share", [linear_share, cosine_share])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_chances_are_chances_and_the_last_step_hides_none(share, kind, steps):
    for rate in (0.0, 0.3, 1.0):
        sampling = SamplingConfig(remask=kind, remask_rate=rate)
        shares = hidden_shares(steps, share, sampling)
        assert (len(shares), shares[0], shares[-1]) == (steps + 1, 1.0, 0.0)
        for step in range(steps):
            before, after = shares[step : step + 2]
            sigma = remasked(sampling, step, steps, before, after)
            assert 0 <= sigma <= most_remasked(before, after)
            stays = stays_hidden(before, after, sigma)
            assert 0 <= stays <= 1
            if kind != "confidence":  # as many are filled on average as the schedule says
                assert math.isclose((1 - before) * (1 - sigma) + before * (1 - stays), 1 - after, abs_tol=1e-12)
        assert stays == 0
        assert sigma == 0 or steps == 1  # of one step, which finds no code to hide


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_taken_back_but_for_known_ones_and_all_are_filled_in_the_end(kind):
    batch, positions, steps = 40, 30, 12
    start = torch.full((batch, positions), -1)
    start[:, ::3] = 4
    start[0] = 2  # nothing is hidden
    sampling = SamplingConfig(remask=kind, remask_rate=1.0)
    codes, choice = (
        noise(0, range(batch), steps * positions, stream).unflatten(1, (steps, positions)) for stream in (0, 2)
    )
    shares = hidden_shares(steps, linear_share, sampling)
    fill = ReMasking(
        shares, sampling, codes, choice, start >= 0, lambda logits, uniforms: draw(logits, uniforms, sampling)
    )
    seen = []

    def logits_of(step: int, sequence: Tensor) -> Tensor:
        seen.append(sequence)
        return torch.randn(batch, positions, 5, generator=torch.Generator().manual_seed(step))

    end = unmask(start, steps, logits_of, fill)
    assert (end >= 0).all()
    assert torch.equal(end[start >= 0], start[start >= 0])
    taken = torch.stack([(before >= 0) & (after < 0) for before, after in zip(seen, [*seen[1:], end], strict=True)])
    assert taken.any(dim=(0, 1)).sum() > 15  # of the 20 places that were hidden
    assert not taken[:, start >= 0].any()
    if kind != "confidence":
        free = start[1:] < 0
        filled = torch.stack([(sequence[1:] >= 0)[free].double().mean() for sequence in seen])
        torch.testing.assert_close(filled, 1 - torch.tensor(shares[:-1]).double(), rtol=0, atol=0.06)


def test_confidence_takes_back_what_was_least_probable():
    chances = spread_by_confidence(0.5, torch.tensor([[0.9, 0.1, math.inf, 0.1], [math.inf] * 4]))
    assert chances[0, 1] == chances[0, 3] > chances[0, 0]
    assert chances[0, 2] == 0
    assert math.isclose(chances[0].sum(), 0.5, abs_tol=1e-6)
    assert (chances[1] == 0).all()
