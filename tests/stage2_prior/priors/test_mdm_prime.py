"""What MDM-Prime does with parts of codes; what all masked priors share is in test_masked_conformance.py, the whole
codes that other orders fill in in test_ways_to_fill.py."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from common.model_io import load_pretrained
from stage1_vq.quantizers import FSQConfig, FSQuantizer
from stage2_prior.condition import Condition
from stage2_prior.drawing import draw
from stage2_prior.masked_sampling import codes_per_step, linear_share, unmask
from stage2_prior.priors import PRIORS, MDMPrime, MDMPrimeConfig
from stage2_prior.priors.masked import hidden_for_nll
from stage2_prior.priors.mdm_prime import SubTokensByLot, least_bases, nll_of_digits, worth_of
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.stage2_prior.test_cuda_graph import OnTheDevice, imaginary_gpu
from tests.stage2_prior.test_ways_to_fill import GRIDS, zipf
from tests.stage2_prior.tiny import condition_for, labelled, random_codes, tiny_prior, tiny_spec


def config(**changes: object) -> MDMPrimeConfig:
    return MDMPrimeConfig(**{"layers": 2, "width": 32, "heads": 4, "nll_levels": 15, **changes})


def two_codes(vocabulary: int = 4, **changes: object) -> MDMPrime:
    """A prior of two codes of two bits each, far from certain and from uniform."""
    prior = tiny_prior("mdm_prime", 0, tiny_spec(1, 2, vocabulary), noise=0.4, config=config(**changes))
    assert isinstance(prior, MDMPrime)
    return prior


@pytest.mark.parametrize(("bases", "vocabulary"), [((2, 2), 3), ((3, 2, 4), 24), ((5, 2), 9), ((2, 2, 2), 8)])
def test_every_state_of_a_code_has_a_number_and_comes_back(bases, vocabulary):
    prior = MDMPrime(config(bases=bases), tiny_spec(1, 2, vocabulary), 0)
    digits = torch.tensor(list(itertools.product(*(range(-1, base) for base in bases))))  # states l
    digits = digits[:, None].expand(-1, 2, -1)  # at both places
    sequence = prior.sequence_of(digits)
    assert torch.equal(prior.digits(sequence), digits)
    assert len(sequence.unique()) == len(sequence)
    assert torch.equal(sequence < 0, (digits < 0).any(-1))
    assert sequence[(digits < 0).all(-1)].tolist() == [-1, -1]
    codes = torch.arange(vocabulary)[:, None].expand(-1, 2)
    assert torch.equal(prior.sequence_of(prior.digits(codes)), codes)
    assert prior.digits(codes)[1, 0].tolist() == [1, *[0] * (len(bases) - 1)]  # the first one is the fastest


def test_bases_that_are_the_levels_of_fsq_give_its_digits():
    levels = (5, 3, 4)
    prior = MDMPrime(config(bases=levels), tiny_spec(1, 60, 60), 0)
    codes = torch.arange(60)
    latents = FSQuantizer(FSQConfig(levels=levels, dim=3)).codes_to_latents((codes[None, None],))[0, :, 0]  # 3 codes
    for digits, numbers in zip(prior.digits(codes[None])[0].unbind(-1), latents, strict=True):
        by_digit = [numbers[digits == digit].unique() for digit in range(int(digits.max()) + 1)]
        assert [len(values) for values in by_digit] == [1] * len(by_digit)
        assert by_digit == sorted(by_digit)


def test_the_least_bases_suffice_and_no_less_would():
    for vocabulary in [*range(2, 130), 1000, 4096, 16384, 50257, 2**18]:
        bits = (vocabulary - 1).bit_length()
        for parts in range(1, bits + 1):
            bases = least_bases(vocabulary, parts)
            assert len(bases) == parts
            assert max(bases) - min(bases) <= 1
            assert min(bases) >= 2
            assert math.prod(bases) >= vocabulary
            if max(bases) > 2:  # one of the larger ones made smaller
                assert math.prod(bases) // bases[0] * (bases[0] - 1) < vocabulary
    assert least_bases(128, 2) == (12, 11)
    assert least_bases(50257, 4) == (15, 15, 15, 15)  # as published for GPT-2's tokens


def test_a_code_can_be_those_alone_that_have_its_known_digits():
    prior = tiny_prior("mdm_prime", spec=CodeSpec((Grid("top", 1, 2, 7), Grid("bottom", 2, 2, 11)), 8, 8, 3))
    digits = prior.digits(prior.sequence(random_codes(40, prior), condition_for(40, prior)))  # b n l
    known = torch.rand(digits.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    sequence = prior.sequence_of(digits.masked_fill(~known, -1))
    with torch.no_grad():
        shares = prior.masked_logits(sequence, condition_for(40, prior)).softmax(-1)  # b n k
    never = prior.no_codes(sequence)
    for sample, place in itertools.product(range(40), range(6)):
        vocabulary, bases = (7, (3, 3)) if place < 2 else (11, (4, 3))
        for code in range(11):
            own = [code // worth % base for worth, base in zip(worth_of(bases), bases, strict=True)]
            fits = code < vocabulary and all(
                own[j] == digits[sample, place, j] for j in range(2) if known[sample, place, j]
            )
            assert bool(shares[sample, place, code] > 0) == fits
            assert bool(never[sample, place, code]) == (not fits)


def by_hand(prior: MDMPrime, digits: Tensor, hidden: tuple[int, ...], chosen: int) -> Tensor:
    """Minus the logarithm of the probability of one hidden sub-token of two codes (flat numbers), float64."""
    flat = digits.flatten().clone()
    flat[list(hidden)] = -1
    place, part = divmod(chosen, 2)
    logits = prior.masked_logits(prior.sequence_of(flat.view(1, 2, 2)), Condition())[0, place].double()
    shares = logits.softmax(-1)
    return -sum(share for code, share in enumerate(shares) if (code >> part) & 1 == digits[place, part]).log()


def mean_over_orders(prior: MDMPrime, digits: Tensor) -> Tensor:
    """The bound itself: of each sub-token, `n l`, in the mean over all orders of revealing them one by one."""
    found = {
        hidden: {part: by_hand(prior, digits, hidden, part) for part in hidden}
        for size in range(1, 5)
        for hidden in itertools.combinations(range(4), size)
    }
    orders = list(itertools.permutations(range(4)))
    total = [torch.zeros((), dtype=torch.float64)] * 4
    for order in orders:
        for step, part in enumerate(order):
            total[part] = total[part] + found[tuple(sorted(order[step:]))][part] / len(orders)
    return torch.stack(total).view(2, 2)


@pytest.mark.parametrize(("vocabulary", "codes"), [(4, [2, 1]), (3, [2, 0])])
@pytest.mark.parametrize("levels", [1, 2, 15])
def test_the_mean_of_many_estimates_is_the_mean_over_all_orders_of_sub_tokens(vocabulary, codes, levels):
    prior, sequence = two_codes(vocabulary, nll_levels=levels), torch.tensor([codes])
    digits = prior.digits(sequence)  # 1 n l
    with torch.no_grad():
        expected = mean_over_orders(prior, digits[0]).sum(-1)  # n
        drawn = [hidden_for_nll(digits.flatten(1), levels, seed) for seed in range(500)]
        hidden, weights = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        nll = [
            prior.sub_token_nll(digits.expand(500, -1, -1), level.view(500, 2, 2), Condition()).sum(-1)
            for level in hidden.unbind(1)
        ]
        first = torch.cat([prior.nll((sequence[:, None],), Condition(), seed) for seed in range(3)])
        estimates = (torch.stack(nll, 1) * weights[..., None]).sum(1).double()
        torch.testing.assert_close(first.double(), estimates[:3], rtol=0, atol=1e-5)
        error = estimates.std(0) / math.sqrt(len(estimates))
        assert ((estimates.mean(0) - expected).abs() < 4 * error).all()
        assert error.max() < 0.1 * expected.max()
        torch.manual_seed(0)
        loss, same = prior((sequence.expand(4000, -1)[:, None],), Condition())
        assert torch.equal(loss, same)
        torch.testing.assert_close(loss.mean().double(), expected.mean(), rtol=0.02, atol=0)
        assert expected.sum() > -mixture_of_orders(prior, sequence).log() + 1e-3  # a bound from above


def mixture_of_orders(prior: MDMPrime, sequences: Tensor) -> Tensor:
    """The probability of each sequence, `b` float64, when sub-tokens are drawn one by one in an order by lot."""
    total = torch.zeros(len(sequences), dtype=torch.float64)
    orders = list(itertools.permutations(range(4)))
    for row, codes in enumerate(sequences):
        digits = prior.digits(codes[None])[0]
        for order in orders:
            nll = [by_hand(prior, digits, tuple(sorted(order[step:])), part) for step, part in enumerate(order)]
            total[row] += (-sum(nll)).exp() / len(orders)
    return total


def test_one_sub_token_at_a_time_the_prior_is_the_mixture_of_its_orders():
    prior = two_codes(3)
    codes = torch.tensor(list(itertools.product(range(3), repeat=2)))
    with torch.no_grad():
        expected = 2000 * mixture_of_orders(prior, codes)
    samples = sample_codes(prior, range(2000), Condition(), 3, SamplingConfig(steps=4))[0].flatten(1)
    counts = torch.stack([(samples == code).all(1).sum() for code in codes])
    torch.testing.assert_close(expected.sum(), torch.tensor(2000.0, dtype=torch.float64))
    assert (expected / 2000 * 9 - 1).abs().max() > 0.5  # far from uniform
    assert ((counts - expected) ** 2 / expected).sum() < 26.1  # 8 degrees of freedom: 1 in 1,000 chance of error


class KnownCodes(MDMPrime):
    """Codes that do not depend on each other, of logits k that are the same for all places; notes what is known."""

    logits: Tensor
    seen: list[Tensor]

    def masked_logits(self, sequence: Tensor, condition: Condition) -> Tensor:
        self.seen.append(sequence)
        return self.logits.expand(*sequence.shape, -1)


def known_codes(sizes: tuple[tuple[int, int], ...], logits: Tensor, **changes: object) -> KnownCodes:
    grids = tuple(Grid(f"grid{i}", *size, len(logits)) for i, size in enumerate(sizes))
    prior = KnownCodes(config(layers=1, **changes), CodeSpec(grids, 8, 8, 1), 0).eval()
    prior.logits, prior.seen = logits, []
    return prior


def test_a_known_categorical_is_drawn_to_its_tail_in_parts():
    """Each code in three parts at up to three steps: the parts of one step together, later ones given the earlier."""
    prior, counts = known_codes(((16, 16),), zipf(), sub_tokens=3), torch.zeros(300, dtype=torch.float64)
    for first in range(0, 240, 40):
        codes = sample_codes(prior, range(first, first + 40), Condition(), 5, SamplingConfig(steps=4))
        counts += torch.bincount(codes[0].flatten(), minlength=300)
    expected = zipf().double().softmax(0) * counts.sum()
    edges = torch.tensor([*range(20), 20, 25, 30, 40, 60, 100, 180, 300])
    bins = torch.bucketize(torch.arange(300), edges, right=True) - 1
    binned, wanted = (torch.zeros(len(edges) - 1).double().index_add(0, bins, x) for x in (counts, expected))
    freedom = len(wanted) - 1
    assert ((binned - wanted) ** 2 / wanted).sum() < freedom + 4 * math.sqrt(2 * freedom)
    assert 0.85 < counts[60:].sum() / expected[60:].sum() < 1.15


@pytest.mark.parametrize("sizes", GRIDS)
def test_every_sub_token_of_every_grid_is_written_once_and_stays(sizes):
    prior = known_codes(sizes, torch.zeros(11), sub_tokens=3)
    codes = sample_codes(prior, range(2), Condition(), 0, SamplingConfig(steps=9))
    prior.code_spec.check(codes)
    steps = [prior.digits(sequence) for sequence in (*prior.seen, prior.sequence(codes, Condition()))]  # each b n l
    assert (steps[0] < 0).all()
    assert (steps[-1] >= 0).all()
    assert len(prior.seen) == min(9, steps[0][0].numel())
    for before, after in itertools.pairwise(steps):
        assert ((before < 0) | (before == after)).all()
        assert ((before < 0) & (after >= 0)).any(dim=2).any(dim=1).all()  # no step is wasted
    if prior.code_spec.codes_per_image > 8:  # some code was known in part
        assert ((steps[4] >= 0).any(-1) & (steps[4] < 0).any(-1)).any()


def test_another_order_or_taking_back_fills_in_whole_codes():
    logits = torch.zeros(11)
    for sampling in (SamplingConfig(order="halton", steps=5), SamplingConfig(remask="cap", steps=5)):
        prior = known_codes(((3, 4),), logits, sub_tokens=2)
        prior.code_spec.check(sample_codes(prior, range(3), Condition(), 0, sampling))
        assert all((sequence >= -1).all() for sequence in prior.seen)
        assert len(prior.seen) == 5
    prior = known_codes(((3, 4),), logits, sub_tokens=2)
    sample_codes(prior, range(3), Condition(), 0, SamplingConfig(steps=5))
    assert any((sequence < -1).any() for sequence in prior.seen)


def test_of_sub_tokens_that_are_copies_of_each_other_the_bound_is_the_entropy_and_not_a_half_of_it():
    """Where the probability of whole codes stands in the place of that of a sub-token, as in the published loss, the
    mean over sizes of hidden sets would be ln(2) / 2."""
    prior = known_codes(((1, 1),), torch.tensor([0.0, -1e4, -1e4, 0.0]), sub_tokens=2, nll_levels=2)
    prior.logits_of_grids = lambda sequence, condition: [  # type: ignore[method-assign]
        prior.logits.expand(len(sequence), 1, 4).masked_fill(prior.cannot_be(sequence)[0], -1e4)
    ]
    for code in (0, 3):
        nll = prior.nll((torch.tensor([[[code]]]),), Condition())
        torch.testing.assert_close(nll, torch.tensor([[math.log(2)]]))


def test_the_gradients_are_those_of_sums_of_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, 4, 11, generator=generator)).requires_grad_()
    digits = torch.stack([torch.randint(base, (5, 4), generator=generator) for base in (4, 3)], dim=-1)
    digits = torch.minimum(digits, torch.tensor([3, 1]))  # 4 * 2 + 3 would be no code
    of_codes = torch.arange(11)[:, None] // torch.tensor([1, 4]) % torch.tensor([4, 3])
    weights = torch.randn(5, 4, 2, generator=generator)
    (nll_of_digits(logits, digits, of_codes) * weights).sum().backward()
    plain = logits.detach().double().requires_grad_()
    shares = plain.softmax(-1)
    nll = torch.stack(
        [
            torch.stack([-shares[..., of_codes[:, part] == digit].sum(-1).log() for digit in range(4)], -1).gather(
                -1, digits[..., part, None]
            )[..., 0]
            for part in range(2)
        ],
        dim=-1,
    )
    (nll * weights).sum().backward()
    torch.testing.assert_close(nll_of_digits(logits, digits, of_codes).double(), nll, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), plain.grad, rtol=1e-4, atol=1e-6)


def test_only_hidden_sub_tokens_lose_and_what_is_known_steers_them():
    prior = tiny_prior("mdm_prime")
    condition = condition_for(6, prior)
    digits = prior.digits(prior.sequence(random_codes(6, prior), condition))
    hidden = torch.zeros_like(digits, dtype=torch.bool)
    hidden[:, 0, 0] = hidden[:, 3] = True
    with torch.no_grad():
        nll = prior.sub_token_nll(digits, hidden, condition)
        assert nll.dtype == torch.float32
        assert (nll[:, 3] > 0).all()
        assert (nll >= 0).all()  # the other hidden one may be sure: of 7 codes, 6 alone has the second digit 2
        assert (nll[~hidden] == 0).all()
        for place, part in itertools.product(range(digits.shape[1]), range(2)):
            other = digits.clone()
            other[:, place, part] = (other[:, place, part] + 1) % 2
            changed = prior.sub_token_nll(other, hidden, condition) != nll
            assert changed[:, 3, 1].all() != (bool(hidden[0, place, part]) and (place, part) != (3, 1))


def test_known_codes_survive_beside_codes_in_parts():
    prior, condition = tiny_prior("mdm_prime"), labelled(9, tiny_prior("mdm_prime"))
    sequence = prior.sequence(random_codes(9, prior), condition)
    kept = torch.arange(9)[:, None] > torch.arange(sequence.shape[1])
    known = prior.grids_of(sequence.masked_fill(~kept, -1))
    for steps in (1, 3, 64):
        drawn = prior.sequence(
            sample_codes(prior, range(9), condition, 0, SamplingConfig(steps=steps), known), condition
        )
        assert torch.equal(drawn[kept], sequence[kept])
        assert not torch.equal(drawn[~kept], sequence[~kept])


def test_one_sub_token_is_plain_diffusion():
    """The bound of whole codes, and the codes drawn of the same numbers."""
    prior = tiny_prior("mdm_prime", config=config(sub_tokens=1))
    codes, condition = random_codes(5, prior), condition_for(5, prior)
    with torch.no_grad():
        torch.testing.assert_close(
            prior.nll(codes, condition), super(MDMPrime, prior).nll(codes, condition), rtol=1e-5, atol=1e-6
        )
        drawn = [
            prior.sequence(sample_codes(prior, range(5), labelled(5, prior), 0, sampling), labelled(5, prior))
            for sampling in (SamplingConfig(steps=4), SamplingConfig(steps=4, order="random"))
        ]
    assert torch.equal(*drawn)


def test_no_step_waits_for_a_gpu_or_copies_to_it():
    sampling, known = SamplingConfig(), torch.zeros(3, 12, dtype=torch.bool)
    numbers, counts = torch.rand(3, 24, dtype=torch.float64), [codes_per_step(24, 4, linear_share)] * 3
    real = MDMPrime(config(layers=1), tiny_spec(3, 4, 7), 0).eval()
    fill = SubTokensByLot(real, counts, known, numbers, numbers, lambda x, own: draw(x, own, sampling))
    with imaginary_gpu(), torch.no_grad():
        fill.prior = prior = MDMPrime(config(layers=1), tiny_spec(3, 4, 7), 0).eval()
        for name in ("step_of", "uniforms"):
            value = getattr(fill, name)
            setattr(fill, name, torch.empty(value.shape, dtype=value.dtype))
        start = torch.full((3, 12), -1)

        def logits_of(step: int, sequence: Tensor) -> Tensor:
            return prior.masked_logits(sequence, Condition()).masked_fill(prior.no_codes(sequence), -math.inf)

        with OnTheDevice():
            codes = unmask(start, 4, logits_of, fill)
        assert codes.shape == (3, 12)
        assert codes.device.type == "cuda"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sub_tokens": 0}, "sub_tokens=0 with width=32, expected 1"),
        ({"sub_tokens": 33}, "sub_tokens=33 with width=32, expected 1"),
        ({"bases": (3, 1)}, r"bases=\[3, 1\], expected numbers of at least 2"),
        ({"bases": ()}, r"bases=\[\], expected numbers of at least 2"),
        ({"bases": (4, 4), "sub_tokens": 3}, "sub_tokens=3 with 2 bases, expected either"),
        ({"width": 36}, "width=36 with heads=4, expected a width that is a multiple of 16"),
        ({"nll_levels": 0}, "nll_levels=0, expected at least 1"),
    ],
)
def test_impossible_configs_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        config(**setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sub_tokens": 5}, "sub_tokens=5 for codes of 11, expected at most 4"),
        ({"bases": (3, 3)}, r"bases=\[3, 3\] for codes of 11, expected .* 9 is at least that; give larger or more"),
        ({"bases": (4, 3, 2)}, r"bases=\[4, 3, 2\] for codes of 11, .* only with the last one; leave the last one out"),
    ],
)
def test_sub_tokens_that_cannot_be_of_the_codes_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        MDMPrime(config(**setting), tiny_spec(), 0)


def test_bases_come_back_from_a_folder(tmp_path):
    prior = tiny_prior("mdm_prime", spec=tiny_spec(), config=config(bases=(4, 3)))
    loaded = load_pretrained(prior.save_pretrained(tmp_path / "prior"), PRIORS)
    assert loaded.config == prior.config == config(bases=(4, 3))
    codes, condition = random_codes(3, prior), condition_for(3, prior)
    assert torch.equal(loaded.nll(codes, condition), prior.nll(codes, condition))


def test_given_codes_are_seen_by_every_sub_token():
    given = (Grid("other", 1, 2, 5),)
    prior = MDMPrime(replace(config(), sub_tokens=2), tiny_spec(2, 2, 11), 0, given=given).eval()
    empty = torch.full((3, 4), -1)
    with torch.no_grad():
        first, second = (prior.masked_logits(empty, Condition(None, (torch.full((3, 1, 2), code),))) for code in (1, 4))
    assert ((first - second).abs().amax(dim=2) > 0).all()
