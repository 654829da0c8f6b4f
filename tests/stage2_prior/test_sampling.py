"""Sampling: settings against a slow reference, frequencies against probabilities, noise that belongs to a sample."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from codes.spec import Codes
from common.errors import UserError
from stage2_prior import in_parts
from stage2_prior.condition import Condition
from stage2_prior.drawing import inverse_cdf, noise, probabilities
from stage2_prior.priors import PRIORS, AutoregressivePrior
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.stage2_prior.tiny import CLASSES, SPECS, labelled, random_codes, tiny_prior, tiny_spec


def some_logits(batch: int = 4, vocabulary: int = 20) -> Tensor:
    return 3 * torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(0))


def reference(logits: list[float], sampling: SamplingConfig) -> list[float]:
    """The definition, one code at a time."""
    weights = [math.exp(logit / sampling.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda code: -weights[code])[: sampling.top_k]
    mass = sum(weights[code] for code in order)
    kept, before = [], 0.0
    for code in order:
        if before < sampling.top_p:
            kept.append(code)
        before += weights[code] / mass
    kept = [code for code in kept if weights[code] >= sampling.min_p * max(weights)]
    total = sum(weights[code] for code in kept)
    return [weights[code] / total if code in kept else 0.0 for code in range(len(logits))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    list(itertools.product([1.0, 0.7, 1.6], [None, 1, 5, 20, 50], [1.0, 0.8, 0.3, 1e-6], [0.0, 0.05, 0.4, 1.0])),
)
def test_probabilities_equal_the_definition(temperature, top_k, top_p, min_p):
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = some_logits()
    shares = probabilities(logits, sampling)
    expected = torch.tensor([reference(row, sampling) for row in logits.double().tolist()], dtype=torch.float64)
    assert shares.dtype == torch.float64
    torch.testing.assert_close(shares, expected, rtol=1e-9, atol=1e-12)


def test_temperature_zero_is_the_most_probable_code():
    shares = probabilities(some_logits(), SamplingConfig(temperature=0, top_k=7, top_p=0.5))
    assert torch.equal(shares.argmax(-1), some_logits().argmax(-1))
    assert shares.sum() == len(shares) == shares.count_nonzero()


def test_a_tiny_temperature_is_greedy_and_finite():
    shares = probabilities(1e4 * some_logits(), SamplingConfig(temperature=1e-300))
    assert torch.equal(shares, probabilities(some_logits(), SamplingConfig(temperature=0)))


def test_equals_at_the_edge_of_top_k_and_top_p_are_all_admitted():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert (probabilities(logits, SamplingConfig(top_k=2)) > 0).tolist() == [[True, True, True, True, False]]
    assert (probabilities(logits, SamplingConfig(top_p=0.6)) > 0).tolist() == [[True, True, True, True, False]]


def test_inverse_cdf_lays_the_shares_side_by_side():
    shares = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    largest = 1 - 2.0**-53
    uniforms = [0.0, 0.2499, 0.25, 0.7499, 0.75, largest]
    codes = [inverse_cdf(shares, torch.tensor([u], dtype=torch.float64)).item() for u in uniforms]
    assert codes == [1, 1, 3, 3, 4, 4]  # never a code of probability 0


def test_inverse_cdf_never_passes_the_last_code_though_shares_do_not_add_up_to_one():
    shares = torch.rand(1000, 37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares /= shares.sum(-1, keepdim=True)
    for dtype in (torch.float64, torch.float32):
        largest = torch.full((1000,), 1 - torch.finfo(dtype).eps / 2, dtype=dtype)
        assert (inverse_cdf(shares.to(dtype), largest) <= 36).all()


def test_noise_is_a_function_of_seed_and_index():
    whole = noise(7, range(10), 6)
    assert whole.dtype == torch.float64
    assert whole.shape == (10, 6)
    assert torch.equal(noise(7, [3, 9, 4], 6), whole[[3, 9, 4]])
    assert torch.equal(noise(7, range(10), 4), whole[:, :4])
    assert not torch.equal(noise(8, range(10), 6), whole)
    assert len(torch.cat([whole, noise(8, range(10), 6)]).unique()) == 120
    assert len(torch.cat([whole, noise(7, range(10), 6, stream=1)]).unique()) == 120
    assert noise(2**64 - 1, [2**64 - 1], 1).shape == (1, 1)


def test_noise_never_changes_between_versions():
    """Who notes seed and index finds the sample again, years later."""
    assert noise(0, [0, 1], 2).tolist() == [
        [0.011546754286331562, 0.24154919656271812],
        [0.8133540609793564, 0.7513314251083365],
    ]
    assert noise(20170101, [123456], 1).tolist() == [[0.051775151142087084]]


def test_noise_is_uniform():
    counts = torch.histc(noise(1, range(1000), 50), bins=100, min=0, max=1)
    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: mean 99, standard deviation 14


@pytest.mark.parametrize(
    ("seed", "index", "name"), [(-1, 0, "seed=-1"), (0, -2, "sample index=-2"), (2**64, 0, "seed")]
)
def test_noise_refuses_what_is_no_seed(seed, index, name):
    with pytest.raises(UserError, match=f"{name}.*, expected 0 to 18446744073709551615"):
        noise(seed, [index], 1)


@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(), SamplingConfig(temperature=0.7, top_k=6), SamplingConfig(top_p=0.7)],
    ids=["as trained", "temperature, top-k", "top-p"],
)
def test_sampled_codes_are_as_frequent_as_they_are_probable(sampling):
    """First code of 4,000 samples of one class; chi-square with at most 10 degrees of freedom."""
    prior, count = tiny_prior("transformer"), 4000
    condition = Condition(torch.full((count,), 2))
    first = sample_codes(prior, range(count), condition, 0, sampling)[0][:, 0, 0]
    logits = prior.stepper(1, Condition(torch.tensor([2]))).next(None)[:, 0]
    expected = count * probabilities(logits, sampling)[0]
    counts = first.bincount(minlength=len(expected))
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    assert possible.sum() > 3
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 30  # 1 in 1,000 chance of error


def test_the_distribution_of_whole_grids_is_that_of_the_prior():
    """2 x 1 codes of 3: nine grids, whose probabilities the teacher-forced pass gives."""
    prior = tiny_prior("transformer", 0, tiny_spec(2, 1, 3))
    grids = torch.tensor(list(itertools.product(range(3), repeat=2))).view(9, 2, 1)
    with torch.no_grad():
        expected = 4000 * (-prior.nll((grids,), Condition()).sum(1)).exp()
    samples = sample_codes(prior, range(4000), Condition(), 3, SamplingConfig())[0]
    counts = torch.stack([(samples == grid).flatten(1).all(1).sum() for grid in grids])
    assert counts.sum() == 4000
    torch.testing.assert_close(expected.sum(), torch.tensor(4000.0))
    assert ((counts - expected) ** 2 / expected).sum() < 26  # 8 degrees of freedom


def test_codes_have_the_shape_type_and_range_of_the_spec():
    prior = tiny_prior("pixelcnn")
    codes = sample_codes(prior, [5, 1], labelled(2, prior), 0, SamplingConfig())
    prior.code_spec.check(codes)
    assert codes[0].dtype == torch.int64
    swapped = sample_codes(prior, [1, 5], Condition(torch.tensor([1, 0])), 0, SamplingConfig())
    assert torch.equal(codes[0], swapped[0].flip(0))


@pytest.mark.parametrize(
    ("schedule", "weights"),
    {"constant": [3, 3, 3, 3, 3], "linear": [1, 1.5, 2, 2.5, 3], "cosine": [1, 1.2929, 2, 2.7071, 3]}.items(),
)
def test_guidance_rises_by_its_schedule(schedule, weights):
    sampling = SamplingConfig(guidance=3.0, guidance_schedule=schedule)
    assert [sampling.guidance_at(step, 5) for step in range(5)] == pytest.approx(weights, abs=1e-4)


def test_guidance_rises_late_with_a_power_above_one():
    sampling = SamplingConfig(guidance=3.0, guidance_schedule="linear", guidance_power=2.0)
    assert [sampling.guidance_at(step, 5) for step in range(5)] == pytest.approx([1, 1.125, 1.5, 2.125, 3])
    with pytest.raises(UserError, match="guidance_power=0, expected above 0; 1 rises evenly, more rises late"):
        SamplingConfig(guidance_power=0)


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        ("transformer", {"guidance_power": 2.0}, "guidance_power=2.0 with guidance_schedule=constant, which does not"),
        ("maskgit", {"guidance": 1.0, "guidance_power": 0.5}, "give guidance_schedule=linear or cosine too, or leave"),
        ("randar", {"guidance_schedule": "linear", "steps": 1}, "steps=1 with guidance_schedule=linear, which rises"),
        (
            "diffusion",
            {"guidance_schedule": "cosine", "steps": 1},
            "a single one would have no guidance; give guidance",
        ),
    ],
)
def test_settings_of_guidance_that_change_nothing_are_refused(kind, setting, message):
    prior = tiny_prior(kind)
    with pytest.raises(UserError, match=message):
        sample_codes(prior, [0], labelled(1, prior), 0, SamplingConfig(**{"guidance": 3.0, **setting}))


@pytest.mark.parametrize("kind", ["randar", "diffusion"])
def test_one_step_has_constant_guidance_and_a_schedule_needs_none(kind):
    prior, condition = tiny_prior(kind), labelled(6, tiny_prior(kind))

    def drawn(**setting: Any) -> Tensor:
        codes = sample_codes(prior, range(6), condition, 0, SamplingConfig(steps=1, temperature=0, **setting))
        return prior.sequence(codes, condition)

    assert not torch.equal(drawn(guidance=4.0), drawn())
    assert torch.equal(drawn(guidance_schedule="linear"), drawn())


def test_guidance_is_off_outside_its_interval():
    sampling = SamplingConfig(guidance=3.0, guidance_start=0.25, guidance_end=0.5)
    assert [sampling.guidance_at(step, 5) for step in range(5)] == [1, 3, 3, 1, 1]
    assert SamplingConfig(guidance=3.0).guidance_at(0, 1) == 3


def test_guidance_that_ends_early_equals_guidance_up_to_there_and_none_after():
    prior = tiny_prior("transformer")
    condition, positions = labelled(6, prior), prior.code_spec.codes_per_image
    sampling = SamplingConfig(temperature=0, guidance=4.0, guidance_end=0.5)
    codes = sample_codes(prior, range(6), condition, 0, sampling)[0].flatten(1)
    with torch.no_grad():
        label, null = (
            prior.logits((codes.view(6, 3, 5),), c) for c in (condition, Condition(torch.full((6,), CLASSES)))
        )
    weights = torch.tensor([4.0 if position <= 7 else 1.0 for position in range(positions)])
    assert torch.equal(codes, (null + weights[:, None] * (label - null)).argmax(-1))
    everywhere = SamplingConfig(temperature=0, guidance=4.0)
    assert not torch.equal(codes, sample_codes(prior, range(6), condition, 0, everywhere)[0].flatten(1))


def test_known_codes_stay_and_what_is_drawn_after_them_follows_them():
    prior, sampling = tiny_prior("transformer"), SamplingConfig()
    free = sample_codes(prior, range(8), labelled(8, prior), 0, sampling)
    known = torch.full_like(free[0], -1)
    known[:, 1] = torch.arange(5) % 11  # the middle row
    drawn = sample_codes(prior, range(8), labelled(8, prior), 0, sampling, (known,))
    assert torch.equal(drawn[0][:, 1], known[:, 1])
    assert torch.equal(drawn[0][:, 0], free[0][:, 0])  # raster order: what comes before does not know them
    assert not torch.equal(drawn[0][:, 2], free[0][:, 2])
    again = sample_codes(prior, range(8), labelled(8, prior), 1, sampling, drawn)
    assert torch.equal(again[0], drawn[0])  # nothing is left to draw


def test_labels_out_of_range_are_refused():
    prior = tiny_prior("transformer")
    with pytest.raises(UserError, match="got label 5, expected 0 to 3, or 4 for any class"):
        sample_codes(prior, [0, 1], Condition(torch.tensor([0, CLASSES + 1])), 0, SamplingConfig())
    with pytest.raises(UserError, match="got label -1, expected 0 to 3"):
        sample_codes(prior, [0], Condition(torch.tensor([-1])), 0, SamplingConfig())


def test_guidance_without_classes_is_refused():
    prior = tiny_prior("transformer", num_classes=0)
    with pytest.raises(UserError, match="got guidance for a prior without classes, expected guidance=1"):
        sample_codes(prior, [0], Condition(), 0, SamplingConfig(guidance=2.0))


def test_guidance_of_a_prior_that_never_saw_the_null_label_is_refused():
    prior = tiny_prior("transformer", knows_null_label=False)
    with pytest.raises(UserError, match=r"guidance=2.0, expected 1: .* train it with label_dropout=0.1"):
        sample_codes(prior, [0], labelled(1, prior), 0, SamplingConfig(guidance=2.0))


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        ("transformer", {"steps": 8}, "steps=8 for a transformer prior, which draws its codes in an order of its own"),
        (
            "diffusion",
            {"choice_temperature": 1.0},
            "choice_temperature=1.0 for a diffusion prior, which does not choose",
        ),
        ("pixelcnn", {"choice_temperature": 1.0}, "leave choice_temperature out, or take a maskgit prior"),
    ],
)
def test_settings_of_other_priors_are_refused(kind, setting, message):
    prior = tiny_prior(kind)
    with pytest.raises(UserError, match=message):
        sample_codes(prior, [0], labelled(1, prior), 0, SamplingConfig(**setting))


@pytest.mark.parametrize("kind", ["transformer", "maskgit"])
def test_a_prior_with_damaged_weights_is_refused(kind):
    prior = tiny_prior(kind)
    with torch.no_grad():
        prior.output.weight.fill_(math.nan)
    with pytest.raises(UserError, match="the prior's logits are not finite"):
        sample_codes(prior, [0], labelled(1, prior), 0, SamplingConfig())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0.1, expected 0 \(greedy\) or more"),
        ({"temperature": math.nan}, "temperature=nan, expected 0"),
        ({"top_k": 0}, "top_k=0, expected at least 1; leave it out"),
        ({"top_p": 0.0}, "top_p=0.0, expected a share above 0"),
        ({"top_p": 1.1}, "top_p=1.1, expected a share above 0 and up to 1"),
        ({"min_p": -0.1}, "min_p=-0.1, expected a share from 0 to 1"),
        ({"guidance": -1.0}, "guidance=-1.0, expected 0 or more"),
        ({"steps": 0}, "steps=0, expected at least 1; leave it out for the prior's own number"),
        ({"choice_temperature": -1.0}, r"choice_temperature=-1.0, expected 0 \(always the surest codes\) or more"),
        ({"choice_temperature": math.inf}, "choice_temperature=inf, expected 0"),
        ({"guidance_end": 1.5}, "guidance_start=0.0 and guidance_end=1.5, expected shares of the steps"),
        ({"guidance_start": 0.6, "guidance_end": 0.5}, "the start not after the end"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**setting)


def test_large_seeds_are_told_apart():
    seeds = (2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1)
    assert len({float(noise(seed, [0], 1)) for seed in seeds}) == 4


@pytest.mark.parametrize("kind", ["var", "hierarchical", "transformer", "maskgit", "diffusion"])
def test_known_codes_of_later_grids_follow_what_was_chosen_before_them(kind):
    spec = SPECS[kind] if kind in SPECS else SPECS["hierarchical"]
    prior = tiny_prior(kind, spec=spec)
    known = tuple(torch.where(grid % 2 == 0, grid, -1) for grid in random_codes(6, prior))

    def complete(beginning: Codes) -> Codes:
        """Every grid holds the sum of those before it."""
        grids = list(beginning)
        for grid in spec.grids[len(beginning) :]:
            before = sum((each.flatten(1).sum(1) for each in grids), torch.zeros(6, dtype=torch.int64))
            grids.append((before % grid.vocabulary).view(-1, 1, 1).expand(-1, grid.height, grid.width))
        return tuple(grids)

    codes = sample_codes(prior, range(6), labelled(6, prior), 0, SamplingConfig(), known, complete=complete)
    spec.check(codes)
    literal = sample_codes(prior, range(6), labelled(6, prior), 0, SamplingConfig(), known)
    assert torch.equal(codes[0], literal[0])  # nothing comes before the first grid
    for number in range(1, len(codes)):
        kept = known[number] >= 0
        assert torch.equal(codes[number][kept], complete(codes[:number])[number][kept])
        assert torch.equal(literal[number][kept], known[number][kept])
    drawn = known[-1] < 0
    if issubclass(PRIORS[kind], AutoregressivePrior):  # what is drawn goes by them
        assert not torch.equal(codes[-1][drawn], literal[-1][drawn])
    else:
        assert torch.equal(codes[-1][drawn], literal[-1][drawn])


def test_known_codes_of_grids_of_equal_sides_stay_as_they_are():
    prior = tiny_prior("rq_transformer")
    keep = torch.tensor([True, False, True])  # columns
    known = tuple(torch.where(keep, grid, -1) for grid in random_codes(4, prior))
    codes = sample_codes(prior, range(4), labelled(4, prior), 0, SamplingConfig(), known, complete=pytest.fail)
    for grid, kept in zip(codes, known, strict=True):
        assert torch.equal(grid[..., keep], kept[..., keep])


@pytest.mark.parametrize(
    "kind", ["transformer", "mingpt", "llamagen", "rq_transformer", "var", "infinity", "hierarchical"]
)
def test_a_batch_that_keeps_too_much_is_drawn_in_parts(kind, monkeypatch):
    prior, seen = tiny_prior(kind), list[int]()
    sampling, condition = SamplingConfig(guidance=2.0), labelled(10, prior)
    known = random_codes(10, prior)
    for grid in known:
        grid[:, -1] = -1
    expected = sample_codes(prior, range(10), condition, 0, sampling, known)
    make = type(prior).stepper

    def stepper(self, batch, condition):
        seen.append(batch)
        return make(self, batch, condition)

    monkeypatch.setattr(type(prior), "stepper", stepper)
    monkeypatch.setattr(in_parts, "ROWS", 2)
    monkeypatch.setattr(in_parts, "CACHE", 4 * 2 * prior.numbers_kept * 4)  # of four guided samples in float32
    assert all(map(torch.equal, sample_codes(prior, range(10), condition, 0, sampling, known), expected))
    assert seen == [6, 6, 8]  # with and without their label
    monkeypatch.setattr(in_parts, "ROWS", 20)
    seen.clear()
    sample_codes(prior, range(10), condition, 0, sampling, known)
    assert seen == [20]


def test_what_steppers_keep_is_what_is_counted():
    prior = tiny_prior("transformer")
    cache = prior.stepper(3, labelled(3, prior)).decoder.cache
    assert 3 * prior.numbers_kept == cache[..., :-1, :].numel()
