"""Images larger than the training size: the window, against one place at a time."""

from __future__ import annotations

import pytest
import torch

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from stage2_prior import sliding_window
from stage2_prior.condition import Condition, TextSpec
from stage2_prior.drawing import draw, uniforms_of
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.sliding_window import places, sample_larger_codes, window_logits
from tests.stage2_prior.tiny import condition_for, labelled, random_codes, tiny_prior, tiny_spec

KINDS = ("transformer", "pixelcnn")  # any prior of one grid will do


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_window_covers_all_its_logits_are_those_of_full_attention(kind):
    prior = tiny_prior(kind)
    codes, condition = random_codes(3, prior), condition_for(3, prior)
    at = [place for turn in places(Grid("codes", 3, 5, 11), prior.only_grid()) for place in turn]
    assert {(place.top, place.left) for place in at} == {(0, 0)}
    with torch.no_grad():
        logits = window_logits(prior, codes[0], at, condition)
        expected = prior.logits(codes, condition)[:, [5 * place.row + place.column for place in at]]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sampling", [SamplingConfig(top_k=6), SamplingConfig(guidance=2.5, guidance_schedule="cosine")]
)
def test_of_the_training_size_the_samples_are_those_of_the_prior(kind, sampling):
    prior, condition = tiny_prior(kind), labelled(4, tiny_prior(kind))
    larger = sample_larger_codes(prior, tiny_spec(), range(4), condition, 3, sampling)
    assert torch.equal(larger[0], sample_codes(prior, range(4), condition, 3, sampling)[0])


def test_precision_is_that_of_autocast():
    prior, condition, spec = tiny_prior("transformer"), labelled(4, tiny_prior("transformer")), tiny_spec(4, 7)
    rough = sample_larger_codes(prior, spec, range(4), condition, 3, SamplingConfig(precision="bf16"))
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample_larger_codes(prior, spec, range(4), condition, 3, SamplingConfig())
    assert torch.equal(rough[0], expected[0])
    assert not torch.equal(rough[0], sample_larger_codes(prior, spec, range(4), condition, 3, SamplingConfig())[0])


