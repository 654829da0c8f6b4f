"""IBQ, MaskGIT's VQ-GAN and Open-MAGVIT2 by their original implementations' own numbers: their weights here give their
latents, codes, images, losses and gradients; published sizes are told by the weights; other models are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from einops import rearrange

from common.errors import UserError
from common.model_io import load_pretrained
from pipelines.commands.import_weights import ImportConfig, import_weights
from stage1_vq.autoencoders import (
    AUTOENCODERS,
    MaskGITVQGANConfig,
    OpenMAGVIT2,
    OpenMAGVIT2Config,
)
from stage1_vq.imports import KINDS
from tests.golden import Golden, golden_frontier, of_theirs, without_values
from tests.stage1_vq.test_import_golden import close


@pytest.mark.parametrize("averages", [True, False])
@torch.no_grad()
def test_ibq_has_the_originals_latents_codes_and_images_of_either_weights(averages: bool):
    reference = golden_frontier("ibq_tokenizer")
    model = KINDS["ibq"].build(reference.weights, {**reference.config, "use_ema": averages})
    prefix, images = "ema/" if averages else "", reference.inputs["x"]
    out = {name.removeprefix(prefix): value for name, value in reference.outputs.items() if name.startswith(prefix)}
    close(model.latents(images), out["prequant"], 5e-5)
    assert torch.equal(model.encode(images)[0], out["indices"])
    close(model.quantizer.codes_to_latents((out["indices"],)), out["quant"], 5e-5)
    close(model.decoded((out["indices"],)), out["recon"], 5e-5)
    close(model(images).reconstruction, out["recon"], 5e-5)


def test_ibq_has_the_originals_losses_and_gradients():
    """Theirs have beta on the codebook's term, ours and the paper's on the latents'."""
    reference = golden_frontier("ibq_tokenizer")
    model = KINDS["ibq"].build(reference.weights, {**reference.config, "use_ema": False}).train()
    out, images = reference.outputs, reference.inputs["x"]
    losses = model(images).losses
    beta = model.config.quantizer.commitment_weight
    quantizer_loss = losses["index_loss"] + losses["commitment_loss"] / beta + beta * losses["codebook_loss"]
    close(quantizer_loss, out["train/quant_loss"], 5e-5)
    entropy = losses["entropy_loss"] + losses["diversity_loss"]
    close(entropy, model.config.quantizer.entropy_weight * out["train/entropy_loss"], 5e-5)
    total = losses["reconstruction_loss"] + quantizer_loss + entropy
    close(total, out["train/loss_total"], 5e-5)
    leaves = {
        "decoder.conv_out.weight": model.decoder.body.conv_out.weight,
        "encoder.conv_in.weight": model.encoder.body.conv_in.weight,
        "quant_conv.weight": model.encoder.quant_conv.weight,
        "quantize.embedding.weight": model.quantizer.codebook,
    }
    for name, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
        expected = out[f"train/grad_total/{name}"]
        close(gradient, expected, 1e-3 * float(expected.abs().max()))


def test_the_published_size_of_ibq_is_told_by_the_weights_alone():
    with torch.device("meta"):
        model = KINDS["ibq"].build(without_values("ibq_16384"))
    assert model.code_spec().describe() == "16x16 codes of 16384 (256x256x3 images)"
    assert (model.config.width, model.config.multipliers, model.config.attention_levels) == (128, (1, 1, 2, 2, 4), (4,))
    assert model.quantizer.dim == 256


def test_ibq_is_imported_from_a_lightning_file_by_the_command(tmp_path: Path):
    reference = golden_frontier("ibq_tokenizer")
    of_the_loss = {"loss.discriminator.main.0.weight": torch.zeros(2)}
    torch.save({"state_dict": {**reference.weights, **of_the_loss}, "epoch": 1}, tmp_path / "ibq.ckpt")
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"params": reference.config}}))
    files = {"weights": str(tmp_path / "ibq.ckpt"), "config": str(tmp_path / "config.yaml")}
    import_weights(ImportConfig(kind="ibq", **files, out=str(tmp_path / "ibq")))
    model = load_pretrained(tmp_path / "ibq", AUTOENCODERS).eval()
    with torch.no_grad():
        codes = model.encode(reference.inputs["x"])
    assert torch.equal(codes[0], reference.outputs["ema/indices"])


# ---- MaskGIT's VQ-GAN -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_maskgits_vqgan_has_the_originals_latents_codes_and_images():
    reference = golden_frontier("maskgit_vqgan")
    model = KINDS["maskgit-vqgan"].build(reference.weights, {**reference.config, "image_size": 32})
    out, images = reference.outputs, of_theirs(reference.inputs["x"])
    indices = rearrange(out["indices"], "b (h w) -> b h w", h=2)
    close(model.latents(images), out["z"], 2e-4)
    assert torch.equal(model.encode(images)[0], indices)
    close(model.quantizer.codes_to_latents((indices,)), out["quant"], 2e-4)
    close((model.decoded((indices,)) + 1) / 2, out["recon"], 2e-4)
    close((model.decode((indices,)) + 1) / 2, out["recon_from_indices"], 2e-4)


