"""From a VAE to images of a prior over its latents, by the commands: encode, train-stage2, assemble, generate."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from codes.latents import LatentDataset
from common.errors import UserError
from images.datasets import DataConfig
from pipelines.cli import main
from pipelines.commands.assemble import AssembleConfig, assemble
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.commands.train_stage2 import prepare
from pipelines.latents.models import is_vae, load_latent_prior, load_vae
from pipelines.latents.pipeline import LatentPipeline
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.vae import VAE, VAEConfig
from stage2_prior.latents import LATENT_PRIORS

RECIPES = {
    "gaussian_mixture": "mnist_latents_mixture",
    "masked_autoregressive_flow": "mnist_latents_maf",
    "second_vae": "mnist_latents_vae",
}
SMALL = {
    "gaussian_mixture": ["--model.components", "3"],
    "masked_autoregressive_flow": ["--model.hidden", "[16]"],
    "second_vae": ["--model.hidden", "[16]"],
}
SHORT = ["--train.steps", "6", "--train.validate_every", "3", "--train.preview_every", "6", "--train.batch_size", "8"]


def make_vae(seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    network = DenseConfig(hidden=(12,))
    vae = VAE(VAEConfig(latents=3, encoder=network, decoder=network), (8, 8))
    for weight in vae.parameters():
        weight.data.mul_(3)  # so that images differ by more than a grey level
    return vae.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a VAE, `vae`, and its latents, `latents`."""
    root = tmp_path_factory.mktemp("root")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    np.savez(root / "images.npz", images=pixels, labels=np.arange(60) % 2)
    make_vae().save_pretrained(root / "vae" / "model")
    data = DataConfig(path=str(root / "images.npz"), image_size=8, channels=1, validation_count=12)
    (root / "vae" / "config.yaml").write_text(yaml.safe_dump({"data": asdict(data), "binarised": "once"}))
    assert main(["encode", "--model", str(root / "vae"), "--out", str(root / "latents"), "--workers", "0"]) == 0
    return root


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Path]:
    """A run of each kind of prior."""
    for kind, recipe in RECIPES.items():
        given = ["--codes", str(root / "latents"), "--decoder", str(root / "vae"), "--run", str(root / kind)]
        assert main(["train-stage2", "--config", recipe, *given, *SMALL[kind], *SHORT]) == 0
    return {kind: root / kind for kind in RECIPES}


def test_every_kind_has_a_recipe():
    assert RECIPES.keys() == LATENT_PRIORS.keys()


@pytest.mark.parametrize("kind", RECIPES)
def test_images_of_each_prior(root: Path, runs: dict[str, Path], tmp_path: Path, kind: str):
    run = runs[kind]
    assert yaml.safe_load((run / "config.yaml").read_text())["latents"] == "3 latents (8x8x1 images)"
    assert len(list((run / "previews").glob("*.png"))) == 1
    summary = assemble(AssembleConfig(stage1=str(root / "vae"), stage2=str(run), out=str(tmp_path / "model")))
    assert summary == (
        f"the model is in {tmp_path / 'model'}; next: zellige generate --model {tmp_path / 'model'} --num 64 --out DIR"
    )
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["kind"] == "latent"
    assert is_vae(tmp_path / "model")
    generate_files(GenerateConfig(model=str(tmp_path / "model"), out=str(tmp_path / "images"), num=5, seed=2))
    pipeline = LatentPipeline.from_pretrained(tmp_path / "model")
    prior, vae = load_latent_prior(run), load_vae(root / "vae")
    latents = torch.cat([prior.sample(1, pipeline.generator(2, i)) for i in range(5)])
    drawn = pipeline.generate(5, seed=2)
    torch.testing.assert_close(drawn.latents, latents)
    torch.testing.assert_close(drawn.images, vae.decode(latents))
    shown = np.stack([np.asarray(Image.open(tmp_path / "images" / f"{i:06d}.png")) for i in range(5)])
    assert np.abs((drawn.images[:, 0].numpy() + 1) * 127.5 - shown).max() < 0.51
    assert not torch.allclose(latents, LatentPipeline(vae).generate(5, seed=2).latents)


def test_a_vae_alone_draws_from_its_own_prior(root: Path, tmp_path: Path):
    assemble(AssembleConfig(stage1=str(root / "vae"), out=str(tmp_path / "model")))
    assert not (tmp_path / "model" / "stage2").exists()
    alone, run = LatentPipeline.from_pretrained(tmp_path / "model"), LatentPipeline.from_pretrained(root / "vae")
    assert alone.fingerprint() == run.fingerprint()
    assert torch.equal(alone.generate(3).images, run.generate(3).images)


