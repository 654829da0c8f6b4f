"""Inpainting, variations and walks in Python: what is known stays, what is drawn belongs to a sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from codes.spec import Codes
from common.errors import UserError
from pipelines import TwoStagePipeline
from pipelines.known_codes import codes_at, codes_of_kept_pixels, random_places
from pipelines.pictures import to_pil
from stage1_vq.autoencoders import VQVAE, VQVAE2, VQVAE2Config, VQVAEConfig
from stage1_vq.quantizers import (
    MultiscaleBSQConfig,
    MultiscaleQuantizerConfig,
    NearestQuantizerConfig,
    QuantizerConfig,
    ResidualQuantizerConfig,
)
from stage2_prior.drawing import noise
from stage2_prior.priors import (
    PRIORS,
    VAR,
    Hierarchical,
    HierarchicalConfig,
    Infinity,
    InfinityConfig,
    MaskGITConfig,
    RQTransformer,
    RQTransformerConfig,
    TransformerConfig,
    VARConfig,
)
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.pipelines.conftest import make_autoencoder, make_pipeline, make_prior, some_images


def test_the_kept_half_survives_bit_for_bit_and_the_other_is_drawn():
    pipeline, images = make_pipeline(), some_images()
    keep = torch.zeros(16, 16, dtype=torch.bool)
    keep[:, :8] = True
    made = pipeline.inpaint(images, keep, labels=[0, 1, 2], seed=4)
    codes = pipeline.encode(images)[0]
    assert torch.equal(made.codes[0][:, :, :2], codes[:, :, :2])
    assert not torch.equal(made.codes[0][:, :, 2:], codes[:, :, 2:])
    assert torch.equal(made.images[..., :8], images[..., :8])
    decoded = pipeline.inpaint(images, keep, labels=[0, 1, 2], seed=4, paste=False)
    assert torch.equal(decoded.codes[0], made.codes[0])
    assert torch.equal(decoded.images, pipeline.decode(made.codes))
    assert torch.equal(made.images[..., 12:], decoded.images[..., 12:])  # nothing fades in from 4 pixels on, the stride
    assert not torch.equal(made.images[..., 8:12], decoded.images[..., 8:12])


def test_what_is_drawn_depends_on_seed_and_index_not_on_the_batch():
    pipeline, images = make_pipeline(), some_images()
    keep = torch.zeros(16, 16, dtype=torch.bool)
    keep[5, 5] = True  # no place whole: all codes are drawn
    whole = pipeline.inpaint(images, keep, labels=1, seed=2).codes[0]
    alone = pipeline.inpaint(images[1:2], keep, labels=1, seed=2, first_index=1).codes[0]
    assert torch.equal(whole[1:2], alone)
    assert not torch.equal(whole, pipeline.inpaint(images, keep, labels=1, seed=3).codes[0])
    assert torch.equal(whole, pipeline.generate(3, labels=1, seed=2).codes[0])  # as generated


def test_variations_keep_the_other_codes_whatever_the_batch():
    pipeline, images = make_pipeline(), some_images()
    codes = pipeline.encode(images)[0]
    varied = pipeline.vary(images, 0.25, labels=0, seed=1).codes[0]
    assert ((varied != codes).flatten(1).sum(1) <= 4).all()
    assert (varied != codes).any()
    assert torch.equal(pipeline.vary(images[2:], 0.25, labels=0, seed=1, first_index=2).codes[0], varied[2:])
    assert torch.equal(pipeline.vary(images, 0.0, labels=0).codes[0], codes)


def test_a_walk_begins_and_ends_at_its_images_and_passes_between_them():
    pipeline, (first, second, _) = make_pipeline(), some_images()
    walk = pipeline.interpolate(first, second, 5, labels=0).codes[0]
    ends = pipeline.encode(torch.stack([first, second]))[0]
    assert torch.equal(walk[[0, -1]], ends)
    assert ((walk == ends[0]) | (walk == ends[1])).all()
    mixed = pipeline.interpolate(first, second, 5, labels=0, redrawn=0.5).codes[0]
    assert torch.equal(mixed[[0, -1]], ends)
    assert not torch.equal(mixed, walk)
    assert torch.equal(pipeline.interpolate(first, second, 2, labels=0).codes[0], ends)


def test_without_a_label_any_class_is_drawn_without_guidance():
    pipeline = make_pipeline()
    pipeline.sampling = SamplingConfig(guidance=3.0)
    made = pipeline.vary(some_images(), 1.0)
    assert made.labels.tolist() == [3, 3, 3]  # the null label of three classes
    plain = TwoStagePipeline(pipeline.autoencoder, pipeline.prior)
    assert torch.equal(plain.vary(some_images(), 1.0).codes[0], made.codes[0])
    assert make_pipeline(num_classes=0).vary(some_images(), 0.5).labels is None


def test_without_a_label_a_prior_that_never_saw_the_null_label_is_refused():
    autoencoder = make_autoencoder()
    prior = make_prior(autoencoder)
    prior.knows_null_label = False
    with pytest.raises(UserError, match=r"must be told a class; give a label, one of the 3 from 0 to 2"):
        TwoStagePipeline(autoencoder, prior).vary(some_images(), 0.5)


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match="got images of 1x8x16, expected 1x16x16, the size that this model makes"):
        make_pipeline().vary(some_images()[:, :, :8], 0.5)


def test_masks_that_are_none_are_refused():
    pipeline, images, half = make_pipeline(), some_images(), torch.arange(16).expand(16, 16) < 8
    for keep, message in [
        (torch.zeros(16, 16, dtype=torch.bool), "the mask keeps nothing: it is black all over"),
        (torch.ones(16, 16, dtype=torch.bool), "the mask keeps everything: nothing is left to draw"),
        (torch.stack([half, half, half | True]), "the mask keeps everything"),  # of one image
        (half[:8], r"got a mask of torch.bool and shape \(8, 16\), expected torch.bool of 16x16"),
        (half.float(), "got a mask of torch.float32"),
        (half.expand(2, -1, -1), r"shape \(2, 16, 16\), expected .* or of 3x16x16"),
    ]:
        with pytest.raises(UserError, match=message):
            pipeline.inpaint(images, keep, labels=0)


def test_a_mask_may_be_a_picture_and_images_files(tmp_path):
    pipeline, half = make_pipeline(), torch.arange(16).expand(16, 16) < 8
    mask = Image.fromarray((half * 255).to(torch.uint8).numpy())
    mask.save(tmp_path / "mask.png")
    to_pil(some_images()[0]).save(tmp_path / "image.png")
    expected = pipeline.inpaint(pipeline.images(tmp_path / "image.png"), half, labels=0).images
    for keep in (mask, tmp_path / "mask.png"):
        assert torch.equal(pipeline.inpaint(tmp_path / "image.png", keep, labels=0).images, expected)


def smooth_images(count: int, seed: int) -> torch.Tensor:
    """count 1 64 64"""
    coarse = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(-1, 1)


def of_scales(quantizer: QuantizerConfig, size: float = 1.0) -> VQVAE:
    """Fresh weights, but latents of mean 0 and standard deviation `size`, and a codebook that fits them."""
    torch.manual_seed(0)
    config = VQVAEConfig(channels=1, width=16, residual_width=8, residual_blocks=1, quantizer=quantizer)
    autoencoder, images = VQVAE(config, (64, 64)), smooth_images(8, 9)
    last = autoencoder.encoder[-1]
    with torch.no_grad():
        z = autoencoder.latents(images)
        mean, deviation = z.mean((0, 2, 3)), z.std((0, 2, 3)) / size
        last.weight /= deviation[:, None, None, None]
        last.bias.copy_((last.bias - mean) / deviation)
    autoencoder.initialise([images])
    return autoencoder.eval()


@pytest.fixture(scope="module")
def ten_scales() -> VQVAE:
    """VAR's, up to 16x16."""
    return of_scales(MultiscaleQuantizerConfig(codebook_size=128, dim=4))