def test_maskgits_vqgan_has_the_originals_losses_and_gradients():
    """Theirs have beta on the codebook's term, ours on the latents'."""
    reference = golden_frontier("maskgit_vqgan")
    model = KINDS["maskgit-vqgan"].build(reference.weights, {**reference.config, "image_size": 32})
    out, x = reference.outputs, reference.inputs["x"].clone().requires_grad_()
    output = model(of_theirs(x))
    beta = model.config.quantizer.commitment_weight
    codebook_loss = output.losses["commitment_loss"] / beta + beta * output.losses["codebook_loss"]
    close(codebook_loss, out["codebook_loss"], 2e-4)
    total = ((output.reconstruction + 1) / 2 - x.detach()).abs().mean() + codebook_loss
    close(total, out["loss_total"], 2e-4)
    leaves = {
        "decoder.conv_out.weight": (model.decoder.conv_out.weight, 2),  # theirs times 2
        "encoder.conv_in.weight": (model.encoder.conv_in.weight, 1),
        "quantize.embedding.weight": (model.quantizer.codebook, 1),
    }
    found = torch.autograd.grad(total, [weight for weight, _ in leaves.values()])
    for (name, (_, factor)), gradient in zip(leaves.items(), found, strict=True):
        expected = out[f"grad/{name}"]
        close(factor * gradient, expected, 1e-3 * float(expected.abs().max()))


def test_the_published_size_of_maskgits_vqgan_is_told_by_the_weights_alone():
    with torch.device("meta"):
        model = KINDS["maskgit-vqgan"].build(without_values("maskgit_vqgan_f16_256"))
    assert model.code_spec().describe() == "16x16 codes of 1024 (256x256x3 images)"
    assert model.config == MaskGITVQGANConfig()


# ---- Open-MAGVIT2 ---------------------------------------------------------------------------------------------------


def open_magvit2() -> tuple[OpenMAGVIT2, Golden]:
    reference = golden_frontier("openmagvit2_tokenizer")
    return KINDS["open-magvit2"].build(reference.weights, reference.config), reference


@torch.no_grad()
def test_open_magvit2_has_the_originals_latents_codes_and_images():
    """Its channels of z are ours in reverse: thus the code of the same signs is the same number."""
    model, reference = open_magvit2()
    out, images = reference.outputs, reference.inputs["x"]
    close(model.latents(images).flip(1), out["z"], 1e-5)
    (codes,) = model.encode(images)
    assert torch.equal(codes, out["indices"])
    assert torch.equal(model.quantizer.codes_to_latents((codes,)).flip(1), out["quant"])
    assert torch.equal(out["quant"], out["quant_from_indices"])
    close(model.decoded((codes,)), out["recon"], 1e-5)
    close(model(images).reconstruction, out["recon"], 1e-5)


