"""Quantizers of XQ-GAN and ImageFolder beside their published code: codes equal, values and gradients within 1e-5.

Not among ours:

| theirs | ours |
|---|---|
| losses of the scales that are kept, over how many images keep them | of all: the same mean, with less noise |
| the first `int(b * codebook_drop)` images of a batch drop scales | each image by chance |
| commitment is a sum over scales (`ms_vq`), the codebook loss a mean | both are means: a weight of theirs times S |
| dependency of the first and the last of more than two branches | a mean over all pairs |
| `ms_lfq`: bit 0 is the least significant | the first bit is the most significant, as elsewhere here |
| `soft_entropy` counts images 0 and 1 as often as the mask of kept scales has 0 and 1 | all images, once each |
| entropies with 1e-5 or 1e-8 inside the logarithm | exact |
| `share_quant_resi` 4 of three scales leaves a convolution unused | refused: `phis=3` are the same |
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stage1_vq.quantizers import (
    GroupedQuantizer,
    GroupedQuantizerConfig,
    MultiscaleBitsConfig,
    MultiscaleBitsQuantizer,
    MultiscaleQuantizer,
    MultiscaleQuantizerConfig,
    NearestQuantizerConfig,
    scales,
)
from stage1_vq.quantizers.bits import joint_probabilities
from stage1_vq.quantizers.scales import ScaleQuantizer, phi_of_each_scale
from tests.golden import golden_frontier, part

ATOL = 1e-5


def close(ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=ATOL)


def variant_of(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Config, weights, inputs and outputs."""
    whole = golden_frontier("xqgan_quantizers")
    weights, inputs = part(whole.weights, f"{name}."), part(whole.inputs, f"{name}.")
    return whole.config[name], weights, inputs, part(whole.outputs, f"{name}/")


def phi_names(arguments: dict[str, Any]) -> list[str]:
    """The convolution of each scale, as theirs name it."""
    count, shared = len(arguments["v_patch_nums"]), arguments.get("share_quant_resi", 4)
    if shared == 1:
        return count * ["quant_resi.qresi"]
    inside = "quant_resi.qresi_ls" if shared else "quant_resi"
    return [f"{inside}.{number}" for number in phi_of_each_scale(count, shared or count)]


def multiscale_config(arguments: dict[str, Any]) -> MultiscaleQuantizerConfig:
    sides = tuple(arguments["v_patch_nums"])
    return MultiscaleQuantizerConfig(
        scales=sides,
        codebook_size=arguments["vocab_size"],
        dim=arguments["Cvae"],
        commitment_weight=len(sides) * arguments.get("beta", 0.25),
        codebook_update="gradient",
        phis=len(set(phi_names(arguments))),
        phi_share=arguments.get("quant_resi", 0.5),
        compare="direction" if arguments.get("using_znorm", True) else "distance",
        quantizer_dropout=arguments["codebook_drop"],
    )


@torch.no_grad()
def load(quantizer: ScaleQuantizer, arguments: dict[str, Any], weights: dict[str, Tensor]) -> None:
    for ours, theirs in zip(quantizer.phi_of_scale, phi_names(arguments), strict=True):
        for name in ("weight", "bias"):
            quantizer.phis[ours].get_parameter(name).copy_(weights[f"{theirs}.{name}"])
    if isinstance(quantizer, MultiscaleQuantizer):
        quantizer.layer.codebook.copy_(weights["embedding.weight"])


def drop_as_theirs(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], drawn: Tensor) -> Tensor:
    """How many scales each image keeps, b; as many are then what ours draws."""
    kept = torch.full_like(drawn, len(config["args"]["v_patch_nums"]))
    dropped = int(len(drawn) * config["args"]["codebook_drop"])
    kept[:dropped] = drawn[:dropped]
    monkeypatch.setattr(scales, "draw_kept", lambda *_, **__: kept)
    return kept


