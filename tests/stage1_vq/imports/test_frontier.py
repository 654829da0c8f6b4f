"""TiTok, TA-TiTok, IBQ, MaskGIT's VQ-GAN and Open-MAGVIT2 by their original implementations' own numbers: their weights
here give their latents, codes, images, losses and gradients; published sizes are told by the weights; other models are
refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from common.model_io import load_pretrained
from common.tensor_files import save_tensors
from pipelines.captions import CaptionEncoder
from pipelines.commands.import_weights import ImportConfig, import_weights
from stage1_vq.autoencoders import (
    AUTOENCODERS,
    MaskGITVQGANConfig,
    OpenMAGVIT2,
    OpenMAGVIT2Config,
    TATiTok,
    TATiTokConfig,
    TiTok,
    TwoStageTiTok,
    TwoStageTiTokConfig,
)
from stage1_vq.imports import KINDS
from tests.clip import save_clip
from tests.golden import Golden, golden_frontier, real_shapes_frontier
from tests.stage1_vq.test_import_golden import close


def titok(name: str = "titok_vq") -> tuple[TiTok, Golden]:
    reference = golden_frontier(name)
    return KINDS["titok"].build(reference.weights, reference.config), reference


def titok_two_stage() -> tuple[TwoStageTiTok, Golden]:
    reference = golden_frontier("titok_two_stage")
    return KINDS["titok"].build(reference.weights, reference.config), reference


def of_theirs(images: Tensor) -> Tensor:
    """Their pixels, from 0 to 1, as ours."""
    return 2 * images - 1


@torch.no_grad()
def test_titok_has_the_originals_latents_codes_and_images():
    model, reference = titok()
    out, images = reference.outputs, of_theirs(reference.inputs["x"])
    close(model.latents(images), out["z"], 1e-5)
    assert torch.equal(model.encode(images)[0], out["indices"])
    close(model.quantizer.codes_to_latents((out["indices"],)), out["quant"], 1e-5)
    close((model.decoder(out["quant"]) + 1) / 2, out["decoder_out"], 1e-5)
    close((model.decode((out["indices"],)) + 1) / 2, out["recon_from_tokens"].clamp(0, 1), 1e-5)


def test_titok_has_the_originals_losses_and_gradients():
    model, reference = titok()
    out, images = reference.outputs, of_theirs(reference.inputs["x"])
    output = model(images)
    quantizer_loss = output.losses["commitment_loss"] + output.losses["codebook_loss"]
    close(output.losses["commitment_loss"], out["commitment_loss"], 1e-5)
    close(output.losses["codebook_loss"], out["codebook_loss"], 1e-5)
    total = ((output.reconstruction + 1) / 2 * reference.inputs["cotangent"]).sum() + quantizer_loss
    close(total, out["loss_total"], 1e-4)
    leaves = {
        "decoder.conv_out.weight": model.decoder.conv_out.weight,
        "decoder.ln_pre.weight": model.decoder.transformer.norm_before.weight,
        "encoder.conv_out.weight": model.encoder.output.weight,
        "encoder.ln_pre.weight": model.encoder.transformer.norm_before.weight,
        "quantize.embedding.weight": model.quantizer.codebook,
    }
    assert {f"grad/{name}" for name in leaves} == {name for name in out if name.startswith("grad/")}
    for name, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
        expected = out[f"grad/{name}"]
        # The last layer is theirs times 2, and so its gradient a half of theirs.
        ours = gradient.view_as(expected) * (2 if name == "decoder.conv_out.weight" else 1)
        close(ours, expected, 1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_titok_in_two_stages_has_the_originals_latents_codes_mixtures_and_images():
    model, reference = titok_two_stage()
    out, images = reference.outputs, of_theirs(reference.inputs["x"])
    close(model.latents(images), out["z"], 5e-5)
    codes = model.encode(images)
    assert torch.equal(codes[0], out["indices"])
    z_q = model.quantizer.codes_to_latents(codes)
    close(z_q, out["quant"], 5e-5)
    close(model.decoder.logits(z_q), out["decoder_out"], 5e-5)
    close(model.decoder.mixture(z_q), out["pixel_quantized"], 5e-5)
    close((model.decoded(codes) + 1) / 2, out["recon"], 5e-5)
    close((model(images).reconstruction + 1) / 2, out["recon_from_tokens"], 5e-5)
    close((model.decode(codes) + 1) / 2, out["recon"].clamp(0, 1), 5e-5)


def test_titok_in_two_stages_has_the_originals_losses_and_gradients():
    model, reference = titok_two_stage()
    out = reference.outputs
    output = model(of_theirs(reference.inputs["x"]))
    close(output.losses["commitment_loss"], out["commitment_loss"], 5e-5)
    close(output.losses["codebook_loss"], out["codebook_loss"], 5e-5)
    total = ((output.reconstruction + 1) / 2 * reference.inputs["cotangent"]).sum()
    close(total, out["loss_total"], 1e-4)
    leaves = {
        "decoder.ffn.2.bias": model.decoder.head[2].bias,
        "decoder.ln_pre.weight": model.decoder.transformer.norm_before.weight,
        "pixel_decoder.conv_out.weight": model.decoder.pixels.conv_out.weight,
        "pixel_quantize.embedding.weight": model.decoder.codebook,
    }
    assert {f"grad/{name}" for name in leaves} == {name for name in out if name.startswith("grad/")}
    for name, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
        expected = out[f"grad/{name}"]
        # The last layer is theirs times 2, and so its gradient a half of theirs.
        close(gradient * (2 if name.startswith("pixel_decoder") else 1), expected, 1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "codes", "width"),
    [
        ("titok_l32", "1x32 codes of 4096 (256x256x3 images)", 1024),
        ("titok_b64", "1x64 codes of 4096 (256x256x3 images)", 768),
        ("titok_s128", "1x128 codes of 4096 (256x256x3 images)", 512),
    ],
)
def test_published_sizes_of_titok_in_two_stages_are_told_by_the_weights_alone(name, codes, width):
    with torch.device("meta"):
        model = KINDS["titok"].build(without_values(name))
    assert model.code_spec().describe() == codes
    assert (model.config.encoder_width, model.config.decoder_width) == (width, width)
    l32 = TwoStageTiTokConfig(quantizer=model.config.quantizer)
    pixel = [name for name in vars(l32) if name.startswith("pixel_")]
    assert all(getattr(model.config, name) == getattr(l32, name) for name in (*pixel, "norm_groups"))
    assert name != "titok_l32" or model.config == l32


def test_a_pixel_decoder_of_other_patches_is_refused():
    reference = golden_frontier("titok_two_stage")
    weights = {name: tensor for name, tensor in reference.weights.items() if not name.startswith("pixel_decoder.up.2")}
    with pytest.raises(UserError, match="has 2 levels, which do not make patches of 4 pixels"):
        KINDS["titok"].build(weights, reference.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_legacy": False}, "in two stages with is_legacy: false"),
        ({"finetune_decoder": False}, "not trained on pixels"),
    ],
)
def test_other_forms_of_titok_in_two_stages_are_refused(change, message):
    reference = golden_frontier("titok_two_stage")
    vq = {**reference.config["model"]["vq_model"], **change}
    with pytest.raises(UserError, match=message):
        KINDS["titok"].build(reference.weights, {**reference.config, "model": {"vq_model": vq}})


@pytest.mark.parametrize(
    ("name", "codes", "sizes"),
    [
        ("titok_bl64_vq8k", "1x64 codes of 8192 (256x256x3 images)", (768, 12, 12, 1024, 24, 16)),
        ("titok_bl128_vq8k", "1x128 codes of 8192 (256x256x3 images)", (768, 12, 12, 1024, 24, 16)),
    ],
)
def test_published_sizes_of_titok_are_told_by_the_weights_alone(name, codes, sizes):
    with torch.device("meta"):
        model = KINDS["titok"].build(without_values(name))
    assert model.code_spec().describe() == codes
    found = tuple(
        getattr(model.config, f"{half}_{size}")
        for half in ("encoder", "decoder")
        for size in ("width", "blocks", "heads")
    )
    assert found == sizes
    assert (model.config.patch, model.quantizer.dim, model.config.nested) == (16, 64, None)


def without_values(name: str) -> dict[str, Tensor]:
    shapes = real_shapes_frontier(name)
    return {key: torch.empty([side for side in shape if isinstance(side, int)]) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("titok_vae", "weights of a TiTok of continuous tokens"),
        ("tatitok_vq", "weights of a TA-TiTok, whose decoder reads a caption beside the codes: give --kind tatitok"),
    ],
)
def test_relatives_of_titok_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        titok(name)


def test_a_width_that_was_not_published_asks_for_its_heads():
    reference = golden_frontier("titok_vq")
    config = {key: value for key, value in reference.config.items() if key != "vit"}
    with pytest.raises(UserError, match=r"a TiTok of width 32 is none of the published ones .* give it as vit.heads"):
        KINDS["titok"].build(reference.weights, config)


def test_titok_is_imported_as_the_hub_has_it_by_the_command(tmp_path: Path):
    reference = golden_frontier("titok_vq")
    save_tensors(reference.weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(reference.config))
    files = {"weights": str(tmp_path / "model.safetensors"), "config": str(tmp_path / "config.json")}
    line = import_weights(ImportConfig(kind="titok", **files, out=str(tmp_path / "titok")))
    assert line.startswith("1x8 codes of 64 (16x16x3 images): the titok model is in")
    model = load_pretrained(tmp_path / "titok", AUTOENCODERS).eval()
    with torch.no_grad():
        codes = model.encode(of_theirs(reference.inputs["x"]))
    assert torch.equal(codes[0], reference.outputs["indices"])


# ---- TA-TiTok -------------------------------------------------------------------------------------------------------


def tatitok(no_text: Tensor | None = None) -> tuple[TATiTok, Golden]:
    reference = golden_frontier("tatitok_vq")
    return KINDS["tatitok"].build(reference.weights, reference.config, no_text), reference


@torch.no_grad()
def test_tatitok_has_the_originals_latents_codes_and_images_of_a_caption():
    model, reference = tatitok()
    out, images, text = reference.outputs, of_theirs(reference.inputs["x"]), reference.inputs["text"]
    close(model.latents(images), out["z"], 1e-5)
    codes = model.encode(images)
    assert torch.equal(codes[0], out["indices"])
    z_q = model.quantizer.codes_to_latents(codes)
    close(z_q, out["quant"], 1e-5)
    close((model.decoder(z_q, text) + 1) / 2, out["recon"], 1e-5)
    close((model.decode_with_text(codes, text) + 1) / 2, out["recon_from_tokens"].clamp(0, 1), 1e-5)
    losses = model(images).losses
    close(losses["commitment_loss"], out["commitment_loss"], 1e-5)
    close(losses["codebook_loss"], out["codebook_loss"], 1e-5)


@torch.no_grad()
def test_tatitok_reads_the_empty_caption_where_none_is_given():
    of_one = golden_frontier("tatitok_vq").inputs["text"][1]
    model, reference = tatitok(of_one)
    codes = (reference.outputs["indices"],)
    expected = reference.outputs["recon_from_tokens"][1].clamp(0, 1)
    close((model.decode(codes)[1] + 1) / 2, expected, 1e-5)
    others = model.decode_with_text(codes, of_one.flip(0).expand(2, -1, -1))
    assert (others[1] - model.decode(codes)[1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_step_refreshes_the_codebook_as_the_original_does():
    model, reference = tatitok()
    out, quantizer = reference.outputs, model.quantizer.train()
    assert model.config.quantizer.refresh
    quantized = quantizer(out["z"])
    assert torch.equal(quantized.codes[0], out["train/indices"])
    close(quantized.z_q, out["train/quant"], 1e-5)
    close(sum(quantized.losses.values()), out["train/quantizer_loss"], 1e-5)
    assert torch.equal(quantizer.codebook, reference.weights["quantize.embedding.weight"])  # not before the step
    quantizer.update(steps_per_epoch=10)
    close(quantizer.entries.shares, out["train/after/embed_prob"], 1e-7)
    close(quantizer.codebook, out["train/after/embedding.weight"], 1e-5)


def test_the_published_size_of_tatitok_is_told_by_the_weights_alone():
    """Stand-ins of the shapes of BL-64's TiTok, with a decoder that reads 77 vectors of 768 numbers."""
    weights = without_values("titok_bl64_vq8k")
    weights["decoder.text_guidance_proj.weight"] = torch.empty(1024, 768)
    weights["decoder.text_guidance_proj.bias"] = torch.empty(1024)
    weights["decoder.text_guidance_positional_embedding"] = torch.empty(77, 1024)
    with torch.device("meta"):
        model = KINDS["tatitok"].build({name: tensor.to("meta") for name, tensor in weights.items()})
    assert model.code_spec().describe() == "1x64 codes of 8192 (256x256x3 images)"
    quantizer = replace(TATiTokConfig().quantizer, refresh=False)
    assert model.config == TATiTokConfig(tokens=64, quantizer=quantizer)
    assert model.decoder.transformer.token_positions.shape == (64 + 77, 1024)


