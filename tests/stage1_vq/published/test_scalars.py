"""FSQ, LFQ and BSQ beside vector-quantize-pytorch 1.31 (`vqp_*`): codes equal, values and gradients within the
tolerance of each file. Every variant of theirs has its counterpart; these by another name:

| theirs | ours |
|---|---|
| LFQ and FSQ with `num_codebooks` | `grouped` with `dim`, its layer an `lfq` or `fsq` |
"""

from __future__ import annotations

import math

import pytest
import torch
from einops import rearrange

from stage1_vq.quantizers import (
    BSQConfig,
    FSQConfig,
    FSQuantizer,
    GroupedQuantizer,
    GroupedQuantizerConfig,
    LFQConfig,
    build_quantizer,
)
from stage1_vq.quantizers.bits import codes_to_bits
from tests.golden import golden
from tests.stage1_vq.published.beside import (
    FLOOR,
    as_codes,
    as_latents,
    check_projection_gradients,
    close,
    floored_entropy,
    load_projections,
    side_by_side,
    variant_of,
)

# ---- FSQ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["l8555", "even", "proj", "sym", "image"])
def test_fsq(variant):
    config, weights, inputs, outputs = variant_of(golden("vqp_fsq"), variant)
    levels = tuple(config["levels"])
    symmetric = config.get("preserve_symmetry", False)
    quantizer = FSQuantizer(FSQConfig(levels=levels, dim=config.get("dim", len(levels)), preserve_symmetry=symmetric))
    load_projections(quantizer, weights)

    z = as_latents(inputs["x"]).requires_grad_()
    quantized = quantizer(z)
    assert torch.equal(quantized.codes[0], as_codes(outputs["indices"]))
    close(quantized.z_q, as_latents(outputs["quantized"]), 1e-5)
    close(quantizer.codes_to_latents(quantized.codes), as_latents(outputs["codes_from_indices"]), 1e-5)
    (quantized.z_q * as_latents(inputs["cotangent"])).sum().backward()
    close(z.grad, as_latents(outputs["grad/x"]), 1e-5)
    check_projection_gradients(quantizer, outputs, 1e-5)
    if "codebook" in outputs:
        every = torch.arange(math.prod(levels)).view(1, 1, -1)
        close(quantizer.codes_to_latents((every,)), rearrange(outputs["codebook"], "k d -> 1 d 1 k"), 1e-5)


def test_fsq_with_two_codebooks_is_grouped():
    config, weights, inputs, outputs = variant_of(golden("vqp_fsq"), "multi")
    levels = tuple(config["levels"])
    layer = FSQConfig(levels=levels, dim=len(levels))
    quantizer = GroupedQuantizer(GroupedQuantizerConfig(groups=config["num_codebooks"], dim=config["dim"], layer=layer))
    load_projections(quantizer, weights)
    z = as_latents(inputs["x"]).requires_grad_()
    quantized = quantizer(z)
    assert torch.equal(side_by_side(quantized.codes), outputs["indices"])
    close(quantized.z_q, as_latents(outputs["quantized"]), 1e-5)
    (quantized.z_q * as_latents(inputs["cotangent"])).sum().backward()
    close(z.grad, as_latents(outputs["grad/x"]), 1e-5)
    check_projection_gradients(quantizer, outputs, 1e-5)


