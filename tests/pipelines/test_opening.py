"""One way to open any model, on a device, in a type, in a revision of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.errors import UserError
from pipelines.codec.codec import Codec
from pipelines.codec.lossless import LosslessCodec
from pipelines.latents.models import load_latent_prior, load_vae
from pipelines.latents.pipeline import LatentPipeline
from pipelines.opening import from_pretrained
from pipelines.stages import load_autoencoder, load_prior
from pipelines.two_stage import TwoStagePipeline
from stage1_vae.decoders import InterleavedConfig
from stage1_vae.likelihoods import LogisticMixtureConfig
from stage1_vae.networks import ConvolutionalConfig
from stage1_vae.vae import VAE, VAEConfig
from stage1_vq.autoencoders import VQVAE
from stage2_prior.latents import LATENT_PRIORS
from stage2_prior.priors import Transformer
from tests.pipelines.conftest import make_pipeline, some_images
from tests.pipelines.latents.test_judging import small_vae


def learned(vae: VAE) -> LatentPipeline:
    """A VAE with a mixture over its latents."""
    from stage1_vae.encode import spec_of

    model, config = LATENT_PRIORS["gaussian_mixture"], LATENT_PRIORS["gaussian_mixture"].config_class
    torch.manual_seed(0)
    return LatentPipeline(vae, model(config(components=2), spec_of(vae), vae.fingerprint()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By what they hold."""
    root = tmp_path_factory.mktemp("models")
    return {
        "two stages": make_pipeline().save_pretrained(root / "two"),
        "latent": learned(small_vae()).save_pretrained(root / "latent"),
        "vae": small_vae().save_pretrained(root / "vae"),
    }


def test_one_function_opens_what_a_folder_holds(folders: dict[str, Path]):
    two, latent, vae = (from_pretrained(folders[name]) for name in ("two stages", "latent", "vae"))
    assert isinstance(two, TwoStagePipeline)
    assert two.fingerprint() == make_pipeline().fingerprint()
    for opened, kind in ((latent, "gaussian_mixture"), (vae, "standard_normal")):
        assert isinstance(opened, LatentPipeline)
        assert kind in repr(opened)
    assert latent.prior.kind == "gaussian_mixture"
    for part, said in (
        ("two/stage1", "load_autoencoder"),
        ("two/stage2", "load_prior"),
        ("latent/stage2", "load_latent_prior"),
    ):
        with pytest.raises(UserError, match=f"alone .* or open it with {said}$"):
            from_pretrained(folders["two stages"].parent / part)
    with pytest.raises(UserError, match="there is no folder"):
        from_pretrained(folders["two stages"] / "nowhere")


OPENERS = {
    "two stages": [
        from_pretrained,
        TwoStagePipeline.from_pretrained,
        load_autoencoder,
        load_prior,
        Codec.from_pretrained,
    ],
    "latent": [from_pretrained, LatentPipeline.from_pretrained, load_vae, load_latent_prior],
    "vae": [
        from_pretrained,
        LatentPipeline.from_pretrained,
        load_vae,
        VAE.from_pretrained,
        LosslessCodec.from_pretrained,
    ],
}
ALL = [(name, opener) for name, openers in OPENERS.items() for opener in openers]


@pytest.mark.parametrize(("name", "opener"), ALL)
def test_every_opener_takes_a_device_and_a_revision(
    name: str, opener, folders: dict[str, Path], tmp_path: Path, monkeypatch
):
    with pytest.raises(UserError, match="device 'cuda:77' cannot be used"):
        opener(folders[name], device="cuda:77")
    with pytest.raises(UserError, match=r"got revision='v2' for the local folder .*, expected none"):
        opener(folders[name], revision="v2")
    asked = []

    def snapshot_download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((hub_id, revision))
        return str(folders[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    opener("owner/name", revision="v2")
    opener("owner/name")
    assert asked == [("owner/name", "v2"), ("owner/name", None)]


def test_a_revision_that_is_not_there_is_named(monkeypatch, tmp_path: Path):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(hub_id: str, **options) -> str:
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="that the hub would give in its revision 'v9'"):
        from_pretrained("owner/name", revision="v9")


def test_a_type_casts_weights_and_leaves_what_decides_codes(folders: dict[str, Path]):
    plain, half = (TwoStagePipeline.from_pretrained(folders["two stages"], dtype=t) for t in (None, torch.bfloat16))
    assert (plain.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert {weight.dtype for weight in half.prior.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in half.autoencoder.decoder.parameters()} == {torch.bfloat16}
    codebook = half.autoencoder.quantizer.state_dict()
    assert all(torch.equal(tensor, codebook[name]) for name, tensor in plain.autoencoder.quantizer.state_dict().items())
    made = half.generate(2, seed=1)
    assert made.images.dtype == torch.float32
    assert torch.equal(made.images, plain.to(torch.bfloat16).generate(2, seed=1).images)
    assert half.reconstruct(some_images()).dtype == torch.float32
    assert "bfloat16 on cpu" in repr(half)
    for opener in (load_autoencoder, load_prior):
        assert next(opener(folders["two stages"], dtype=torch.float16).parameters()).dtype == torch.float16
    for kind, part in ((VQVAE, "stage1"), (Transformer, "stage2")):
        loaded = kind.from_pretrained(folders["two stages"] / part, dtype=torch.float64)
        assert next(loaded.parameters()).dtype == torch.float64
    for opener in (from_pretrained, load_prior):
        with pytest.raises(UserError, match=r"dtype=torch.int8, expected one of torch.float32"):
            opener(folders["two stages"], dtype=torch.int8)


@pytest.mark.parametrize("name", ["latent", "vae"])
def test_of_a_vae_the_networks_are_cast_and_latents_stay(name: str, folders: dict[str, Path], tmp_path: Path):
    plain, half = (from_pretrained(folders[name], dtype=dtype) for dtype in (None, torch.bfloat16))
    assert half.dtype == torch.bfloat16
    before, after = plain.generate(4, seed=2), half.generate(4, seed=2)
    assert torch.equal(before.latents, after.latents)  # drawn by priors that are not cast
    assert after.images.dtype == torch.float32
    assert not torch.equal(before.images, after.images)
    torch.testing.assert_close(before.images, after.images, atol=0.05, rtol=0)
    images = torch.rand(3, 1, 6, 4) * 2 - 1
    assert half.encode(images).dtype == torch.float32
    torch.testing.assert_close(half.reconstruct(images), plain.reconstruct(images), atol=0.1, rtol=0)
    again = from_pretrained(half.save_pretrained(tmp_path / "half"))  # a learned prior goes with what the VAE is now
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.generate(4, seed=2).images, after.images)


def test_pixels_that_go_by_others_are_not_cast(tmp_path: Path):
    torch.manual_seed(0)
    network = ConvolutionalConfig(widths=(4,), residual_blocks=0)
    decoder = InterleavedConfig(levels=1, width=4, residual_blocks=0, trunk_widths=(4,), trunk_blocks=0)
    likelihood = LogisticMixtureConfig(components=2)
    vae = VAE(VAEConfig(latents=2, encoder=network, decoder=decoder, likelihood=likelihood), (8, 8))
    with pytest.raises(UserError, match="a decoder interleaved, expected none: its pixels go by those before them"):
        LatentPipeline.from_pretrained(vae.save_pretrained(tmp_path / "model"), dtype=torch.bfloat16)
