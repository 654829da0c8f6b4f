"""The MaskGIT generators of TiTok: the published logits and greedy codes, on BERT and on a U-ViT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.imports import KINDS, FirstStage
from stage2_prior.masked_sampling import SurestFirst, codes_per_step, unmask
from stage2_prior.priors.titok_maskgit import TiTokMaskGIT, TiTokMaskGITConfig
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.golden import Golden, golden_frontier, real_shapes_frontier

EACH = pytest.mark.parametrize(("name", "atol"), [("maskgit_imagebert", 2e-4), ("maskgit_uvit", 5e-5)])


def imported(reference: Golden, **changes: Any) -> TiTokMaskGIT:
    generator = {**reference.config["model"]["generator"], **changes}
    return KINDS["titok-maskgit"].build(reference.weights, {"model": {"generator": generator}}, None)


@EACH
def test_logits_are_the_originals_with_and_without_the_class(name, atol):
    reference = golden_frontier(name)
    prior, inputs = imported(reference), reference.inputs
    sequence = inputs["ids"].masked_fill(inputs["ids"] == 24, -1)
    assert (sequence < 0).any()
    for labels, expected in ((inputs["condition"], "logits_cond"), (torch.full((3,), 7), "logits_uncond")):
        with torch.no_grad():
            logits = prior.masked_logits(sequence, Condition(labels))
        torch.testing.assert_close(logits, reference.outputs[expected], rtol=1e-5, atol=atol)


@EACH
def test_greedy_codes_are_the_originals(name, atol):
    """Of the form of guidance that is the same at each step: cond + s (cond - uncond). The published code is sure of a
    code by its logit, which other codes of the place do not count for; all else is that of `SurestFirst`."""
    reference = golden_frontier(name)
    prior, config = imported(reference), reference.config
    labels, null = Condition(reference.inputs["gen_condition"]), Condition(torch.full((3,), 7))
    counts = [codes_per_step(12, config["steps"], prior.hidden_share)] * 3
    numbers = torch.full((3, config["steps"], 12), 0.5)

    def greedy(logits: Tensor, uniforms: Tensor) -> Tensor:
        return logits.argmax(-1)

    def logit(logits: Tensor, codes: Tensor) -> Tensor:
        return logits.gather(2, codes[..., None])[..., 0]

    def logits_of(step: int, sequence: Tensor) -> Tensor:
        label, without = prior.masked_logits(sequence, labels), prior.masked_logits(sequence, null)
        return without + (1 + config["guidance_scale"]) * (label - without)

    fill = SurestFirst(counts, numbers, numbers, 0.0, greedy, certainty=logit)
    codes = unmask(torch.full((3, 12), -1), config["steps"], logits_of, fill)
    assert torch.equal(codes, reference.outputs["generate/constant/greedy"])


def test_what_is_imported_samples_in_any_order():
    reference = golden_frontier("maskgit_uvit")
    prior, condition = imported(reference), Condition(reference.inputs["gen_condition"])
    for sampling in (SamplingConfig(guidance=2.5), SamplingConfig(order="halton"), SamplingConfig(remask="loop")):
        prior.code_spec.check(sample_codes(prior, range(3), condition, 0, sampling))


@pytest.mark.parametrize(
    ("name", "network", "layers", "width", "places"),
    [
        ("titok_l32_generator", "bert", 24, 768, 32),
        ("titok_b64_generator", "bert", 24, 768, 64),
        ("titok_s128_generator", "uvit", 20, 1024, 128),
    ],
)
def test_published_sizes_are_told_by_the_weights_alone(name, network, layers, width, places):
    with torch.device("meta"):
        weights = {key: torch.empty(shape) for key, shape in real_shapes_frontier(name).items()}
        prior = KINDS["titok-maskgit"].build(weights, None, None)
    config = prior.config
    assert (config.network, config.layers, config.width, config.heads) == (network, layers, width, 16)
    assert prior.code_spec.describe() == f"1x{places} codes of 4096 (256x256x3 images)"
    assert prior.num_classes == 1000


def test_an_old_files_buffer_is_passed_over():
    reference = golden_frontier("maskgit_imagebert")
    weights = {**reference.weights, "model.embeddings.position_ids": torch.arange(13)}
    generator = reference.config["model"]["generator"]
    assert KINDS["titok-maskgit"].build(weights, generator, None).config.network == "bert"


@EACH
def test_all_of_a_network_learns(name, atol):
    prior = imported(golden_frontier(name)).train()
    codes = torch.randint(24, (40, 1, 12), generator=torch.Generator().manual_seed(0))
    prior((codes,), Condition(torch.arange(40) % 8)).loss.mean().backward()
    assert [key for key, weight in prior.named_parameters() if not weight.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "the config has hidden_size=64, but the weights are of a model with hidden_size=32"),
        ({"image_seq_len": 13}, "image_seq_len=13, but the weights are of a model with image_seq_len=12"),
        ({"num_attention_heads": None}, "no published model has 3 layers of width 32, .* give n_head"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        imported(golden_frontier("maskgit_imagebert"), **change)


def test_another_first_stage_and_other_weights_are_refused():
    reference = golden_frontier("maskgit_uvit")
    other = FirstStage(CodeSpec((Grid("tokens", 1, 11, 24),), 64, 64))
    with pytest.raises(UserError, match="a prior of 12 codes of 24, but the first stage makes 1x11 codes of 24"):
        KINDS["titok-maskgit"].build(reference.weights, reference.config["model"], other)
    with pytest.raises(UserError, match="they are not those of a MaskGIT generator of TiTok"):
        KINDS["titok-maskgit"].build({"a": torch.zeros(1)}, None, None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"network": "gpt"}, "network=gpt, expected one of bert, uvit"),
        ({"network": "uvit", "layers": 3}, "layers=3 of a uvit, expected an even number"),
        ({"heads": 5}, "width=768 with heads=5, expected a width that is a multiple of heads"),
    ],
)
def test_impossible_sizes_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        TiTokMaskGITConfig(**setting)
