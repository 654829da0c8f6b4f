"""Windows of places, which differ from sample to sample, agree with one pass over the whole image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from codes.spec import CodeSpec, Grid
from stage2_prior.condition import Condition, EmbeddingSpec, TextSpec
from stage2_prior.drawing import draw, uniforms_of
from stage2_prior.priors import PRIORS, LlamaGenConfig, MinGPTConfig, Prior, PriorConfig, TransformerConfig
from stage2_prior.priors.base import NO_CODE
from stage2_prior.sampling import SamplingConfig, sample_codes, with_order
from stage2_prior.stepping import GuidedStepper, GuidedWindowStepper
from tests.stage2_prior.tiny import TINY, condition_for, labelled, random_codes, tiny_prior

SEVERAL = CodeSpec((Grid("top", 1, 2, 5), Grid("bottom", 2, 4, 11), Grid("residual", 2, 4, 7)), 8, 16, 3)
GIVEN = (Grid("depth", 1, 2, 5),)
BATCH = 4


@dataclass
class Case:
    kind: str
    config: PriorConfig | None = None
    spec: CodeSpec | None = None
    classes: int = 4
    facts: dict[str, Any] = field(default_factory=dict)

    def prior(self) -> Prior:
        return tiny_prior(self.kind, self.classes, self.spec, config=self.config, **self.facts)

    def condition(self, prior: Prior, batch: int = BATCH) -> Condition:
        condition = condition_for(batch, prior) if self.classes else Condition()
        codes = tuple(torch.randint(grid.vocabulary, (batch, grid.height, grid.width)) for grid in prior.given)
        text = embeddings = mask = None
        if prior.text is not None:
            text = torch.randint(prior.text.vocabulary, (batch, prior.text.length))
        if prior.embeddings is not None:
            embeddings = torch.randn(batch, prior.embeddings.length, prior.embeddings.width)
            # Of one sample the last does not count, though others do.
            mask = torch.arange(prior.embeddings.length) >= torch.tensor([0, 2, 5, 1])[:batch, None]
            mask[3:, -1] = False
        return Condition(condition.labels, codes or None, text, embeddings, mask)


CASES = {
    "transformer": Case("transformer"),
    "several grids": Case("transformer", spec=SEVERAL),
    "blocks": Case("transformer", TransformerConfig(layers=1, width=64, heads=2), classes=0),
    "blocks and biases": Case("mingpt", MinGPTConfig(layers=1, width=64, heads=2)),
    "shared heads": Case("transformer", TransformerConfig(layers=2, width=32, heads=4, key_value_heads=2)),
    "one head": Case("mingpt", MinGPTConfig(layers=2, width=32, heads=1)),
    "one head of keys": Case("transformer", TransformerConfig(layers=2, width=32, heads=4, key_value_heads=1)),
    "text and given": Case("transformer", facts={"given": GIVEN, "text": TextSpec(9, 3)}),
    "mingpt": Case("mingpt"),
    "given": Case("mingpt", MinGPTConfig(layers=2, width=24, heads=3, unmasked=2), classes=0, facts={"given": GIVEN}),
    "llamagen": Case("llamagen"),
    "captions": Case(
        "llamagen",
        LlamaGenConfig(layers=2, width=24, heads=3, hidden_width=32),
        classes=0,
        facts={"embeddings": EmbeddingSpec(5, 6)},
    ),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def before_places(sequence: Tensor, places: Tensor) -> Tensor:
    """The code before each place, b w; -1 where there is none."""
    number = sequence.shape[1]
    codes = sequence.gather(1, (places - 1).clamp(0, number - 1))
    return torch.where((places > 0) & (places <= number), codes, -1)


@EVERY_CASE
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_windows_and_steps_agree_with_the_teacher_forced_pass(case, autocast, batch):
    torch.manual_seed(0)
    prior = case.prior()
    assert prior.takes_windows
    codes, condition, width = random_codes(batch, prior), case.condition(prior, batch), 3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = prior.logits(codes, condition).float()
        stepper, by_steps = prior.stepper(batch, condition), prior.stepper(batch, condition)
    sequence = prior.sequence(codes, condition)
    number = sequence.shape[1]
    tolerance = 0.2 * float(expected[expected > NO_CODE].std()) if autocast else 1e-5  # bfloat16: three digits
    for place in range(number):
        logits = by_steps.next(sequence[:, place - 1 : place] if place else None)[:, 0]
        assert (logits - expected[:, place, : logits.shape[-1]]).abs().max() < tolerance, place
    first = torch.zeros(batch, dtype=torch.int64)
    while int(first.min()) < number:
        places = first[:, None] + torch.arange(width)
        previous = before_places(sequence, places)
        wrong = torch.where(places > first[:, None], torch.randint_like(previous, 5), previous)
        stepper.window(first, wrong)  # may be asked again with other codes after the first
        logits = stepper.window(first, previous)
        assert logits.shape == (batch, width, expected.shape[-1])
        assert logits.dtype == torch.float32
        for sample, row in enumerate(places.tolist()):
            for column, place in enumerate(row):
                if place < number:
                    difference = (logits[sample, column] - expected[sample, place]).abs().max()
                    assert difference < tolerance, (sample, place)
        first = (first + torch.randint(1, width + 1, (batch,))).clamp(max=number)


@pytest.mark.parametrize("kind", [kind for kind in TINY if getattr(PRIORS[kind], "takes_windows", False)])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_windows_lead_to_the_codes_that_steps_lead_to(kind, guidance):
    """256 samples; each window is asked with the codes that its own logits led to."""
    prior, batch, width = tiny_prior(kind), 256, 4
    sampling = SamplingConfig(guidance=guidance, guidance_schedule="linear")
    condition = labelled(batch, prior)
    drawn = sample_codes(prior, range(batch), condition, 0, sampling)
    if prior.draws_in_any_order:
        condition, _ = with_order(prior, range(batch), condition, 0, None)
    expected = prior.sequence(drawn, condition)
    number = expected.shape[1]
    if guidance == 1:
        stepper = prior.stepper(batch, condition)
    else:
        doubled = prior.stepper(2 * batch, prior.doubled_for_guidance(condition))
        weights = [sampling.guidance_at(step, number) for step in range(number)]
        stepper = GuidedWindowStepper(doubled, weights)
    uniforms = uniforms_of(0, range(batch), number + width, torch.device("cpu"))
    codes = torch.zeros(batch, number + width, dtype=torch.int64)
    for first in range(number):
        places = torch.full((batch, 1), first) + torch.arange(width)
        logits = stepper.window(places[:, 0], before_places(codes, places))
        codes[:, first] = draw(logits[:, :1], uniforms[:, first : first + 1], sampling)[:, 0]
    assert torch.equal(codes[:, :number], expected)


def test_guidance_without_windows_offers_none():
    assert not hasattr(GuidedStepper, "window")