def losses_of_kept(quantizer: ScaleQuantizer, f: Tensor, codes: Any, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The error of the sum after each scale from f, a mean over the images that keep it and over scales: with its
    gradient to the sums, and to f."""
    to_sums, to_latents = [], []
    for number in range(len(codes)):
        total = quantizer.latents_of_prefix(codes[: number + 1], *f.shape[2:])
        which = kept > number
        to_sums.append(F.mse_loss(total[which], f[which].detach()))
        to_latents.append(F.mse_loss(total[which].detach(), f[which]))
    return torch.stack(to_sums).mean(), torch.stack(to_latents).mean()


def check_gradients(quantizer: ScaleQuantizer, arguments: dict[str, Any], gradients: dict[str, Tensor]) -> None:
    for ours, theirs in zip(quantizer.phi_of_scale, phi_names(arguments), strict=True):
        for name in ("weight", "bias"):
            close(quantizer.phis[ours].get_parameter(name).grad, gradients[f"{theirs}.{name}"])
    if isinstance(quantizer, MultiscaleQuantizer):
        close(quantizer.layer.codebook.grad, gradients["embedding.weight"])


def check_codes(quantizer: ScaleQuantizer, f: Tensor, outputs: dict[str, Tensor], places: list[int] | None) -> None:
    """Codes and sums in eval mode; places: where bit i of theirs is in ours, None where codes are the same numbers."""
    codes = quantizer.eval().codes(f)
    side = f.shape[-1]
    for number, grid in enumerate(codes):
        theirs = outputs[f"eval/idx_{number}"]
        if places is not None:
            theirs = sum((theirs >> bit & 1) << place for bit, place in enumerate(places))
        assert torch.equal(grid.flatten(1), theirs)
        close(quantizer.latents_of_prefix(codes[: number + 1], side, side), outputs[f"eval/fhat_{number}"])
    if "eval/var_input" in outputs:
        inputs = [rearrange(x, "b d h w -> b (h w) d") for x in quantizer.next_scale_inputs(codes)]
        close(torch.cat(inputs, 1), outputs["eval/var_input"])
    quantizer.train()


@pytest.mark.parametrize("name", ["vq_z", "vq_plain", "vq_nonshared"])
def test_multiscale_with_dropout_by_distance_or_direction(name, monkeypatch):
    config, weights, inputs, outputs = variant_of(name)
    arguments, f = config["args"], inputs["f"].clone().requires_grad_()
    quantizer = MultiscaleQuantizer(multiscale_config(arguments))
    load(quantizer, arguments, weights)
    check_codes(quantizer, f, outputs, None)

    kept = drop_as_theirs(monkeypatch, config, inputs["dropout"])
    quantized = quantizer(f)
    close(quantized.z_q, outputs["train/quant"])
    to_sums, to_latents = losses_of_kept(quantizer, f, quantized.codes, kept)
    codebook_loss, commitment_loss = to_sums, quantizer.config.commitment_weight * to_latents
    if not arguments["codebook_drop"]:
        codebook_loss, commitment_loss = (quantized.losses[f"{each}_loss"] for each in ("codebook", "commitment"))
    close(codebook_loss, outputs["train/vq_loss"])
    close(commitment_loss, outputs["train/commit_loss"])
    ((quantized.z_q * inputs["cotangent"]).sum() + codebook_loss + commitment_loss).backward()
    close(f.grad, outputs["train/grad/f"])
    check_gradients(quantizer, arguments, part(outputs, "train/grad/"))


def side_by_side(h: Tensor, branches: int, side: int) -> Tensor:
    """Their tokens, branch after branch, as channels: b c (branches side side) 1 to b (branches c) side side."""
    return rearrange(h, "b c (g h w) 1 -> b (g c) h w", g=branches, h=side)


def test_product_of_multiscale_branches(monkeypatch):
    config, weights, inputs, outputs = variant_of("pq")
    arguments, branches = config["args"], config["product_quant"]
    layer = multiscale_config(arguments)
    quantizer = GroupedQuantizer(
        GroupedQuantizerConfig(groups=branches, layer=layer, dependency_weight=config["dependency_loss_weight"])
    )
    groups: Any = quantizer.groups()
    for number, group in enumerate(groups):
        load(group, arguments, part(weights, f"quantizes.{number}."))
    h = inputs["h"].clone().requires_grad_()
    f = side_by_side(h, branches, config["side"])
    codes = quantizer.codes(f)
    for number in range(branches):
        for scale in range(len(layer.scales)):
            grid = codes[scale * branches + number]
            assert torch.equal(grid.flatten(1), outputs[f"eval/branch{number}_idx_{scale}"])

    kept = drop_as_theirs(monkeypatch, config, inputs["dropout"])
    quantized = quantizer(f)  # all branches drop alike
    close(quantized.z_q, outputs["train/quant"])
    close(quantized.losses["dependency_loss"], outputs["train/dependency_loss"])
    pairs = [
        losses_of_kept(group, f_group, codes[number::branches], kept)
        for number, (group, f_group) in enumerate(zip(groups, f.chunk(branches, 1), strict=True))
    ]
    codebook_loss = torch.stack([to_sums for to_sums, _ in pairs]).mean()
    commitment_loss = layer.commitment_weight * torch.stack([to_latents for _, to_latents in pairs]).mean()
    close(codebook_loss, outputs["train/vq_loss"])
    close(commitment_loss, outputs["train/commit_loss"])
    losses = codebook_loss + commitment_loss + quantized.losses["dependency_loss"]
    ((quantized.z_q * inputs["cotangent"]).sum() + losses).backward()
    close(h.grad, outputs["train/grad/h"])
    for number, group in enumerate(groups):
        check_gradients(group, arguments, part(outputs, f"train/grad/quantizes.{number}."))


def test_product_of_codebooks_of_one_scale():
    config, weights, inputs, outputs = variant_of("pq_vq")
    arguments, branches = config["args"], config["product_quant"]
    layer = NearestQuantizerConfig(
        codebook_size=arguments["vocab_size"],
        dim=arguments["z_channels"],
        commitment_weight=arguments["beta"],
        codebook_update="gradient",
        l2_normalise=arguments["codebook_norm"],
    )
    quantizer = GroupedQuantizer(
        GroupedQuantizerConfig(groups=branches, layer=layer, dependency_weight=config["dependency_loss_weight"])
    )
    groups: Any = quantizer.groups()
    with torch.no_grad():
        for number, group in enumerate(groups):
            group.codebook.copy_(weights[f"quantizes.{number}.embedding.weight"])
    h = inputs["h"].clone().requires_grad_()
    quantized = quantizer(side_by_side(h, branches, config["side"]))
    for number, grid in enumerate(quantized.codes):
        assert torch.equal(grid.flatten(), outputs[f"eval/branch{number}_idx_0"])
    close(quantized.z_q, outputs["train/quant"])
    for ours, theirs in (("codebook", "vq"), ("commitment", "commit"), ("dependency", "dependency")):
        close(quantized.losses[f"{ours}_loss"], outputs[f"train/{theirs}_loss"])
    ((quantized.z_q * inputs["cotangent"]).sum() + sum(quantized.losses.values())).backward()
    close(h.grad, outputs["train/grad/h"])
    for number, group in enumerate(groups):
        close(group.codebook.grad, outputs[f"train/grad/quantizes.{number}.embedding.weight"])


@pytest.mark.parametrize("name", ["lfq_soft", "lfq_hard"])
def test_multiscale_of_signs(name, monkeypatch):
    config, weights, inputs, outputs = variant_of(name)
    arguments, f = config["args"], inputs["f"].clone().requires_grad_()
    bits, sides = arguments["Cvae"], tuple(arguments["v_patch_nums"])
    soft, weight = arguments["soft_entropy"], arguments["entropy_weight"]
    quantizer = MultiscaleBitsQuantizer(
        MultiscaleBitsConfig(
            scales=sides,
            bits=bits,
            dim=bits,
            unit_length=arguments["using_znorm"],
            ratio=arguments["scale"],
            entropy_weight=weight,
            inverse_temperature=1.0 if soft else 100.0,
            entropy_bits=1 if soft else bits,
            phis=len(set(phi_names(arguments))),
            quantizer_dropout=arguments["codebook_drop"],
        )
    )
    load(quantizer, arguments, weights)
    check_codes(quantizer, f, outputs, list(range(bits))[::-1])

    kept = drop_as_theirs(monkeypatch, config, inputs["dropout"])
    quantized = quantizer(f)
    close(quantized.z_q, outputs["train/quant"])
    narrow = quantizer.narrow(f)
    codebook_loss, to_latents = losses_of_kept(quantizer, narrow, quantized.codes, kept)
    commitment_loss = quantizer.config.commitment_weight * to_latents
    close(codebook_loss, outputs["train/vq_loss"])
    close(commitment_loss, outputs["train/commit_loss"])

    entropies, total = [], torch.zeros_like(narrow)
    for number, grid in enumerate(quantized.codes):
        rest, mask = narrow - total.detach(), kept > number
        # What the decoder sees of an image stays where its scales end, and so does what theirs takes for its rest.
        total = total + mask.view(-1, 1, 1, 1) * quantizer.grow(grid, number, f.shape[2:])
        rows = rest[mask.long()] if soft else rest[mask]
        sample, batch = quantizer.entropies(rows, number)
        logits = 4 * quantizer.config.inverse_temperature * quantizer.corner(number) * rows
        logits = rearrange(logits, "b bits h w -> (b h w) bits")
        parts = logits.split(quantizer.config.entropy_bits, 1)
        means = [joint_probabilities(part).mean(0) for part in parts]
        floored = -torch.stack([(mean * (mean + (1e-8 if soft else 1e-5)).log()).sum() for mean in means]).sum()
        torch.testing.assert_close(batch, floored, rtol=0, atol=2e-4)
        entropies.append((sample - floored) * weight / mask.float().mean())
    entropy_loss = torch.stack(entropies).mean()
    close(entropy_loss, outputs["train/entropy_loss"])
    ((quantized.z_q * inputs["cotangent"]).sum() + codebook_loss + commitment_loss + entropy_loss).backward()
    close(f.grad, outputs["train/grad/f"])
    check_gradients(quantizer, arguments, part(outputs, "train/grad/"))
