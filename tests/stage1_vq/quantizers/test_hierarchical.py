"""Scales that are trained through each other: the slow loop, and HierarchicalVQ of vector-quantize-pytorch 1.32.

Not among ours:

| theirs | ours |
|---|---|
| a shared codebook moves between the scales of a step | once a step; the test moves it in between as they do |
| dropout draws once for a batch, and never all scales | for each image, `fewest_scales` to all |
| with dropout the loss of the scales that are kept alone | of all: the same mean, with less noise |
| rows of other lengths (`mask`, `lens`) | none |
| a finest grid that is smaller than the map | the last is h w |
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers import scales
from stage1_vq.quantizers.hierarchical import HierarchicalQuantizer, HierarchicalQuantizerConfig
from stage1_vq.quantizers.nearest import NearestQuantizerConfig
from tests.golden import golden_frontier, part

LAYER = NearestQuantizerConfig(codebook_size=20, dim=5)


def make(layer: NearestQuantizerConfig = LAYER, **settings: Any) -> HierarchicalQuantizer:
    torch.manual_seed(0)
    made = HierarchicalQuantizer(
        HierarchicalQuantizerConfig(**{"scales": (1, 2, 4), "phis": 2, "layer": layer, **settings})
    )
    for parameter in made.phis.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def latents(b: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(b, 5, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shared", [True, False])
def test_codes_latents_losses_and_gradients_are_those_of_the_slow_loop(shared):
    quantizer, z, upstream = make(shared_codebook=shared), latents().requires_grad_(), latents(seed=2)
    quantized = quantizer(z)
    ((quantized.z_q * upstream).sum() + quantized.losses["commitment_loss"]).backward()
    found, phis = z.grad.clone(), [phi.weight.grad.clone() for phi in quantizer.phis]
    z.grad = None
    quantizer.zero_grad()

    total, commitments = torch.zeros_like(z), []
    for number, side in enumerate((1, 2, 4)):
        rest = F.avg_pool2d(z - total, 4 // side)
        vectors = quantizer.layers[0 if shared else number].codebook
        rows = rearrange(rest, "b d h w -> b h w 1 d")
        codes = (rows - vectors).square().sum(-1).argmin(-1)
        assert torch.equal(quantized.codes[number], codes)
        nearest = rearrange(vectors[codes], "b h w d -> b d h w")
        commitments.append(0.25 * (rest - nearest).square().mean())
        passed = rest + (nearest - rest).detach()
        grown = F.interpolate(passed, size=(4, 4), mode="bilinear", align_corners=False) if side < 4 else passed
        total = total + 0.5 * grown + 0.5 * quantizer.phis[[0, 0, 1][number]](grown)
    torch.testing.assert_close(quantized.z_q, total)
    torch.testing.assert_close(quantized.losses["commitment_loss"], torch.stack(commitments).mean())
    ((total * upstream).sum() + torch.stack(commitments).mean()).backward()
    torch.testing.assert_close(found, z.grad)
    for phi, gradient in zip(quantizer.phis, phis, strict=True):
        torch.testing.assert_close(phi.weight.grad, gradient)


def test_dropout_shows_the_decoder_the_first_scales_and_the_gradient_goes_where_they_are(monkeypatch):
    quantizer, z = make(quantizer_dropout=1.0), latents().requires_grad_()
    monkeypatch.setattr(scales, "draw_kept", lambda *_, **__: torch.tensor([1, 3, 2, 3]))
    quantized, whole = quantizer(z), make()(z)
    for image, kept in enumerate([1, 3, 2, 3]):
        expected = quantizer.latents_of_prefix([grid[image : image + 1] for grid in quantized.codes[:kept]], 4, 4)
        torch.testing.assert_close(quantized.z_q[image], expected[0])
    torch.testing.assert_close(quantized.losses, whole.losses)
    quantized.z_q[0].sum().backward()  # of the first image nothing but the first scale is seen, whose phi is the first
    assert quantizer.phis[0].weight.grad.abs().sum() > 0
    assert quantizer.phis[1].weight.grad.abs().sum() == 0


@pytest.mark.parametrize("shared", [True, False])
def test_k_means_serves_all_scales(shared):
    layer = NearestQuantizerConfig(codebook_size=60, dim=5)
    torch.manual_seed(0)
    config = HierarchicalQuantizerConfig(scales=(1, 2, 4), layer=layer, shared_codebook=shared)
    quantizer, z = HierarchicalQuantizer(config), latents(b=64)
    before = float(quantizer(z).statistics["quantization_error"])
    torch.manual_seed(1)
    quantizer.initialise([z[:40], z[40:]])
    assert quantizer(z).statistics["quantization_error"] < 0.8 * before


def test_health_and_warnings_name_the_scale_where_each_has_a_codebook():
    layer = NearestQuantizerConfig(codebook_size=500, dim=5)
    quantizer = make(layer, shared_codebook=False)
    quantizer(latents())
    quantizer.update()
    health = quantizer.health(steps_per_epoch=1)
    assert {"perplexity", "scale2_perplexity"} <= set(health)
    lines = quantizer.warnings({name: float(value) for name, value in health.items()}, 1)
    assert [line.split(": only")[0] for line in lines] == ["scale0", "scale1", "scale2"]
    assert "a smaller model.quantizer.layer.codebook_size" in lines[0]


def test_a_config_survives_json():
    config = make(shared_codebook=False, codebook_sizes=(4, 8, 16)).config
    assert HierarchicalQuantizer.config_from({**asdict(config), "scales": [1, 2, 4]}) == config
    assert [grid.vocabulary for grid in HierarchicalQuantizer(config).grids(4, 4)] == [4, 8, 16]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook_sizes": (4, 8, 16)}, r"codebook_sizes=\(4, 8, 16\), expected none where shared_codebook=true"),
        ({"codebook_sizes": (4, 8), "shared_codebook": False}, "expected one for each of the 3 scales"),
        ({"phis": 4}, r"phis=4, expected one of \[1, 2, 3\]"),
        ({"layer": NearestQuantizerConfig(lookup_dim=2)}, "layer.lookup_dim=2, expected null"),
        ({"layer": NearestQuantizerConfig(l2_normalise=True)}, "layer.l2_normalise=True, expected False"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        HierarchicalQuantizerConfig(**{"scales": (1, 2, 4), **settings})


# ---- the published numbers ------------------------------------------------------------------------------------------


def as_map(x: Tensor) -> Tensor:
    """b c h w as it is; a row of latents, b c n, as n x 1 places: a convolution of three then sees a column."""
    return x if x.ndim == 4 else x.unsqueeze(-1)


@torch.no_grad()
def load(quantizer: HierarchicalQuantizer, weights: dict[str, Tensor]) -> None:
    books = [weights[name] for name in sorted(weights) if name.endswith("_codebook.embed")]
    for number, (layer, book) in enumerate(zip(quantizer.layers, books, strict=True)):
        prefix = "vq" if quantizer.config.shared_codebook else f"vqs.{number}"
        layer.codebook.copy_(book[0])
        layer.cluster_sizes.copy_(weights[f"{prefix}._codebook.cluster_size"][0])
        layer.vector_sums.copy_(weights[f"{prefix}._codebook.embed_avg"][0])
    for number, phi in enumerate(quantizer.phis):
        name = "phi_shared" if len(quantizer.phis) == 1 else f"phi_levels.{number}"
        weight = weights[f"{name}.conv.weight"]
        phi.weight.zero_()
        (phi.weight if weight.ndim == 4 else phi.weight[..., 1]).copy_(weight)
        phi.bias.copy_(weights[f"{name}.conv.bias"])


@pytest.mark.parametrize("name", ["image", "seq", "dropout"])
def test_codes_sums_losses_gradients_and_codebooks_as_hierarchical_vq(name, monkeypatch):
    file = golden_frontier("vqp132_hierarchical")
    arguments = file.config[name]["args"]
    inputs, outputs = part(file.inputs, f"{name}."), part(file.outputs, f"{name}/")
    shared = arguments.get("shared_codebook", True)
    quantizer = HierarchicalQuantizer(
        HierarchicalQuantizerConfig(
            scales=tuple(arguments["scales"]),
            layer=NearestQuantizerConfig(
                codebook_size=arguments["codebook_size"], dim=arguments["dim"], commitment_weight=1.0, revive_after=0
            ),
            shared_codebook=shared,
            phis=arguments.get("share_quant_resi", 1),
            quantizer_dropout=arguments.get("nested_dropout", 0.0),
            fewest_scales=arguments.get("nested_dropout_min_levels", 1),
        )
    )
    load(quantizer, part(file.weights, f"{name}."))

    def close(ours: Tensor | None, theirs: Tensor) -> None:
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    def same_codes(codes: tuple[Tensor, ...], mode: str) -> None:
        for number, grid in enumerate(codes):
            assert torch.equal(grid, as_map(outputs[f"{mode}/indices_{number}"].unsqueeze(1))[:, 0])

    z = as_map(inputs["x"]).requires_grad_()
    quantized = quantizer.eval()(z)
    same_codes(quantized.codes, "eval")
    close(quantized.z_q, as_map(outputs["eval/quantized"]))
    close(quantizer.codes_to_latents(quantized.codes), as_map(outputs["eval/output_from_indices"]))

    quantizer.train()
    cutoff, count = int(outputs["train/cutoff"]), len(arguments["scales"])
    kept = count if cutoff < 0 else cutoff + 1
    monkeypatch.setattr(scales, "draw_kept", lambda b, *_, **__: torch.full((b,), kept))
    losses: list[Tensor] = []

    def recorded(config: Any, rest: Tensor, error: Tensor, *_: Any, **__: Any) -> dict[str, Tensor]:
        losses.append(config.commitment_weight * error)
        if shared:
            quantizer.update()  # theirs looks the next scale up in what this one has moved
        return {"commitment_loss": losses[-1]}

    monkeypatch.setattr("stage1_vq.quantizers.hierarchical.lookup_losses", recorded)
    monkeypatch.setattr("stage1_vq.quantizers.codebook.Codebook.join_calls", lambda *_: None)
    quantized = quantizer(z)
    same_codes(quantized.codes, "train")
    close(quantized.z_q, as_map(outputs["train/quantized"]))
    loss = torch.stack(losses[:kept]).mean()
    close(loss, outputs["train/loss"])
    if kept == count:
        close(quantized.losses["commitment_loss"], outputs["train/loss"])
    ((quantized.z_q * as_map(inputs["cotangent"])).sum() + loss).backward()
    close(z.grad, as_map(outputs["grad/x"]))
    for number, phi in enumerate(quantizer.phis):
        prefix = "phi_shared" if len(quantizer.phis) == 1 else f"phi_levels.{number}"
        weight = outputs[f"grad/{prefix}.conv.weight"]
        close(phi.weight.grad if weight.ndim == 4 else phi.weight.grad[..., 1], weight)
        close(phi.bias.grad, outputs[f"grad/{prefix}.conv.bias"])
    if not shared:
        quantizer.update()
    for number, layer in enumerate(quantizer.layers):
        prefix = "train/after/vq" if shared else f"train/after/vqs.{number}"
        close(layer.codebook, outputs[f"{prefix}._codebook.embed"][0])
        close(layer.cluster_sizes, outputs[f"{prefix}._codebook.cluster_size"][0])
