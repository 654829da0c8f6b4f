"""Halton-MaskGIT's transformer: the published logits, and both of its samplers step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.halton import halton_order
from stage2_prior.imports import KINDS, FirstStage
from stage2_prior.priors.halton_maskgit import HaltonMaskGIT
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.golden import Golden, golden_frontier, real_shapes_frontier


def imported(reference: Golden, **changes: Any) -> HaltonMaskGIT:
    return KINDS["halton-maskgit"].build(reference.weights, {**reference.config["model"], **changes}, None)


def hidden_as_here(codes: Tensor, vocabulary: int) -> Tensor:
    """`b h w` with the number of the mask -> `b n` with -1."""
    return codes.flatten(1).masked_fill(codes.flatten(1) == vocabulary, -1)


def test_logits_are_the_originals_with_and_without_the_class():
    reference = golden_frontier("halton_transformer")
    prior, inputs = imported(reference), reference.inputs
    labels = torch.where(inputs["drop"].bool(), prior.num_classes, inputs["label"])
    assert (inputs["code"] == 30).any()
    with torch.no_grad():
        sequence = hidden_as_here(inputs["code"], 30)
        logits = prior.logits_and_mask(sequence, Condition(labels))
        masked = prior.masked_logits(sequence, Condition(labels))
    torch.testing.assert_close(logits, reference.outputs["logits"], rtol=1e-5, atol=1e-5)
    assert torch.equal(masked, logits[..., :-1])


@pytest.mark.parametrize("sampler", ["halton", "confidence"])
@pytest.mark.parametrize("noise", ["greedy", "gumbel"])
def test_each_step_of_the_published_samplers_predicts_the_same(sampler, noise):
    """Led along the published codes, the guided logits give the published predictions. The published temperature
    multiplies the logits; its mask number may be drawn, and is clamped to a code at the end alone."""
    reference = golden_frontier("halton_transformer")
    config, outputs, prior = reference.config, reference.outputs, imported(reference)
    labels, steps = reference.inputs["gen_label"], config["steps"]
    predicted, masks = (outputs[f"{sampler}/{noise}/{name}"] for name in ("pred", "masks"))
    guidance = SamplingConfig(
        guidance=1 + config["w"], guidance_schedule="constant" if sampler == "halton" else "linear"
    )
    state = torch.full((2, 16), 30)
    for step in range(steps):
        sequence = hidden_as_here(state[:, None], 30)
        with torch.no_grad():
            label = prior.logits_and_mask(sequence, Condition(labels))
            null = prior.logits_and_mask(sequence, Condition(torch.full((2,), 5)))
        logits = null + guidance.guidance_at(step, steps) * (label - null)
        if sampler == "halton":
            warm = 0.5 if step < config["temp_warmup"] else 1.0
            rise = (config["sm_temp_max"] - config["sm_temp_min"]) * step / (steps - 1)
            temperature = 1 / (warm * (config["sm_temp_min"] + rise))  # as it is named and signed here
        else:
            temperature = 1 / config["sm_temp"]
        logits = (logits / temperature).log_softmax(-1)
        if noise == "gumbel":
            logits = logits + reference.inputs["gumbel"][step]
        ours = logits.argmax(-1)
        assert torch.equal(ours, predicted[step].flatten(1)), step
        # masks: of the Halton sampler what is written; of the other what is hidden then. The published one writes all
        # that is known anew at every step, which SurestFirst, as MaskGIT's own code, does not.
        written = masks[step].flatten(1).bool()
        if sampler == "confidence":
            written = ~written | (state != 30)
        state = torch.where(written, ours, state)
    assert torch.equal(state.clamp(max=29), outputs[f"{sampler}/{noise}/codes"].flatten(1))


def test_places_are_written_in_the_published_order():
    outputs = golden_frontier("halton_transformer").outputs
    masks, done = outputs["halton/greedy/masks"].flatten(2), 0
    for written in masks[:, 0]:
        count = int(written.sum())
        assert set(written.nonzero().flatten().tolist()) == set(halton_order(4, 4)[done : done + count].tolist())
        done += count
    assert done == 16


def test_names_of_compiled_and_parallel_models_are_known_and_it_samples():
    reference = golden_frontier("halton_transformer")
    weights = {f"module._orig_mod.{name}": tensor for name, tensor in reference.weights.items()}
    prior = KINDS["halton-maskgit"].build(weights, reference.config["model"], None)
    codes = sample_codes(prior, range(3), Condition(torch.tensor([0, 3, 4])), 0, SamplingConfig(guidance=2.5, steps=6))
    prior.code_spec.check(codes)
    kept = sample_codes(prior, range(3), Condition(torch.tensor([0, 3, 4])), 0, SamplingConfig(remask="cap", steps=40))
    prior.code_spec.check(kept)


@pytest.mark.parametrize(
    ("name", "heads", "width"),
    [("tiny", 6, 384), ("small", 6, 512), ("base", 12, 768), ("large", 16, 1024)],
)
def test_published_sizes_are_told_by_the_weights_alone(name, heads, width):
    shapes = real_shapes_frontier(f"halton_256_{name}")
    with torch.device("meta"):
        weights = {key: torch.empty(shape) for key, shape in shapes.items()}
        prior = KINDS["halton-maskgit"].build(weights, None, None)
    assert (prior.config.heads, prior.config.width, prior.num_classes) == (heads, width, 1000)
    assert prior.code_spec.describe().startswith("16x16 codes of 16384 (256x256x3 images)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proj": 2}, "the original's proj=2 is not supported: expected 1"),
        ({"depth": 3}, "the config has depth=3, but the weights are of a model with depth=2"),
        ({"heads": 5}, "heads=5 of 4 numbers make 20, but the weights have 24"),
        ({"heads": None}, "no published model has 2 layers of width 24, .* give n_head"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        imported(golden_frontier("halton_transformer"), **change)


def test_another_first_stage_and_other_weights_are_refused():
    reference = golden_frontier("halton_transformer")
    other = FirstStage(CodeSpec((Grid("codes", 4, 4, 29),), 64, 64))
    with pytest.raises(UserError, match="a prior of 16 codes of 30, but the first stage makes 4x4 codes of 29"):
        KINDS["halton-maskgit"].build(reference.weights, reference.config["model"], other)
    with pytest.raises(UserError, match=r"the weights have no tok_emb\.weight: they are not those of Halton-MaskGIT"):
        KINDS["halton-maskgit"].build({"a": torch.zeros(1)}, None, None)
