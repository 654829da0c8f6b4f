"""The levels are wired as published; it learns; wrong configs are refused. More in test_conformance.py, and the numbers
of the open implementation in ../imports/test_vqvae2.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from stage1_vq.autoencoders.vqvae2 import VQVAE2, VQVAE2Config
from stage1_vq.quantizers import MultiscaleQuantizerConfig, NearestQuantizerConfig, ResidualQuantizerConfig
from tests.stage1_vq.autoencoders.test_vqvae import pictures

NEAREST = NearestQuantizerConfig(codebook_size=16, dim=6)


def tiny(quantizer: Any = NEAREST, size: tuple[int, int] = (16, 24), **settings: Any) -> VQVAE2:
    torch.manual_seed(0)
    defaults = {"width": 8, "residual_width": 4, "residual_blocks": 1, "bottom_stride": 2}
    return VQVAE2(VQVAE2Config(**{**defaults, **settings}, quantizer=quantizer), size)


def images_like(model: VQVAE2, b: int = 3) -> Tensor:
    return torch.rand(b, 3, *model.image_size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def convolutions(module: nn.Module) -> list[tuple[int, int, int, int]]:
    return [
        (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0])
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    ]


BLOCK = [(128, 64, 3, 1), (64, 128, 1, 1)]


def test_the_default_networks_have_the_papers_sizes():
    with torch.device("meta"):
        model = VQVAE2(VQVAE2Config(), (256, 256))
    assert model.code_spec().describe() == "32x32 codes of 512 + 64x64 codes of 512 (256x256x3 images)"
    top, bottom = model.encoders
    assert convolutions(bottom) == [(3, 64, 4, 2), (64, 128, 4, 2), (128, 128, 3, 1), *BLOCK, *BLOCK]
    assert convolutions(top) == [(128, 64, 4, 2), (64, 128, 3, 1), *BLOCK, *BLOCK]
    assert convolutions(model.to_latents) == [(128, 64, 1, 1), (192, 64, 1, 1)]
    assert convolutions(model.conditioners) == [(64, 128, 3, 1), *BLOCK, *BLOCK, (128, 64, 4, 2)]
    assert convolutions(model.upsamplers) == [(64, 64, 4, 2)]
    assert convolutions(model.decoder) == [(128, 128, 3, 1), *BLOCK, *BLOCK, (128, 64, 4, 2), (64, 3, 4, 2)]
    assert model.last_layer().shape == (64, 3, 4, 4)


def test_three_levels_for_1024_pixels_have_the_papers_grids():
    with torch.device("meta"):
        model = VQVAE2(VQVAE2Config(levels=3, bottom_stride=8), (1024, 1024))
    spec = model.code_spec()
    assert [(grid.name, grid.height) for grid in spec.grids] == [("level0", 32), ("level1", 64), ("level2", 128)]
    assert convolutions(model.encoders[2])[:4] == [(3, 64, 4, 2), (64, 128, 4, 2), (128, 128, 4, 2), (128, 128, 3, 1)]
    assert convolutions(model.decoder)[-3:] == [(128, 128, 4, 2), (128, 64, 4, 2), (64, 3, 4, 2)]


@pytest.mark.parametrize("levels", [2, 3])
def test_a_level_is_conditioned_on_those_above_and_the_image_on_all(levels):
    model = tiny(levels=levels).eval()
    codes = model.encode(images_like(model))
    image = model.decode(codes)
    for level in range(levels):
        other = tuple((grid + 1) % 16 if n == level else grid for n, grid in enumerate(codes))
        assert not torch.equal(model.decode(other), image), level
    features = model.features(images_like(model))
    above = model.join(0, None, model.quantizers[0].codes_to_latents(codes[:1]))
    moved = model.join(0, None, model.quantizers[0].codes_to_latents(((codes[0] + 1) % 16,)))
    for level in range(1, levels):
        assert not torch.equal(model.latents(level, features, above), model.latents(level, features, moved))
        z_q = model.quantizers[level].codes_to_latents((codes[level],))
        above, moved = model.join(level, above, z_q), model.join(level, moved, z_q)


def test_codes_come_top_first_and_each_level_halves_the_sides():
    model = tiny(levels=3)
    codes = model.encode(images_like(model))
    assert [tuple(grid.shape) for grid in codes] == [(3, 2, 3), (3, 4, 6), (3, 8, 12)]
    assert model.stride == 8


@pytest.mark.parametrize(
    ("quantizer", "names"),
    [
        (
            ResidualQuantizerConfig(depth=2, layer=NEAREST),
            ["level0_depth0", "level0_depth1", "level1_depth0", "level1_depth1"],
        ),
        (
            MultiscaleQuantizerConfig(scales=(1, 2), codebook_size=16, dim=6, phis=1),
            ["level0_scale0", "level0_scale1", "level1_scale0", "level1_scale1"],
        ),
    ],
)
def test_quantizers_of_several_grids_work_at_each_level(quantizer, names):
    model = tiny(quantizer).eval()
    images = images_like(model)
    codes = model.encode(images)
    model.code_spec().check(codes)
    assert [grid.name for grid in model.code_spec().grids] == names
    torch.testing.assert_close(model.decode(codes), model(images).reconstruction.clamp(-1, 1))


def test_losses_statistics_and_health_are_named_by_level():
    model = tiny()
    output = model(images_like(model))
    assert set(output.losses) == {"reconstruction_loss", "level0_commitment_loss", "level1_commitment_loss"}
    assert set(output.statistics) == {"level0_quantization_error", "level1_quantization_error"}
    model.update()
    health = model.health(steps_per_epoch=1)
    assert {"codes_used_share", "level0_codes_used_share", "level1_perplexity", "dead_codes"} <= set(health)


def test_a_warning_names_its_level():
    model = tiny(NearestQuantizerConfig(codebook_size=400, dim=6))
    model(images_like(model))
    model.update()
    metrics = {name: float(value) for name, value in model.health(steps_per_epoch=1).items()}
    lines = model.warnings(metrics, 1)
    assert lines[0].startswith("level0: only ")
    assert "a smaller model.quantizer.codebook_size" in lines[0]
    assert len(lines) == 2


def test_k_means_starts_each_level_among_its_latents():
    model, images = tiny(levels=3, data_variance=0.5), torch.rand(8, 3, 16, 24)
    with torch.no_grad():
        model.initialise([images[:4], images[4:]])
        features, above = model.features(images), None
        for level, quantizer in enumerate(model.quantizers):
            z = model.latents(level, features, above)
            assert z.amin() - 0.01 <= quantizer.codebook.min() <= quantizer.codebook.max() <= z.amax() + 0.01
            above = model.join(level, above, quantizer.codes_to_latents(quantizer.codes(z)))
        model.update()
        used = model.health(steps_per_epoch=1)["codes_used_share"]
        assert used == 0  # to initialise is not to train: nothing was noted


@pytest.mark.parametrize("levels", [2, 3])
def test_eight_pictures_are_learned(levels):
    quantizer = NearestQuantizerConfig(codebook_size=32, dim=16, revive_after=20)
    model = tiny(quantizer, (16, 16), levels=levels, width=32, residual_width=16)
    images = pictures()
    with torch.no_grad():
        model.initialise([images])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(180):
        loss = torch.stack(list(model(images).losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update()
    model.eval()
    error = (model.decode(model.encode(images)) - images).square().mean()
    assert error < 0.01, f"{error:.4f} of {images.var():.4f}, the variance of the pixels"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 1}, "model.levels=1, expected at least 2; an autoencoder of one level is kind vqvae"),
        ({"bottom_stride": 6}, "model.bottom_stride=6, expected a power of 2"),
        ({"bottom_stride": 1}, "model.bottom_stride=1, expected a power of 2"),
        ({"width": 7}, "model.width=7, expected an even number"),
        ({"channels": 0}, "model.channels=0, expected at least 1"),
        ({"residual_blocks": -1}, "model.residual_blocks=-1, expected 0 or more"),
        ({"data_variance": 0.0}, "model.data_variance=0.0, expected above 0"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        VQVAE2Config(**settings)