def errors(autoencoder: VQVAE, images: torch.Tensor, codes: Codes) -> torch.Tensor:
    """Mean squared error of the latents in each column, in units of their variance."""
    with torch.no_grad():
        z, z_q = autoencoder.latents(images), autoencoder.quantizer.codes_to_latents(codes)
    return (z - z_q).square().mean((0, 1, 2)) / z.var()


@pytest.mark.parametrize("config", [VARConfig(layers=1, width=32, heads=2), MaskGITConfig(layers=1, width=32, heads=2)])
def test_the_kept_half_of_ten_scales_is_as_good_as_encoded_away_from_the_border(ten_scales, config):
    """With the fine codes of the original upon coarse ones that were drawn the error is ten times as large."""
    pipeline = TwoStagePipeline(ten_scales, PRIORS[config.kind](config, ten_scales.code_spec(), 0))
    images, keep = smooth_images(6, 1), torch.arange(64).expand(64, 64) < 32
    made = pipeline.inpaint(images, keep, seed=1)
    own = pipeline.encode(images)
    assert not torch.equal(made.codes[0], own[0])  # the 1x1 scale tells of the other half too, and is drawn
    encoded, inpainted = errors(ten_scales, images, own), errors(ten_scales, images, made.codes)
    assert encoded.mean() < 0.05
    assert inpainted[:6].mean() < 1.1 * encoded[:6].mean()
    assert inpainted[8:].mean() > 0.5
    literal = pipeline.redraw(codes_of_kept_pixels(own, keep), seed=1).codes
    assert errors(ten_scales, images, literal)[:6].mean() > 3 * encoded[:6].mean()


