"""generate and vary on hierarchies of latents: temperatures, and groups that stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.commands.vary import VaryConfig, vary_files
from pipelines.latents.pipeline import LatentPipeline
from stage1_vae.hierarchies.vdvae import VDVAE, VDVAEConfig
from stage1_vae.likelihoods import BernoulliConfig
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.pictures import levels_shown, progressive
from stage1_vae.vae import VAE, VAEConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    vae = VDVAE(
        VDVAEConfig(
            channels=1, width=8, latents=2, encoder_layers="8x1,8d2,4x1,4d4,1x1", decoder_layers="1x1,4m1,4x1,8m4",
            bottleneck_multiple=0.5, likelihood=BernoulliConfig(),
        ),
        (8, 8),
    )  # fmt: skip
    for weight in vae.parameters():
        weight.data += 0.2 * torch.randn(weight.shape)  # so that samples differ
    return str(vae.save_pretrained(tmp_path_factory.mktemp("model") / "vdvae"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for seed, name in enumerate("ab"):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path / "pictures"


def shown(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("0*.png"))]


def test_temperatures_of_samples(model: str, tmp_path: Path):
    """One for all is as many that are equal; at 0 all samples are the prior's mean; each group's is its own."""
    for out, options in (
        ("one", {"temperature": 0.5}),
        ("each", {"temperatures": (0.5, 0.5, 0.5, 0.5)}),
        ("none", {"temperature": 0.0}),
        ("plain", {}),
    ):
        generate_files(GenerateConfig(model=model, out=str(tmp_path / out), num=3, **options))
    assert shown(tmp_path / "one") == shown(tmp_path / "each") != shown(tmp_path / "plain")
    assert len(set(shown(tmp_path / "none"))) == 1
    assert len(set(shown(tmp_path / "plain"))) == 3
    pipeline = LatentPipeline.from_pretrained(model)
    hot, cold = (pipeline.generate(5, seed=2, temperature=[1.0, 1.0, 1.0, last]) for last in (1.0, 0.0))
    sizes = pipeline.vae.sizes  # type: ignore[attr-defined]
    above, last = slice(0, sum(sizes[:3])), slice(sum(sizes[:3]), None)
    torch.testing.assert_close(hot.latents[:, above], cold.latents[:, above])
    assert (hot.latents[:, last] - cold.latents[:, last]).abs().mean() > 0.1
    with pytest.raises(UserError, match=r"was begun with other settings: temperature was 0\.5 and is now 1"):
        generate_files(GenerateConfig(model=model, out=str(tmp_path / "one"), num=3))


def test_batches_change_no_sample(model: str):
    pipeline = LatentPipeline.from_pretrained(model)
    for pixels in ("mean", "sample"):
        one, many = (pipeline.generate(5, seed=1, batch_size=size, pixels=pixels) for size in (1, 5))
        torch.testing.assert_close(one.latents, many.latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.images, many.images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperatures": (1.0, 0.5)}, r"temperatures=\(1.0, 0.5\), expected .* each of the 4 groups"),
        ({"temperature": -1.0}, r"temperatures=-1.0, expected one of 0 or more"),
        ({"temperature": 0.5, "temperatures": (1.0,) * 4}, "expected one of the two"),
    ],
)
def test_temperatures_that_there_are_not(model: str, tmp_path: Path, options, said):
    with pytest.raises(UserError, match=said):
        generate_files(GenerateConfig(model=model, out=str(tmp_path / "out"), num=3, **options))


def test_groups_of_an_image_stay(model: str):
    """The others are drawn anew in each variant, from the prior given those that stay above them."""
    pipeline = LatentPipeline.from_pretrained(model)
    vae, image = pipeline.vae, torch.rand(1, 8, 8) * 2 - 1
    assert isinstance(vae, VDVAE)
    variants = vae.split(pipeline.vary(image, {1, 3}, 3, seed=4, first_index=7).latents)
    noise = torch.randn(1, *vae.shape, generator=pipeline.generator(4, 7, stream=2))
    kept = vae.posterior_latents(image[None], noise)
    for place, group in enumerate(variants):
        if place in (1, 3):
            assert (group[0] - group[1]).abs().mean() > 0.1
        else:
            torch.testing.assert_close(group, kept[place].expand_as(group))
    again = pipeline.vary(image, {1, 3}, 1, seed=4, first_index=7).latents
    torch.testing.assert_close(again[0], vae.joined(variants)[0], rtol=1e-4, atol=1e-4)
    still = pipeline.vary(image, {1, 3}, 2, temperature=0.0).images
    torch.testing.assert_close(still[0], still[1])
    with pytest.raises(UserError, match="variants=0, expected at least 1"):
        pipeline.vary(image, {1}, 0)


def test_latents_of_another_shape_are_not_decoded(model: str):
    pipeline = LatentPipeline.from_pretrained(model)
    with pytest.raises(UserError, match=r"got latents of shape \(2, 1\), expected \('n', "):
        pipeline.decode(torch.zeros(2, 1))


def test_vary_writes_variants_of_each_image(model: str, pictures: Path, tmp_path: Path):
    config = VaryConfig(model=model, images=str(pictures), out=str(tmp_path / "out"), share=0.5, variants=2)
    assert vary_files(config).startswith("2 variants of each of 2 images in ")
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("?_?.png")}
    assert set(written) == {"a_0.png", "a_1.png", "b_0.png", "b_1.png"}
    assert len(set(written.values())) == 4
    chosen = VaryConfig(model=model, images=str(pictures), out=str(tmp_path / "two"), groups=(2, 3), variants=2)
    vary_files(chosen)  # half of the four
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").glob("?_?.png")} == written


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": (4,)}, r"groups=\[4\], expected at least one, from 0, the top one, to 3"),
        ({"groups": ()}, r"groups=\[\], expected at least one"),
        ({"guidance": 2.0}, "guidance=2.0, expected it left out"),
    ],
)
def test_what_a_hierarchy_is_not_asked(model: str, pictures: Path, tmp_path: Path, options, said):
    with pytest.raises(UserError, match=said):
        vary_files(VaryConfig(model=model, images=str(pictures), out=str(tmp_path / "out"), **options))


def test_a_vae_of_one_group_does_not_vary(pictures: Path, tmp_path: Path):
    flat = VAE(VAEConfig(latents=2, encoder=DenseConfig(hidden=()), decoder=DenseConfig(hidden=())), (8, 8))
    folder = flat.save_pretrained(tmp_path / "flat")
    with pytest.raises(UserError, match="there is no folder nowhere"):
        vary_files(VaryConfig(model="nowhere", images=str(pictures), out=str(tmp_path / "out"), groups=(0,)))
    with pytest.raises(UserError, match="a VAE of one group of latents, expected a hierarchy"):
        vary_files(VaryConfig(model=str(folder), images=str(pictures), out=str(tmp_path / "out")))


def test_levels(model: str):
    """The first rows are alike for all images, as nothing is told or drawn; the last ones are the reconstruction and
    the sample."""
    vae = LatentPipeline.from_pretrained(model).vae
    assert isinstance(vae, VDVAE)
    assert levels_shown(vae) == [0, 1, 3, 4]
    images = torch.rand(3, 1, 8, 8).round() * 2 - 1
    sheet = progressive(vae, images)
    assert sheet.height > 9 * 56
    with torch.no_grad():
        nothing = torch.zeros(3, *vae.shape)
        _, outputs = vae.draw(nothing, temperatures=0.0, known=vae.posterior_latents(images))
        torch.testing.assert_close(vae.shown(outputs, "mean"), vae.decode(vae.encode(images)))
        _, outputs = vae.draw(nothing, temperatures=0.0)
        torch.testing.assert_close(outputs[0], outputs[2])
