"""The model of a demo, and what it can do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import nn

from common.errors import UserError
from common.wording import an
from pipelines.codec.codec import Codec
from pipelines.codec.lossless import LosslessCodec
from pipelines.devices import open_device
from pipelines.latents.models import is_vae
from pipelines.latents.pipeline import LatentPipeline
from pipelines.model_folders import INDEX_NAME, any_model_folder
from pipelines.one_by_one import decode_each, sample_each
from pipelines.pictures import save_png
from pipelines.prior_requests import labels_of, prompts_of
from pipelines.two_stage import TwoStagePipeline


@dataclass(frozen=True)
class Subject:
    """One model, seen as what it is. All that is there shares the same networks."""

    name: str  # as a person named it
    codec: Codec | None = None  # of a model with codes: its autoencoder, and the prior where it has one
    pipeline: TwoStagePipeline | None = None  # of one with a prior that draws by itself
    latent: LatentPipeline | None = None  # of a VAE
    lossless: LosslessCodec | None = None  # of a VAE whose likelihood codes images without loss

    @property
    def networks(self) -> list[nn.Module]:
        found: list[object] = [self.codec.autoencoder, self.codec.prior] if self.codec is not None else []
        if self.latent is not None:
            found += [self.latent.vae, self.latent.prior]
        return [network for network in found if isinstance(network, nn.Module)]

    @property
    def channels(self) -> int:
        return self.latent.vae.config.channels if self.latent is not None else self._codec.autoencoder.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) that the model was trained on."""
        if self.latent is not None:
            return self.latent.vae.image_size
        spec = self._codec.autoencoder.code_spec()
        return spec.image_height, spec.image_width

    @property
    def _codec(self) -> Codec:
        assert self.codec is not None
        return self.codec

    def describe(self) -> str:
        """For the head of the page."""
        height, width = self.image_size
        weights = sum(weight.numel() for network in self.networks for weight in network.parameters())
        colours = "grey" if self.channels == 1 else "colour"
        size = f"{height}×{width} pixels in {colours}, {weights:,} weights"
        if self.latent is not None:
            shape = "×".join(map(str, self.latent.vae.shape))
            return f"a likelihood VAE with {shape} latents, {size}"
        codec = self._codec
        grids = " + ".join(f"{g.height}×{g.width} of {g.vocabulary}" for g in codec.autoencoder.code_spec().grids)
        prior = f" and {an(codec.prior.kind)} prior" if codec.prior is not None else ", without a prior"
        return f"{an(codec.autoencoder.kind)}{prior}; codes {grids}, {size}"


def open_subject(name: str, device_name: str | None, text_encoder: str | None = None) -> Subject:
    """An assembled model, an autoencoder alone, or a VAE. Raises UserError."""
    _, device = open_device(device_name)
    if is_vae(name):
        if text_encoder is not None:
            raise UserError(f"text_encoder={text_encoder}, but {name} is a VAE and reads no captions; leave it out")
        latent = LatentPipeline.from_pretrained(name).to(device)
        return Subject(name, latent=latent, lossless=lossless_codec(latent))
    if not (any_model_folder(name) / INDEX_NAME).is_file():
        if text_encoder is not None:
            raise UserError(f"text_encoder={text_encoder}, but {name} has no prior that reads captions; leave it out")
        return Subject(name, codec=Codec.from_pretrained(name).to(device))
    pipeline = TwoStagePipeline.from_pretrained(name).to(device)
    codec = Codec(pipeline.autoencoder, pipeline.prior, pipeline.tables)
    if pipeline.prior.given:  # it goes by codes of other pictures, which visitors do not have
        return Subject(name, codec=codec)
    if pipeline.prior.embeddings is not None or text_encoder is not None:
        pipeline.load_text_encoder(text_encoder)
    return Subject(name, codec=codec, pipeline=pipeline)


def lossless_codec(latent: LatentPipeline) -> LosslessCodec | None:
    """None where the model's images cannot be coded without loss."""
    codec = LosslessCodec(latent.vae)
    try:
        codec.exact  # noqa: B018 (refuses such a model)
    except UserError:
        return None
    return codec


def some_samples(subject: Subject, count: int) -> list[Image.Image]:
    """Images for visitors who have none; none of a model that draws none by itself."""
    if not count:
        return []
    if subject.latent is not None:
        return sample_each(subject.latent, range(count), 0, "mean", lambda _, picture: picture)
    if subject.pipeline is None:
        return []
    pipeline, indices = subject.pipeline, range(count)
    try:
        labels, prompts = labels_of(pipeline.prior, indices), prompts_of(pipeline.prior, indices)
    except UserError:  # a prior of captions that must be told one
        return []
    codes = pipeline.sample(indices, labels, 0, prompts=prompts)
    return decode_each(pipeline, codes, range(count), lambda _, picture: picture, pipeline.sampling.decoding)


def save_samples(pictures: list[Image.Image], folder: Path) -> list[str]:
    """As files whose names tell that they are no photos: their paths."""
    paths = [folder / f"sample_{number}.png" for number in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        save_png(picture, path)
    return [str(path) for path in paths]
