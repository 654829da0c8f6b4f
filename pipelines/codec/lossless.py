"""8-bit images to `.zlg` bytes and back without loss, by a likelihood VAE."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.processes import usable_device
from images.datasets import to_float, to_uint8
from pipelines.codec.bits_back import decode_chain, encode_chain
from pipelines.codec.contents import FINGERPRINT_BYTES
from pipelines.codec.dependencies import lossless_fingerprint
from pipelines.codec.entropy_coding import DamagedPayloadError
from pipelines.codec.lossless_archive import (
    SEGMENT,
    ImageShape,
    LosslessArchive,
    LosslessFile,
    Segment,
    crc_of_pixels,
    open_lossless,
    write_lossless,
)
from pipelines.codec.lossless_facts import described
from pipelines.latents.models import load_vae
from stage1_vae.exact import ExactModel, exact_model
from stage1_vae.model import LikelihoodVAE
from stage1_vae.objectives.terms import elbo

BATCH = 64  # images whose ELBO is computed at a time
DRAWS = 256  # of latents, of all images of a segment together, at least: for the ELBO


class LosslessCodec:
    """A VAE as a codec. Its fingerprint is computed once: make a new codec when its weights have changed.

    >>> codec = LosslessCodec.from_pretrained("models/digits")
    >>> data = codec.compress(images)  # b c H W, uint8, or float whose values are those of 8 bits in [-1, 1]
    >>> images = codec.decompress(data)  # b c H W, float32 in [-1, 1]
    """

    def __init__(self, vae: LikelihoodVAE):
        """Raises UserError for a VAE whose images cannot be coded without loss."""
        self.vae = vae.eval()
        self.shape = ImageShape(*vae.image_size, vae.config.channels)

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, *, device: torch.device | str = "cpu", revision: str | None = None
    ) -> Self:
        """Of a model or run folder, or a hub id; revision: branch, tag or commit of the hub. Raises UserError."""
        return cls(load_vae(folder_or_hub_id, revision=revision)).to(usable_device(device))

    def to(self, device: torch.device | str) -> Self:
        """Where its device has no float64, on the CPU."""
        self.vae.to("cpu" if torch.device(device).type == "mps" else device)
        self.__dict__.pop("exact", None)
        return self

    @cached_property
    def exact(self) -> ExactModel[Any]:
        return exact_model(self.vae)

    @cached_property
    def model(self) -> bytes:
        """What of the VAE's fingerprint stands in files."""
        return bytes.fromhex(lossless_fingerprint(self.vae))[:FINGERPRINT_BYTES]

    # ---- images to bytes --------------------------------------------------------------------------------------------

    def compress(self, images: Tensor, names: Sequence[str] | None = None) -> bytes:
        """One archive of images: b c H W, uint8 from 0 to 255, or float in [-1, 1] that 8 bits hold exactly. Raises
        UserError for other images."""
        pixels = images if images.dtype == torch.uint8 else to_uint8(images)
        if images.dtype != torch.uint8 and not torch.allclose(to_float(pixels), images.float(), rtol=0, atol=1e-5):
            raise UserError(
                "got images whose numbers lie between those of 8 bits, which lossless files do not hold; hand over "
                "uint8, or round them"
            )
        if names is not None and len(names) != len(images):
            raise UserError(f"got {len(names)} names for {len(images)} images, expected one for each")
        if images.ndim != 4 or not len(images):
            raise UserError(f"got images of shape {tuple(images.shape)}, expected b c H W, at least one")
        array = pixels.movedim(1, -1).cpu().numpy()
        segments = []
        for start in range(0, len(array), SEGMENT):
            own = () if names is None else tuple(names[start : start + SEGMENT])
            segments.append(self.segment(array[start : start + SEGMENT], own))
        return self.archive(segments)

    def archive(self, segments: Iterable[Segment]) -> bytes:
        return write_lossless(LosslessArchive(self.model, self.shape, tuple(segments)))

    def check_pixels(self, pixels: np.ndarray, title: str) -> None:
        """Raises UserError for images, uint8 n H W c, that this model cannot code. title: how messages name them."""
        if pixels.shape[1:] != self.shape:
            raise UserError(
                f"{title} has {described(ImageShape(*pixels.shape[1:]))}, expected {described(self.shape)}, the only "
                "images that this model codes without loss; name others, or a model that was trained on such images"
            )
        if self.exact.bits == 1 and not bool(np.isin(pixels, (0, 255)).all()):
            raise UserError(
                f"{title} has values between black and white, and this model (likelihood bernoulli) knows these two "
                "only; make the images so, or name a model with the likelihood logistic_mixture"
            )

    def segment(self, pixels: np.ndarray, names: Sequence[str] = ()) -> Segment:
        """Images, uint8 n H W c of up to SEGMENT, coded, and read again for a proof. Raises UserError."""
        self.check_pixels(pixels, "an image")
        chain = encode_chain(self.exact, self.values_of(pixels))
        crcs, done = [], 0
        for group in chain.groups:
            crcs.append(crc_of_pixels(self.shape, pixels[done : done + group.images].tobytes()))
            done += group.images
        segment = Segment(chain, tuple(crcs), self.bound_bits(pixels), tuple(names) or ("",) * len(pixels))
        try:
            found = [images for _, images in self.decoded(segment, 0, "")][::-1]
        except UserError:
            found = []
        if not np.array_equal(np.concatenate([pixels[:0], *found]), pixels):
            raise UserError(
                f"what was coded does not decode to the same images on {self.exact.device}, so nothing was written; "
                "take the CPU (--device cpu)"
            )
        return segment

    def values_of(self, pixels: np.ndarray) -> np.ndarray:
        """As the model counts: black and white are 0 and 1."""
        return pixels // 255 if self.exact.bits == 1 else pixels

    @torch.inference_mode()
    def bound_bits(self, pixels: np.ndarray) -> int:
        """The bits that images, uint8 n H W c, take by the model's ELBO, of its own arithmetic."""
        draws, total = -(-DRAWS // len(pixels)), 0.0
        device = next(self.vae.parameters()).device
        generator = torch.Generator(device).manual_seed(0)
        for start in range(0, len(pixels), BATCH):
            images = to_float(torch.from_numpy(pixels[start : start + BATCH]).movedim(-1, 1)).to(device)
            for _ in range(draws):
                noise = torch.cat([self.vae.noise_source(images[:1]).noise(1, generator) for _ in images], dim=1)
                total -= float(elbo(self.vae.terms(images, noise=noise)).double().sum()) / draws
        if not math.isfinite(total):
            raise UserError("the ELBO of these images is not finite: the model is damaged; take an earlier checkpoint")
        return max(0, round(total / math.log(2)))

    # ---- bytes to images --------------------------------------------------------------------------------------------

    def decompress(
        self, file: bytes | Path, images: Sequence[int] | None = None, *, title: str | None = None
    ) -> Tensor:
        """The images of a file, or of its bytes, or those of these numbers: b c H W, float32 in [-1, 1], on the CPU.

        title: how messages name the file; None: its path. Raises UserError for a damaged file and for another model;
        what it returns are the images that were compressed.
        """
        with open_lossless(file, title) as opened:
            if images is None:
                opened.check()
            numbers = range(opened.count) if images is None else images
            found = dict(self.images(opened, numbers))
        return to_float(torch.from_numpy(np.stack([found[number] for number in numbers]))).movedim(-1, 1)

    def check_file(self, file: LosslessFile) -> None:
        """Raises UserError unless this model wrote the file."""
        if file.model != self.model:
            raise UserError(
                f"{file.title} needs the VAE {file.model.hex()}, this model is {self.model.hex()}; name the model that "
                "it was compressed with"
            )
        if file.shape != self.shape:
            raise file.edited(f"it claims {described(file.shape)}, and its model has {described(self.shape)}")

    def images(self, file: LosslessFile, numbers: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Images by their numbers, uint8 H W c, the last ones of a segment first. Of a segment all that lie upon the
        first wanted one are decoded. Raises UserError, also after some of them."""
        self.check_file(file)
        wanted = set(numbers)
        if outside := [number for number in wanted if not 0 <= number < file.count]:
            raise UserError(f"{file.title} has no image {min(outside)}, expected 0 to {file.count - 1}")
        for place_number, place in enumerate(file.places):
            own = wanted.intersection(range(place.first, place.first + place.images))
            if not own:
                continue
            for first, images in self.decoded(file.segment(place_number), min(own) - place.first, file.title):
                for offset, image in enumerate(images, place.first + first):
                    if offset in own:
                        yield offset, image

    def decoded(self, segment: Segment, lowest: int, title: str) -> Iterator[tuple[int, np.ndarray]]:
        """The groups of a segment from the last to that of image `lowest`: number of the first image and uint8
        n H W c. Raises UserError for pixels that do not have their checksum."""
        wrong = UserError(
            f"{title} cannot be decoded: its pixels do not have the checksum that it names; copy it again from where "
            "it came, or compress the images anew"
        )
        last = segment.images
        try:
            for values, crc in zip(decode_chain(self.exact, segment.chain), reversed(segment.crcs), strict=True):
                pixels = values * 255 if self.exact.bits == 1 else values
                if crc_of_pixels(self.shape, pixels.tobytes()) != crc:
                    raise wrong
                last -= len(pixels)
                yield last, pixels
                if last <= lowest and last:
                    return
        except DamagedPayloadError as error:
            raise wrong from error
