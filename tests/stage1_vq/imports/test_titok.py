"""TiTok in its forms and TA-TiTok by the original implementation's own numbers: its weights here give its latents,
codes, images, losses and gradients; published sizes are told by the weights; other models are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.model_io import load_pretrained
from common.tensor_files import save_tensors
from pipelines.captions import CaptionEncoder
from pipelines.commands.import_weights import ImportConfig, import_weights
from stage1_vq.autoencoders import (
    AUTOENCODERS,
    TATiTok,
    TATiTokConfig,
    TiTok,
    TwoStageTiTok,
    TwoStageTiTokConfig,
)
from stage1_vq.imports import KINDS
from tests.clip import save_clip
from tests.golden import Golden, golden_frontier, of_theirs, without_values
from tests.stage1_vq.test_import_golden import close


def titok(name: str = "titok_vq") -> tuple[TiTok, Golden]:
    reference = golden_frontier(name)
    return KINDS["titok"].build(reference.weights, reference.config), reference


def titok_two_stage() -> tuple[TwoStageTiTok, Golden]:
    reference = golden_frontier("titok_two_stage")
    return KINDS["titok"].build(reference.weights, reference.config), reference


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
    quantizer.update()
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
