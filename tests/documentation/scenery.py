"""What the commands of the docs find in their working folder: small stand-ins for photos, digits, runs and models.

A name of `SCENERY` is what the docs call it by; each is made once, when a page names it, and copied into the folder in
which the page's blocks run.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines.cli import main
from pipelines.two_stage import TwoStagePipeline
from stage1_vae.binarise import Binarised
from stage1_vae.hierarchies.markov import MarkovConfig, MarkovHierarchy
from stage1_vae.likelihoods import BernoulliConfig
from stage1_vae.likelihoods.logistic_mixture import LogisticMixtureConfig
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.vae import VAE, VAEConfig
from stage1_vq.autoencoders import (
    VQVAE,
    VQVAE2,
    Autoencoder,
    FlexTok,
    FlexTokConfig,
    FlowDecoder,
    FlowDecoderConfig,
    TiTok,
    TiTokConfig,
    VQVAE2Config,
    VQVAEConfig,
)
from stage1_vq.quantizers import FSQConfig, NearestQuantizerConfig
from stage2_prior.priors import Transformer, TransformerConfig
from tests.documentation.smaller import smaller

PHOTOS = ("cat", "n01484850_great_white_shark", *(f"photo_{i}" for i in range(6)))
CLASSES = ("bird", "car", "cat", "deer", "dog")


def pixels(seed: int, *shape: int) -> np.ndarray:
    """Smooth random pictures, uint8: 4x4 random colours scaled up, so that JPEG and PNG stay small."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, *shape[2:]), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def photos(folder: Path) -> None:
    """Some photos of several sizes, cat.jpg among them."""
    folder.mkdir(parents=True)
    for number, name in enumerate(PHOTOS):
        Image.fromarray(pixels(number, 48 + 4 * (number % 5), 64, 3)).save(folder / f"{name}.jpg")


def class_folders(folder: Path) -> None:
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(pixels(10 * number + i, 32, 32, 3)).save(folder / name / f"{i}.png")