def test_a_model_replaces_another_one_and_says_so(root: Path, runs: dict[str, Path], tmp_path: Path):
    names = {"stage1": str(root / "vae"), "out": str(tmp_path / "model")}
    assemble(AssembleConfig(**names, stage2=str(runs["gaussian_mixture"])))
    summary = assemble(AssembleConfig(**names, stage2=str(runs["second_vae"])))
    assert ", in place of another one;" in summary
    assert "in place" not in assemble(AssembleConfig(**names, stage2=str(tmp_path / "model")))
    assert load_latent_prior(tmp_path / "model").kind == "second_vae"


def test_an_assembled_model_stands_for_its_vae(root: Path, runs: dict[str, Path], tmp_path: Path):
    assemble(AssembleConfig(stage1=str(root / "vae"), stage2=str(runs["second_vae"]), out=str(tmp_path / "model")))
    given = ["--data.path", str(root / "images.npz"), "--workers", "0", "--out", str(tmp_path / "latents")]
    assert main(["encode", "--model", str(tmp_path / "model"), *given]) == 0
    assert LatentDataset(tmp_path / "latents").stage1_fingerprint == load_vae(root / "vae").fingerprint()


def test_stages_that_do_not_fit_are_refused(root: Path, runs: dict[str, Path], tmp_path: Path):
    make_vae(seed=1).save_pretrained(tmp_path / "other")
    config = AssembleConfig(stage1=str(tmp_path / "other"), stage2=str(runs["second_vae"]), out=str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"the two stages do not fit: .* \(same shape, other weights\)"):
        assemble(config)
    VAE(VAEConfig(latents=4), (8, 8)).save_pretrained(tmp_path / "wider")
    with pytest.raises(UserError, match=r"the VAE makes 4 latents .*, the prior was trained on 3 latents"):
        assemble(AssembleConfig(stage1=str(tmp_path / "wider"), stage2=str(runs["second_vae"]), out="model"))
    given = ["--config", "mnist_latents_maf", "--codes", str(root / "latents"), "--run", str(tmp_path / "run")]
    train = prepare([*given, "--decoder", str(tmp_path / "other")])
    with pytest.raises(UserError, match=r"holds latents of VAE .* encode images with this model"):
        train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "got top_k for a VAE, expected none"),
        ({"codes": "codes"}, "got codes for a VAE, expected none"),
        ({"stage2": ("a", "b")}, "a prior over latents has no levels"),
        ({"stage2": ""}, "stage2 is empty"),
    ],
)
def test_what_a_vae_does_not_take_is_refused(root: Path, tmp_path: Path, changes, message: str):
    with pytest.raises(UserError, match=message):
        assemble(AssembleConfig(**{"stage1": str(root / "vae"), "out": str(tmp_path / "model"), **changes}))


def test_codes_and_latents_are_not_confused(root: Path, tmp_path: Path):
    of_codes = ["--config", "folder", "--codes", str(root / "latents"), "--run", str(tmp_path)]
    with pytest.raises(UserError, match="is a folder of latent shards, expected code shards, as a transformer prior"):
        prepare(of_codes)
    codes = tmp_path / "codes"
    codes.mkdir()
    (codes / "index.json").write_text(json.dumps({"code_spec": {}, "shards": []}))
    of_latents = ["--config", "mnist_latents_maf", "--codes", str(codes), "--run", str(tmp_path)]
    with pytest.raises(UserError, match="is a folder of code shards, expected latent shards, as a masked_auto"):
        prepare(of_latents)
    with pytest.raises(UserError, match="codes is empty"):
        prepare(["--config", "mnist_latents_maf"])


def test_the_kind_may_be_given(root: Path, tmp_path: Path):
    given = ["--codes", str(root / "latents"), "--run", str(tmp_path), *SMALL["second_vae"], *SHORT]
    prepare(["--config", "mnist_latents_maf", "--model.kind", "second_vae", *given])()
    assert load_latent_prior(tmp_path).kind == "second_vae"


def test_help_shows_the_options_of_the_kind(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["train-stage2", "--config", "mnist_latents_mixture", "--help"])
    shown = capsys.readouterr().out
    assert "--model.iterations" in shown
    assert "--draws" in shown
    assert "--label_dropout" not in shown