def test_weights_that_are_not_tatitoks_are_refused():
    reference = golden_frontier("tatitok_vq")
    with pytest.raises(UserError, match="they are not those of a TA-TiTok; give --kind titok"):
        KINDS["tatitok"].build(golden_frontier("titok_vq").weights, reference.config)
    vae = {**reference.config, "model": {"vq_model": {"quantize_mode": "vae"}}}
    with pytest.raises(UserError, match=r"weights of a TA-TiTok of continuous tokens .* such as tatitok_bl32_vq"):
        KINDS["tatitok"].build(reference.weights, vae)
    message = "tells of a caption in 4 vectors of 12 numbers, expected 5 of 12: name the CLIP"
    with pytest.raises(UserError, match=message):
        tatitok(torch.zeros(4, 12))


def test_tatitok_is_imported_by_the_command_with_what_its_clip_says_of_nothing(tmp_path: Path):
    reference = golden_frontier("tatitok_vq")
    clip = save_clip(tmp_path / "clip", width=12)
    save_tensors(reference.weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(reference.config))
    files = {"weights": str(tmp_path / "model.safetensors"), "config": str(tmp_path / "config.json")}
    line = import_weights(ImportConfig(kind="tatitok", **files, text_encoder=str(clip), out=str(tmp_path / "tatitok")))
    assert line.startswith("1x8 codes of 64 (16x16x3 images): the tatitok model is in")
    model = load_pretrained(tmp_path / "tatitok", AUTOENCODERS).eval()
    assert isinstance(model, TATiTok)
    assert model.captions() == (5, 12, str(clip))
    torch.testing.assert_close(model.decoder.no_text, CaptionEncoder.load(str(clip)).of("", 5))
    with torch.no_grad():
        codes = model.encode(of_theirs(reference.inputs["x"]))
    assert torch.equal(codes[0], reference.outputs["indices"])
    with pytest.raises(UserError, match="--text_encoder is for --kind tatitok"):
        import_weights(ImportConfig(kind="titok", **files, text_encoder=str(clip), out=str(tmp_path / "other")))


# ---- IBQ ------------------------------------------------------------------------------------------------------------


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