def digits(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(3):
        Image.fromarray(pixels(number, 28, 28)).save(folder / f"{number}.png")


def digits_file(path: Path) -> None:
    images, labels = np.stack([pixels(i, 28, 28) for i in range(40)]), np.arange(40) % 10
    np.savez(path, train_images=images, train_labels=labels, test_images=images[:10], test_labels=labels[:10])


def one_photo(path: Path) -> None:
    Image.fromarray(pixels(len(path.stem), 40, 60, 3)).save(path)


def mask(path: Path) -> None:
    """White but for a hole in the middle, of the proportions of `one_photo`."""
    white = np.full((40, 60), 255, dtype=np.uint8)
    white[10:30, 15:45] = 0
    Image.fromarray(white).save(path)


def lines(path: Path) -> None:
    path.write_text("".join(f"{first} {second}\n" for first in "abcdefghij" for second in "abcdefghijklmnopqrstuvwxyz"))


def captions(path: Path) -> None:
    path.write_text("file,caption\n" + "".join(f"{name}.jpg,a photo of {name}\n" for name in PHOTOS))


def autoencoder(size: int, channels: int) -> VQVAE:
    torch.manual_seed(0)
    quantizer = NearestQuantizerConfig(codebook_size=16, dim=4)
    config = VQVAEConfig(channels=channels, width=8, residual_width=4, residual_blocks=1, quantizer=quantizer)
    return VQVAE(config, (size, size)).eval()


def prior(first: Autoencoder, classes: tuple[str, ...]) -> Transformer:
    torch.manual_seed(1)
    config = TransformerConfig(layers=1, width=16, heads=2)
    fingerprint = first.fingerprint()
    return Transformer(
        config, first.code_spec(), len(classes), class_names=classes, stage1_fingerprint=fingerprint
    ).eval()


def photo_run(folder: Path) -> None:
    """Of stage one, on 16x16 pixels of five classes: 4x4 codes of 16."""
    images = ["--data.path", str(made("cifar10/train")), "--data.image_size", "16"]
    train("train-stage1", "folder_short", *images, run_folder=folder)


def photo_codes(folder: Path) -> None:
    encode(made("runs/photos"), made("cifar10/train"), folder)


def prior_run(folder: Path) -> None:
    train("train-stage2", "folder_short", "--codes", str(made("runs/codes")), run_folder=folder)


def photo_model(folder: Path) -> None:
    """With tables."""
    stages = ["--stage1", made("runs/photos"), "--stage2", made("runs/photos_prior")]
    run("assemble", *stages, "--codes", made("runs/codes"), "--out", folder)


def quickstart_folder(folder: Path) -> None:
    parts = {"stage1": "runs/photos", "codes": "runs/codes", "stage2": "runs/photos_prior", "model": "model"}
    for part, name in parts.items():
        shutil.copytree(made(name), folder / part)


def digit_autoencoder(folder: Path) -> None:
    autoencoder(28, 1).save_pretrained(folder)


def digit_model(folder: Path) -> None:
    first = autoencoder(28, 1)
    TwoStagePipeline(first, prior(first, tuple("0123456789"))).save_pretrained(folder)


def token_model(folder: Path) -> None:
    """TiTok of 8 nested tokens, with a prior."""
    torch.manual_seed(0)
    sizes = {f"{half}_{size}": 1 for half in ("encoder", "decoder") for size in ("blocks", "heads")}
    sizes |= {"encoder_width": 16, "decoder_width": 16, "channels": 1, "patch": 7, "tokens": 8}
    first = TiTok(TiTokConfig(nested="uniform", quantizer=FSQConfig(levels=(4, 4), dim=2), **sizes), (28, 28)).eval()
    TwoStagePipeline(first, prior(first, ())).save_pretrained(folder)


def flextok(folder: Path) -> None:
    """Of 8 nested tokens."""
    torch.manual_seed(0)
    sizes = {f"{half}_{size}": 1 for half in ("encoder", "decoder") for size in ("blocks", "heads")}
    sizes |= {"encoder_width": 16, "decoder_width": 16, "channels": 1, "patch": 4, "tokens": 8}
    config = FlexTokConfig(steps=2, quantizer=FSQConfig(levels=(4, 4), dim=2), **sizes)
    FlexTok(config, (28, 28)).eval().save_pretrained(folder)


def flow_decoder(folder: Path) -> None:
    """On the codes of the digits' model."""
    first = autoencoder(28, 1)
    config = FlowDecoderConfig(
        width=8, multipliers=(1, 1), residual_blocks=1, transformer_blocks=1, heads=1, norm_groups=4, steps=2,
        tokenizer=first.config,
    )  # fmt: skip
    FlowDecoder(config, (28, 28)).eval().save_pretrained(folder)


def vae(likelihood: BernoulliConfig | LogisticMixtureConfig) -> VAE:
    torch.manual_seed(0)
    dense = DenseConfig(hidden=(8,))
    config = VAEConfig(latents=4, encoder=dense, decoder=dense, likelihood=likelihood)
    return VAE(config, (28, 28), Binarised("once") if likelihood.kind == "bernoulli" else None).eval()


def binary_vae(folder: Path) -> None:
    vae(BernoulliConfig()).save_pretrained(folder)


def levels(folder: Path) -> None:
    torch.manual_seed(0)
    quantizer = NearestQuantizerConfig(codebook_size=16, dim=4)
    config = VQVAE2Config(width=8, residual_width=4, residual_blocks=1, quantizer=quantizer)
    VQVAE2(config, (16, 16)).eval().save_pretrained(folder)


def level_codes(folder: Path) -> None:
    encode(made("runs/vqvae2"), made("cifar10/train"), folder)


def lossless_vae(folder: Path) -> None:
    vae(LogisticMixtureConfig(components=2)).save_pretrained(folder)


def ladder(folder: Path) -> None:
    config = MarkovConfig(latents=(8, 4, 3, 2, 2), hidden=(8, 8, 8, 8, 8), inference="top_down")
    MarkovHierarchy(config, (28, 28), Binarised("once", 0)).save_pretrained(folder)


def latents(folder: Path) -> None:
    encode(made("runs/vae"), made("mnist.npz"), folder)


def encode(model: Path, images: Path, out: Path) -> None:
    run("encode", "--model", model, "--data.path", images, "--out", out, "--workers", 0)


def train(command: str, recipe: str, *options: str, run_folder: Path) -> None:
    run(*smaller(["zellige", command, "--config", recipe, *options])[1:], "--run", run_folder)


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0, words


SCENERY: dict[str, Callable[[Path], None]] = {
    "my_photos": photos,
    "photos": class_folders,
    "maps": class_folders,
    "imagenet_samples": photos,
    "cifar10/train": class_folders,
    "cifar10/test": class_folders,
    "my_digits": digits,
    "mnist.npz": digits_file,
    "a.png": one_photo,
    "b.png": one_photo,
    "photo.png": one_photo,
    "mask.png": mask,
    "captions.csv": captions,
    "lines.txt": lines,
    "model": photo_model,
    "models/photos": photo_model,
    "models/mnist": digit_model,
    "models/tokens": token_model,
    "runs/titok": token_model,
    "runs/flextok": flextok,
    "runs/flow": flow_decoder,
    "runs/quickstart": quickstart_folder,
    "runs/quickstart/model": digit_model,
    "runs/quickstart/stage1": digit_autoencoder,
    "runs/photos": photo_run,
    "runs/maps": photo_run,
    "runs/folder": photo_run,
    "runs/first": photo_run,
    "runs/second": photo_run,
    "runs/photos_prior": prior_run,
    "runs/folder_prior": prior_run,
    "runs/prior": prior_run,
    "runs/codes": photo_codes,
    "codes": photo_codes,
    "runs/vqvae2": levels,
    "runs/vqvae2_codes": level_codes,
    "runs/vae": binary_vae,
    "runs/mnist_binary": binary_vae,
    "runs/digits": lossless_vae,
    "runs/ladder": ladder,
    "latents": latents,
}

kept: Path | None = None  # where they are made, once for all pages of a process


@cache
def made(name: str) -> Path:
    """Where the stand-in of this name lies; those of one kind are the same."""
    builder = SCENERY[name]
    first = next(other for other, same in SCENERY.items() if same is builder)
    if first != name and builder is not one_photo:
        return made(first)
    assert kept is not None
    path = kept / name.replace("/", "_") / Path(name).name
    path.parent.mkdir(parents=True)
    builder(path)
    return path


def set_the_scene(folder: Path, words: str) -> None:
    """Puts into `folder` what `words`, all code of a page, names."""
    for name in SCENERY:
        if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w/-])", words):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (source := made(name)).is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copy(source, target)