def slow(prior, spec: CodeSpec, condition: Condition, sampling: SamplingConfig) -> torch.Tensor:
    """Code after code in raster order, each from a window cut out of the image so far."""
    grid, window = spec.grids[0], prior.only_grid()
    count = len(condition.labels)
    uniforms = uniforms_of(7, range(count), grid.size, torch.device("cpu"))
    codes = torch.zeros(count, grid.height, grid.width, dtype=torch.int64)
    for row in range(grid.height):
        for column in range(grid.width):
            top = min(max(row - window.height // 2, 0), grid.height - window.height)
            left = min(max(column - window.width // 2, 0), grid.width - window.width)
            part = codes[:, top : top + window.height, left : left + window.width]
            with torch.no_grad():
                logits = prior.logits((part,), condition)
            number = grid.width * row + column
            here = logits[:, window.width * (row - top) + column - left, None].float()
            codes[:, row, column] = draw(here, uniforms[:, number, None], sampling)[:, 0]
    return codes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(5, 8), (3, 7), (4, 5)])
def test_many_places_at_once_are_drawn_as_if_one_by_one(kind, size, monkeypatch):
    prior, spec = tiny_prior(kind), tiny_spec(*size)
    condition, sampling = labelled(3, prior), SamplingConfig(top_k=8)
    expected = slow(prior, spec, condition, sampling)
    for at_once in (64, 1):
        monkeypatch.setattr(sliding_window, "WINDOWS_AT_ONCE", at_once)
        (codes,) = sample_larger_codes(prior, spec, range(3), condition, 7, sampling)
        assert torch.equal(codes, expected)
    (alone,) = sample_larger_codes(prior, spec, [1], Condition(condition.labels[1:2]), 7, sampling)
    assert torch.equal(alone, expected[1:2])


def test_a_place_is_drawn_after_all_that_its_window_holds_before_it_and_in_few_turns():
    grid, window = Grid("codes", 9, 17, 2), Grid("codes", 4, 6, 2)
    drawn = torch.zeros(9, 17, dtype=torch.bool)
    turns = list(places(grid, window))
    for turn in turns:
        for place in turn:
            before = drawn[place.top : place.top + 4, place.left : place.left + 6].flatten()
            assert before[: place.in_window(window)].all()
            assert not drawn[place.row, place.column]
        for place in turn:
            drawn[place.row, place.column] = True
    assert drawn.all()
    assert len(turns) == 8 * 6 + 17  # rows follow each other a window behind


def test_each_code_costs_one_pass_over_a_window(monkeypatch):
    prior, windows = tiny_prior("transformer"), []
    logits = prior.logits
    monkeypatch.setattr(prior, "logits", lambda codes, c: windows.append(codes[0].shape) or logits(codes, c))
    sample_larger_codes(prior, tiny_spec(4, 7), range(2), labelled(2, prior), 0, SamplingConfig())
    assert sum(shape[0] for shape in windows) == 2 * 28
    assert {tuple(shape[1:]) for shape in windows} == {(3, 5)}


def test_dropout_is_off_and_the_prior_stays_in_training():
    prior = tiny_prior("pixelcnn")
    for module in prior.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    condition, spec = labelled(2, prior), tiny_spec(3, 6)
    expected = sample_larger_codes(prior, spec, range(2), condition, 0, SamplingConfig())
    prior.train()
    assert torch.equal(sample_larger_codes(prior, spec, range(2), condition, 0, SamplingConfig())[0], expected[0])
    assert prior.training


def test_a_caption_holds_for_every_window():
    prior = tiny_prior("transformer", num_classes=0, text=TextSpec(2, 5))
    text, sampling = torch.tensor([[0, 1], [4, 3]]), SamplingConfig(temperature=0)
    both = sample_larger_codes(prior, tiny_spec(4, 6), [0, 1], Condition(text=text), 0, sampling)[0]
    for number in range(2):
        condition = Condition(text=text[number : number + 1])
        alone = sample_larger_codes(prior, tiny_spec(4, 6), [number], condition, 0, sampling)[0]
        assert torch.equal(alone[0], both[number])
    assert not torch.equal(both[0], both[1])


def test_what_cannot_be_drawn_is_refused():
    def attempt(prior, spec, guidance=1.0):
        sample_larger_codes(prior, spec, [0], labelled(1, prior), 0, SamplingConfig(guidance=guidance))

    prior = tiny_prior("transformer")
    with pytest.raises(UserError, match="an image of 8x20 is smaller than the 12x20 that the prior was trained on"):
        attempt(prior, tiny_spec(2, 5))
    with pytest.raises(UserError, match=r"got codes of 6x9 codes of 12 .*, expected one grid of 11 codes"):
        attempt(prior, tiny_spec(6, 9, vocabulary=12))
    with pytest.raises(UserError, match="this prior goes by given codes, which tell of an image of the training size"):
        attempt(tiny_prior("transformer", given=(Grid("map", 2, 2, 3),)), tiny_spec(6, 9))
    with pytest.raises(UserError, match="expected one grid: a transformer prior models one"):
        attempt(
            tiny_prior("transformer", spec=CodeSpec((Grid("a", 2, 2, 3), Grid("b", 2, 2, 3)), 8, 8)), tiny_spec(6, 9)
        )
    with pytest.raises(UserError, match="a var prior draws images of its own size only, expected one that walks the"):
        attempt(tiny_prior("var"), tiny_spec(6, 9))
    with pytest.raises(UserError, match=r"guidance=2.0, expected 1: .* never saw the null label"):
        attempt(tiny_prior("transformer", knows_null_label=False), tiny_spec(6, 9), 2.0)
    with torch.no_grad():
        prior.output.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="the prior's logits are not finite"):
        attempt(prior, tiny_spec(6, 9))
