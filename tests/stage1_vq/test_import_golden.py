"""The original implementations' own numbers: their weights here give their latents, codes, images and gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from common.renaming import renamed
from stage1_vq.autoencoders import VQGAN, VQGANConfig
from stage1_vq.imports import KINDS
from stage1_vq.imports.diffusers import name_in_diffusers
from stage1_vq.quantizers import NearestQuantizerConfig
from tests.golden import Golden, golden, real_shapes

# Of each file: its kind, the tolerance that its makers measured, and their names for latents, codes, z_q and images.
FILES: dict[str, tuple[str, float, tuple[str, str, str, str]]] = {
    "taming_vqgan": ("taming-vqgan", 2e-4, ("prequant", "indices", "quant", "recon")),
    "taming_vqgan_deep": ("taming-vqgan", 2e-4, ("prequant", "indices", "quant", "recon")),
    "taming_gumbelvq": ("taming-gumbelvq", 5e-5, ("prequant", "indices_argmax", "quant_argmax", "recon_argmax")),
    "llamagen_vq": ("llamagen-vq", 5e-5, ("prequant", "indices", "quant", "recon")),
    "var_vqvae": ("var-vqvae", 5e-5, ("f", "idx_{}", "fhat_3", "recon")),
    "diffusers_vqmodel": ("diffusers-vqmodel", 5e-5, ("latents", "indices", "quant", "recon")),
    "diffusers_vqmodel_spatial": ("diffusers-vqmodel", 5e-5, ("latents", "indices", "quant", "recon")),
}
each_file = pytest.mark.parametrize("name", FILES)


def imported(name: str) -> tuple[VQGAN, Golden, float]:
    reference = golden(name)
    kind, tolerance, _ = FILES[name]
    return KINDS[kind].build(reference.weights, reference.config), reference, tolerance


def recorded_codes(name: str, outputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The original's, in our shape: b h w for each grid."""
    key = FILES[name][2][1]
    if "{}" not in key:
        return (outputs[key],)
    flat = [outputs[key.format(number)] for number in range(4)]
    return tuple(rearrange(grid, "b (h w) -> b h w", h=number + 1) for number, grid in enumerate(flat))


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=tolerance)


@each_file
@torch.no_grad()
def test_latents_are_the_originals(name):
    model, reference, tolerance = imported(name)
    if "encoder_out" in reference.outputs:
        close(model.encoder.body(reference.inputs["x"]), reference.outputs["encoder_out"], tolerance)
    close(model.latents(reference.inputs["x"]), reference.outputs[FILES[name][2][0]], tolerance)


@each_file
@torch.no_grad()
def test_codes_are_the_originals_exactly(name):
    model, reference, _ = imported(name)
    for ours, theirs in zip(model.encode(reference.inputs["x"]), recorded_codes(name, reference.outputs), strict=True):
        assert torch.equal(ours, theirs)


@each_file
@torch.no_grad()
def test_code_vectors_and_images_are_the_originals(name):
    model, reference, tolerance = imported(name)
    codes = recorded_codes(name, reference.outputs)
    close(model.quantizer.codes_to_latents(codes), reference.outputs[FILES[name][2][2]], tolerance)
    images = reference.outputs[FILES[name][2][3]]
    close(model.decode(codes)[: len(images)], images.clamp(-1, 1), tolerance)
    output = model(reference.inputs["x"])
    reconstruction = output.reconstruction[: len(images)]
    if name == "var_vqvae":  # this one records clamped images
        reconstruction = reconstruction.clamp(-1, 1)
    close(reconstruction, images, tolerance)


