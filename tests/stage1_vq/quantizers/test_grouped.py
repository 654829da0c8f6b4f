"""Groups of channels are quantized each by itself, and the published implementation gives the same numbers."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers.grouped import GroupedQuantizer, GroupedQuantizerConfig
from stage1_vq.quantizers.multiscale import MultiscaleQuantizerConfig
from stage1_vq.quantizers.nearest import NearestQuantizerConfig
from stage1_vq.quantizers.residual import ResidualQuantizer, ResidualQuantizerConfig
from tests.golden import golden
from tests.stage1_vq.published.test_residual_vectors import as_map, as_vectors, assert_same, load_layer

NEAREST = NearestQuantizerConfig(codebook_size=10, dim=3)
RESIDUAL = ResidualQuantizerConfig(depth=2, layer=NEAREST)
SCALES = MultiscaleQuantizerConfig(scales=(1, 2, 4), codebook_size=9, dim=3, phis=2, quantizer_dropout=1.0)


def make(layer: Any = NEAREST, groups: int = 2) -> GroupedQuantizer:
    torch.manual_seed(0)
    return GroupedQuantizer(GroupedQuantizerConfig(groups=groups, layer=layer))


def latents(b: int = 4, d: int = 6) -> Tensor:
    return torch.randn(b, d, 3, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [NEAREST, RESIDUAL])
def test_each_group_is_quantized_by_its_own_quantizer(layer):
    quantizer, z = make(layer), latents()
    quantized = quantizer(z)
    alone = [group(part) for group, part in zip(quantizer.groups(), (z[:, :3], z[:, 3:]), strict=True)]
    assert torch.equal(quantized.z_q, torch.cat([one.z_q for one in alone], 1))
    for number, grid in enumerate(quantized.codes):
        assert torch.equal(grid, alone[number % 2].codes[number // 2])
    mean = (alone[0].losses["commitment_loss"] + alone[1].losses["commitment_loss"]) / 2
    torch.testing.assert_close(quantized.losses["commitment_loss"], mean)
    torch.testing.assert_close(quantized.statistics["quantization_error"], (quantized.z_q - z).square().mean())


def test_grids_are_named_layer_by_layer():
    assert [grid.name for grid in make(groups=3).grids(2, 2)] == ["group0", "group1", "group2"]
    names = [grid.name for grid in make(RESIDUAL).grids(2, 2)]
    assert names == ["depth0_group0", "depth0_group1", "depth1_group0", "depth1_group1"]


def test_the_gradient_is_the_identity():
    quantizer, z, upstream = make(RESIDUAL), latents().requires_grad_(), torch.randn(4, 6, 3, 4)
    quantizer(z).z_q.backward(upstream)
    assert torch.equal(z.grad, upstream)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layer", [SCALES, replace(RESIDUAL, quantizer_dropout=1.0)])
def test_dropout_ends_the_sums_of_all_groups_of_an_image_alike(layer, shared):
    torch.manual_seed(0)
    quantizer = GroupedQuantizer(GroupedQuantizerConfig(layer=layer, shared_codebook=shared))
    z = latents(b=12)
    quantized = quantizer(z)
    depth = len(quantized.codes) // 2
    groups: Any = quantizer.groups()
    ended: list[list[int]] = []
    for number, (group, seen) in enumerate(zip(groups, quantized.z_q.chunk(2, 1), strict=True)):
        codes = quantized.codes[number::2]
        sums = [
            group.latents_of_prefix(codes[:kept], 3, 4)
            if layer is SCALES
            else sum(book.look_up(grid) for book, grid in zip(group.stack()[:kept], codes, strict=False))
            for kept in range(1, depth + 1)
        ]
        ended.append([[torch.allclose(total[i], seen[i], atol=1e-6) for total in sums].index(True) for i in range(12)])
    assert ended[0] == ended[1]
    assert len(set(ended[0])) == depth


def test_dependency_is_the_cosine_of_the_groups_means_over_all_pairs():
    torch.manual_seed(0)
    quantizer = GroupedQuantizer(GroupedQuantizerConfig(groups=3, layer=NEAREST, dependency_weight=0.5))
    z = latents(d=9).requires_grad_()
    quantized = quantizer(z)
    means = [part.mean((2, 3)) for part in quantized.z_q.chunk(3, 1)]
    cosines = [F.cosine_similarity(means[i], means[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(quantized.losses["dependency_loss"], 0.5 * torch.stack(cosines).mean())
    quantized.losses["dependency_loss"].backward()
    assert z.grad.abs().min() > 0
    with torch.no_grad():  # a step down makes the groups less alike
        further = quantizer.dependency(quantized.z_q - 10 * z.grad)
    assert further < quantizer.dependency(quantized.z_q)


def test_groups_start_from_their_own_channels_and_lower_the_error():
    quantizer, z = make(RESIDUAL), latents(b=16) + torch.tensor([0.0, 0, 0, 50, 50, 50]).view(1, 6, 1, 1)
    quantizer.initialise([z[:9], z[9:]])
    first, second = (group.stack()[0].codebook for group in quantizer.groups())
    assert first.abs().max() < 10
    assert second.min() > 40
    assert quantizer(z).statistics["quantization_error"] < 0.3


def test_warnings_and_health_name_the_group():
    layer = ResidualQuantizerConfig(depth=2, layer=NearestQuantizerConfig(codebook_size=500, dim=3))
    quantizer = make(layer)
    quantizer(latents())
    quantizer.update()
    health = quantizer.health(steps_per_epoch=1)
    assert {"perplexity", "group1_codes_used_share", "group0_depth1_perplexity"} <= set(health)
    lines = quantizer.warnings({name: float(value) for name, value in health.items()}, 1)
    assert [line.split(": only")[0] for line in lines] == [
        "group0: depth0", "group0: depth1", "group1: depth0", "group1: depth1",
    ]  # fmt: skip
    assert "a smaller model.quantizer.layer.layer.codebook_size" in lines[0]


@pytest.mark.parametrize("layer", [NEAREST, RESIDUAL])
def test_a_config_survives_json(layer):
    config = GroupedQuantizerConfig(groups=3, layer=layer)
    assert config.inner_dim == 9
    assert GroupedQuantizer.config_from(asdict(config)) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 0}, "groups=0, expected at least 1"),
        ({"dim": 0}, "dim=0, expected at least 1, or null for that of all groups"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        GroupedQuantizerConfig(**settings)


@pytest.mark.parametrize("layer", [NEAREST, RESIDUAL])
def test_a_shared_codebook_is_one_quantizer_that_sees_each_group_as_an_image(layer):
    torch.manual_seed(0)
    quantizer = GroupedQuantizer(GroupedQuantizerConfig(layer=layer, shared_codebook=True))
    (alone,) = copy.deepcopy(quantizer).different()
    z = latents()
    images = torch.stack([z[:, :3], z[:, 3:]], 1).flatten(0, 1)
    for one, batch in ((quantizer, z), (alone, images)):
        torch.manual_seed(1)
        one.initialise([batch])
    quantized, expected = quantizer(z), alone(images)
    assert torch.equal(quantized.z_q, torch.cat([expected.z_q[::2], expected.z_q[1::2]], 1))
    for number, grid in enumerate(quantized.codes):
        assert torch.equal(grid, expected.codes[number // 2][number % 2 :: 2])
    assert torch.equal(quantizer.codes_to_latents(quantized.codes), quantized.z_q)
    torch.testing.assert_close(quantized.losses, expected.losses)
    quantizer.update()
    health = quantizer.health(steps_per_epoch=1)
    alone.update()
    assert health == alone.health(steps_per_epoch=1)
    assert torch.equal(quantizer(z).z_q[:, :3], alone(images).z_q[::2])
    if layer is NEAREST:
        (line,) = quantizer.warnings({"codes_used_share": 0.1}, steps_per_epoch=1)
        assert line.startswith("only 10% of 10 codes")
        assert "a smaller model.quantizer.layer.codebook_size" in line


def test_a_projection_stands_around_all_groups():
    torch.manual_seed(0)
    quantizer = GroupedQuantizer(GroupedQuantizerConfig(layer=NEAREST, dim=8))
    z = latents(d=8).requires_grad_()
    quantized = quantizer(z)
    inner = quantizer.project_in(z)
    expected = torch.cat(
        [group(part).z_q for group, part in zip(quantizer.groups(), inner.chunk(2, 1), strict=True)], 1
    )
    torch.testing.assert_close(quantized.z_q, quantizer.project_out(expected))
    quantized.z_q.square().sum().backward()
    assert all(weight.grad.any() for weight in quantizer.parameters())


def test_a_training_step_as_vector_quantize_pytorch():
    data = golden("vqp_residualvq")
    settings = data.config["grouped"]
    layer = NearestQuantizerConfig(
        codebook_size=settings["codebook_size"],
        dim=settings["dim"] // settings["groups"],
        commitment_weight=1.0,
        decay=0.8,
        revive_after=0,
    )
    quantizer = make(ResidualQuantizerConfig(depth=settings["num_quantizers"], layer=layer), settings["groups"])
    groups: list[ResidualQuantizer] = list(quantizer.layers)
    for g, group in enumerate(groups):
        for number, ours in enumerate(group.stack()):
            load_layer(ours, data.weights, f"grouped.rvqs.{g}.layers.{number}")
    x = as_map(data.inputs["grouped.x"]).requires_grad_()
    quantized = quantizer(x)
    codes = rearrange(list(quantized.codes), "(q g) b n 1 -> g b n q", g=2)
    assert torch.equal(codes, data.outputs["grouped/eval/indices"])
    assert torch.equal(codes, data.outputs["grouped/train/indices"])
    assert_same(as_vectors(quantized.z_q), data.outputs["grouped/train/quantized"])
    assert_same(quantized.losses["commitment_loss"], data.outputs["grouped/train/losses"].mean())
    from_codes = quantizer.codes_to_latents(quantized.codes)
    assert_same(as_vectors(from_codes), data.outputs["grouped/eval/output_from_indices"])
    # There each of the 2 layers passes the gradient on, and the losses of 2 layers of 2 groups are summed.
    output = (quantized.z_q * as_map(data.inputs["grouped.cotangent"])).sum()
    (2 * output + 4 * quantized.losses["commitment_loss"]).backward()
    assert_same(as_vectors(x.grad), data.outputs["grouped/grad/x"])
    quantizer.update()
    for g, group in enumerate(groups):
        for number, ours in enumerate(group.stack()):
            after = f"grouped/train/after/rvqs.{g}.layers.{number}._codebook"
            assert_same(ours.codebook, data.outputs[f"{after}.embed"][0])
            assert_same(ours.vector_sums, data.outputs[f"{after}.embed_avg"][0])