def test_the_kept_half_of_bits_on_scales_is_as_good_as_encoded_away_from_the_border():
    """All grids of a scale at once, each told from what was chosen before."""
    quantizer = MultiscaleBSQConfig(scales=(1, 2, 4, 8, 12, 16), dim=6, bits_per_code=4)
    tokenizer = of_scales(quantizer, 0.8)
    prior = Infinity(InfinityConfig(layers=1, width=32, heads=2), tokenizer.code_spec(), 0)
    images, keep = smooth_images(6, 1), torch.arange(64).expand(64, 64) < 32
    made, own = TwoStagePipeline(tokenizer, prior).inpaint(images, keep, seed=1), tokenizer.encode(images)
    assert not torch.equal(made.codes[0], own[0])
    encoded, inpainted = errors(tokenizer, images, own), errors(tokenizer, images, made.codes)
    assert encoded.mean() < 0.2
    assert inpainted[:6].mean() < 1.1 * encoded[:6].mean()
    assert inpainted[8:].mean() > 1.0
    literal = TwoStagePipeline(tokenizer, prior).redraw(codes_of_kept_pixels(own, keep), seed=1).codes
    assert errors(tokenizer, images, literal)[:6].mean() > 3 * encoded[:6].mean()


def test_a_walk_between_ten_scales_passes_from_one_image_to_the_other_place_by_place(ten_scales):
    pipeline = TwoStagePipeline(ten_scales, VAR(VARConfig(layers=1, width=32, heads=2), ten_scales.code_spec(), 0))
    first, second = smooth_images(2, 3)
    walk = pipeline.interpolate(first, second, 5).codes
    ends = pipeline.encode(torch.stack([first, second]))
    for grid, of_ends in zip(walk, ends, strict=True):
        assert torch.equal(grid[[0, -1]], of_ends)
    with torch.no_grad():
        z = ten_scales.latents(torch.stack([first, second]))
        middle = ten_scales.quantizer.codes_to_latents(tuple(grid[2:3] for grid in walk))
        places = random_places(tuple(grid[:1] for grid in ends), 0.5, noise(0, [0], 680, stream=1))
        mixed = codes_at(places, *(tuple(grid[i : i + 1] for grid in ends) for i in (1, 0)))
        literal = ten_scales.quantizer.codes_to_latents(mixed)
    # Of each place to either image. Fine codes of one upon coarse ones of the other are those of neither.
    distances, former = ((z - each).square().mean(1) / z.var() for each in (middle, literal))
    assert distances.amin(0).mean() < 0.2
    assert former.amin(0).mean() > 2 * distances.amin(0).mean()
    assert (distances[0] < distances[1]).float().mean() == pytest.approx(0.5, abs=0.15)


def test_variations_of_residual_codes_draw_all_depths_of_a_place():
    layer = NearestQuantizerConfig(codebook_size=8, dim=4)
    torch.manual_seed(0)
    quantizer = ResidualQuantizerConfig(depth=3, layer=layer)
    autoencoder = VQVAE(VQVAEConfig(channels=1, width=8, residual_width=8, quantizer=quantizer), (16, 16)).eval()
    prior = RQTransformer(RQTransformerConfig(layers=1, width=16, heads=2), autoencoder.code_spec(), 0)
    pipeline, images = TwoStagePipeline(autoencoder, prior), some_images(8)
    varied, own = (torch.stack(codes) for codes in (pipeline.vary(images, 0.25, seed=1).codes, pipeline.encode(images)))
    changed = (varied != own).any(0)  # b h w
    assert (changed.flatten(1).sum(1) <= 4).all()
    assert (varied != own).sum() > 2.3 * changed.sum()  # of 3 each, 7 in 8 of them by another number


def test_levels_below_what_was_drawn_are_encoded_after_it():
    torch.manual_seed(0)
    quantizer = NearestQuantizerConfig(codebook_size=16, dim=4)
    config = VQVAE2Config(channels=1, width=8, residual_width=4, residual_blocks=1, quantizer=quantizer)
    autoencoder = VQVAE2(config, (32, 32)).eval()
    levels = HierarchicalConfig(
        top=TransformerConfig(layers=1, width=16, heads=2), bottom=TransformerConfig(layers=1, width=16, heads=2)
    )
    pipeline = TwoStagePipeline(autoencoder, Hierarchical(levels, autoencoder.code_spec(), 0))
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    keep = torch.arange(32).expand(32, 32) < 16
    top, bottom = pipeline.inpaint(images, keep, seed=1).codes
    own_top, own_bottom = pipeline.encode(images)
    assert torch.equal(top[..., :2], own_top[..., :2])
    expected = pipeline.completing(images)((top,))[1]
    assert torch.equal(bottom[..., :4], expected[..., :4])
    assert torch.equal(bottom[..., 0], own_bottom[..., 0])  # far from what was drawn nothing changes
    assert not torch.equal(expected[..., :4], own_bottom[..., :4])


def test_settings_of_sampling_are_taken_by_name():
    pipeline, images = make_pipeline(), some_images()
    greedy = pipeline.vary(images, 1.0, labels="class 1", temperature=0).codes[0]
    assert torch.equal(greedy, pipeline.generate(3, labels=1, temperature=0).codes[0])
    rough = pipeline.vary(images, 1.0, labels=1, precision="bf16").codes[0]
    with torch.autocast("cpu", torch.bfloat16):
        condition = pipeline.condition([1, 1, 1])
        expected = sample_codes(pipeline.prior, range(3), condition, 0, SamplingConfig())[0]
    assert torch.equal(rough, expected)
    with pytest.raises(UserError, match="precision=fp8, expected bf16"):
        pipeline.generate(1, precision="fp8")
