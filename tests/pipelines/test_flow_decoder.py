"""A flow decoder wherever a model is used: begun from another kind, in files and samples, in so many steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from common.errors import UserError
from common.model_io import load_pretrained
from pipelines import TwoStagePipeline
from pipelines.cli import main
from pipelines.codec.codec import Codec
from pipelines.commands.assemble import AssembleConfig, assemble
from pipelines.commands.reconstruct import ReconstructConfig, reconstruct_files
from stage1_vq.autoencoders import AUTOENCODERS, FlowDecoder, FlowDecoderConfig
from tests.pipelines.conftest import make_autoencoder, make_prior, some_images

DECODER = {
    "kind": "flow_decoder", "width": 8, "multipliers": [1, 2], "residual_blocks": 1, "transformer_blocks": 1,
    "heads": 2, "window": 2, "norm_groups": 4, "steps": 3,
}  # fmt: skip


def make_flow_decoder() -> FlowDecoder:
    """On the codes of `make_autoencoder`."""
    former = make_autoencoder()
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in DECODER.items()}
    torch.manual_seed(1)
    model = FlowDecoder(FlowDecoderConfig(**values, tokenizer=former.config), (16, 16)).eval()
    model.load_state_dict({**model.state_dict(), **of_codes(former)})
    model.codes_maker = former.fingerprint()
    return model


def of_codes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("decoder.")}


def test_a_prior_of_the_old_model_draws_with_the_new_decoder_whatever_the_batch():
    pipeline = TwoStagePipeline(make_flow_decoder(), make_prior(make_autoencoder()))
    whole = pipeline.generate(7, seed=5, batch_size=7)
    for batch_size in (1, 3):
        parts = pipeline.generate(7, seed=5, batch_size=batch_size)
        assert torch.equal(parts.codes[0], whole.codes[0])
        assert (parts.images - whole.images).abs().max() < 1 / 255
    assert torch.equal(pipeline.generate(2, seed=5, first_index=3, batch_size=2).codes[0], whole.codes[0][3:5])


def test_a_file_decodes_to_the_image_that_its_codes_stand_for():
    model, images = make_flow_decoder(), some_images()
    codec = Codec(model)
    data = codec.compress(images, "packed").data
    torch.manual_seed(3)
    decoded = torch.stack(codec.decompress(data))
    torch.testing.assert_close(decoded, model.decode(model.encode(images)))
    assert torch.equal(torch.stack(codec.decompress(data)), decoded)


def test_steps_are_chosen_where_images_are_made(tmp_path: Path):
    folder = make_flow_decoder().save_pretrained(tmp_path / "flow")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    made = {}
    for steps in (None, 3, 1):
        asked = ReconstructConfig(
            model=str(folder), images=str(tmp_path / "one.png"), out=str(tmp_path / f"{steps}"), alone=True,
            decoder_steps=steps,
        )  # fmt: skip
        reconstruct_files(asked)
        made[steps] = np.asarray(Image.open(tmp_path / f"{steps}" / "one.png"))
    assert np.array_equal(made[None], made[3])
    assert not np.array_equal(made[1], made[3])
    prior = make_prior(make_autoencoder()).save_pretrained(tmp_path / "prior")
    assemble(AssembleConfig(stage1=str(folder), stage2=str(prior), out=str(tmp_path / "model"), decoder_steps=1))
    assembled = TwoStagePipeline.from_pretrained(tmp_path / "model")
    assert assembled.autoencoder.config.steps == 1
    former = make_autoencoder().save_pretrained(tmp_path / "former")
    with pytest.raises(UserError, match="2 steps of the decoder, but a vqvae model decodes in one pass"):
        reconstruct_files(replace(asked, model=str(former), out=str(tmp_path / "other"), decoder_steps=2))


def test_from_puts_a_model_of_codes_into_the_recipe_and_a_flow_decoder_in_its_place(tmp_path: Path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    recipe = {
        "model": {**DECODER, "tokenizer": {"kind": "vqgan", "channels": 1, "width": 32}},
        "frozen": ["tokenizer"],
        "data": {"path": str(tmp_path / "images.npz"), "image_size": 16, "channels": 1, "validation_count": 8},
        "train": {"steps": 2, "batch_size": 8, "workers": 0, "tracker": "none", "preview_every": 0, "save_every": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    former = make_autoencoder()
    folder = former.save_pretrained(tmp_path / "former")
    line = ["train-stage1", "--config", str(tmp_path / "recipe.yaml"), "--device", "cpu"]
    assert main([*line, "--from", str(folder), "--run", str(tmp_path / "flow")]) == 0
    flow = load_pretrained(tmp_path / "flow", AUTOENCODERS)
    assert isinstance(flow, FlowDecoder)
    assert flow.config.tokenizer == former.config
    assert flow.config.width == 8
    assert flow.codes_fingerprint() == former.fingerprint()
    assert all(torch.equal(tensor, flow.state_dict()[name]) for name, tensor in of_codes(former).items())
    assert "settings that differ" not in capsys.readouterr().out
    again = [*line, "--from", str(tmp_path / "flow"), "--model.steps", "1", "--distillation.teacher_steps", "2"]
    assert main([*again, "--run", str(tmp_path / "one")]) == 0
    one = load_pretrained(tmp_path / "one", AUTOENCODERS)
    assert one.config == replace(flow.config, steps=1)
    assert one.codes_fingerprint() == former.fingerprint()
    assert main([*again, "--run", str(tmp_path / "one"), "--train.steps", "4"]) == 0  # it goes on
    capsys.readouterr()
    assert main([*line, "--run", str(tmp_path / "fresh"), "--model.tokenizer.width", "64"]) == 2
    assert "frozen=tokenizer of fresh weights" in capsys.readouterr().err
