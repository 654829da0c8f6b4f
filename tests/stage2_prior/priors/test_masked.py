"""Losses and bounds of MaskGIT and absorbing diffusion; what all masked priors share is in test_conformance.py."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.draws import spread
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.priors import DiffusionConfig, MaskedPrior, MaskGIT, MaskGITConfig
from stage2_prior.priors.masked import hidden_for_nll, hide
from tests.stage2_prior.test_masked_sampling import mixture_of_orders
from tests.stage2_prior.tiny import condition_for, random_codes, tiny_prior, tiny_spec

THREE = tiny_spec(1, 3, 3)  # three codes of three: all orders and all sets of hidden codes can be looked at


def three_codes(kind: str) -> tuple[MaskedPrior, Tensor]:
    """A prior that is far from certain and from uniform, and the codes of one image, `1 n`."""
    return tiny_prior(kind, 0, THREE, noise=0.4), torch.tensor([[2, 0, 1]])


def nll_of_sets(prior: MaskedPrior, sequence: Tensor) -> dict[tuple[int, ...], Tensor]:
    """For every set of hidden codes, the nll `n` of those in it, 0 for the others."""
    sets = [s for size in (1, 2, 3) for s in itertools.combinations(range(3), size)]
    found = {}
    for hidden in sets:
        masked = sequence.clone()
        masked[:, list(hidden)] = -1
        with torch.no_grad():
            logits = prior.masked_logits(masked, Condition())[0].double()
        nll = F.cross_entropy(logits, sequence[0], reduction="none")
        found[hidden] = torch.stack([nll[i] if i in hidden else torch.zeros_like(nll[i]) for i in range(3)])
    return found


def mean_over_orders(prior: MaskedPrior, sequence: Tensor) -> Tensor:
    """The nll of each code, `n`, in the mean over all orders: the bound itself."""
    nll, orders = nll_of_sets(prior, sequence), list(itertools.permutations(range(3)))
    total = torch.zeros(3, dtype=torch.float64)
    for order in orders:
        for step, place in enumerate(order):
            total[place] += nll[tuple(sorted(order[step:]))][place] / len(orders)
    return total


@pytest.mark.parametrize("kind", ["maskgit", "diffusion"])
@pytest.mark.parametrize("levels", [1, 2, 15])
def test_the_mean_of_many_estimates_is_the_mean_over_all_orders_and_no_less_than_the_nll(kind, levels):
    prior, sequence = three_codes(kind)
    prior.config = replace(prior.config, nll_levels=levels)
    expected = mean_over_orders(prior, sequence)
    drawn = [hidden_for_nll(sequence, levels, seed) for seed in range(500)]
    hidden, weights = (torch.cat(parts) for parts in zip(*drawn, strict=True))  # seeds levels n, seeds levels
    with torch.no_grad():
        nll = [prior.hidden_nll(sequence.expand(500, -1), level, Condition()) for level in hidden.unbind(1)]
        first = torch.cat([prior.nll(prior.grids_of(sequence), Condition(), seed) for seed in range(3)])
    estimates = (torch.stack(nll, 1) * weights[..., None]).sum(1).double()
    torch.testing.assert_close(first.double(), estimates[:3], rtol=0, atol=1e-5)
    error = estimates.std(0) / math.sqrt(len(estimates))  # n
    assert ((estimates.mean(0) - expected).abs() < 4 * error).all()
    assert error.max() < 0.1 * expected.max()
    assert expected.sum() > -mixture_of_orders(prior, sequence).log() + 1e-3
    if levels > 1:
        assert estimates.sum(1).std() < 0.5 * expected.sum()


def test_sizes_of_hidden_sets_are_spread_evenly_and_hidden_codes_count_once_on_average():
    sequences = torch.randint(9, (200, 10), generator=torch.Generator().manual_seed(0))
    hidden, weights = hidden_for_nll(sequences, 10, seed=0)
    assert hidden.sum(2).tolist() == [list(range(1, 11))] * 200
    hidden, weights = hidden_for_nll(sequences, 5, seed=0)
    assert hidden.shape == (200, 5, 10)
    assert ((hidden.sum(2) - 1).div(2, rounding_mode="floor") == torch.arange(5)).all()
    counted = (hidden * weights[..., None]).sum(1)  # b n
    torch.testing.assert_close(counted.mean(), torch.tensor(1.0), rtol=0, atol=1e-1)
    assert hidden_for_nll(sequences, 99, seed=0)[0].shape == (200, 10, 10)


def test_an_estimate_belongs_to_the_codes_and_the_seed():
    codes = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 5]])
    first, second = (hidden_for_nll(codes, 3, seed)[0] for seed in (0, 1))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first[0], second[0])
    assert torch.equal(hidden_for_nll(codes[1:], 3, 0)[0], first[1:])


def test_the_diffusion_loss_is_an_unbiased_estimate_of_the_bound_and_of_the_integral_over_time():
    prior, sequence = three_codes("diffusion")
    by_order = mean_over_orders(prior, sequence).mean()
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    by_time = sum(  # codes hidden with probability t, their nll weighed by 1/t
        nll.sum() / 3 * (t ** len(hidden) * (1 - t) ** (3 - len(hidden)) / t).mean()
        for hidden, nll in nll_of_sets(prior, sequence).items()
    )
    torch.testing.assert_close(by_time, by_order, rtol=1e-6, atol=0)
    torch.manual_seed(0)
    with torch.no_grad():
        loss, nll = prior((sequence.expand(3000, -1)[:, None],), Condition())
    assert torch.equal(loss, nll)
    torch.testing.assert_close(loss.mean().double(), by_order, rtol=0.02, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_maskgit_loss_has_the_expectation_of_its_definition(smoothing):
    exact, sequence = three_codes("maskgit")
    prior = MaskGIT(MaskGITConfig(layers=2, width=32, heads=4, label_smoothing=smoothing), THREE, 0).eval()
    prior.load_state_dict(exact.state_dict())
    expected = 0.0
    for size in (1, 2, 3):
        # ceil(3 cos) is `size` where the cosine is above (size - 1) / 3 and not above size / 3.
        chance = (math.acos((size - 1) / 3) - math.acos(size / 3)) / (math.pi / 2)
        sets = list(itertools.combinations(range(3), size))
        for hidden in sets:
            masked = sequence.clone()
            masked[:, list(hidden)] = -1
            with torch.no_grad():
                log_shares = prior.masked_logits(masked, Condition())[0].double().log_softmax(-1)  # n k
            target = (1 - smoothing) * F.one_hot(sequence[0], 3) + smoothing / 3
            cross_entropy = -(target * log_shares).sum(-1)
            expected += chance / len(sets) * cross_entropy[list(hidden)].sum() / (3 * 2 / math.pi)
    torch.manual_seed(0)
    with torch.no_grad():
        loss, nll = prior((sequence.expand(6000, -1)[:, None],), Condition())
    assert nll is None
    assert loss.shape == (6000,)
    torch.testing.assert_close(loss.mean().double(), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize(("kind", "share"), [("maskgit", 2 / math.pi), ("diffusion", 0.5 + 1 / 30)])
def test_training_hides_the_share_of_codes_that_its_schedule_says(kind, share, monkeypatch):
    prior, seen = tiny_prior(kind, spec=tiny_spec()), []
    compute = prior.hidden_nll
    monkeypatch.setattr(
        prior, "hidden_nll", lambda sequence, hidden, *rest: seen.append(hidden) or compute(sequence, hidden, *rest)
    )
    prior(random_codes(60, prior), condition_for(60, prior))
    counts = seen[0].sum(1)
    assert counts.min() >= 1
    if kind == "diffusion":  # evenly apart: 1 to 15 four times each, whatever the random start
        assert (counts.bincount(minlength=16)[1:] - 4).abs().max() <= 1
    assert counts.double().mean() / 15 == pytest.approx(share, abs=0.04)
    assert len(seen[0].unique(dim=0)) > 40


def test_random_numbers_of_a_batch_are_evenly_apart():
    torch.manual_seed(0)
    numbers = torch.stack([spread(5, torch.device("cpu")) for _ in range(2000)])
    assert ((numbers >= 0) & (numbers < 1)).all()
    gaps = numbers.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.2))
    torch.testing.assert_close(numbers.mean(0), torch.full((5,), 0.5), rtol=0, atol=0.03)


def test_as_many_codes_are_hidden_as_asked_and_every_place_alike():
    torch.manual_seed(0)
    hidden = hide(torch.tensor([0, 2, 7]).repeat(3000), 7)
    assert hidden.sum(1).tolist() == [0, 2, 7] * 3000
    torch.testing.assert_close(hidden[1::3].double().mean(0), torch.full((7,), 2 / 7).double(), rtol=0, atol=0.03)


@pytest.mark.parametrize("config_class", [MaskGITConfig, DiffusionConfig])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"width": 36, "heads": 4}, "width=36 with heads=4, expected a width that is a multiple of 16"),
        ({"layers": 0}, "layers=0, expected at least 1"),
        ({"dropout": 1.0}, "dropout=1.0, expected a share from 0 to below 1"),
        ({"residual_dropout": -0.1}, "residual_dropout=-0.1, expected a share"),
        ({"nll_levels": 0}, "nll_levels=0, expected at least 1: each tells the nll at one share of masks"),
    ],
)
def test_impossible_configs_are_refused(config_class, setting, message):
    with pytest.raises(UserError, match=message):
        config_class(**setting)


def test_impossible_label_smoothing_is_refused():
    with pytest.raises(UserError, match=r"label_smoothing=1\.0, expected a share from 0 to below 1"):
        MaskGITConfig(label_smoothing=1.0)
