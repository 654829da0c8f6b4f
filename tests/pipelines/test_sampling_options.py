"""Settings of sampling that a command is given, beside those that a model records."""

from __future__ import annotations

import pytest

from pipelines.sampling_options import SamplingOptions
from stage2_prior.sampling_config import SamplingConfig

OWN = SamplingConfig(order="confidence", choice_temperature=2.0, temperature=0.9, steps=10, mask_schedule="linear")
REMASKING = SamplingConfig(remask="loop", remask_rate=0.1, remask_filled=0.8, guidance=2.0)


def test_what_is_left_out_is_the_models_own():
    assert SamplingOptions().sampling(OWN) == OWN
    assert SamplingOptions(steps=5).sampling(REMASKING).remask_filled == 0.8
    assert SamplingOptions(choice_temperature=1.0).sampling(OWN).choice_temperature == 1.0


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [
        (OWN, {"order": "halton"}, {"order": "halton"}),
        (OWN, {"order": "entropy", "choice_temperature": 0.5}, {"order": "entropy", "choice_temperature": 0.5}),
        (OWN, {"remask": "cap", "remask_rate": 0.2}, {"remask": "cap", "remask_rate": 0.2}),
        (REMASKING, {"remask": "off"}, {}),
        (REMASKING, {"remask": "rescale"}, {"remask": "rescale"}),
        (REMASKING, {"order": "confidence"}, {"order": "confidence"}),
    ],
)
def test_another_way_to_fill_in_leaves_nothing_of_the_models_own(own, asked, expected):
    """Not the choice temperature of another order, nor the rate of another re-masking; all else stays."""
    found = SamplingOptions(**asked).sampling(own)
    for name in ("order", "choice_temperature", "remask", "remask_rate", "remask_start", "remask_end", "remask_filled"):
        assert getattr(found, name) == expected.get(name, getattr(SamplingConfig(), name)), name
    assert (found.temperature, found.steps, found.guidance) == (own.temperature, own.steps, own.guidance)
    assert found.mask_schedule == own.mask_schedule


def test_another_schedule_of_guidance_does_not_rise_as_late_as_the_models():
    own = SamplingConfig(guidance=3.0, guidance_schedule="cosine", guidance_power=2.75)
    assert SamplingOptions(guidance_schedule="constant").sampling(own).guidance_power == 1
    assert SamplingOptions(guidance_schedule="linear", guidance_power=2.0).sampling(own).guidance_power == 2
    assert SamplingOptions(guidance_schedule="cosine", guidance=2.0).sampling(own).guidance_power == 2.75


@pytest.mark.parametrize(
    ("own", "asked"),
    [(OWN, {"order": "confidence"}), (OWN, {"remask": "off"}), (REMASKING, {"remask": "loop"})],
)
def test_the_models_own_way_asked_for_by_name_keeps_what_the_model_says_of_it(own, asked):
    assert SamplingOptions(**asked).sampling(own) == own