def test_the_factors_of_open_magvit2s_codes_are_their_lower_and_their_upper_bits():
    """As its priors have them."""
    model, reference = open_magvit2()
    lower, _ = reference.config["factorized_bits"]
    with torch.no_grad():
        (codes,) = model.encode(reference.inputs["x"])
    assert torch.equal(codes % 2**lower, reference.outputs["factorized/indices_pre"])
    assert torch.equal(codes // 2**lower, reference.outputs["factorized/indices_post"])


def test_open_magvit2s_quantizer_has_the_originals_losses_and_their_gradient():
    """Of the mean assignment p theirs is -sum p log(p + 1e-5), ours the entropy itself."""
    model, reference = open_magvit2()
    out, scale, weight = reference.outputs, reference.config["train_z_scale"], reference.config["entropy_loss_weight"]
    z = (out["z"].flip(1) * scale).requires_grad_()
    quantized = model.quantizer.train()(z)
    close(quantized.statistics["sample_entropy"], out["train/per_sample_entropy"], 1e-5)
    corners = torch.cartesian_prod(*6 * [torch.tensor([-1.0, 1.0])])
    p = (200 * rearrange(z.detach(), "b d h w -> (b h w) d") @ corners.t()).softmax(1).mean(0)
    close(-(p * (p + 1e-5).log()).sum(), out["train/codebook_entropy"], 1e-5)
    close(quantized.statistics["batch_entropy"], -torch.xlogy(p, p).sum(), 1e-5)
    close(quantized.losses["entropy_loss"], weight * out["train/per_sample_entropy"], 1e-5)
    close(quantized.losses["diversity_loss"], -weight * quantized.statistics["batch_entropy"], 1e-6)
    close(quantized.losses["commitment_loss"], reference.config["commit_weight"] * out["train/commitment"], 1e-5)
    total = (quantized.z_q * reference.inputs["cotangent"].flip(1)).sum() + sum(quantized.losses.values())
    close(total, out["train/loss"], 1e-5 + weight * 64e-5)
    (gradient,) = torch.autograd.grad(total, z)
    expected = out["train/grad/z"]
    close(gradient.flip(1), expected, 1e-4 * float(expected.abs().max()))


def test_open_magvit2_has_the_originals_loss_and_gradients():
    model, reference = open_magvit2()
    out, losses = reference.outputs, model(reference.inputs["x"]).losses
    assert losses.keys() == {"reconstruction_loss", "commitment_loss"}
    total = losses["reconstruction_loss"] + losses["commitment_loss"]
    close(total, out["train/loss_total"], 1e-5)
    leaves = {
        "decoder.adaptive.0.gamma.weight": (model.decoder.adaptive[0].gamma.weight, 1),
        "decoder.adaptive.1.beta.bias": (model.decoder.adaptive[1].beta.bias, None),
        "decoder.conv_out.weight": (model.decoder.conv_out.weight, None),
        "encoder.conv_out.weight": (model.encoder.conv_out.weight, 0),
    }
    assert {f"train/grad_total/{name}" for name in leaves} == {name for name in out if "grad_total" in name}
    found = torch.autograd.grad(total, [weight for weight, _ in leaves.values()])
    for (name, (_, axis)), gradient in zip(leaves.items(), found, strict=True):
        expected = out[f"train/grad_total/{name}"]
        ours = gradient if axis is None else gradient.flip(axis)
        close(ours, expected, 1e-4 * float(expected.abs().max()))


def test_the_published_size_of_open_magvit2_is_told_by_the_weights_alone():
    with torch.device("meta"):
        model = KINDS["open-magvit2"].build(without_values("openmagvit2_256_L"))
    assert model.code_spec().describe() == "16x16 codes of 262144 (256x256x3 images)"
    assert model.config == OpenMAGVIT2Config()


@torch.no_grad()
def test_open_magvit2s_averages_are_taken_when_they_are_asked_for():
    reference = golden_frontier("openmagvit2_tokenizer")
    plain, bias = KINDS["open-magvit2"].build(reference.weights, reference.config), "encoder.conv_out.bias"
    averages = {f"model_ema.{name.replace('.', '')}": weight for name, weight in reference.weights.items()}
    averages["model_ema.encoderconv_outbias"] = torch.arange(6.0)
    both = {**reference.weights, **averages, "model_ema.decay": torch.tensor(0.999)}
    raw = KINDS["open-magvit2"].build(both, reference.config)
    assert torch.equal(raw.encoder.conv_out.bias, plain.encoder.conv_out.bias)
    taken = KINDS["open-magvit2"].build(both, {**reference.config, "use_ema": True})
    assert taken.encoder.conv_out.bias.tolist() == [5, 4, 3, 2, 1, 0]
    assert torch.equal(reference.weights[bias].flip(0), plain.encoder.conv_out.bias)
    with pytest.raises(
        UserError, match=r"use_ema: true, but the weights hold no averages, model_ema\.\*: leave it out"
    ):
        KINDS["open-magvit2"].build(reference.weights, {**reference.config, "use_ema": True})


def test_open_magvit2_is_imported_from_a_lightning_file_by_the_command(tmp_path: Path):
    reference = golden_frontier("openmagvit2_tokenizer")
    of_the_loss = {"loss.discriminator.main.0.weight": torch.zeros(2)}
    torch.save({"state_dict": {**reference.weights, **of_the_loss}, "epoch": 1}, tmp_path / "magvit2.ckpt")
    loss = {"params": {"codebook_weight": 0.3, "commit_weight": 0.5}}
    arguments = {name: reference.config[name] for name in ("ddconfig", "n_embed", "embed_dim", "norm_num_groups")}
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"init_args": {**arguments, "lossconfig": loss}}}))
    files = {"weights": str(tmp_path / "magvit2.ckpt"), "config": str(tmp_path / "config.yaml")}
    line = import_weights(
        ImportConfig(kind="open-magvit2", **files, image_size=(16, 24), out=str(tmp_path / "magvit2"))
    )
    assert line.startswith("4x6 codes of 64 (16x24x3 images): the open_magvit2 model is in")
    model = load_pretrained(tmp_path / "magvit2", AUTOENCODERS).eval()
    assert (model.config.quantizer.entropy_weight, model.config.quantizer.commitment_weight) == (0.3, 0.5)
    with torch.no_grad():
        codes = model.encode(reference.inputs["x"])
    assert torch.equal(codes[0], reference.outputs["indices"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.conv_in.weight": None}, "the weights have no encoder.conv_in.weight and encoder.conv_out.weight"),
        ({"decoder.conv_in.bias": None}, r"not those of this model \(missing: decoder.conv_in.bias\)"),
        ({"quant_conv.weight": torch.zeros(1)}, r"\(not expected: quant_conv.weight\)"),
    ],
)
def test_weights_that_are_not_open_magvit2s_are_refused(change, message):
    reference = golden_frontier("openmagvit2_tokenizer")
    weights = {name: tensor for name, tensor in {**reference.weights, **change}.items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        KINDS["open-magvit2"].build(weights, reference.config)
