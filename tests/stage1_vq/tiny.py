"""A small quantizer and a small autoencoder of each kind: the rows of two tables, for tests that go through all."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from stage1_vq.autoencoders import (
    AUTOENCODERS,
    Autoencoder,
    DVAEConfig,
    FlexTokConfig,
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
    "fsq, unrounded": FSQConfig(levels=(5, 4, 3, 2, 2, 2), dim=DIM, unrounded=0.5),
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
    "flextok": FlexTokConfig(
        patch=4,
        tokens=5,
        encoder_width=32,
        encoder_blocks=1,
        encoder_heads=2,
        decoder_width=64,
        decoder_blocks=2,
        decoder_heads=4,
        nested=None,
        unconditional=0.0,
        steps=4,
        quantizer=FSQConfig(levels=(5, 4, 3), dim=3),
    ),
    "flextok, grey, nested, residual": FlexTokConfig(
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
        unconditional=0.5,
        times="mode",
        steps=2,
        guidance=2.0,
        guidance_form="plain",
        noise_seed=7,
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
