"""Every way in which a masked prior may be asked to fill in codes, re-masking included: on every grid, with known
codes, and what the samples are distributed like. How each goes about it: test_masked_sampling.py, test_halton.py,
test_remasking.py."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.drawing import draw
from stage2_prior.masked_sampling import codes_per_step, filling_by, linear_share, unmask
from stage2_prior.priors import MaskGITConfig
from stage2_prior.priors.maskgit import MaskGIT
from stage2_prior.remasking import ReMasking, hidden_shares
from stage2_prior.sampling import sample_codes
from stage2_prior.sampling_config import SamplingConfig
from tests.stage2_prior.test_cuda_graph import OnTheDevice, imaginary_gpu
from tests.stage2_prior.tiny import labelled, random_codes, tiny_prior

ORDERS = {order: SamplingConfig(order=order) for order in ("confidence", "random", "halton", "entropy")}
REMASKS = {
    f"remask {kind}": SamplingConfig(remask=kind, remask_rate=0.8) for kind in ("cap", "rescale", "confidence", "loop")
}
WAYS = {**ORDERS, **REMASKS}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)

GRIDS = [
    ((1, 1),),
    ((1, 7),),
    ((5, 1),),
    ((3, 4),),
    ((8, 8),),
    ((2, 2), (3, 5)),
    ((4, 4),) * 3,
    ((9, 33),),
    ((128, 128),),
]


class KnownLogits(MaskGIT):
    """Codes that do not depend on each other, of logits `n k` that are the same for all images; notes what is known at
    each step."""

    logits: Tensor
    seen: list[Tensor]

    def masked_logits(self, sequence: Tensor, condition: Condition) -> Tensor:
        self.seen.append(sequence)
        return self.logits.expand(len(sequence), -1, -1)


def known_logits(sizes: tuple[tuple[int, int], ...], logits: Tensor) -> KnownLogits:
    """logits: k of every place, or n k."""
    grids = tuple(Grid(f"grid{i}", *size, logits.shape[-1]) for i, size in enumerate(sizes))
    prior = KnownLogits(MaskGITConfig(layers=1, width=8, heads=2), CodeSpec(grids, 8, 8, 1), 0).eval()
    prior.logits, prior.seen = logits.expand(prior.code_spec.codes_per_image, -1), []
    return prior


@EVERY_WAY
@pytest.mark.parametrize("sizes", GRIDS)
def test_every_place_of_every_grid_is_written_once(way, sizes):
    prior = known_logits(sizes, torch.zeros(3))
    codes = sample_codes(prior, range(2), Condition(), 0, replace(WAYS[way], steps=9))
    prior.code_spec.check(codes)
    end = prior.sequence(codes, Condition())
    steps = [*prior.seen, end]
    assert (steps[0] < 0).all()
    if way in ORDERS:
        assert len(prior.seen) == min(9, end.shape[1])
        for before, after in itertools.pairwise(steps):
            assert ((before < 0) | (before == after)).all()  # what is written is not written again
            assert ((before < 0) & (after >= 0)).any(dim=1).all()  # no step is wasted
    else:
        assert len(prior.seen) == 9  # more than there are codes, where one asks for them


@EVERY_WAY
@pytest.mark.parametrize("kind", ["maskgit", "diffusion", "mdm_prime"])
def test_known_codes_survive_and_the_others_do_not_depend_on_the_batch(way, kind):
    prior, condition = tiny_prior(kind), labelled(9, tiny_prior(kind))
    sequence = prior.sequence(random_codes(9, prior), condition)
    number_known = torch.arange(9)[:, None]  # none at all to all of them
    kept = torch.rand(sequence.shape, generator=torch.Generator().manual_seed(1)).argsort(1).argsort(1) < number_known
    known = prior.grids_of(sequence.masked_fill(~kept, -1))
    sampling = replace(WAYS[way], steps=6, guidance=2.0, guidance_schedule="linear")
    together = sample_codes(prior, range(9), condition, 0, sampling, known)
    prior.code_spec.check(together)
    drawn = prior.sequence(together, condition)
    assert torch.equal(drawn[kept], sequence[kept])
    assert not torch.equal(drawn[~kept], sequence[~kept])
    for i in range(9):
        alone = Condition(condition.labels[i : i + 1])
        codes = sample_codes(prior, [i], alone, 0, sampling, tuple(grid[i : i + 1] for grid in known))
        assert torch.equal(prior.sequence(codes, alone)[0], drawn[i])


def test_the_ways_draw_different_images_and_a_priors_own_has_a_name():
    prior, condition = tiny_prior("maskgit", noise=0.5), labelled(6, tiny_prior("maskgit"))

    def drawn(sampling: SamplingConfig) -> tuple[int, ...]:
        return tuple(
            prior.sequence(sample_codes(prior, range(6), condition, 0, sampling), condition).flatten().tolist()
        )

    samples = [drawn(replace(way, steps=4)) for way in WAYS.values()]
    assert len({drawn(replace(way, steps=7)) for way in WAYS.values()}) == len(WAYS)
    assert drawn(SamplingConfig(steps=4)) == drawn(SamplingConfig(steps=4, order="confidence"))
    assert drawn(SamplingConfig(steps=4)) != drawn(SamplingConfig(steps=4, mask_schedule="linear"))
    assert drawn(replace(REMASKS["remask cap"], steps=4, remask_rate=0.0)) not in samples
    late = replace(REMASKS["remask cap"], steps=4, remask_start=1.0)
    assert drawn(late) == drawn(replace(REMASKS["remask rescale"], steps=4, remask_rate=0.0))


# Both choose by what was drawn, and so draw probable codes too often; the others are the prior's own distribution.
EXACT = [way for way in WAYS if way not in ("confidence", "remask confidence")]


def zipf() -> Tensor:
    """Shares from 0.6 down to a few in a million."""
    return torch.log(torch.arange(1, 301, dtype=torch.float64) ** -2.0).float()


def chi_squared(way: str, samples: int = 240) -> tuple[float, int, float]:
    """Of the codes of 16x16 places with the same known shares: the statistic, its degrees of freedom, and the share of
    the codes drawn that are among the 240 least probable of 300, over what it should be."""
    prior, counts = known_logits(((16, 16),), zipf()), torch.zeros(300, dtype=torch.float64)
    for first in range(0, samples, 40):
        codes = sample_codes(prior, range(first, first + 40), Condition(), 5, replace(WAYS[way], steps=6))
        counts += torch.bincount(codes[0].flatten(), minlength=300)
    expected = zipf().double().softmax(0) * counts.sum()
    edges = torch.tensor([*range(20), 20, 25, 30, 40, 60, 100, 180, 300])
    bins = torch.bucketize(torch.arange(300), edges, right=True) - 1
    binned, wanted = (torch.zeros(len(edges) - 1).double().index_add(0, bins, x) for x in (counts, expected))
    assert wanted.min() > 15
    tail = float(counts[60:].sum() / expected[60:].sum())
    return float(((binned - wanted) ** 2 / wanted).sum()), len(wanted) - 1, tail


@pytest.mark.parametrize("way", EXACT)
def test_a_known_categorical_is_drawn_to_its_tail(way):
    statistic, freedom, tail = chi_squared(way)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)
    assert 0.85 < tail < 1.15


def test_confidence_draws_likely_codes_too_often():
    """It is why it needs chance, `choice_temperature`. Re-masking by confidence does so, too, but takes back at most
    one code at a step and is not far off."""
    statistic, freedom, tail = chi_squared("confidence", 80)
    assert statistic > freedom + 10 * math.sqrt(2 * freedom)
    assert tail < 0.9


def test_the_places_of_the_lowest_entropy_come_first():
    logits = torch.zeros(12, 4)
    logits[:, 0] = torch.randperm(12, generator=torch.Generator().manual_seed(2)) / 2.0  # the more, the surer
    prior = known_logits(((3, 4),), logits)
    sample_codes(prior, range(3), Condition(), 0, SamplingConfig(order="entropy", steps=4, mask_schedule="linear"))
    for step, sequence in enumerate(prior.seen):
        surest = logits[:, 0].topk(3 * step).indices
        assert (sequence >= 0).sum(1).tolist() == [3 * step] * 3
        assert (sequence[:, surest] >= 0).all()
    prior.seen.clear()
    hot = SamplingConfig(order="entropy", steps=4, mask_schedule="linear", choice_temperature=100.0)
    sample_codes(prior, range(3), Condition(), 0, hot)
    assert not (prior.seen[1][:, logits[:, 0].topk(3).indices] >= 0).all()


@EVERY_WAY
def test_no_step_waits_for_a_gpu_or_copies_to_it(way):
    sampling, known = WAYS[way], torch.zeros(3, 12, dtype=torch.bool)

    def uniforms(numbers: int, stream: int) -> Tensor:
        return torch.rand(3, numbers, dtype=torch.float64)

    def drawn(logits: Tensor, numbers: Tensor) -> Tensor:
        return draw(logits, numbers, sampling)

    if sampling.order is None:
        numbers = uniforms(4 * 12, 0).unflatten(1, (4, 12))
        fill = ReMasking(hidden_shares(4, linear_share, sampling), sampling, numbers, numbers, known, drawn)
    else:
        counts = [codes_per_step(12, 4, linear_share)] * 3
        fill = filling_by(sampling.order, counts, known, [Grid("codes", 3, 4, 7)], uniforms, drawn, 1.0)
    with imaginary_gpu(), torch.no_grad():
        for name, value in vars(fill).items():
            if isinstance(value, Tensor):
                setattr(fill, name, torch.empty(value.shape, dtype=value.dtype))
        logits, start = torch.zeros(3, 12, 7), torch.full((3, 12), -1)
        with OnTheDevice():
            codes = unmask(start, 4, lambda step, sequence: logits + sequence.sum(), fill)
        assert codes.shape == (3, 12)
        assert codes.device.type == "cuda"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"order": "best"}, "order=best, expected one of confidence, random, halton, entropy"),
        ({"mask_schedule": "square"}, "mask_schedule=square, expected one of cosine, linear, arccos"),
        ({"remask": "none"}, "remask=none, expected one of off, cap, rescale, confidence, loop"),
        ({"remask": "cap", "order": "halton"}, "got remask=cap with order=halton, expected either"),
        ({"remask_rate": 0.1}, "got remask_rate=0.1 without remask, expected remask=cap"),
        ({"remask": "cap", "remask_rate": 1.5}, "remask_rate=1.5, expected a share from 0"),
        ({"remask": "cap", "remask_filled": 0.5}, "got remask_filled=0.5 with remask=cap, expected remask=loop"),
        ({"remask": "loop", "remask_filled": 1.0}, "remask_filled=1.0, expected a share between 0 and 1"),
        ({"remask": "loop", "remask_start": 0.97}, "remask_start=0.97 and remask_end=0.95, expected shares"),
    ],
)
def test_impossible_ways_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**setting)


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        ("transformer", {"order": "halton"}, "order=halton for a transformer prior, which draws its codes in an order"),
        ("pixelcnn", {"remask": "cap"}, "remask=cap for a pixelcnn prior, .* leave remask out, or take a maskgit"),
        ("transformer", {"mask_schedule": "cosine"}, "mask_schedule=cosine for a transformer prior"),
        (
            "maskgit",
            {"order": "halton", "choice_temperature": 1.0},
            "maskgit prior with order=halton, which does not .* out, or take order=confidence or entropy$",
        ),
        (
            "maskgit",
            {"remask": "loop", "choice_temperature": 1.0},
            "with remask=loop, which .* leave choice_temperature out, or say remask off",
        ),
        ("diffusion", {"choice_temperature": 1.0}, "or take order=confidence or entropy"),
    ],
)
def test_ways_of_other_priors_are_refused(kind, setting, message):
    prior = tiny_prior(kind)
    with pytest.raises(UserError, match=message):
        sample_codes(prior, [0], labelled(1, prior), 0, SamplingConfig(**setting))


def test_each_order_has_a_choice_temperature_of_its_own():
    maskgit, diffusion = tiny_prior("maskgit"), tiny_prior("diffusion")
    for prior, setting, expected in (
        (maskgit, {}, 4.5),
        (maskgit, {"choice_temperature": 2.0}, 2.0),
        (maskgit, {"order": "entropy"}, 0.0),
        (maskgit, {"order": "random"}, None),
        (maskgit, {"remask": "cap"}, None),
        (diffusion, {}, None),
        (diffusion, {"order": "confidence"}, 4.5),
        (diffusion, {"order": "entropy", "choice_temperature": 1.0}, 1.0),
    ):
        assert SamplingConfig(**setting).choice_temperature_for(prior) == expected
