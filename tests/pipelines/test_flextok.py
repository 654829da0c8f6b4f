"""FlexTok through the commands: files of its first tokens with a prior, guidance where images are made, and what
alignment compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipelines.codec.codec import Codec
from pipelines.commands.assemble import AssembleConfig, assemble
from pipelines.commands.reconstruct import ReconstructConfig, reconstruct_files
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import FlexTok, FlexTokConfig
from stage1_vq.quantizers import FSQConfig
from stage2_prior.priors import MaskGIT, MaskGITConfig, Prior, Transformer, TransformerConfig
from tests.pipelines.conftest import make_autoencoder

TOKENS = 4


def make_flextok() -> FlexTok:
    """Untrained, of 16x16 grey images."""
    torch.manual_seed(0)
    sizes = {f"{half}_{size}": 1 for half in ("encoder", "decoder") for size in ("blocks", "heads")}
    config = FlexTokConfig(
        channels=1,
        patch=4,
        tokens=TOKENS,
        encoder_width=16,
        decoder_width=16,
        steps=2,
        quantizer=FSQConfig(levels=(5, 4), dim=2),
        **sizes,
    )
    return FlexTok(config, (16, 16)).eval()


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def make_prior(model: FlexTok) -> Prior:
    torch.manual_seed(1)
    return Transformer(TransformerConfig(layers=1, width=16, heads=2), model.code_spec(), 2).eval()


@torch.no_grad()
def test_a_file_holds_the_first_tokens_and_decodes_to_what_they_tell():
    model, images = make_flextok(), pictures(5)
    codec, lengths = Codec(model, make_prior(model)), []
    codes = model.encode(images)[0]
    for tokens in (1, 3, TOKENS):
        data = codec.compress(images, "prior", tokens=tokens).data
        torch.manual_seed(tokens)  # whatever is drawn elsewhere
        torch.testing.assert_close(torch.stack(codec.decompress(data)), model.decode((codes[..., :tokens],)))
        lengths.append(len(data))
    assert lengths == sorted(set(lengths))


@pytest.mark.parametrize("kind", ["transformer", "maskgit"])
def test_a_prior_of_its_row_draws_images_whatever_the_batch(kind: str):
    model = make_flextok()
    prior = make_prior(model)
    if kind == "maskgit":
        prior = MaskGIT(MaskGITConfig(layers=1, width=16, heads=2), model.code_spec(), 2).eval()
    pipeline = TwoStagePipeline(model, prior)
    whole = pipeline.generate(5, seed=5, batch_size=5)
    parts = pipeline.generate(5, seed=5, batch_size=2)
    assert torch.equal(parts.codes[0], whole.codes[0])
    assert (parts.images - whole.images).abs().max() < 1 / 255
    with pytest.raises(UserError, match="a flextok model has no codes of places, so none to keep outside a hole"):
        pipeline.inpaint(pictures(1), torch.ones(16, 16, dtype=torch.bool))


def test_steps_guidance_and_tokens_are_chosen_where_images_are_made(tmp_path: Path):
    folder = make_flextok().save_pretrained(tmp_path / "flextok")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    made = {}
    asked = ReconstructConfig(model=str(folder), images=str(tmp_path / "one.png"), out="", alone=True)
    choices = {
        "all": {},
        "same": {"decoder_steps": 2, "decoder_guidance": 1.0, "tokens": TOKENS},
        "steps": {"decoder_steps": 5},
        "guidance": {"decoder_guidance": 4.0},
        "tokens": {"tokens": 1},
    }
    for name, choice in choices.items():
        reconstruct_files(replace(asked, out=str(tmp_path / name), **choice))
        made[name] = np.asarray(Image.open(tmp_path / name / "one.png"))
    assert np.array_equal(made["all"], made["same"])
    for name in ("steps", "guidance", "tokens"):
        assert not np.array_equal(made[name], made["all"]), name

    prior = make_prior(make_flextok()).save_pretrained(tmp_path / "prior")
    assemble(AssembleConfig(stage1=str(folder), stage2=str(prior), out=str(tmp_path / "model"), decoder_guidance=3.0))
    assert TwoStagePipeline.from_pretrained(tmp_path / "model").autoencoder.config.guidance == 3.0
    former = make_autoencoder().save_pretrained(tmp_path / "former")
    with pytest.raises(UserError, match=r"a guidance of 2.0, but the decoder of a vqvae model was never without codes"):
        reconstruct_files(replace(asked, model=str(former), out=str(tmp_path / "other"), decoder_guidance=2.0))
