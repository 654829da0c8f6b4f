"""Lookahead draws the codes of the step-by-step loop, in fewer passes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from stage2_prior import drawing, lookahead, sampling
from stage2_prior.condition import Condition
from stage2_prior.drawing import draw, draw_and_sure
from stage2_prior.lookahead import Ahead, Memory, Pace, looks_ahead, memory_of, pace_of
from stage2_prior.priors import AutoregressivePrior
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.stage2_prior.tiny import TINY, labelled, random_codes, tiny_prior

SEVERAL = CodeSpec((Grid("top", 1, 2, 5), Grid("bottom", 2, 3, 11), Grid("residual", 2, 2, 7)), 8, 12, 3)
WITH_WINDOWS = [kind for kind in TINY if tiny_prior(kind).takes_windows]


class SlowWindows:
    """The reference: a whole teacher-forced pass for each window, without a cache."""

    def __init__(self, prior: AutoregressivePrior, batch: int, condition: Condition):
        self.prior, self.condition, self.position = prior, condition, 0
        self.codes = torch.zeros(batch, prior.code_spec.codes_per_image, dtype=torch.int64)
        self.widths: list[int] = []

    def next(self, previous: Tensor | None) -> Tensor:
        first = torch.full((len(self.codes),), self.position)
        self.position += 1
        return self.window(first, first[:, None] if previous is None else previous)

    @torch.inference_mode()
    def window(self, first: Tensor, previous: Tensor) -> Tensor:
        self.widths.append(previous.shape[1])
        places = first[:, None] + torch.arange(previous.shape[1])
        for codes, at, before in zip(self.codes, places, previous, strict=True):
            seen = (at > 0) & (at <= len(codes))
            codes[at[seen] - 1] = before[seen]
        logits = self.prior.logits(self.prior.grids_of(self.codes), self.condition).float()
        rows = torch.arange(len(first))[:, None]
        beyond = (places >= self.codes.shape[1])[..., None]
        return logits[rows, places.clamp(max=self.codes.shape[1] - 1)].masked_fill(beyond, math.nan)


def slowly(prior: AutoregressivePrior) -> AutoregressivePrior:
    prior.takes_windows = True
    prior.stepper = lambda batch, condition: SlowWindows(prior, batch, condition)
    return prior


def drawn(prior, count: int = 5, known=None, *, seed: int = 0, **settings) -> tuple[Tensor, list[int]]:
    """Codes `b n` and the passes of each sample."""
    passes: list[int] = []
    condition = labelled(count, prior)
    codes = sample_codes(
        prior, range(count), condition, seed, SamplingConfig(**settings), known, tell_passes=passes.extend
    )
    return prior.sequence(codes, condition), passes


SETTINGS = [
    {},
    {"guidance": 2.5, "guidance_schedule": "linear"},
    {"temperature": 0.7, "top_k": 4},
    {"top_p": 0.8, "min_p": 0.05},
    {"temperature": 0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", WITH_WINDOWS)
def test_codes_are_those_of_the_steps_whatever_the_window(kind, settings):
    prior = tiny_prior(kind)
    places = prior.code_spec.codes_per_image
    expected, steps = drawn(prior, lookahead="off", **settings)
    assert steps == [places] * 5
    totals = []
    for window in (1, 2, 3, 5, places, places + 4):
        codes, passes = drawn(prior, lookahead=window, **settings)
        assert torch.equal(codes, expected), window
        assert all(math.ceil(places / window) <= number <= places for number in passes)
        assert torch.equal(drawn(prior, 1, lookahead=window, **settings)[0], expected[:1])
        totals.append(sum(passes))
    assert totals[0] > totals[1] >= totals[3]
    assert len(set(passes)) > 1  # samples progress differently


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn", "pixelsnail"])
@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_the_walk_needs_nothing_of_a_prior_but_its_logits(kind, settings):
    """By windows of whole teacher-forced passes, for priors too whose own steppers take none."""
    expected, _ = drawn(tiny_prior(kind), lookahead="off", **settings)
    for window in (2, 4, 40):
        codes, passes = drawn(slowly(tiny_prior(kind)), lookahead=window, **settings)
        assert torch.equal(codes, expected)
        assert max(passes) < expected.shape[1]


@pytest.mark.parametrize("temperature", [1.0, 1e4])
def test_several_grids_draw_codes_of_their_own_vocabularies(temperature):
    """At such a temperature a logit that only stands for no code would be as probable as any."""
    prior = tiny_prior("transformer", spec=SEVERAL)
    expected, _ = drawn(prior, 16, lookahead="off", temperature=temperature)
    for window in (2, 5, 12):
        codes, _ = drawn(prior, 16, lookahead=window, temperature=temperature)
        assert torch.equal(codes, expected)
        prior.code_spec.check(prior.grids_of(codes))


def test_a_prior_that_goes_by_nothing_takes_as_many_passes_as_windows():
    """All codes are as probable, so that the first guess, the uniform number itself, is right everywhere."""
    prior = tiny_prior("transformer")
    with torch.no_grad():
        prior.output.weight.zero_()
    places = prior.code_spec.codes_per_image
    for window in (2, 4, places):
        memory_of(prior).drawn = None
        assert drawn(prior, lookahead=window)[1] == [math.ceil(places / window)] * 5


def test_a_prior_that_is_sure_is_guessed_from_what_it_drew_before():
    """Nothing but the place decides: once seen, all is known."""
    prior = tiny_prior("mingpt")
    with torch.no_grad():
        prior.embedding.weight.zero_()
    first, cold = drawn(prior, 1, lookahead=5, temperature=0)
    second, warm = drawn(prior, 1, lookahead=5, temperature=0, seed=1)
    assert torch.equal(first, second)
    assert warm == [3]
    assert cold > warm


@pytest.mark.parametrize("window", [2, 4, 15])
def test_known_codes_are_guessed_right(window):
    prior = tiny_prior("transformer")
    everything = random_codes(4, prior)
    known = everything[0].clone()
    known[:, 1, 1:3] = -1  # a hole
    known[0, 2] = -1  # and another, of one sample
    expected, _ = drawn(prior, 4, (known,), lookahead="off")
    codes, passes = drawn(prior, 4, (known,), lookahead=window)
    assert torch.equal(codes, expected)
    assert max(passes[1:]) <= passes[0] <= 8  # of 15 places
    slow = slowly(tiny_prior("transformer"))
    codes, passes = drawn(slow, 4, everything, lookahead=window)
    assert torch.equal(codes, slow.sequence(everything, labelled(4, slow)))
    assert passes == [1] * 4


def ahead_of(prior, stepper, uniforms: Tensor) -> Ahead:
    vocabularies = [prior.code_spec.grids[0].vocabulary] * uniforms.shape[1]
    return Ahead(stepper, uniforms, SamplingConfig(), None, Memory(), vocabularies)


def test_logits_after_a_wrong_guess_or_beyond_the_end_need_not_be_finite():
    prior, batch = tiny_prior("transformer"), 4
    uniforms = torch.rand(batch, 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    condition = labelled(batch, prior)
    steps = SlowWindows(prior, batch, condition)
    expected: list[Tensor] = []
    for place in range(15):
        logits = steps.next(expected[-1] if expected else None)
        expected.append(draw(logits, uniforms[:, place : place + 1], SamplingConfig()))
    right = torch.cat(expected, dim=1)
    wrong_guesses = 0

    class Poisoned(SlowWindows):  # its logits beyond the end are nan anyway
        def window(self, first: Tensor, previous: Tensor) -> Tensor:
            nonlocal wrong_guesses
            logits = super().window(first, previous)
            places = first[:, None] + torch.arange(previous.shape[1])
            before = right.gather(1, (places - 1).clamp(0, 14))
            wrong = ((previous != before) & (places > 0)).cumsum(dim=1) > 0
            wrong_guesses += int(wrong.sum())
            return logits.masked_fill(wrong[..., None], math.nan)

    result = ahead_of(prior, Poisoned(prior, batch, condition), uniforms).walk(4, 15)
    assert torch.equal(result.codes, right)
    assert bool(result.finite)
    assert wrong_guesses > 20


@pytest.mark.parametrize("spec", [None, SEVERAL], ids=["one grid", "several"])
def test_damaged_weights_are_told(spec):
    prior = tiny_prior("transformer", spec=spec)
    with torch.no_grad():
        prior.blocks[1].feed_forward.down.weight.fill_(math.nan)
    with pytest.raises(UserError, match="the prior's logits are not finite"):
        drawn(prior, lookahead=4)


def test_draws_on_the_edge_of_rounding_are_left_to_the_steps(monkeypatch):
    prior = tiny_prior("transformer")
    expected, _ = drawn(prior, lookahead="off")
    without, few = drawn(prior, lookahead=4)
    monkeypatch.setattr(drawing, "EDGE", 0.5)
    codes, passes = drawn(prior, lookahead=4)
    assert torch.equal(codes, expected)
    assert torch.equal(without, expected)
    assert min(passes) > 15 >= max(few)  # the windows' and then all the steps


def test_a_draw_is_sure_unless_its_number_lies_next_to_a_border():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(1, 5, 4)
    uniforms = torch.tensor([[0.05, 0.1 + 1e-8, 0.3 - 1e-8, 0.6 + 1e-4, 0.99]], dtype=torch.float64)
    codes, sure = draw_and_sure(logits, uniforms, SamplingConfig())
    assert torch.equal(codes, draw(logits, uniforms, SamplingConfig()))
    assert codes.tolist() == [[0, 1, 1, 3, 3]]
    assert sure.tolist() == [[True, False, False, True, True]]
    close = torch.tensor([[[1.0, 1.0 + 1e-7, 0.0], [1.0, 1.1, 0.0]]])
    codes, sure = draw_and_sure(close, uniforms[:, :2], SamplingConfig(temperature=0))
    assert codes.tolist() == [[1, 1]]
    assert sure.tolist() == [[False, True]]


def lengths_of(pace: Pace, seconds_of, batches: int) -> list[int]:
    """What is taken, batch after batch, by a machine that takes so long at each length."""
    taken = []
    for _ in range(batches):
        taken.append(pace.length())
        pace.note(taken[-1], seconds_of(taken[-1]))
    return taken


def test_the_faster_length_is_found_and_kept():
    slow = lengths_of(Pace(64), lambda length: 1.0 if length == 1 else 1.5, 40)
    assert sum(length > 1 for length in slow) == 3  # a first one that does not count, and two that show it
    assert slow[8:] == [1] * 32
    close = lengths_of(Pace(64), lambda length: 1.0, 60)
    assert close[30:] == [1] * 30  # a window must be faster, not as fast
    best_of_8 = {1: 1.0, 4: 0.6, 8: 0.5, 16: 0.55}
    found = lengths_of(Pace(64), best_of_8.__getitem__, 60)
    assert found[50:] == [8] * 10
    assert set(lengths_of(Pace(4), best_of_8.__getitem__, 60)[30:]) == {4}
    assert set(lengths_of(Pace(3), best_of_8.__getitem__, 60)) == {1}  # no window may be tried


def test_what_was_found_is_looked_at_again():
    pace = Pace(4)
    lengths_of(pace, {1: 1.0, 4: 0.5}.__getitem__, 30)
    assert pace.best == 4
    lengths_of(pace, {1: 0.5, 4: 1.0}.__getitem__, 100)
    assert pace.best == 1


def test_auto_takes_turns_by_whole_batches_and_never_other_codes(monkeypatch):
    prior = tiny_prior("transformer")
    expected, _ = drawn(prior, lookahead="off")
    taken = []
    for _ in range(8):
        codes, passes = drawn(prior)
        assert torch.equal(codes, expected)
        taken.append(max(passes))
    assert taken[0] == taken[2] == 15
    assert taken[1] < 15
    pace = pace_of(prior, 5, SamplingConfig(), anything_known=False)
    assert pace.used >= {1, 4}
    pace.challenge(None)
    pace.best = 1
    monkeypatch.setattr(sampling, "draw_ahead", None)  # not called any more
    assert torch.equal(drawn(prior)[0], expected)
    assert pace_of(prior, 64, SamplingConfig(), anything_known=False).length() == 1
    assert pace_of(prior, 64, SamplingConfig(), anything_known=False).other is None  # a CPU gains nothing there


def test_auto_is_off_where_rounding_could_show():
    auto, four = SamplingConfig(), SamplingConfig(lookahead=4)
    prior = tiny_prior("transformer")
    assert looks_ahead(prior, auto)
    assert not looks_ahead(prior, SamplingConfig(precision="tf32"))
    assert looks_ahead(prior, SamplingConfig(precision="tf32", lookahead=4))
    with torch.autocast("cpu", torch.bfloat16):
        assert not looks_ahead(prior, auto)
        assert looks_ahead(prior, four)
    assert not looks_ahead(prior.bfloat16(), auto)
    assert not looks_ahead(tiny_prior("pixelcnn"), auto)


def test_memory_goes_with_its_prior_and_holds_few_sequences():
    prior = tiny_prior("transformer")
    for seed in range(9):
        drawn(prior, lookahead=4, seed=seed)
    assert memory_of(prior).drawn.shape == (lookahead.REMEMBERED, 15)
    assert prior in lookahead.MEMORIES
    count = len(lookahead.MEMORIES)
    del prior
    assert len(lookahead.MEMORIES) < count


def test_first_guesses_fall_among_the_codes_drawn_at_their_place():
    memory, vocabularies = Memory(), torch.tensor([8, 4])
    uniforms = torch.tensor([[0.0, 0.99], [0.5, 0.5]], dtype=torch.float64)
    assert memory.guesses(uniforms, vocabularies).tolist() == [[0, 3], [4, 2]]
    memory.remember(torch.tensor([[5, 1], [7, 1], [6, 0], [7, 0]]))
    assert memory.guesses(uniforms, vocabularies).tolist() == [[5, 1], [7, 1]]


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        ("transformer", {"lookahead": 0}, "lookahead=0, expected at least 1 code, auto, or off"),
        ("pixelcnn", {"lookahead": 4}, "lookahead=4 for a pixelcnn prior, which takes no windows of codes; leave it"),
        ("maskgit", {"lookahead": 4}, "lookahead=4 for a maskgit prior, which takes no windows"),
    ],
)
def test_impossible_lookahead_is_refused(kind, setting, message):
    prior = tiny_prior(kind)
    with pytest.raises(UserError, match=message):
        drawn(prior, **setting)


def test_lookahead_is_no_setting_that_samples_depend_on():
    assert SamplingConfig(lookahead=8).record == SamplingConfig(lookahead="off").record
    assert "temperature" in SamplingConfig().record


@pytest.mark.parametrize("kind", ["hierarchical", "var", "rq_transformer", "pixelsnail"])
def test_priors_without_windows_go_step_by_step(kind):
    prior = tiny_prior(kind)
    assert not prior.takes_windows
    assert drawn(prior)[1] == [prior.steps] * 5