def gradients(model: VQGAN, loss: Tensor, x: Tensor) -> dict[str, Tensor]:
    leaves = {
        "x": x,
        "encoder.conv_in.weight": model.encoder.body.conv_in.weight,
        "decoder.conv_out.weight": model.last_layer(),
        "quantize.embedding.weight": model.quantizer.codebook,
    }
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("name", ["taming_vqgan", "taming_vqgan_deep"])
def test_losses_and_gradients_are_the_originals(name):
    model, reference, tolerance = imported(name)
    x = reference.inputs["x"].clone().requires_grad_()
    losses = model(x).losses
    beta = model.config.quantizer.commitment_weight
    # The original's code has beta on the codebook's term, the paper and we on the encoder's.
    embedding_loss = losses["commitment_loss"] / beta + beta * losses["codebook_loss"]
    close(embedding_loss, reference.outputs["emb_loss"], tolerance)
    total = losses["reconstruction_loss"] + embedding_loss
    close(total, reference.outputs["loss_total"], tolerance)
    recorded = {key.removeprefix("grad/"): value for key, value in reference.outputs.items() if key.startswith("grad/")}
    ours = gradients(model, total, x)
    assert recorded.keys() <= ours.keys()
    for key, gradient in recorded.items():
        close(ours[key], gradient, 1e-4 * float(gradient.abs().max()))  # some are small beside the tolerance


def test_losses_and_gradients_of_llamagens_quantizer_are_the_originals_without_its_entropy_term():
    model, reference, _ = imported("llamagen_vq")
    losses = model.quantizer(reference.outputs["prequant"]).losses
    close(losses["codebook_loss"], reference.outputs["train/vq_loss"], 5e-5)
    close(losses["commitment_loss"], reference.outputs["train/commit_loss"], 5e-5)


def test_the_divergence_of_gumbelvq_has_its_weight_from_the_first_step_on():
    model, reference, tolerance = imported("taming_gumbelvq")
    loss = model.quantizer(reference.outputs["prequant"]).losses["kl_loss"]
    assert reference.outputs["diff"] > 1e-4
    close(loss, reference.outputs["diff"], tolerance * float(reference.outputs["diff"]))
    assert model.quantizer.temperature() == 1  # of the original, which no schedule moves here


def test_the_temperature_of_gumbelvq_follows_the_originals_schedule():
    reference = golden("taming_gumbelvq")
    schedule = {"warm_up_steps": 0, "max_decay_steps": 1000001, "lr_start": 0.9, "lr_max": 0.9, "lr_min": 1e-06}
    config = {**reference.config, "temperature_scheduler_config": {"target": "taming.lr_scheduler", "params": schedule}}
    quantizer = KINDS["taming-gumbelvq"].build(reference.weights, config).quantizer
    assert quantizer.temperature() == pytest.approx(0.9)
    for step, expected in ((500_000, 0.45), (2_000_000, 1e-6)):
        quantizer.begin_step(step)
        assert float(quantizer.temperature()) == pytest.approx(expected, rel=1e-4)


def former_name(name: str) -> str:
    """Of a diffusers attention layer's weights, before its names became to_q and so on."""
    return renamed(
        name, {r"\.to_q\.": ".query.", r"\.to_k\.": ".key.", r"\.to_v\.": ".value.", r"\.to_out\.0\.": ".proj_attn."}
    )


def test_files_of_old_diffusers_versions_are_read_as_well():
    reference = golden("diffusers_vqmodel")
    old = {former_name(key): tensor for key, tensor in reference.weights.items()}
    assert old.keys() != reference.weights.keys()
    model = KINDS["diffusers-vqmodel"].build(old, reference.config)
    assert torch.equal(model.encode(reference.inputs["x"])[0], reference.outputs["indices"])


