"""TiTok of continuous tokens by its original implementation's own numbers; published sizes are told by the weights;
relatives are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.tensor_files import save_tensors
from pipelines.commands.import_weights import ImportConfig, import_weights
from pipelines.latents.models import load_vae
from stage1_vae.imports import KINDS
from stage1_vae.posteriors.diagonal import DiagonalGaussian
from stage1_vae.vae import VAE
from tests.golden import Golden, golden_frontier, real_shapes_frontier


def titok_vae(name: str = "titok_vae") -> tuple[VAE, Golden]:
    reference = golden_frontier(name)
    return KINDS["titok-vae"].build(reference.weights, reference.config), reference


def close(one: torch.Tensor, other: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=atol)


@torch.no_grad()
def test_it_has_the_originals_moments_divergence_draws_and_images():
    model, reference = titok_vae()
    out, images = reference.outputs, 2 * reference.inputs["x"] - 1
    close(model.encoder(images), out["moments"])
    posterior = model.posterior(images)
    assert isinstance(posterior, DiagonalGaussian)
    close(posterior.mean, out["mean"])
    close(2 * posterior.log_scale, out["logvar"])
    close(posterior.scale, out["std"])
    of_numbers = posterior.kl_to_standard_normal().view_as(out["mean"])
    close(of_numbers.sum((1, 2)), out["kl"])  # theirs is one value for each token
    drawn = posterior.draw(reference.inputs["noise"][None]).latents[0]
    close(drawn, out["sample"])
    decoded = model.decoder.outputs(drawn)
    close((decoded + 1) / 2, out["recon_sample"])
    close((model.decode(model.encode(images)) + 1) / 2, out["recon_mode"].clamp(0, 1))


def test_the_published_size_is_told_by_the_weights_alone():
    shapes = real_shapes_frontier("titok_bl64_vae_c16")
    with torch.device("meta"):
        weights = {key: torch.empty([side for side in shape if isinstance(side, int)]) for key, shape in shapes.items()}
        model = KINDS["titok-vae"].build(weights)
    encoder, decoder = model.config.encoder, model.config.decoder
    assert (model.shape, model.image_size) == ((16, 1, 64), (256, 256))
    assert (encoder.patch, encoder.width, encoder.blocks, encoder.heads) == (16, 768, 12, 12)
    assert (decoder.patch, decoder.width, decoder.blocks, decoder.heads) == (16, 1024, 24, 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("titok_vq", r"weights of a TiTok of codes \(quantize_mode: vq\): give --kind titok"),
        ("tatitok_vq", r"weights of a TiTok of codes \(quantize_mode: vq\): give --kind titok"),
    ],
)
def test_models_of_codes_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        titok_vae(name)


def test_a_decoder_of_captions_is_refused():
    reference = golden_frontier("titok_vae")
    weights = {**reference.weights, "decoder.text_guidance_proj.weight": torch.zeros(2, 2)}
    with pytest.raises(UserError, match="weights of a TA-TiTok of continuous tokens, whose decoder reads a caption"):
        KINDS["titok-vae"].build(weights, reference.config)


def test_it_is_imported_as_the_hub_has_it_by_the_command(tmp_path: Path):
    reference = golden_frontier("titok_vae")
    save_tensors(reference.weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(reference.config))
    files = {"weights": str(tmp_path / "model.safetensors"), "config": str(tmp_path / "config.json")}
    line = import_weights(ImportConfig(kind="titok-vae", **files, out=str(tmp_path / "titok")))
    assert line.endswith(f"next: zellige reconstruct --model {tmp_path / 'titok'} --images DIR --out IMAGES")
    model = load_vae(tmp_path / "titok").eval()
    with torch.no_grad():
        close(model.encode(2 * reference.inputs["x"] - 1), reference.outputs["mean"])
