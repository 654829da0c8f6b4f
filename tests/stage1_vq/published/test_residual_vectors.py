"""Residual nearest codes beside ResidualVQ of vector-quantize-pytorch (`vqp_residualvq`)."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from einops import rearrange
from torch import Tensor

from stage1_vq.quantizers import residual
from stage1_vq.quantizers.codebook import Codebook
from stage1_vq.quantizers.nearest import NearestQuantizerConfig
from stage1_vq.quantizers.residual import ResidualQuantizer, ResidualQuantizerConfig
from tests.golden import Golden, golden

VARIANTS = ["plain", "rot", "shared", "proj", "uneven", "dropout"]


def reference() -> Golden:
    return golden("vqp_residualvq")


def load_layer(layer: Codebook, weights: dict[str, Tensor], name: str) -> None:
    layer.codebook.copy_(weights[f"{name}._codebook.embed"][0])
    layer.vector_sums.copy_(weights[f"{name}._codebook.embed_avg"][0])
    layer.cluster_sizes.copy_(weights[f"{name}._codebook.cluster_size"][0])


def peer(data: Golden, variant: str, gradient_through: Literal["sum", "layers"] = "sum") -> ResidualQuantizer:
    """Our quantizer with the weights of the variant."""
    config = data.config[variant]
    uneven = isinstance(config["codebook_size"], list)
    layer = NearestQuantizerConfig(
        codebook_size=16 if uneven else config["codebook_size"],
        dim=config.get("codebook_dim", config["dim"]),
        commitment_weight=1.0,
        decay=0.8,
        gradient="straight-through" if config.get("rotation_trick") is False else "rotation",
        revive_after=0,
    )
    quantizer = ResidualQuantizer(
        ResidualQuantizerConfig(
            depth=len(config["codebook_size"]) if uneven else config["num_quantizers"],
            layer=layer,
            codebook_sizes=tuple(config["codebook_size"]) if uneven else (),
            shared_codebook=config.get("shared_codebook", False),
            dim=config["dim"],
            quantizer_dropout=float(config.get("quantize_dropout", False)),
            gradient_through=gradient_through,
        )
    )
    with torch.no_grad():
        for number, ours in enumerate(quantizer.layers):
            load_layer(ours, data.weights, f"{variant}.layers.{number}")
        if variant == "proj":
            for name, ours in (("project_in", quantizer.project_in), ("project_out", quantizer.project_out)):
                ours.weight.copy_(data.weights[f"proj.{name}.weight"][:, :, None, None])
                ours.bias.copy_(data.weights[f"proj.{name}.bias"])
    return quantizer


def as_map(vectors: Tensor) -> Tensor:
    return rearrange(vectors, "b n d -> b d n 1")


def as_vectors(z: Tensor) -> Tensor:
    return rearrange(z, "b d n 1 -> b n d")


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_rest_as_vector_quantize_pytorch(variant):
    data = reference()
    quantizer, x = peer(data, variant).eval(), as_map(data.inputs[f"{variant}.x"])
    quantized = quantizer(x)
    codes = rearrange(list(quantized.codes), "q b n 1 -> b n q")
    assert torch.equal(codes, data.outputs[f"{variant}/eval/indices"])
    assert_same(as_vectors(quantized.z_q), data.outputs[f"{variant}/eval/quantized"])
    from_codes = quantizer.codes_to_latents(quantized.codes)
    assert_same(as_vectors(from_codes), data.outputs[f"{variant}/eval/output_from_indices"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_as_vector_quantize_pytorch(variant, monkeypatch):
    data = reference()
    quantizer, x = peer(data, variant), as_map(data.inputs[f"{variant}.x"])
    depth = quantizer.config.depth
    indices = data.outputs[f"{variant}/train/indices"]
    kept = int((indices[0, 0] >= 0).sum())  # -1 marks the layers that were dropped
    assert kept == (2 if variant == "dropout" else depth)
    monkeypatch.setattr(residual, "draw_kept", lambda b, *_: torch.full((b,), kept))
    quantized = quantizer(x)
    codes = rearrange(list(quantized.codes), "q b n 1 -> b n q")
    assert torch.equal(codes[..., :kept], indices[..., :kept])
    assert_same(as_vectors(quantized.z_q), data.outputs[f"{variant}/train/quantized"])
    if kept == depth:
        assert_same(quantized.losses["commitment_loss"], data.outputs[f"{variant}/train/losses"].mean())
    if variant == "shared":
        return  # there its averages decay once per layer, here once per step: see the next test
    quantizer.update()
    for number, layer in enumerate(list(quantizer.layers)[:kept]):
        after = f"{variant}/train/after/layers.{number}._codebook"
        assert_same(layer.codebook, data.outputs[f"{after}.embed"][0])
        assert_same(layer.vector_sums, data.outputs[f"{after}.embed_avg"][0])
        assert_same(layer.cluster_sizes, data.outputs[f"{after}.cluster_size"][0])


def test_a_shared_codebook_whose_averages_decay_once_per_layer_is_that_of_vector_quantize_pytorch():
    data = reference()
    quantizer, residual = peer(data, "shared").eval(), as_map(data.inputs["shared.x"])
    layer = quantizer.stack()[0]
    steps = []  # what each layer saw: counts k, sums k d
    for grid in quantizer.codes(residual):
        codes, rows = grid.flatten(), rearrange(residual, "b d n 1 -> (b n) d")
        sums = torch.zeros_like(layer.codebook).index_add_(0, codes, rows)
        steps.append((torch.bincount(codes, minlength=len(sums)), sums))
        residual = residual - layer.look_up(grid)
    for counts, sums in steps:
        layer.move(counts, sums)
    after = "shared/train/after/layers.0._codebook"
    assert_same(layer.codebook, data.outputs[f"{after}.embed"][0])
    assert_same(layer.vector_sums, data.outputs[f"{after}.embed_avg"][0])
    assert_same(layer.cluster_sizes, data.outputs[f"{after}.cluster_size"][0])


@pytest.mark.parametrize("variant", ["plain", "rot", "shared", "uneven"])
def test_gradients_layer_by_layer_are_those_of_vector_quantize_pytorch(variant):
    """There the losses of the layers are summed, here they are their mean."""
    data = reference()
    quantizer, x = peer(data, variant, "layers"), as_map(data.inputs[f"{variant}.x"]).requires_grad_()
    quantized = quantizer(x)
    output = (quantized.z_q * as_map(data.inputs[f"{variant}.cotangent"])).sum()
    (output + quantizer.config.depth * quantized.losses["commitment_loss"]).backward()
    assert_same(as_vectors(x.grad), data.outputs[f"{variant}/grad/x"])


def test_the_straight_through_gradient_through_the_sum_is_theirs_without_the_factor_of_the_depth():
    data = reference()
    quantizer, x = peer(data, "plain"), as_map(data.inputs["plain.x"]).requires_grad_()
    quantized = quantizer(x)
    total = (quantized.z_q * as_map(data.inputs["plain.cotangent"])).sum() + quantized.losses["commitment_loss"]
    (quantizer.config.depth * total).backward()
    assert_same(as_vectors(x.grad), data.outputs["plain/grad/x"])