@pytest.mark.parametrize("told", [True, False], ids=["by the config", "by the weights"])
def test_widths_of_diffusers_that_are_no_multiples_of_the_first(told: bool):
    """36, 48 and 60 channels: a third more, and two thirds."""
    quantizer = NearestQuantizerConfig(codebook_size=8, dim=4, codebook_update="gradient", revive_after=0)
    shape: dict[str, Any] = {"residual_blocks": 1, "attention_levels": (), "norm_groups": 12, "z_channels": 4}
    torch.manual_seed(0)
    ours = VQGAN(VQGANConfig(width=36, multipliers=(1, 48 / 36, 60 / 36), quantizer=quantizer, **shape), (16, 16))
    named = partial(name_in_diffusers, levels=3, old=False)
    weights = {name: tensor for key, tensor in ours.state_dict().items() if (name := named(key)) is not None}
    assert weights["decoder.up_blocks.0.resnets.0.conv1.weight"].shape[0] == 60
    config = {"norm_num_groups": 12, **({"block_out_channels": [36, 48, 60]} if told else {})}
    read = KINDS["diffusers-vqmodel"].build(weights, config)
    assert read.config.level_widths() == [36, 36, 48, 60]
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(read.decode(read.encode(images)), ours.eval().decode(ours.encode(images)))
    with pytest.raises(UserError, match="broken numbers of channels: expected whole ones"):
        VQGANConfig(width=36, multipliers=(1, 1.3), attention_levels=(), norm_groups=12)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def sizes(model: VQGAN) -> dict[str, Any]:
    config = model.config
    return {
        "width": config.width,
        "multipliers": config.multipliers,
        "attention_levels": config.attention_levels,
        "quantizer": (config.quantizer.kind, config.quantizer.codebook_size, config.quantizer.dim),
        "codes": model.code_spec().describe(),
    }


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        (
            "taming_vqgan_imagenet_f16_1024",
            "taming-vqgan",
            {
                "width": 128,
                "multipliers": (1, 1, 2, 2, 4),
                "attention_levels": (4,),
                "quantizer": ("nearest", 1024, 256),
                "codes": "16x16 codes of 1024 (256x256x3 images)",
            },
        ),
        (
            "llamagen_vq16",
            "llamagen-vq",
            {
                "width": 128,
                "multipliers": (1, 1, 2, 2, 4),
                "attention_levels": (4,),
                "quantizer": ("nearest", 16384, 8),
                "codes": "16x16 codes of 16384 (256x256x3 images)",
            },
        ),
        (
            "llamagen_vq8",
            "llamagen-vq",
            {
                "width": 128,
                "multipliers": (1, 2, 2, 4),
                "attention_levels": (3,),
                "quantizer": ("nearest", 16384, 8),
                "codes": "32x32 codes of 16384 (256x256x3 images)",
            },
        ),
        (
            "var_vae_ch160v4096z32",
            "var-vqvae",
            {
                "width": 160,
                "multipliers": (1, 1, 2, 2, 4),
                "attention_levels": (4,),
                "quantizer": ("multiscale", 4096, 32),
                "codes": " + ".join(f"{s}x{s} codes of 4096" for s in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
                + " (256x256x3 images)",
            },
        ),
    ],
)
def test_published_sizes_are_told_by_the_weights_alone(name: str, kind: str, expected: dict[str, Any]):
    with torch.device("meta"):
        model = KINDS[kind].build(published_weights(name))
    assert sizes(model) == expected
    assert model.config.norm_groups == 32
    assert model.config.spatial_norm is False


def published_weights(name: str) -> dict[str, Tensor]:
    """Without values; integer tensors have their type before their shape."""
    shapes = real_shapes(name)
    return {key: torch.empty([side for side in shape if isinstance(side, int)]) for key, shape in shapes.items()}


@each_file
def test_a_config_says_nothing_that_the_weights_do_not_but_groups_and_sizes_of_images(name):
    """What the shapes of the weights tell is what the original's arguments say."""
    model, reference, _ = imported(name)
    kind = FILES[name][0]
    untold = ("norm_num_groups", "spatial_norm_groups", "norm_type", "v_patch_nums", "image_size", "image_hw")
    partly = {key: reference.config[key] for key in untold if key in reference.config}
    bare = KINDS[kind].build(reference.weights, partly)
    assert bare.config == model.config or name == "taming_gumbelvq"  # whose kl_weight no shape tells
    assert bare.code_spec() == model.code_spec()
