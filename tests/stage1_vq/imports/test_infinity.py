"""Infinity's tokenizer by its original implementation's own numbers: its weights here give its latents, bits, sums and
images, and the labels of bitwise self-correction; other weights are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from common.model_io import load_pretrained
from pipelines.commands.import_weights import ImportConfig, import_weights
from stage1_vq.autoencoders import AUTOENCODERS, InfinityTokenizer, InfinityTokenizerConfig
from stage1_vq.imports import KINDS
from stage1_vq.imports.infinity import original_name
from stage1_vq.quantizers.bits import bits_to_codes, codes_to_bits
from tests.golden import Golden, golden_frontier
from tests.stage1_vq.test_import_golden import close

SETTINGS = {"image_hw": [16, 16], "scales": [1, 2, 3, 4], "norm_num_groups": 4}


def infinity() -> tuple[InfinityTokenizer, Golden]:
    reference = golden_frontier("infinity_vae")
    return KINDS["infinity-vae"].build(reference.weights, SETTINGS), reference


def of_scales(named: dict[str, Tensor], name: str) -> list[Tensor]:
    return [named[f"{name}_{scale}"] for scale in range(4)]


@torch.no_grad()
def test_it_has_the_originals_latents_bits_sums_and_images():
    model, reference = infinity()
    out, images = reference.outputs, reference.inputs["x"]
    z = model.latents(images)
    close(z, out["h"], 5e-5)
    codes = model.encode(images)
    for ours, index, bits in zip(codes, of_scales(out, "index"), of_scales(out, "bits"), strict=True):
        assert torch.equal(ours, index[:, 0])
        assert torch.equal(codes_to_bits(ours, 6).long(), rearrange(bits, "b 1 h w d -> b d h w"))
    close(model.quantizer.codes_to_latents(codes), out["quant"], 1e-5)
    close(model.quantizer(z).z_q, out["quant"], 1e-5)
    close(model.decode(codes), out["recon"], 5e-5)
    close(model.decode(codes), out["recon_from_bits"], 5e-5)
    inputs = [
        F.interpolate(total, size=(side, side), mode="area")
        for total, side in zip(model.quantizer.walk(z)[1], (2, 3, 4), strict=False)
    ]
    for ours, theirs in zip(inputs, [out[f"var_input_{scale}"] for scale in range(3)], strict=True):
        close(ours, theirs[:, :, 0], 1e-5)


@torch.no_grad()
def test_after_flipped_bits_it_has_the_originals_labels_and_inputs():
    """Scale by scale, what is to be described after bits of which some were flipped, and what a prior sees then."""
    model, reference = infinity()
    z, out, given = model.latents(reference.inputs["x"]), reference.outputs, list[Tensor]()
    strength, flips = reference.inputs["bsc_strength"], of_scales(reference.inputs, "bsc_uniform")
    for scale, label in enumerate(of_scales(out, "bsc_requant/gt_bits")):
        codes = model.quantizer.codes_after(z, tuple(given))
        bits = codes_to_bits(codes[scale], 6)
        assert torch.equal(rearrange(bits, "b d h w -> b (h w) d").long(), label)
        flipped = rearrange(flips[scale] < strength[scale], "b 1 h w d -> b d h w")
        given.append(bits_to_codes(bits ^ flipped if scale < reference.config["bsc_layers"] else bits))
    assert any(not torch.equal(one, other) for one, other in zip(given, model.quantizer.codes(z), strict=True))
    _, sums, _ = model.quantizer.walk(z, tuple(given))
    inputs = [
        rearrange(F.interpolate(total, size=(side, side), mode="bilinear"), "b d h w -> b (h w) d")
        for total, side in zip(sums, (2, 3, 4), strict=False)
    ]
    close(torch.cat(inputs, 1), out["bsc_requant/x_BLC"], 1e-5)
    for ours, label in zip(model.quantizer.codes(z), of_scales(out, "bsc_norequant/gt_bits"), strict=True):
        assert torch.equal(rearrange(codes_to_bits(ours, 6), "b d h w -> b (h w) d").long(), label)


def test_the_published_size_is_told_by_the_weights():
    """Stand-ins of the shapes that the published configuration has, without numbers."""
    with torch.device("meta"):
        model = InfinityTokenizer(InfinityTokenizerConfig(), (256, 256))
        weights = {name: tensor for key, tensor in model.state_dict().items() if (name := original_name(key))}
        weights["quantizer.lfq.mask"] = torch.empty(32)
        taken = KINDS["infinity-vae"].build(weights, None)
        larger = KINDS["infinity-vae"].build(weights, {"image_size": 1024})
    assert taken.config == model.config
    assert weights["encoder.down.1.block.0.nin_shortcut.conv.weight"].shape == (256, 128, 1, 1)
    assert "decoder.up.4.upsample.conv.conv.bias" in weights
    assert [grid.height for grid in larger.code_spec().grids][-4:] == [64] * 4  # of 8 bits each
    assert len(larger.code_spec().grids) == 52


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.conv_in.conv.weight": None}, "they are not of Infinity's tokenizer"),
        ({"quantizer.lfq.mask": None, "quantize.lfq.mask": None}, "they are not of Infinity's tokenizer"),
        ({"encoder.mid.attn_1.q.conv.weight": torch.zeros(1)}, "the weights have attention or see videos"),
        ({"encoder.conv_out.conv.weight": None}, r"the weights have no encoder\.conv_out\.conv\.weight beside quant"),
        ({"decoder.conv_in.conv.bias": None}, r"not those of this model \(missing: decoder.conv_in.conv.bias\)"),
    ],
)
def test_other_weights_are_refused(change, message):
    reference = golden_frontier("infinity_vae")
    weights = {name: tensor for name, tensor in {**reference.weights, **change}.items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        KINDS["infinity-vae"].build(weights, SETTINGS)


def test_a_size_of_no_published_scale_asks_for_scales():
    reference = golden_frontier("infinity_vae")
    with pytest.raises(UserError, match="image_size=20x20 has 5 places along its longer side, which is none of"):
        KINDS["infinity-vae"].build(reference.weights, {"image_size": 20, "norm_num_groups": 4})
    taken = KINDS["infinity-vae"].build(reference.weights, {"image_size": 32, "norm_num_groups": 4})
    assert [grid.height for grid in taken.code_spec().grids] == [1, 2, 4, 6, 8]
    with pytest.raises(UserError, match="norm"):
        KINDS["infinity-vae"].build(reference.weights, {"image_size": 32})


def test_it_is_imported_from_its_file_by_the_command(tmp_path: Path):
    reference = golden_frontier("infinity_vae")
    torch.save({"vae": reference.weights, "trainer": 1}, tmp_path / "infinity_vae_d6.pth")
    (tmp_path / "config.yaml").write_text("image_size: 16\nscales: [1, 2, 3, 4]\nnorm_num_groups: 4\n")
    files = {"weights": str(tmp_path / "infinity_vae_d6.pth"), "config": str(tmp_path / "config.yaml")}
    line = import_weights(ImportConfig(kind="infinity-vae", **files, out=str(tmp_path / "infinity")))
    assert "the infinity_tokenizer model is in" in line
    model = load_pretrained(tmp_path / "infinity", AUTOENCODERS).eval()
    with torch.no_grad():
        codes = model.encode(reference.inputs["x"])
    assert torch.equal(codes[3], reference.outputs["index_3"][:, 0])
