"""Weights of vq-vae-2-pytorch's PixelSNAIL give its logits here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.imports.pixelsnail import build_pixelsnail
from stage2_prior.priors.pixelsnail import PixelSNAIL
from tests.golden import Golden, golden


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def logits(prior: PixelSNAIL, codes: Tensor, condition: Condition) -> Tensor:
    """b k h w, as the original has them."""
    return rearrange(prior.logits((codes,), condition), "b (h w) k -> b k h w", h=codes.shape[1])


def assert_same_logits(prior: PixelSNAIL, data: Golden, condition: Condition, suffix: str = "") -> None:
    codes = data.inputs["codes"]
    ours = logits(prior, codes, condition)
    assert_same(ours, data.outputs[f"logits{suffix}"])
    # The original has logits of the first rows alone too. They are those of the whole grid.
    assert_same(ours[:, :, : data.config["rows"]], data.outputs[f"logits{suffix}_rows"])
    assert_same(F.cross_entropy(ours, codes), data.outputs[f"loss{suffix}"])
    assert_same(prior.nll((codes,), condition).mean(), data.outputs[f"loss{suffix}"])


def assert_same_causality(prior: PixelSNAIL, data: Golden) -> None:
    codes = data.inputs["codes"]
    other = codes.clone()
    other[:, data.config["rows"], 2] = (other[:, data.config["rows"], 2] + 1) % 24
    moved = (logits(prior, codes, Condition()) - logits(prior, other, Condition())).abs().amax(dim=(0, 1)) > 0
    assert torch.equal(moved.long(), data.outputs["changed"].long())


def unconditional(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the bottom prior, as the original computes without a condition."""
    return {name: tensor for name, tensor in weights.items() if "cond" not in name}


def test_the_top_prior():
    data = golden("pixelsnail_top")
    prior = build_pixelsnail(data.weights, data.config)
    assert prior.code_spec.describe() == "8x8 codes of 24 (64x64x3 images)"
    assert (prior.given, prior.num_classes) == ((), 0)
    assert_same_logits(prior, data, Condition())
    assert_same_causality(prior, data)


def test_the_bottom_prior():
    data = golden("pixelsnail_bottom")
    prior, condition = build_pixelsnail(data.weights, data.config), Condition(codes=(data.inputs["cond"],))
    assert prior.code_spec.describe() == "8x8 codes of 24 (32x32x3 images)"
    assert [(grid.height, grid.width, grid.vocabulary) for grid in prior.given] == [(4, 4, 24)]
    assert_same(prior.features(condition), data.outputs["cond_features"])
    assert_same_logits(prior, data, condition, "_cond")


def test_the_bottom_prior_without_a_condition():
    data = golden("pixelsnail_bottom")
    prior = build_pixelsnail(unconditional(data.weights))
    assert_same_logits(prior, data, Condition())
    assert_same_causality(prior, data)


@pytest.mark.parametrize("name", ["pixelsnail_top", "pixelsnail_bottom"])
def test_shapes_tell_what_the_config_says(name):
    data = golden(name)
    prior = build_pixelsnail(data.weights)
    assert prior.config == build_pixelsnail(data.weights, {**data.config, "dropout": 0.1}).config
    assert prior.config.blocks == prior.config.residual_blocks == 2
    assert prior.config.attention == data.config["attention"]
    assert prior.config.output_blocks == data.config["n_out_res_block"]
    assert build_pixelsnail(data.weights, {"dropout": 0.3}).config.dropout == 0.3


def test_a_config_of_other_weights_is_refused():
    data = golden("pixelsnail_top")
    with pytest.raises(UserError, match="the config has n_class=512, but the weights are of a model with n_class=24"):
        build_pixelsnail(data.weights, {"n_class": 512})


def test_missing_and_unexpected_names_are_told():
    data = golden("pixelsnail_top")
    weights = {name: tensor for name, tensor in data.weights.items() if not name.startswith("vertical.conv.conv.bias")}
    with pytest.raises(UserError, match=r"missing: vertical.conv.conv.bias; not expected: extra\.weight\)"):
        build_pixelsnail({**weights, "extra.weight": torch.zeros(1)})


def test_weights_of_something_else_are_refused():
    with pytest.raises(UserError, match=r"the weights have no blocks.0.resblocks.0.conv1.* of 4 axes: .* check --kind"):
        build_pixelsnail({"encoder.weight": torch.zeros(3)})