# ---- LFQ and BSQ ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "proj", "image", "spherical", "scaled"])
def test_lfq(variant):
    """Entropies with their floor from the dense table, which reproduces the file; ours, without it, are a little more:
    each of k probabilities makes a difference from 0 to FLOOR / e. test_lfq.py has ours beside the table without it."""
    config, weights, inputs, outputs = variant_of(golden("vqp_lfq"), variant)
    kind = BSQConfig if config.get("spherical") else LFQConfig
    k, entropy_weight = config["codebook_size"], config.get("entropy_loss_weight", 0.1)
    diversity = config.get("diversity_gamma", 1.0)
    bits = int(math.log2(k))
    scaled = {"corner": "codebook_scale", "soft_clamp": "soft_clamp_input_value"}
    quantizer = build_quantizer(
        kind(
            **{ours: config[theirs] for ours, theirs in scaled.items() if theirs in config},
            bits=bits,
            dim=config["dim"],
            commitment_weight=config.get("commitment_loss_weight", 0.0),
            entropy_weight=entropy_weight,
            diversity=diversity,
            inverse_temperature=10,
            entropy_bits=bits,
        )
    )
    load_projections(quantizer, weights)

    z = as_latents(inputs["x"]).requires_grad_()
    quantized = quantizer(z)
    assert torch.equal(quantized.codes[0], as_codes(outputs["train/indices"]))
    assert torch.equal(quantizer.codes(z)[0], as_codes(outputs["eval/indices"]))
    close(quantized.z_q, as_latents(outputs["train/quantized"]), 1e-5)
    close(quantizer.codes_to_latents(quantized.codes), as_latents(outputs["codes_from_indices"]), 1e-5)

    rows = rearrange(quantizer.lookup_vectors(z), "b bits h w -> (b h w) bits")
    every = quantizer.corners(codes_to_bits(torch.arange(k).view(k, 1, 1), bits)).flatten(1)
    probabilities = (-10 * torch.cdist(rows, every).square()).softmax(1)
    sample, batch = floored_entropy(probabilities).mean(), floored_entropy(probabilities.mean(0))
    close(sample, outputs["train/per_sample_entropy"], 1e-5)
    close(batch, outputs["train/batch_entropy"], 1e-5)
    for ours, theirs in (("sample_entropy", sample), ("batch_entropy", batch)):
        assert -1e-5 <= quantized.statistics[ours] - theirs <= k * FLOOR / math.e
    torch.testing.assert_close(
        quantized.losses["entropy_loss"], entropy_weight * quantized.statistics["sample_entropy"]
    )
    loss = entropy_weight * (sample - diversity * batch)
    if "commitment_loss" in quantized.losses:
        close(quantized.statistics["quantization_error"], outputs["train/commitment"], 1e-5)
        loss = loss + quantized.losses["commitment_loss"]
    close(loss, outputs["train/aux_loss"], 1e-5)

    ((quantized.z_q * as_latents(inputs["cotangent"])).sum() + loss).backward()
    close(z.grad, as_latents(outputs["grad/x"]), 1e-5)
    check_projection_gradients(quantizer, outputs, 1e-5)


def test_lfq_with_two_codebooks_is_grouped():
    """Entropies as in `test_lfq`: each codebook's, of which the file has the mean."""
    config, weights, inputs, outputs = variant_of(golden("vqp_lfq"), "multi")
    bits = int(math.log2(config["codebook_size"]))
    layer = LFQConfig(bits=bits, dim=bits, commitment_weight=config["commitment_loss_weight"], inverse_temperature=10)
    quantizer = GroupedQuantizer(GroupedQuantizerConfig(groups=config["num_codebooks"], dim=config["dim"], layer=layer))
    load_projections(quantizer, weights)
    z = as_latents(inputs["x"]).requires_grad_()
    quantized = quantizer(z)
    assert torch.equal(side_by_side(quantized.codes), outputs["train/indices"])
    assert torch.equal(side_by_side(quantizer.codes(z)), outputs["eval/indices"])
    close(quantized.z_q, as_latents(outputs["train/quantized"]), 1e-5)
    close(quantizer.codes_to_latents(quantized.codes), as_latents(outputs["codes_from_indices"]), 1e-5)
    close(quantized.statistics["quantization_error"], outputs["train/commitment"], 1e-5)

    every = 2 * codes_to_bits(torch.arange(2**bits).view(-1, 1, 1), bits).flatten(1).float() - 1
    found = []
    for part in quantizer.parts(z):
        rows = rearrange(part, "b d n 1 -> (b n) d")
        probabilities = (-10 * torch.cdist(rows, every).square()).softmax(1)
        found.append(torch.stack([floored_entropy(probabilities).mean(), floored_entropy(probabilities.mean(0))]))
    sample, batch = torch.stack(found).mean(0)
    close(sample, outputs["train/per_sample_entropy"], 1e-5)
    close(batch, outputs["train/batch_entropy"], 1e-5)
    for ours, theirs in (("sample_entropy", sample), ("batch_entropy", batch)):
        assert -1e-5 <= quantized.statistics[ours] - theirs <= 2**bits * FLOOR / math.e
    loss = 0.1 * (sample - batch) + quantized.losses["commitment_loss"]
    close(loss, outputs["train/aux_loss"], 1e-5)
    ((quantized.z_q * as_latents(inputs["cotangent"])).sum() + loss).backward()
    close(z.grad, as_latents(outputs["grad/x"]), 1e-5)
    check_projection_gradients(quantizer, outputs, 1e-5)
