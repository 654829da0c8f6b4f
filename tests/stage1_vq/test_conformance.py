"""What every quantizer and every autoencoder owes its users: tables of classes times properties.

A new class is one row in a table; a test fails until it has one.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.model_io import load_pretrained
from pipelines.fields import kinds_of
from stage1_vq.autoencoders import (
    AUTOENCODERS,
    Autoencoder,
    AutoencoderConfig,
    DVAEConfig,
    FlowDecoderConfig,
    InfinityTokenizerConfig,
    MaskGITVQGANConfig,
    OpenMAGVIT2Config,
    TATiTokConfig,
    TiTokConfig,
    TwoStageTiTokConfig,
    ViTVQGANConfig,
    VQGANConfig,
    VQVAE2Config,
    VQVAEConfig,
)
from stage1_vq.quantizers import (
    QUANTIZERS,
    BinaryMapperConfig,
    BinaryQuantizerConfig,
    BSQConfig,
    DiVeQConfig,
    FSPConfig,
    FSQConfig,
    FVQConfig,
    GroupedQuantizerConfig,
    GumbelQuantizerConfig,
    HierarchicalQuantizerConfig,
    IBQConfig,
    LFQConfig,
    MultiscaleBitsConfig,
    MultiscaleBSQConfig,
    MultiscaleQuantizerConfig,
    NearestQuantizerConfig,
    QINCoConfig,
    Quantizer,
    QuantizerConfig,
    ResidualQuantizerConfig,
    ResidualScalarConfig,
    SimVQConfig,
)

DIM = 6
TINY_NEAREST = NearestQuantizerConfig(codebook_size=16, dim=DIM, revive_after=2)

QUANTIZER_ROWS: dict[str, Any] = {
    "nearest": TINY_NEAREST,
    "nearest, by gradient": NearestQuantizerConfig(codebook_size=40, dim=DIM, codebook_update="gradient"),
    "nearest, rotation": NearestQuantizerConfig(codebook_size=16, dim=DIM, gradient="rotation"),
    "nearest, normalised look-up": NearestQuantizerConfig(codebook_size=16, dim=DIM, lookup_dim=3, l2_normalise=True),
    "nearest, further losses": NearestQuantizerConfig(
        codebook_size=16,
        dim=DIM,
        codebook_update="gradient",
        orthogonal_weight=0.5,
        diversity_weight=0.02,
        diversity_temperature=1.0,
    ),
    "nearest, rare codes revived": NearestQuantizerConfig(
        codebook_size=16, dim=DIM, decay=0.5, revive_after=1, revive_below=0.5
    ),
    "nearest, refreshed": NearestQuantizerConfig(
        codebook_size=16, dim=DIM, codebook_update="gradient", revive_after=0, refresh=True
    ),
    "fsq": FSQConfig(levels=(5, 4, 3, 2, 2, 2), dim=DIM),
    "fsq, projected, symmetric": FSQConfig(levels=(4, 3), dim=DIM, preserve_symmetry=True),
    "lfq": LFQConfig(bits=DIM, dim=DIM, inverse_temperature=1),
    "lfq, projected": LFQConfig(bits=5, dim=DIM, inverse_temperature=1, entropy_bits=3, diversity=0.5),
    "lfq, clamped": LFQConfig(bits=DIM, dim=DIM, inverse_temperature=1, corner=0.5, soft_clamp=1.5),
    "bsq": BSQConfig(bits=DIM, dim=DIM, inverse_temperature=1),
    "simvq": SimVQConfig(codebook_size=24, dim=DIM),
    "simvq, rotation": SimVQConfig(codebook_size=24, dim=DIM, frozen_dim=4, gradient="rotation"),
    "simvq, hidden layer": SimVQConfig(codebook_size=24, dim=DIM, hidden_dim=10),
    "ibq": IBQConfig(codebook_size=24, dim=DIM, temperature=0.5),
    "gumbel": GumbelQuantizerConfig(
        codebook_size=24, dim=DIM, temperature_steps=100, kl_warmup_steps=0, kl_weight=0.005
    ),
    "gumbel, straight-through": GumbelQuantizerConfig(
        codebook_size=24, dim=DIM, embedding_dim=4, sample="straight-through"
    ),
    "gumbel, diversity": GumbelQuantizerConfig(
        codebook_size=24, dim=DIM, diversity_weight=0.1, kl_weight=0, kmeans_iterations=5, temperature_steps=0
    ),
    "binary": BinaryQuantizerConfig(dim=DIM),
    "binary, two grids": BinaryQuantizerConfig(dim=DIM, bits_per_code=4),
    "residual": ResidualQuantizerConfig(depth=3, layer=TINY_NEAREST),
    "residual, shared codebook, dropout": ResidualQuantizerConfig(
        depth=3, layer=TINY_NEAREST, shared_codebook=True, quantizer_dropout=0.5
    ),
    "residual, projected, by gradient, rotation": ResidualQuantizerConfig(
        dim=DIM,
        depth=2,
        layer=NearestQuantizerConfig(codebook_size=16, dim=4, codebook_update="gradient", gradient="rotation"),
        quantizer_dropout=1.0,
    ),
    "residual, beam": ResidualQuantizerConfig(
        depth=3, layer=TINY_NEAREST, beam=4, gradient_through="layers", gradient_between=0.5
    ),
    "grouped": GroupedQuantizerConfig(groups=3, layer=NearestQuantizerConfig(codebook_size=8, dim=2, revive_after=2)),
    "grouped residual": GroupedQuantizerConfig(
        layer=ResidualQuantizerConfig(depth=2, layer=NearestQuantizerConfig(codebook_size=8, dim=3, revive_after=2))
    ),
    "grouped, shared codebook, projected": GroupedQuantizerConfig(
        dim=DIM, layer=NearestQuantizerConfig(codebook_size=8, dim=4, revive_after=2), shared_codebook=True
    ),
    "grouped lfq": GroupedQuantizerConfig(dim=DIM, layer=LFQConfig(bits=4, dim=4, inverse_temperature=1)),
    "grouped fsq": GroupedQuantizerConfig(layer=FSQConfig(levels=(5, 4, 3), dim=3)),
    "grouped bsq": GroupedQuantizerConfig(layer=BSQConfig(bits=3, dim=3, inverse_temperature=1)),
    "fsq, rotated, noise": FSQConfig(
        levels=(5, 4, 3, 4, 5, 4), dim=DIM, preserve_symmetry=True, noise_dropout=0.1, orthogonal_rotation=True
    ),
    "lfq, factors": LFQConfig(bits=DIM, dim=DIM, inverse_temperature=1, factorized_bits=(2, DIM - 2)),
    "lfq, rotated": LFQConfig(bits=DIM, dim=DIM, inverse_temperature=1, orthogonal_rotation=True),
    "ibq, other weights": IBQConfig(
        codebook_size=24, dim=DIM, temperature=0.5, commitment_weight=1.0, codebook_weight=0.25
    ),
    "diveq": DiVeQConfig(codebook_size=16, dim=DIM, revive_after=2),
    "diveq, space-filling": DiVeQConfig(codebook_size=16, dim=DIM, space_filling=True, noise=0.05, revive_after=0),
    "diveq, residual": DiVeQConfig(codebook_size=16, dim=DIM, depth=3, noise=0.0, revive_after=2),
    "diveq, groups": DiVeQConfig(codebook_size=16, dim=DIM, groups=2, revive_after=2),
    "diveq, residual groups": DiVeQConfig(codebook_size=16, dim=DIM, depth=2, groups=3, revive_after=2),
    "diveq, random direction": DiVeQConfig(codebook_size=16, dim=DIM, direction="random"),
    "fsp": FSPConfig(levels=(5, 4, 3, 2, 2, 2), dim=DIM),
    "fsp, projected, as latents": FSPConfig(
        levels=(4, 5), dim=DIM, distribution="normal", quantized_share=0.5, as_latents=True, moments=4
    ),
    "fvq": FVQConfig(codebook_size=24, dim=DIM, patch=4, width=8, heads=2),
    "fvq, rotation, no blocks": FVQConfig(
        codebook_size=24, dim=DIM, patch=1, width=8, heads=1, blocks=0, gradient="rotation"
    ),
    "fvq, directional step": FVQConfig(codebook_size=24, dim=DIM, patch=4, width=8, heads=2, gradient="diveq"),
    "binary_mapper": BinaryMapperConfig(bits=5, dim=DIM),
    "binary_mapper, no projection": BinaryMapperConfig(
        bits=DIM, dim=DIM, embedding_dim=4, temperature=0.7, free_nats=0.1
    ),
    "fsq, clamped": FSQConfig(levels=(5, 4, 3), dim=DIM, preserve_symmetry=True, bound="clamp"),
    "residual_scalar": ResidualScalarConfig(
        dim=DIM, layer=FSQConfig(levels=(5, 4, 3, 5), dim=4, preserve_symmetry=True, orthogonal_rotation=True)
    ),
    "residual_scalar, lfq": ResidualScalarConfig(
        depth=3, layer=LFQConfig(bits=DIM, dim=DIM, inverse_temperature=1, orthogonal_rotation=True, soft_clamp=2.0)
    ),
    "multiscale_bsq": MultiscaleBSQConfig(scales=(1, 2, 4), dim=DIM),
    "multiscale_bsq, two grids a scale": MultiscaleBSQConfig(scales=(1, 3), dim=DIM, bits_per_code=4, diversity=0.5),
    "multiscale": MultiscaleQuantizerConfig(scales=(1, 2, 4), codebook_size=24, dim=DIM, phis=2, revive_after=2),
    "multiscale, by gradient": MultiscaleQuantizerConfig(
        scales=(1, 2, 4), codebook_size=24, dim=DIM, phis=3, codebook_update="gradient"
    ),
    "multiscale, by direction, dropout": MultiscaleQuantizerConfig(
        scales=(1, 2, 4), codebook_size=24, dim=DIM, phis=2, compare="direction", quantizer_dropout=0.5, fewest_scales=2
    ),
    "multiscale_bits": MultiscaleBitsConfig(
        scales=(1, 2, 4), bits=DIM, dim=DIM, phis=2, inverse_temperature=1, quantizer_dropout=0.5
    ),
    "multiscale_bits, unit length, projected": MultiscaleBitsConfig(
        scales=(1, 2, 4),
        bits=4,
        dim=DIM,
        phis=3,
        unit_length=True,
        ratio=0.7,
        inverse_temperature=1,
        entropy_bits=1,
        diversity=0.5,
    ),
    "qinco": QINCoConfig(depth=3, codebook_size=16, dim=DIM, hidden=5, revive_after=2),
    "qinco, beam, dropout": QINCoConfig(
        depth=3, codebook_size=16, dim=DIM, blocks=1, hidden=5, beam=3, quantizer_dropout=0.5, gradient="rotation"
    ),
    "hierarchical": HierarchicalQuantizerConfig(
        scales=(1, 2, 4), layer=NearestQuantizerConfig(codebook_size=40, dim=DIM, revive_after=2), phis=2
    ),
    "hierarchical, codebooks by gradient, dropout": HierarchicalQuantizerConfig(
        scales=(1, 2, 4),
        shared_codebook=False,
        codebook_sizes=(5, 9, 16),
        layer=NearestQuantizerConfig(dim=DIM, codebook_update="gradient", gradient="rotation"),
        quantizer_dropout=0.5,
        fewest_scales=2,
    ),
    "grouped multiscale_bits": GroupedQuantizerConfig(
        layer=MultiscaleBitsConfig(scales=(1, 2, 4), bits=3, dim=3, phis=2, inverse_temperature=1)
    ),
    "grouped multiscale": GroupedQuantizerConfig(
        layer=MultiscaleQuantizerConfig(scales=(1, 2, 4), codebook_size=16, dim=3, phis=2, quantizer_dropout=0.5),
        dependency_weight=0.3,
    ),
    "grouped multiscale, shared codebook, by gradient": GroupedQuantizerConfig(
        shared_codebook=True,
        layer=MultiscaleQuantizerConfig(
            scales=(1, 2, 4), codebook_size=16, dim=3, phis=3, codebook_update="gradient", quantizer_dropout=0.5
        ),
    ),
}
AUTOENCODER_ROWS: dict[str, Any] = {
    "vqvae2": VQVAE2Config(width=16, residual_width=8, residual_blocks=1, quantizer=TINY_NEAREST),
    "vqvae2, three levels, grey, residual": VQVAE2Config(
        channels=1,
        levels=3,
        bottom_stride=2,
        width=8,
        residual_width=4,
        residual_blocks=1,
        data_variance=0.25,
        quantizer=ResidualQuantizerConfig(depth=2, layer=TINY_NEAREST),
    ),
    "vqvae, multiscale": VQVAEConfig(
        width=8,
        residual_width=4,
        residual_blocks=1,
        quantizer=MultiscaleQuantizerConfig(scales=(1, 2, 4), codebook_size=16, dim=DIM, phis=2),
    ),
    "vqvae, grouped multiscale": VQVAEConfig(
        width=8,
        residual_width=4,
        residual_blocks=1,
        quantizer=GroupedQuantizerConfig(
            layer=MultiscaleQuantizerConfig(scales=(1, 2, 4), codebook_size=16, dim=3, phis=2, compare="direction"),
            dependency_weight=0.1,
        ),
    ),
    "vqvae": VQVAEConfig(width=8, residual_width=4, residual_blocks=1, quantizer=TINY_NEAREST),
    "vqvae, fsq": VQVAEConfig(
        width=8, residual_width=4, residual_blocks=1, quantizer=FSQConfig(levels=(5, 4, 3), dim=3)
    ),
    "vqvae, gumbel": VQVAEConfig(
        width=8,
        residual_width=4,
        residual_blocks=1,
        quantizer=GumbelQuantizerConfig(codebook_size=16, dim=5, embedding_dim=7, kl_weight=0.01),
    ),
    "vqvae, binary": VQVAEConfig(
        width=16, residual_width=16, residual_blocks=1, quantizer=BinaryQuantizerConfig(dim=6, bits_per_code=4)
    ),
    "vqvae, grey, by gradient": VQVAEConfig(
        channels=1,
        width=8,
        residual_width=4,
        residual_blocks=2,
        downsamplings=3,
        data_variance=0.25,
        quantizer=NearestQuantizerConfig(codebook_size=16, dim=4, lookup_dim=2, codebook_update="gradient"),
    ),
    "vqgan": VQGANConfig(
        width=8,
        multipliers=(1, 2, 2),
        residual_blocks=1,
        attention_levels=(2,),
        norm_groups=4,
        z_channels=6,
        quantizer=TINY_NEAREST,
    ),
    "vqgan, timm backbone": VQGANConfig(
        width=8,
        multipliers=(1, 1, 2, 2),
        residual_blocks=1,
        attention_levels=(),
        norm_groups=4,
        z_channels=6,
        backbone="test_convnext",
        quantizer=TINY_NEAREST,
    ),
    "vqgan, grey, spatial norm": VQGANConfig(
        channels=1,
        width=4,
        multipliers=(1, 2, 1, 2),
        residual_blocks=2,
        attention_levels=(1, 3),
        norm_groups=2,
        spatial_norm=True,
        z_channels=5,
        quant_conv_kernel=3,
        l2_weight=0.5,
        quantizer=NearestQuantizerConfig(codebook_size=16, dim=4, codebook_update="gradient"),
    ),
    "dvae": DVAEConfig(
        width=16,
        groups=3,
        blocks=1,
        quantizer=GumbelQuantizerConfig(
            codebook_size=16, dim=64, embedding_dim=16, temperature_steps=200, kl_warmup_steps=0, kl_weight=0.005
        ),
    ),
    "dvae, grey, nearest": DVAEConfig(channels=1, width=8, groups=4, blocks=1, quantizer=TINY_NEAREST),
    "vit_vqgan": ViTVQGANConfig(
        patch=4,
        width=32,
        blocks=1,
        heads=2,
        quantizer=NearestQuantizerConfig(
            codebook_size=16, dim=32, lookup_dim=4, l2_normalise=True, codebook_update="gradient"
        ),
    ),
    "vit_vqgan, grey, squared error alone": ViTVQGANConfig(
        channels=1,
        patch=8,
        width=32,
        blocks=2,
        heads=4,
        positions="sincos",
        logit_laplace_weight=0.0,
        quantizer=TINY_NEAREST,
    ),
    "maskgit_vqgan": MaskGITVQGANConfig(
        width=8,
        multipliers=(1, 2, 2),
        residual_blocks=1,
        norm_groups=4,
        l2_weight=0.5,
        quantizer=TINY_NEAREST,
    ),
    "open_magvit2": OpenMAGVIT2Config(
        width=8,
        multipliers=(1, 2, 2),
        residual_blocks=1,
        norm_groups=4,
        l2_weight=0.5,
        quantizer=LFQConfig(bits=4, dim=4, entropy_bits=4),
    ),
    "open_magvit2, grey, nearest": OpenMAGVIT2Config(
        channels=1, width=8, multipliers=(1, 1, 2), residual_blocks=2, norm_groups=2, quantizer=TINY_NEAREST
    ),
    "flow_decoder": FlowDecoderConfig(
        width=8,
        multipliers=(1, 2, 2),
        residual_blocks=1,
        transformer_blocks=1,
        heads=2,
        window=1,
        norm_groups=4,
        steps=3,
        tokenizer=VQVAEConfig(width=8, residual_width=4, residual_blocks=1, quantizer=TINY_NEAREST),
    ),
    "flow_decoder, grey, one step, two grids": FlowDecoderConfig(
        width=8,
        multipliers=(1, 2),
        residual_blocks=2,
        transformer_blocks=2,
        heads=1,
        norm_groups=2,
        steps=1,
        noise_seed=7,
        tokenizer=DVAEConfig(
            channels=1,
            width=8,
            groups=4,
            blocks=1,
            quantizer=ResidualQuantizerConfig(depth=2, layer=TINY_NEAREST),
        ),
    ),
    "infinity_tokenizer": InfinityTokenizerConfig(
        width=8,
        multipliers=(1, 2, 2),
        residual_blocks=1,
        norm_groups=4,
        l2_weight=0.5,
        quantizer=MultiscaleBSQConfig(scales=(1, 2, 4), dim=4),
    ),
    "titok": TiTokConfig(
        patch=8,
        tokens=5,
        encoder_width=32,
        encoder_blocks=1,
        encoder_heads=2,
        decoder_width=16,
        decoder_blocks=2,
        decoder_heads=4,
        quantizer=NearestQuantizerConfig(codebook_size=16, dim=4, l2_normalise=True, codebook_update="gradient"),
    ),
    "titok_two_stage": TwoStageTiTokConfig(
        tokens=5,
        encoder_width=32,
        encoder_blocks=1,
        encoder_heads=2,
        decoder_width=16,
        decoder_blocks=2,
        decoder_heads=4,
        pixel_codebook_size=24,
        pixel_dim=8,
        pixel_width=8,
        pixel_multipliers=(1, 1, 2),
        pixel_residual_blocks=1,
        norm_groups=4,
        l1_weight=0.5,
        quantizer=NearestQuantizerConfig(codebook_size=16, dim=4, l2_normalise=True, codebook_update="gradient"),
    ),
    "tatitok": TATiTokConfig(
        patch=8,
        tokens=5,
        encoder_width=32,
        encoder_blocks=1,
        encoder_heads=2,
        decoder_width=16,
        decoder_blocks=2,
        decoder_heads=4,
        text_length=3,
        text_width=7,
        l1_weight=0.5,
        quantizer=NearestQuantizerConfig(
            codebook_size=16, dim=4, codebook_update="gradient", revive_after=0, refresh=True
        ),
    ),
    "titok, grey, nested, residual": TiTokConfig(
        channels=1,
        patch=4,
        tokens=6,
        encoder_width=32,
        encoder_blocks=1,
        encoder_heads=2,
        decoder_width=32,
        decoder_blocks=1,
        decoder_heads=2,
        nested="uniform",
        l1_weight=0.5,
        quantizer=ResidualQuantizerConfig(depth=2, layer=TINY_NEAREST),
    ),
}
IMAGE_SIZE = (16, 24)
OF_ANY_SIZE = [row for row, config in AUTOENCODER_ROWS.items() if AUTOENCODERS[config.kind].codes_have_places]


def make_quantizer(row: str) -> Quantizer:
    torch.manual_seed(0)
    config = QUANTIZER_ROWS[row]
    return QUANTIZERS[config.kind](config)


def make_autoencoder(row: str) -> Autoencoder:
    torch.manual_seed(0)
    config = AUTOENCODER_ROWS[row]
    autoencoder = AUTOENCODERS[config.kind](config, IMAGE_SIZE)
    autoencoder.initialise([images_for(autoencoder, 4, seed=9)])
    return autoencoder


def latents(b: int, seed: int = 1) -> Tensor:
    return torch.randn(b, DIM, 4, 5, generator=torch.Generator().manual_seed(seed))


def images_for(autoencoder: Autoencoder, b: int, seed: int = 1, size: tuple[int, int] = IMAGE_SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(b, autoencoder.channels, *size, generator=generator) * 2 - 1


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=tolerance, atol=tolerance, msg=name)


def test_no_class_is_missing_from_the_tables():
    assert {config.kind for config in QUANTIZER_ROWS.values()} == set(QUANTIZERS) == set(kinds_of(QuantizerConfig))
    assert {config.kind for config in AUTOENCODER_ROWS.values()} == set(AUTOENCODERS)
    assert set(AUTOENCODERS) == set(kinds_of(AutoencoderConfig))


def test_each_kind_names_its_own_classes():
    for kind, quantizer in QUANTIZERS.items():
        assert quantizer.config_class is kinds_of(QuantizerConfig)[kind]
    for kind, autoencoder in AUTOENCODERS.items():
        assert autoencoder.kind == kind
        assert autoencoder.config_class is kinds_of(AutoencoderConfig)[kind]


# ---- quantizers -----------------------------------------------------------------------------------------------------

each_quantizer = pytest.mark.parametrize("row", QUANTIZER_ROWS)


@each_quantizer
def test_codes_fit_the_grids_and_latents_keep_their_shape(row):
    quantizer, z = make_quantizer(row), latents(3)
    quantized = quantizer(z)
    assert quantized.z_q.shape == (3, quantizer.dim_out, 4, 5)
    for codes, grid in zip(quantized.codes, quantizer.grids(4, 5), strict=True):
        assert codes.shape == (3, grid.height, grid.width)
        assert codes.dtype == torch.int64
        assert 0 <= codes.min() <= codes.max() < grid.vocabulary


@each_quantizer
def test_codes_are_enough_to_rebuild_the_latents(row):
    quantizer, z = make_quantizer(row).eval(), latents(3)
    quantized = quantizer(z)
    assert all(torch.equal(one, other) for one, other in zip(quantizer.codes(z), quantized.codes, strict=True))
    torch.testing.assert_close(quantizer.codes_to_latents(quantized.codes), quantized.z_q)


@each_quantizer
def test_codes_of_an_image_do_not_depend_on_its_batch(row):
    quantizer, z = make_quantizer(row).eval(), latents(7)
    alone = [quantizer.codes(image) for image in z.split(1)]
    for number, together in enumerate(quantizer.codes(z)):
        assert torch.equal(together, torch.cat([codes[number] for codes in alone]))


@each_quantizer
def test_after_a_beginning_of_its_own_come_its_own_codes_and_after_another_none_that_fit_worse(row):
    """Codes of grids that somebody else chose stay, and those of later grids make up for them as far as they can."""
    quantizer, z = make_quantizer(row).eval(), latents(3)
    own, other = quantizer.codes(z), quantizer.codes(latents(3, seed=2))
    for number in range(len(own)):
        completed = quantizer.codes_after(z, own[:number])
        assert all(map(torch.equal, completed, own))
    for number in range(1, len(own)):
        made_up = quantizer.codes_after(z, other[:number])
        assert all(map(torch.equal, made_up[:number], other[:number]))
        with torch.no_grad():
            error, former = (
                (quantizer.codes_to_latents(codes) - quantizer.codes_to_latents(own)).square().mean()
                for codes in (made_up, (*other[:number], *own[number:]))
            )
        dependent = row.startswith(
            (
                "residual",
                "qinco",
                "multiscale",
                "hierarchical",
                "grouped residual",
                "grouped multiscale",
                "diveq, residual",
            )
        )
        assert error < former if dependent else error == former


@each_quantizer
def test_losses_are_means_so_that_they_do_not_depend_on_the_batch_size(row):
    quantizer, z = make_quantizer(row).eval(), latents(3)
    one, many = quantizer(z).losses, quantizer(z.repeat(5, 1, 1, 1)).losses
    assert one.keys() == many.keys()
    for name in one:
        assert one[name].ndim == 0
        torch.testing.assert_close(one[name], many[name])


@each_quantizer
def test_gradients_reach_the_latents_and_every_weight(row):
    quantizer, z = make_quantizer(row), latents(3).requires_grad_()
    quantized = quantizer(z)
    target = torch.randn(quantized.z_q.shape, generator=torch.Generator().manual_seed(2))
    ((quantized.z_q - target).square().mean() + sum(quantized.losses.values())).backward()
    assert z.grad.abs().min() > 0
    for name, weight in quantizer.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


@each_quantizer
def test_a_forward_pass_leaves_the_state_alone_and_in_eval_mode_nothing_to_update_from(row):
    quantizer = make_quantizer(row)
    before = state(quantizer)
    quantizer(latents(3))
    assert_equal_states(state(quantizer), before)
    quantizer.discard()
    waiting = dict(quantizer.named_buffers())
    waiting = {name: tensor.clone() for name, tensor in waiting.items()}
    quantizer.eval()(latents(3))
    assert_equal_states(dict(quantizer.named_buffers()), waiting)


@each_quantizer
def test_micro_batches_equal_one_batch(row):
    whole, split = make_quantizer(row), make_quantizer(row)
    for step in range(4):
        z = latents(6, seed=step)
        whole(z)
        for part in z.split(2):
            split(part)
        for quantizer in (whole, split):
            torch.manual_seed(step)
            quantizer.update(steps_per_epoch=3)
    assert_equal_states(state(whole), state(split), tolerance=1e-5)


@each_quantizer
def test_a_skipped_step_leaves_no_trace(row):
    skipped, clean = make_quantizer(row), make_quantizer(row)
    for step in range(4):
        skipped(latents(3, seed=100 + step) * torch.nan)
        skipped.discard()
        for quantizer in (skipped, clean):
            quantizer(latents(3, seed=step))
            torch.manual_seed(step)
            quantizer.update(steps_per_epoch=3)
    assert_equal_states(state(skipped), state(clean))


@each_quantizer
def test_a_model_cast_to_bfloat16_and_back_keeps_its_quantizer_to_the_last_bit(row):
    quantizer, z = make_quantizer(row).eval(), latents(2)
    expected, before = quantizer(z), {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    nn.ModuleList([quantizer]).bfloat16()
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())
    found = quantizer(z)
    assert torch.equal(found.z_q, expected.z_q)
    assert quantizer(z.bfloat16()).z_q.dtype == torch.bfloat16
    assert all(tensor.device.type == "meta" for tensor in quantizer.to("meta").state_dict().values())


@each_quantizer
def test_bfloat16_autocast_gives_the_codes_of_float32(row):
    quantizer, z = make_quantizer(row).eval(), latents(20)
    with torch.autocast("cpu", torch.bfloat16):
        under = quantizer.codes(z)
    assert all(torch.equal(one, other) for one, other in zip(under, quantizer.codes(z), strict=True))


@each_quantizer
def test_health_is_scalars_by_name(row):
    quantizer = make_quantizer(row)
    quantizer(latents(3))
    health = quantizer.update(steps_per_epoch=3)
    for name, value in health.items():
        assert value.ndim == 0, name
        assert value.isfinite(), name


# ---- autoencoders ---------------------------------------------------------------------------------------------------

each_autoencoder = pytest.mark.parametrize("row", AUTOENCODER_ROWS)


@each_autoencoder
@pytest.mark.parametrize("size", [IMAGE_SIZE, (8, 8), (32, 16)])
def test_codes_are_as_the_code_spec_says_and_decode_to_images_of_that_size(row, size):
    autoencoder = make_autoencoder(row).eval()
    images = images_for(autoencoder, 3, size=size)
    if not autoencoder.codes_have_places and size != IMAGE_SIZE:
        with pytest.raises(UserError, match=f"cannot encode {size[0]}x{size[1]} images: .* of 16x24 images alone"):
            autoencoder.encode(images)
        return
    codes = autoencoder.encode(images)
    autoencoder.code_spec(*size).check(codes)
    assert all(grid.dtype == torch.int64 for grid in codes)
    decoded = autoencoder.decode(codes)
    assert decoded.shape == images.shape
    assert -1 <= decoded.min() <= decoded.max() <= 1
    assert autoencoder.code_spec() == autoencoder.code_spec(*IMAGE_SIZE)


@each_autoencoder
def test_completing_what_somebody_else_began_keeps_it_and_of_its_own_beginnings_makes_encode(row):
    autoencoder = make_autoencoder(row).eval()
    images, others = images_for(autoencoder, 2), images_for(autoencoder, 2, seed=2)
    with torch.no_grad():
        own, other, complete = autoencoder.encode(images), autoencoder.encode(others), autoencoder.completing(images)
        for number in range(len(own) + 1):
            assert all(map(torch.equal, complete(own[:number]), own))
            mixed = complete(other[:number])
            assert all(map(torch.equal, mixed[:number], other[:number]))
            autoencoder.code_spec(*IMAGE_SIZE).check(mixed)


@each_autoencoder
def test_decoding_the_codes_gives_the_reconstruction(row):
    autoencoder = make_autoencoder(row).eval()
    images = images_for(autoencoder, 3)
    output = autoencoder(images)
    codes = autoencoder.encode(images)
    assert all(torch.equal(one, other) for one, other in zip(codes, output.codes, strict=True))
    torch.testing.assert_close(autoencoder.decode(codes), output.reconstruction.clamp(-1, 1))


@each_autoencoder
def test_an_image_does_not_depend_on_its_batch(row):
    autoencoder = make_autoencoder(row).eval()
    images = images_for(autoencoder, 5)
    together = autoencoder.encode(images)
    alone = [autoencoder.encode(image) for image in images.split(1)]
    for number, codes in enumerate(together):
        assert torch.equal(codes, torch.cat([one[number] for one in alone]))
    torch.testing.assert_close(autoencoder.decode(together), torch.cat([autoencoder.decode(one) for one in alone]))


@each_autoencoder
def test_one_loss_trains_every_weight_and_is_a_mean(row):
    autoencoder = make_autoencoder(row)
    images = images_for(autoencoder, 3)
    losses = autoencoder.eval()(images).losses  # without the noise that some quantizers have in training
    again = autoencoder(images.repeat(4, 1, 1, 1)).losses
    for name, loss in losses.items():
        assert loss.ndim == 0
        torch.testing.assert_close(loss, again[name])
    torch.stack(list(autoencoder.train()(images).losses.values())).sum().backward()
    for name, weight in autoencoder.named_parameters():  # DistributedDataParallel waits for each of them
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


@each_autoencoder
def test_a_model_folder_brings_the_same_model_back(row, tmp_path):
    autoencoder = make_autoencoder(row)
    images = images_for(autoencoder, 3)
    autoencoder(images)
    autoencoder.update(steps_per_epoch=3)
    folder = autoencoder.save_pretrained(tmp_path / "model")
    loaded = load_pretrained(folder, AUTOENCODERS)
    assert type(loaded) is type(autoencoder)
    assert loaded.fingerprint() == autoencoder.fingerprint()
    assert json.loads(json.dumps(loaded.arguments())) == json.loads(json.dumps(autoencoder.arguments()))
    assert loaded.code_spec() == autoencoder.code_spec()
    autoencoder.eval()
    assert torch.equal(loaded.decode(loaded.encode(images)), autoencoder.decode(autoencoder.encode(images)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@each_autoencoder
def test_cast_to_another_type_it_runs_and_comes_back_from_its_folder_as_it_was_saved(row, dtype, tmp_path):
    autoencoder = make_autoencoder(row).eval()
    images = images_for(autoencoder, 2)
    in_float32 = autoencoder.decode(autoencoder.encode(images))
    autoencoder.to(dtype)
    types = {name: tensor.dtype for name, tensor in autoencoder.state_dict().items() if tensor.is_floating_point()}
    assert dtype in types.values()
    assert all(kind == (torch.float32 if "quantizer" in name else dtype) for name, kind in types.items())
    codes = autoencoder.encode(images)
    decoded = autoencoder.decode(codes)
    autoencoder.code_spec().check(codes)
    assert decoded.dtype == torch.float32
    assert torch.isfinite(decoded).all()
    if dtype == torch.float64:
        assert (decoded - in_float32).abs().max() < 1e-4
    bits = autoencoder.decoder_bits(images, codes)
    assert bits is None or torch.isfinite(bits).all()
    loaded = load_pretrained(autoencoder.save_pretrained(tmp_path / "model"), AUTOENCODERS)
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
        name: tensor.dtype for name, tensor in autoencoder.state_dict().items()
    }
    assert loaded.fingerprint() == autoencoder.fingerprint()
    again = loaded.encode(images)
    assert all(torch.equal(grid, same) for grid, same in zip(again, codes, strict=True))
    assert torch.equal(loaded.decode(codes), decoded)


@each_autoencoder
def test_bfloat16_autocast_gives_finite_losses_and_valid_codes(row):
    autoencoder = make_autoencoder(row)
    images = images_for(autoencoder, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output = autoencoder(images)
    autoencoder.code_spec().check(output.codes)
    for name, loss in output.losses.items():
        assert loss.dtype == torch.float32, name
        assert loss.isfinite(), name


@each_autoencoder
@pytest.mark.parametrize("size", [(16, 25), (18, 24), (0, 8)])
def test_a_size_off_the_stride_is_refused_with_one_that_fits(row, size):
    autoencoder = make_autoencoder(row)
    with pytest.raises(UserError, match=f"cannot encode {size[0]}x{size[1]} images: both sides must be multiples of"):
        autoencoder.encode(images_for(autoencoder, 1, size=size))
    with pytest.raises(UserError, match="both sides must be multiples of"):
        autoencoder.code_spec(*size)
    with pytest.raises(UserError, match="both sides must be multiples of"):
        type(autoencoder)(autoencoder.config, size)


@each_autoencoder
def test_images_of_the_wrong_kind_are_refused(row):
    autoencoder = make_autoencoder(row)
    with pytest.raises(UserError, match=r"got images of shape \(2, 7, 16, 16\), expected \(batch, "):
        autoencoder.encode(torch.zeros(2, 7, 16, 16))
    with pytest.raises(UserError, match=r"got images of type torch.uint8, expected floats in \[-1, 1\]"):
        autoencoder.encode(torch.zeros(2, autoencoder.channels, 16, 16, dtype=torch.uint8))


@each_autoencoder
def test_codes_that_are_none_are_refused(row):
    autoencoder = make_autoencoder(row)
    codes = autoencoder.encode(images_for(autoencoder, 2))
    with pytest.raises(UserError, match="grids, expected"):
        autoencoder.decode((*codes, codes[0]))
    with pytest.raises(UserError, match="holds codes from"):
        autoencoder.decode(tuple(grid + 10**6 for grid in codes))
    with pytest.raises(UserError, match=r"has shape \(\d+,\), expected \d+x\d+"):
        autoencoder.decode(tuple(grid.flatten(1) for grid in codes))
    with pytest.raises(UserError, match="got codes of 0 grids, expected"):
        autoencoder.decode(())


SUMS = (
    "vqvae, multiscale",
    "vqvae, grouped multiscale",
    "titok, grey, nested, residual",
    "flow_decoder, grey, one step, two grids",
    "infinity_tokenizer",
)


@each_autoencoder
@torch.no_grad()
def test_first_grids_decode_where_the_others_only_add_and_are_refused_elsewhere(row):
    """All of them are the whole; those of a sum tell of it, whatever the size of the image."""
    autoencoder = make_autoencoder(row).eval()
    images = images_for(autoencoder, 2)
    codes = autoencoder.encode(images)
    if row not in SUMS:
        # Of a single grid there is none without the others.
        with pytest.raises(UserError, match=r"grids, expected 1 to|all of use|expected those of all"):
            autoencoder.decode_first((*codes, codes[0]) if len(codes) == 1 else codes[:1], *IMAGE_SIZE)
        return
    step = 2 if row == "vqvae, grouped multiscale" else 1
    torch.testing.assert_close(autoencoder.decode_first(codes, *IMAGE_SIZE), autoencoder.decode(codes))
    for count in range(step, len(codes), step):
        first = autoencoder.decode_first(codes[:count], *IMAGE_SIZE)
        assert first.shape == images.shape
        assert not torch.equal(first, autoencoder.decode(codes))
        changed = tuple((grid + 1) % 16 for grid in codes[:count])
        assert not torch.equal(autoencoder.decode_first(changed, *IMAGE_SIZE), first)
    if step == 2:
        with pytest.raises(UserError, match="got codes of 1 grid, expected a multiple of 2"):
            autoencoder.decode_first(codes[:1], *IMAGE_SIZE)
    if autoencoder.codes_have_places:
        larger = images_for(autoencoder, 2, size=(32, 16))
        assert autoencoder.decode_first(autoencoder.encode(larger)[:step], 32, 16).shape == larger.shape
        with pytest.raises(UserError, match="has shape"):
            autoencoder.decode_first(autoencoder.encode(larger)[: 2 * step], *IMAGE_SIZE)
