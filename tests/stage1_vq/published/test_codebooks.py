"""SimVQ, Gumbel-softmax and the nearest code beside vector-quantize-pytorch 1.31 (`vqp_*`), taming-transformers and
LlamaGen: codes equal, values and gradients within the tolerance of each file. ResidualVQ's are in
test_residual_vectors.py and quantizers/test_grouped.py. Every variant of theirs has its counterpart; these by another
name:

| theirs | ours |
|---|---|
| VectorQuantize `heads`, `heads_one` | `grouped` with `dim` for the projections, the latter with `shared_codebook` |
| ResidualVQ `shared_codebook` | averages decay once per step, theirs once per layer, which our parts can do too |
| taming's `remap` to a list of used codes | an import keeps the codes as they are; a table says which is which |
| taming's and diffusers' "legacy" loss | has beta on the codebook's term: our weights can say it |
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange

from stage1_vq.quantizers import (
    GroupedQuantizer,
    GroupedQuantizerConfig,
    GumbelQuantizer,
    GumbelQuantizerConfig,
    NearestQuantizer,
    NearestQuantizerConfig,
    SimVQConfig,
    SimVQuantizer,
)
from stage1_vq.quantizers.bits import entropy
from stage1_vq.quantizers.codebook_losses import mean_soft_assignment
from stage1_vq.quantizers.gradients import Rotation, StraightThrough
from stage1_vq.quantizers.soft_codes import soft_statistics
from tests.golden import golden
from tests.stage1_vq.published.beside import (
    as_codes,
    as_latents,
    check_projection_gradients,
    close,
    floored_entropy,
    load_projections,
    side_by_side,
    variant_of,
)

# ---- SimVQ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["rot", "ste", "frozen", "mlp", "image"])
def test_simvq(variant):
    config, weights, inputs, outputs = variant_of(golden("vqp_simvq"), variant)
    quantizer = SimVQuantizer(
        SimVQConfig(
            codebook_size=config["codebook_size"],
            dim=config["dim"],
            frozen_dim=config.get("frozen_codebook_dim"),
            hidden_dim=config.get("mlp"),
            commitment_weight=config.get("input_to_quantize_commit_loss_weight", 0.25),
            gradient="rotation" if config.get("rotation_trick", True) else "straight-through",
        )
    )
    quantizer.load_state_dict(weights, strict=False)

    z = as_latents(inputs["x"]).requires_grad_()
    quantized = quantizer(z)
    assert torch.equal(quantized.codes[0], as_codes(outputs["indices"]))
    close(quantized.z_q, as_latents(outputs["quantized"]), 1e-5)
    close(quantizer.codes_to_latents(quantized.codes), as_latents(outputs["codes_from_indices"]), 1e-5)
    # Their commitment_weight multiplies both terms.
    loss = config.get("commitment_weight", 1.0) * torch.stack(list(quantized.losses.values())).sum()
    close(loss, outputs["loss"], 1e-5)
    ((quantized.z_q * as_latents(inputs["cotangent"])).sum() + loss).backward()
    close(z.grad, as_latents(outputs["grad/x"]), 1e-5)
    for name, weight in quantizer.named_parameters():
        close(weight.grad, outputs[f"grad/{name}"], 1e-5)


# ---- Gumbel ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ["straight-through", "soft"])
def test_gumbel(sample):
    file = golden("taming_gumbelvq")
    config, weights, noise, outputs = file.config, file.weights, file.inputs["gumbel_noise"], file.outputs
    quantizer = GumbelQuantizer(
        GumbelQuantizerConfig(
            codebook_size=config["n_embed"],
            dim=config["embed_dim"],
            sample=sample,
            kl_weight=config["kl_weight"],
            kl_warmup_steps=0,
        )
    )
    names = {"logits.weight": "proj.weight", "logits.bias": "proj.bias", "embedding.weight": "embed.weight"}
    quantizer.load_state_dict({ours: weights[f"quantize.{theirs}"] for ours, theirs in names.items()}, strict=False)

    z = outputs["prequant"].clone().requires_grad_()
    logits = quantizer.logits_of(z)
    close(logits, outputs["logits"], 5e-5)
    at_rest = quantizer.eval()(z)
    assert torch.equal(at_rest.codes[0], outputs["indices_argmax"])
    close(at_rest.z_q, outputs["quant_argmax"], 5e-5)
    close(at_rest.losses["kl_loss"], outputs["diff"], 5e-5)

    z_q = quantizer.sample(logits, noise, 1.0)
    prefix = "soft/" if sample == "soft" else ""
    close(z_q, outputs[f"{prefix}train_quant"], 5e-5)
    if sample == "straight-through":
        assert torch.equal((logits + noise).argmax(1), outputs["indices"])
        close(z_q, outputs["quant"], 5e-5)
        close(quantizer.sample(logits, noise, config["temp"]), outputs["quant_temp"], 5e-5)
    loss = (z_q * file.inputs["cotangent"]).sum() + at_rest.losses["kl_loss"]
    close(loss, outputs[f"{prefix}loss"], 5e-5)
    loss.backward()
    close(z.grad, outputs[f"{prefix}grad/prequant"], 5e-5)
    close(quantizer.logits.weight.grad, outputs[f"{prefix}grad/quantize.proj.weight"], 5e-5)
    close(quantizer.embedding.weight.grad, outputs[f"{prefix}grad/quantize.embed.weight"], 5e-5)


# ---- nearest --------------------------------------------------------------------------------------------------------


def plain(**settings: Any) -> NearestQuantizer:
    """As published: without k-means and revival."""
    return NearestQuantizer(NearestQuantizerConfig(kmeans_iterations=0, revive_after=0, **settings))


@pytest.mark.parametrize(("variant", "legacy"), [("fixed", False), ("legacy", True), ("v1", True)])
def test_nearest_by_gradient(variant, legacy):
    """Our `commitment_weight` is beta of the paper and of `legacy=False`: on the encoder's term. The legacy form, that
    of public VQ-GAN weights, has beta on the codebook's term and 1 on the encoder's."""
    file = golden("taming_quantizers")
    config, inputs = file.config, file.inputs
    outputs = {name.removeprefix(f"{variant}/"): value for name, value in file.outputs.items()}
    weight = 1.0 if legacy else config["beta"]
    settings = {"codebook_size": config["n_e"], "dim": config["e_dim"], "codebook_update": "gradient"}
    quantizer = plain(commitment_weight=weight, **settings)
    quantizer.load_state_dict({"codebook": file.weights["embedding.weight"]}, strict=False)

    z = inputs["z"].clone().requires_grad_()
    quantized = quantizer(z)
    assert torch.equal(quantized.codes[0].flatten(), outputs["indices"].flatten())
    close(quantized.z_q, outputs["quant"], 1e-5)
    loss = quantized.losses["commitment_loss"]
    loss = loss + (config["beta"] if legacy else 1.0) * quantized.losses["codebook_loss"]
    close(loss, outputs["loss"], 1e-5)
    ((quantized.z_q * inputs["cotangent"]).sum() + loss).backward()
    close(z.grad, outputs["grad/z"], 1e-5)
    close(quantizer.codebook.grad, outputs["grad/embedding.weight"], 1e-5)
    if "perplexity" in outputs:
        quantizer.update()
        close(quantizer.health(steps_per_epoch=1)["perplexity"], outputs["perplexity"], 1e-5)


def test_nearest_by_ema():
    file = golden("taming_emavq")
    config, inputs, outputs = file.config, file.inputs, file.outputs
    settings = {"codebook_size": config["n_embed"], "dim": config["embedding_dim"], "epsilon": config["eps"]}
    quantizer = plain(commitment_weight=config["beta"], decay=config["decay"], **settings)
    names = {"codebook": "weight", "cluster_sizes": "cluster_size", "vector_sums": "embed_avg"}
    quantizer.load_state_dict({ours: file.weights[f"embedding.{name}"] for ours, name in names.items()}, strict=False)

    at_rest = quantizer.eval()(inputs["z0"])
    assert torch.equal(at_rest.codes[0].flatten(), outputs["eval/indices"])
    close(at_rest.z_q, outputs["eval/quant"], 5e-5)
    quantizer.train()
    for step in range(3):
        z = inputs[f"z{step}"].clone().requires_grad_()
        quantized = quantizer(z)
        assert torch.equal(quantized.codes[0].flatten(), outputs[f"step{step}/indices"])
        close(quantized.z_q, outputs[f"step{step}/quant"], 5e-5)
        close(quantized.losses["commitment_loss"], outputs[f"step{step}/loss"], 5e-5)
        if step == 0:
            ((quantized.z_q * inputs["cotangent"]).sum() + quantized.losses["commitment_loss"]).backward()
            close(z.grad, outputs["step0/grad_z"], 5e-5)
        quantizer.update()
        close(quantizer.health(steps_per_epoch=1)["perplexity"], outputs[f"step{step}/perplexity"], 5e-5)
        for ours, name in names.items():
            close(quantizer.state_dict()[ours], outputs[f"step{step}/after/embedding.{name}"], 5e-5)


@pytest.mark.parametrize("variant", ["ste", "rot", "cosine", "cosine_rot", "image"])
def test_nearest_by_ema_beside_vector_quantize(variant):
    config, weights, inputs, outputs = variant_of(golden("vqp_vectorquantize"), variant)
    quantizer = plain(
        codebook_size=config["codebook_size"],
        dim=config["dim"],
        decay=config.get("decay", 0.8),
        commitment_weight=config.get("commitment_weight", 1.0),
        lookup_dim=config.get("codebook_dim"),
        l2_normalise=config.get("use_cosine_sim", False),
        gradient="rotation" if config.get("rotation_trick", True) else "straight-through",
    )
    load_projections(quantizer, weights)
    names = {"codebook": "embed", "cluster_sizes": "cluster_size", "vector_sums": "embed_avg"}
    quantizer.load_state_dict({ours: weights[f"_codebook.{name}"][0] for ours, name in names.items()}, strict=False)

    z = as_latents(inputs["x"])
    at_rest = quantizer.eval()(z)
    assert torch.equal(at_rest.codes[0], as_codes(outputs["eval/indices"]))
    close(at_rest.z_q, as_latents(outputs["eval/quantized"]), 5e-5)
    quantizer.train()
    for step, name in enumerate(["x", "x2"]):
        z = as_latents(inputs[name]).clone().requires_grad_()
        quantized = quantizer(z)
        assert torch.equal(quantized.codes[0], as_codes(outputs[f"step{step}/indices"]))
        close(quantized.z_q, as_latents(outputs[f"step{step}/quantized"]), 5e-5)
        close(quantized.losses["commitment_loss"], outputs[f"step{step}/loss"], 5e-5)
        if step == 0:
            loss = quantized.losses["commitment_loss"]
            ((quantized.z_q * as_latents(inputs["cotangent"])).sum() + loss).backward()
            close(z.grad, as_latents(outputs["grad/x"]), 5e-5)
            check_projection_gradients(quantizer, outputs, 5e-5)
        quantizer.update()
        for ours, theirs in names.items():
            close(quantizer.state_dict()[ours], outputs[f"step{step}/after/_codebook.{theirs}"][0], 5e-5)


def test_nearest_by_gradient_beside_a_learnable_codebook():
    """Theirs is one squared error with gradients to both sides: our two losses, whose value is twice that. Its
    `sync_update_v` adds to the gradient of z_q that share of itself."""
    config, weights, inputs, outputs = variant_of(golden("vqp_vectorquantize"), "learnable")
    quantizer = plain(
        codebook_size=config["codebook_size"], dim=config["dim"], commitment_weight=1.0, codebook_update="gradient"
    )
    quantizer.load_state_dict({"codebook": weights["_codebook.embed"][0]}, strict=False)
    z = as_latents(inputs["x"]).clone().requires_grad_()
    quantized = quantizer(z)
    assert torch.equal(quantized.codes[0], as_codes(outputs["step0/indices"]))
    for loss in quantized.losses.values():
        close(loss, outputs["step0/loss"], 5e-5)
    cotangent = (1 + config["sync_update_v"]) * as_latents(inputs["cotangent"])
    ((quantized.z_q * cotangent).sum() + sum(quantized.losses.values())).backward()
    close(z.grad, as_latents(outputs["grad/x"]), 5e-5)
    close(quantizer.codebook.grad, outputs["grad/_codebook.embed"][0], 5e-5)


def test_a_mask_of_padding():
    config, weights, inputs, outputs = variant_of(golden("vqp_vectorquantize"), "masked")
    quantizer = plain(codebook_size=config["codebook_size"], dim=config["dim"], decay=0.8, commitment_weight=1.0)
    names = {"codebook": "embed", "cluster_sizes": "cluster_size", "vector_sums": "embed_avg"}
    quantizer.load_state_dict({ours: weights[f"_codebook.{name}"][0] for ours, name in names.items()}, strict=False)
    mask = inputs["mask"].bool().unsqueeze(-1)
    at_rest = quantizer.eval()(as_latents(inputs["x"]), mask)
    assert torch.equal(at_rest.codes[0], as_codes(outputs["eval/indices"]))
    close(at_rest.z_q, as_latents(outputs["eval/quantized"]), 5e-5)
    quantizer.train()
    for step, name in enumerate(["x", "x2"]):
        z = as_latents(inputs[name]).clone().requires_grad_()
        quantized = quantizer(z, mask)
        assert torch.equal(quantized.codes[0], as_codes(outputs[f"step{step}/indices"]))
        close(quantized.z_q, as_latents(outputs[f"step{step}/quantized"]), 5e-5)
        close(quantized.losses["commitment_loss"], outputs[f"step{step}/loss"], 5e-5)
        if step == 0:
            output = (quantized.z_q * as_latents(inputs["cotangent"])).sum()
            (output + quantized.losses["commitment_loss"]).backward()
            close(z.grad, as_latents(outputs["grad/x"]), 5e-5)
        quantizer.update()
        for ours, theirs in names.items():
            close(quantizer.state_dict()[ours], outputs[f"step{step}/after/_codebook.{theirs}"][0], 5e-5)


@pytest.mark.parametrize("variant", ["heads", "heads_one"])
def test_heads_are_grouped(variant):
    config, weights, inputs, outputs = variant_of(golden("vqp_vectorquantize"), variant)
    layer = NearestQuantizerConfig(
        codebook_size=config["codebook_size"],
        dim=config["codebook_dim"],
        decay=0.8,
        commitment_weight=1.0,
        gradient="rotation" if config.get("rotation_trick", True) else "straight-through",
        kmeans_iterations=0,
        revive_after=0,
    )
    shared = not config["separate_codebook_per_head"]
    quantizer = GroupedQuantizer(
        GroupedQuantizerConfig(groups=config["heads"], dim=config["dim"], layer=layer, shared_codebook=shared)
    )
    load_projections(quantizer, weights)
    layers = [layer for layer in quantizer.different() if isinstance(layer, NearestQuantizer)]
    assert len(layers) == len(weights["_codebook.embed"])
    names = {"codebook": "embed", "cluster_sizes": "cluster_size", "vector_sums": "embed_avg"}
    for number, layer in enumerate(layers):
        states = {ours: weights[f"_codebook.{name}"][number] for ours, name in names.items()}
        layer.load_state_dict(states, strict=False)

    at_rest = quantizer.eval()(as_latents(inputs["x"]))
    assert torch.equal(side_by_side(at_rest.codes), outputs["eval/indices"])
    close(at_rest.z_q, as_latents(outputs["eval/quantized"]), 5e-5)
    close(quantizer.codes_to_latents(at_rest.codes), as_latents(outputs["eval/quantized"]), 5e-5)
    quantizer.train()
    for step, name in enumerate(["x", "x2"]):
        z = as_latents(inputs[name]).clone().requires_grad_()
        quantized = quantizer(z)
        assert torch.equal(side_by_side(quantized.codes), outputs[f"step{step}/indices"])
        close(quantized.z_q, as_latents(outputs[f"step{step}/quantized"]), 5e-5)
        close(quantized.losses["commitment_loss"], outputs[f"step{step}/loss"], 5e-5)
        if step == 0:
            output = (quantized.z_q * as_latents(inputs["cotangent"])).sum()
            (output + quantized.losses["commitment_loss"]).backward()
            close(z.grad, as_latents(outputs["grad/x"]), 5e-5)
            check_projection_gradients(quantizer, outputs, 5e-5)
        quantizer.update()
        for number, layer in enumerate(layers):
            for ours, theirs in names.items():
                after = outputs[f"step{step}/after/_codebook.{theirs}"][number]
                close(layer.state_dict()[ours], after, 5e-5)


def test_orthogonal_regularisation():
    """Of a codebook that learns by gradient. Theirs has one squared error: the value is half the sum of our two."""
    config, weights, inputs, outputs = variant_of(golden("vqp_vectorquantize"), "ortho")
    quantizer = plain(
        codebook_size=config["codebook_size"],
        dim=config["dim"],
        commitment_weight=1.0,
        codebook_update="gradient",
        gradient="rotation",
        orthogonal_weight=config["orthogonal_reg_weight"],
    )
    quantizer.load_state_dict({"codebook": weights["_codebook.embed"][0]}, strict=False)
    z = as_latents(inputs["x"]).clone().requires_grad_()
    losses = quantizer(z).losses
    close(losses["orthogonal_loss"] / 10, outputs["step0/breakdown/orthogonal_reg"], 5e-5)
    close(losses["commitment_loss"] + losses["orthogonal_loss"], outputs["step0/loss"], 5e-5)
    quantized = quantizer(z)
    assert torch.equal(quantized.codes[0], as_codes(outputs["step0/indices"]))
    close(quantized.z_q, as_latents(outputs["step0/quantized"]), 5e-5)
    ((quantized.z_q * as_latents(inputs["cotangent"])).sum() + sum(quantized.losses.values())).backward()
    close(z.grad, as_latents(outputs["grad/x"]), 5e-5)
    close(quantizer.codebook.grad, outputs["grad/_codebook.embed"][0], 5e-5)


@pytest.mark.parametrize("variant", ["diversity", "ce"])
def test_losses_of_soft_assignments(variant):
    """Their codebooks stand still: an EMA without update here. Theirs has the entropy of each place's mean over the
    batch, with their floor as in `test_lfq`; ours that of the mean over all places."""
    config, weights, inputs, outputs = variant_of(golden("vqp_vectorquantize"), variant)
    weight = config.get("codebook_diversity_loss_weight", 0.0)
    quantizer = plain(
        codebook_size=config["codebook_size"],
        dim=config["dim"],
        commitment_weight=config.get("commitment_weight", 1.0),
        commitment="cross-entropy" if variant == "ce" else "squared-error",
        diversity_weight=weight,
        diversity_temperature=1 / config.get("codebook_diversity_temperature", 100.0),
    )
    quantizer.load_state_dict({"codebook": weights["_codebook.embed"][0]}, strict=False)
    for step, name in enumerate(["x", "x2"]):
        z = as_latents(inputs[name]).clone().requires_grad_()
        quantized = quantizer(z)
        assert torch.equal(quantized.codes[0], as_codes(outputs[f"step{step}/indices"]))
        close(quantized.z_q, as_latents(outputs[f"step{step}/quantized"]), 5e-5)
        loss = quantized.losses["commitment_loss"]
        close(loss, outputs[f"step{step}/breakdown/commitment"] * config.get("commitment_weight", 1.0), 5e-5)
        if variant == "diversity":
            use = [mean_soft_assignment(place, quantizer.codebook, 5.0) for place in rearrange(z, "b d n 1 -> n b d")]
            theirs = -torch.stack([floored_entropy(of_place) for of_place in use]).mean()
            close(theirs, outputs[f"step{step}/breakdown/codebook_diversity"], 5e-5)
            ours = entropy(mean_soft_assignment(rearrange(z, "b d n 1 -> (b n) d"), quantizer.codebook, 5.0))
            torch.testing.assert_close(quantized.losses["diversity_loss"], -weight * ours)
            loss = loss + weight * theirs
        close(loss, outputs[f"step{step}/loss"], 5e-5)
        if step == 0:
            ((quantized.z_q * as_latents(inputs["cotangent"])).sum() + loss).backward()
            close(z.grad, as_latents(outputs["grad/x"]), 5e-5)


def test_taming_remap_is_a_table_of_our_codes():
    file = golden("taming_quantizers")
    used, k = file.inputs["used"].long(), file.config["n_e"]
    quantizer = plain(codebook_size=k, dim=file.config["e_dim"], codebook_update="gradient")
    quantizer.load_state_dict({"codebook": file.weights["embedding.weight"]}, strict=False)
    codes = quantizer.codes(file.inputs["z"])[0].flatten()
    table = torch.full((k,), len(used))
    table[used] = torch.arange(len(used))
    assert torch.equal(table[codes], file.outputs["remap/indices"].flatten())


def test_normalised_codebook_by_gradient_with_entropy_terms():
    """LlamaGen's quantizer: our nearest, and `soft_statistics` for the entropy loss, a softmax of minus squared
    distance over the temperature 0.01. Theirs adds 1e-5 inside the logarithm of the mean."""
    file = golden("llamagen_vq")
    config, outputs = file.config, file.outputs
    codebook = file.weights["quantize.embedding.weight"]
    quantizer = plain(
        codebook_size=len(codebook),
        dim=codebook.shape[1],
        commitment_weight=config["commit_loss_beta"],
        codebook_update="gradient",
        l2_normalise=config["codebook_l2_norm"],
    )
    quantizer.load_state_dict({"codebook": codebook}, strict=False)
    z = outputs["prequant"].clone().requires_grad_()
    quantized = quantizer(z)
    assert torch.equal(quantized.codes[0], outputs["indices"])
    close(quantized.z_q, outputs["quant"], 5e-5)
    close(quantized.losses["codebook_loss"], outputs["train/vq_loss"], 5e-5)
    close(quantized.losses["commitment_loss"], outputs["train/commit_loss"], 5e-5)

    rows = rearrange(quantizer.lookup_vectors(z), "b d h w -> (b h w) d").contiguous()
    sample_entropy, mean = soft_statistics(rows, quantizer.entries.code_vectors(), 2 / 0.01)
    entropy_loss = config["entropy_loss_ratio"] * (sample_entropy + (mean * (mean + 1e-5).log()).sum())
    close(entropy_loss, outputs["train/entropy_loss"], 5e-5)
    ((quantized.z_q * file.inputs["cotangent"]).sum() + sum(quantized.losses.values()) + entropy_loss).backward()
    close(z.grad, outputs["train/grad/prequant"], 5e-5)
    close(quantizer.codebook.grad, outputs["train/grad/embedding"], 5e-5)


def test_rotation_trick():
    file = golden("vqp_rotation_trick")
    for function, value, gradient in ((Rotation, "rotated", "grad_src"), (StraightThrough, "ste", "ste_grad_src")):
        source = file.inputs["src"].clone().requires_grad_()
        rotated = function.apply(source, file.inputs["tgt"])
        close(rotated, file.outputs[value], 1e-3)
        (rotated * file.inputs["cotangent"]).sum().backward()
        close(source.grad, file.outputs[gradient], 1e-3)
