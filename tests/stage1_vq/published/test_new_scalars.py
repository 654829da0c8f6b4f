"""FSP, the binary mapper, and rotations and noise of FSQ and LFQ, beside vector-quantize-pytorch 1.32 (`vqp132_*`):
codes equal, values and gradients within 1e-5.

What theirs draw is drawn by ours from the same numbers. Not among ours:

| theirs | ours |
|---|---|
| BinaryMapper: bit 0 is the least significant | the first bit is the most significant, as elsewhere here |
| ResidualFSQ and ResidualLFQ with rotations: looked up without turning back | turned back |
| FSP's kurtosis target: 0 | that of the distribution, which is 0 for a normal one |
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from stage1_vq.quantizers import (
    BinaryMapper,
    BinaryMapperConfig,
    FSPConfig,
    FSPQuantizer,
    FSQConfig,
    FSQuantizer,
    LFQConfig,
    LFQuantizer,
    ResidualScalarConfig,
    ResidualScalarQuantizer,
    binary_mapper,
    fsp,
    fsq,
)
from stage1_vq.quantizers.bits import codes_to_bits
from tests.golden import golden_frontier
from tests.stage1_vq.published.beside import (
    ATOL,
    FLOOR,
    as_codes,
    as_latents,
    check_projection_gradients,
    close,
    draws_from,
    load_projections,
    variant_of,
)

# ---- FSP ------------------------------------------------------------------------------------------------------------

MOMENTS = {"none": 0, "kurt": 4}  # theirs by name; the others are mean and variance


@pytest.mark.parametrize("variant", ["tanh", "inv", "normal", "laplace", "cauchy"])
def test_fsp(variant, monkeypatch):
    config, weights, inputs, outputs = variant_of(golden_frontier("vqp132_fsp"), variant)
    arguments = config["args"]
    levels = tuple(arguments["levels"])
    norm = arguments.get("vector_norm", "var_tanh")
    quantizer = FSPQuantizer(
        FSPConfig(
            levels=levels,
            dim=arguments.get("dim", len(levels)),
            distribution=arguments.get("act_name", "tanh"),
            quantized_share=arguments.get("quantize_rate", 0.0),
            as_latents=arguments.get("need_inv_act", False),
            moments=MOMENTS.get(norm, 2),
        )
    )
    load_projections(quantizer, weights)
    z = as_latents(inputs["x"]).requires_grad_()
    b, _, h, w = z.shape

    def recorded(name: str) -> Tensor:
        return rearrange(inputs[name], "(b h w) d -> b d h w", b=b, h=h, w=w)

    draws_from(monkeypatch, fsp, "uniform", [recorded("uniform_mask"), recorded("uniform_perturb")])
    quantized = quantizer(z)
    assert torch.equal(quantized.codes[0].view_as(outputs["train/indices"]), outputs["train/indices"])
    close(quantized.z_q, as_latents(outputs["train/quantized"]))
    loss = sum(quantized.losses.values(), torch.zeros(()))
    close(loss, outputs["train/norm_loss"])
    ((quantized.z_q * as_latents(inputs["cotangent"])).sum() + loss).backward()
    close(z.grad, as_latents(outputs["grad/x"]))
    check_projection_gradients(quantizer, outputs, ATOL)

    found = quantizer.eval()(z)
    assert torch.equal(found.codes[0].view_as(outputs["eval/indices"]), outputs["eval/indices"])
    close(found.z_q, as_latents(outputs["eval/quantized"]))
    close(quantizer.codes_to_latents(found.codes), as_latents(outputs["eval/codes_from_indices"]))


# ---- BinaryMapper ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["b4", "b3"])
def test_binary_mapper(variant, monkeypatch):
    """Their output is one-hot: our vectors are then the unit ones, in the order of their codes."""
    config, _, inputs, outputs = variant_of(golden_frontier("vqp132_binary_mapper"), variant)
    bits = config["args"]["bits"]
    quantizer = BinaryMapper(
        BinaryMapperConfig(
            bits=bits,
            dim=bits,
            embedding_dim=2**bits,
            temperature=config["temperature"],
            free_nats=config["args"].get("kl_loss_threshold", math.log(2)),
        )
    )
    last_first = codes_to_bits(torch.arange(2**bits).view(-1, 1, 1), bits).flatten(1)
    theirs = (last_first * 2 ** torch.arange(bits)).sum(1)  # the number that they give to each of our codes
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.eye(2**bits)[theirs])
    # Our first bit is the most significant: with the bits as they are given, ours is their code read backwards.
    z = as_latents(inputs["logits"]).requires_grad_()
    draws_from(monkeypatch, binary_mapper, "uniform", [rearrange(inputs["uniform"], "(b n) d -> b d n 1", b=2)])
    quantized = quantizer(z)
    close(quantized.z_q, as_latents(outputs["train/one_hot"]))
    close(quantized.losses["kl_loss"], outputs["train/aux_loss"])
    ((quantized.z_q * as_latents(inputs["cotangent"])).sum() + quantized.losses["kl_loss"]).backward()
    close(z.grad, as_latents(outputs["grad/logits"]))

    found = quantizer.eval()(z)
    close(found.z_q, as_latents(outputs["eval/one_hot"]))
    assert torch.equal(theirs[found.codes[0]], as_codes(outputs["eval/indices"]))


# ---- FSQ and LFQ ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fsq_noise", "fsq_rot", "fsq_rot_proj"])
def test_fsq_with_rotation_or_noise(variant, monkeypatch):
    config, weights, inputs, outputs = variant_of(golden_frontier("vqp132_fsq_rot"), variant)
    arguments = config["args"]
    levels = tuple(arguments["levels"])
    quantizer = FSQuantizer(
        FSQConfig(
            levels=levels,
            dim=arguments.get("dim", len(levels)),
            preserve_symmetry=arguments.get("preserve_symmetry", False),
            noise_dropout=arguments.get("noise_dropout", 0.0),
            orthogonal_rotation=arguments.get("orthogonal_rotation", False),
        )
    )
    load_projections(quantizer, weights)
    if "orthogonal_rot" in weights:
        quantizer.rotation.copy_(weights["orthogonal_rot"])
    if "uniform_mask" in inputs:
        recorded = [rearrange(inputs[name], "b n 1 d -> b d n 1") for name in ("uniform_mask", "uniform_noise")]
        draws_from(monkeypatch, fsq, "uniform", recorded)
    z = as_latents(inputs["x"]).requires_grad_()
    quantized = quantizer(z)
    assert torch.equal(quantized.codes[0], as_codes(outputs["train/indices"]))
    close(quantized.z_q, as_latents(outputs["train/quantized"]))
    (quantized.z_q * as_latents(inputs["cotangent"])).sum().backward()
    theirs = as_latents(outputs["grad/x"])
    if "uniform_mask" in inputs:
        # Their clamp to 1 takes the gradient of numbers without noise too, whose outermost level rounds to 1 + 1e-7.
        lost = (theirs == 0) & (recorded[0] >= arguments["noise_dropout"])
        assert 0 < lost.sum() < lost.numel() // 4
        assert (quantized.z_q[lost].abs() > 0.999).all()
        theirs = torch.where(lost, z.grad, theirs)
    close(z.grad, theirs)
    check_projection_gradients(quantizer, outputs, ATOL)

    found = quantizer.eval()(z)
    assert torch.equal(found.codes[0], as_codes(outputs["eval/indices"]))
    close(found.z_q, as_latents(outputs["eval/quantized"]))
    close(quantizer.codes_to_latents(found.codes), as_latents(outputs["eval/codes_from_indices"]))


def test_lfq_with_rotation():
    config, weights, inputs, outputs = variant_of(golden_frontier("vqp132_fsq_rot"), "lfq_rot")
    arguments = config["args"]
    bits = int(math.log2(arguments["codebook_size"]))
    weight = arguments["entropy_loss_weight"]
    quantizer = LFQuantizer(
        LFQConfig(
            bits=bits,
            dim=arguments["dim"],
            commitment_weight=arguments["commitment_loss_weight"],
            entropy_weight=weight,
            orthogonal_rotation=True,
        )
    )
    quantizer.rotation.copy_(weights["orthogonal_rot"])
    z = as_latents(inputs["x"]).requires_grad_()
    quantized = quantizer(z)
    assert torch.equal(quantized.codes[0], as_codes(outputs["train/indices"]))
    close(quantized.z_q, as_latents(outputs["train/quantized"]))
    close(quantizer.codes_to_latents(quantized.codes), as_latents(outputs["eval/codes_from_indices"]))

    rows = rearrange(quantizer.lookup_vectors(z), "b bits h w -> (b h w) bits")
    every = quantizer.corners(codes_to_bits(torch.arange(2**bits).view(-1, 1, 1), bits)).flatten(1)
    soft = (-100 * torch.cdist(rows, every).square()).softmax(1)

    def entropy(probabilities: Tensor) -> Tensor:
        return -(probabilities * probabilities.clamp(min=FLOOR).log()).sum(-1)

    loss = weight * (entropy(soft).mean() - entropy(soft.mean(0))) + quantized.losses["commitment_loss"]
    close(loss, outputs["train/aux_loss"])
    ((quantized.z_q * as_latents(inputs["cotangent"])).sum() + loss).backward()
    close(z.grad, as_latents(outputs["grad/x"]))


@pytest.mark.parametrize("variant", ["rfsq", "rfsq_rot", "rlfq_rot"])
def test_residual_scalars(variant):
    """Entropies with their floor of 1e-5 differ from ours by far less than the tolerance, at a weight of 0.01."""
    config, weights, inputs, outputs = variant_of(golden_frontier("vqp132_residual"), variant)
    arguments = config["args"]
    rotated = arguments.get("orthogonal_rotation", False)
    if "levels" in arguments:
        levels = tuple(arguments["levels"])
        layer: Any = FSQConfig(levels=levels, dim=len(levels), preserve_symmetry=True, orthogonal_rotation=rotated)
    else:
        bits = int(math.log2(arguments["codebook_size"]))
        layer = LFQConfig(
            bits=bits,
            dim=bits,
            commitment_weight=arguments["commitment_loss_weight"],
            entropy_weight=arguments["entropy_loss_weight"],
            orthogonal_rotation=rotated,
        )
    depth = arguments["num_quantizers"]
    quantizer = ResidualScalarQuantizer(ResidualScalarConfig(depth=depth, layer=layer, dim=arguments["dim"]))
    load_projections(quantizer, weights)
    if rotated:
        for number, each in enumerate(quantizer.stack()):
            each.rotation.copy_(weights[f"layers.{number}.orthogonal_rot"])
    z = as_latents(inputs["x"]).requires_grad_()
    quantized = quantizer(z)
    assert torch.equal(torch.stack([grid.squeeze(-1) for grid in quantized.codes], -1), outputs["train/indices"])
    close(quantized.z_q, as_latents(outputs["train/quantized"]))
    losses = depth * sum(quantized.losses.values(), torch.zeros(()))
    if "train/losses" in outputs:
        close(losses, outputs["train/losses"].sum())
    ((quantized.z_q * as_latents(inputs["cotangent"])).sum() + losses).backward()
    close(z.grad, as_latents(outputs["grad/x"]))
    check_projection_gradients(quantizer, outputs, ATOL)
    found = quantizer.eval()(z)
    close(found.z_q, as_latents(outputs["eval/quantized"]))
    torch.testing.assert_close(quantizer.codes_to_latents(found.codes), found.z_q)
