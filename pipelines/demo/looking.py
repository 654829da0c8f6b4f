"""What a demo shows of an image that goes through a model and back: what is lost, and what is in between."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from codes.spec import Codes, CodeSpec
from common.errors import UserError
from metrics.similarity import decibels
from pipelines.any_size import encode_any_size
from pipelines.codec.codec import Codec
from pipelines.figures import bits_of_codes
from pipelines.image_folders import scale_within, to_images
from pipelines.image_input import fit
from pipelines.latents.pipeline import LatentPipeline
from pipelines.pictures import to_pil
from stage1_vae.binarise import binarise
from stage1_vae.objectives.terms import elbo
from stage2_prior.priors import AutoregressivePrior

WORST = 64  # grey levels: an error of so many and more is drawn brightest
CODES_SIDE = 256  # pixels at least of the longer side of a picture of codes
LISTED = 4096  # codes of an image that are told as numbers
ELBO_DRAWS = 64

Facts = list[tuple[str, str]]
"""Names of figures, and the figures in words."""


class Seen(NamedTuple):
    original: Image.Image  # as the model sees it
    reconstruction: Image.Image
    error: Image.Image
    between: list[tuple[Image.Image, str]]  # codes as pictures; none of a VAE
    numbers: str  # codes or latents
    facts: Facts


def reconstruct(codec: Codec, picture: Image.Image, own_size: int | None) -> Seen:
    """A picture through its codes. own_size: in its own size, scaled down to this longer side; None: scaled and cropped
    to that of the model, the only one of which the prior tells the bits. Raises UserError."""
    spec = codec.autoencoder.code_spec()
    if own_size is None:
        original = fit(picture, spec.image_height, spec.image_width)
    else:
        original = scale_within(picture, own_size)
    images = to_images(original)
    with torch.no_grad():
        codes = encode_any_size(codec.autoencoder, images)
        decoded = codec.pixels(codes)[..., : original.height, : original.width].cpu()
    reconstruction = to_pil(decoded[0])
    return Seen(
        original,
        reconstruction,
        error_map(original, reconstruction),
        [(picture_of_codes(grid[0], k), title) for grid, k, title in zip(codes, *grids_of(codec, codes), strict=True)],
        numbers_of(codes, grids_of(codec, codes)[1]),
        [
            ("PSNR", psnr_in_words(original, reconstruction)),
            *bits_of(codec, codes, codec.spec_of(original.height, original.width), original.width * original.height),
        ],
    )


def grids_of(codec: Codec, codes: Codes) -> tuple[list[int], list[str]]:
    """Vocabulary and title of each grid of an image's codes."""
    grids = codec.autoencoder.code_spec().grids
    titles = [
        f"{grid.name}: {codes[i].shape[1]}×{codes[i].shape[2]} codes of {grid.vocabulary}"
        for i, grid in enumerate(grids)
    ]
    return [grid.vocabulary for grid in grids], titles


def bits_of(codec: Codec, codes: Codes, spec: CodeSpec, pixels: int) -> Facts:
    """What the codes of one image take: as they are, and by the prior where it knows such codes."""
    plain = sum(grid.height * grid.width * math.log2(grid.vocabulary) for grid in spec.grids)
    facts = [("bits, every code as likely", in_bits(plain, pixels))]
    prior = codec.prior
    if prior is None or prior.given or spec.grids != prior.code_spec.grids:
        return facts
    labels = torch.full((1,), -1, device=codes[0].device)
    try:
        with torch.no_grad():
            parts = bits_of_codes(prior, codes, labels)
    except UserError:  # a prior that must be told a class or a caption
        return facts
    bits = float(sum(part.sum() for part in parts))
    bound = "" if isinstance(prior, AutoregressivePrior) else ", at most"
    return [*facts, (f"bits by the {prior.kind} prior{bound}", in_bits(bits, pixels))]


def in_bits(bits: float, pixels: int) -> str:
    return f"{bits:,.0f}, {bits / pixels:.3f} per pixel"


def psnr_in_words(original: Image.Image, other: Image.Image) -> str:
    found = decibels(np.asarray(original), np.asarray(other))
    return "equal" if found is None else f"{found:.2f} dB"


def error_map(original: Image.Image, reconstruction: Image.Image) -> Image.Image:
    """The mean error of the channels of each pixel, from black, none, to bright yellow, WORST grey levels and more."""
    difference = np.abs(np.asarray(original, dtype=np.float32) - np.asarray(reconstruction, dtype=np.float32))
    if difference.ndim == 3:
        difference = difference.mean(axis=2)
    colours = colormaps["inferno"](np.clip(difference / WORST, 0, 1))[..., :3]
    return Image.fromarray(np.round(255 * colours).astype(np.uint8))


def picture_of_codes(codes: Tensor, vocabulary: int) -> Image.Image:
    """Codes h w as squares: a colour for each code, far from those of its neighbours in the codebook."""
    numbers = codes.cpu().numpy().astype(np.int64) % vocabulary
    hue = (numbers * 0.6180339887) % 1.0  # steps of the golden ratio leave the largest gaps between hues
    value = 0.95 - 0.45 * ((numbers * 0.7548776662) % 1.0)
    hsv = np.stack([255 * hue, np.full_like(hue, 165.0), 255 * value], axis=-1).astype(np.uint8)
    small = Image.fromarray(hsv, mode="HSV").convert("RGB")
    zoom = max(1, -(-CODES_SIDE // max(small.size)))
    return small.resize((small.width * zoom, small.height * zoom), Image.Resampling.NEAREST)


def numbers_of(codes: Codes, titles: list[str]) -> str:
    """Codes of one image, one 1 h w per grid, in rows."""
    parts, listed = [], 0
    for grid, title in zip(codes, titles, strict=True):
        listed += grid.numel()
        if listed > LISTED:
            parts.append(f"# {title}: too many to be listed here")
            continue
        width = len(str(int(grid.max())))
        rows = [" ".join(f"{number:>{width}}" for number in row) for row in grid[0].tolist()]
        parts.append("\n".join([f"# {title}", *rows]))
    return "\n".join(parts)


@torch.no_grad()
def reconstruct_latent(pipeline: LatentPipeline, picture: Image.Image) -> Seen:
    """A picture, as the model takes it, through the mean of its posterior. Raises UserError."""
    original = as_taken(pipeline, picture)
    images, vae = to_images(original).to(pipeline.device), pipeline.vae
    latents = pipeline.encode(images)
    reconstruction = to_pil(pipeline.decode(latents)[0])
    noise = vae.noise_source(images).noise(ELBO_DRAWS, pipeline.generator(0, 0))
    bound = -float(elbo(vae.terms(images, noise=noise)).double().mean())
    facts = [("PSNR", psnr_in_words(original, reconstruction)), ("-log p, at most (ELBO)", f"{bound:.1f} nats")]
    if vae.discrete:
        numbers = vae.config.channels * math.prod(vae.image_size)
        per_dimension = bound / math.log(2) / numbers
        facts.append(("bits without loss, at most", f"{bound / math.log(2):,.0f}, {per_dimension:.3f} per dimension"))
    return Seen(
        original, reconstruction, error_map(original, reconstruction), [], numbers_of_latents(latents[0]), facts
    )


def as_taken(pipeline: LatentPipeline, picture: Image.Image) -> Image.Image:
    """A picture scaled and cropped to the size of a VAE's images, and black and white where those of its training
    were, or where its likelihood knows nothing else."""
    vae = pipeline.vae
    seen = fit(picture, *vae.image_size)
    trained = vae.config.likelihood.kind == "bernoulli" if vae.binarised is None else vae.binarised.how != "none"
    if not trained:
        return seen
    pixels = np.asarray(seen)
    return Image.fromarray(binarise(pixels[None], "threshold", 0, [0])[0])


def numbers_of_latents(latents: Tensor) -> str:
    """Of one image: rows of up to ten numbers, or those of a map, channel after channel."""
    if latents.numel() > LISTED:
        return f"# {latents.numel()} numbers: too many to be listed here"
    rows = latents.flatten(0, -2).tolist() if latents.ndim > 1 else [p.tolist() for p in latents.split(10)]
    return "\n".join(" ".join(f"{number:+.3f}" for number in row) for row in rows)


def pixels_of(picture: Image.Image) -> Tensor:
    """uint8 c H W"""
    array = torch.from_numpy(np.array(picture))
    return array[None] if array.ndim == 2 else array.movedim(-1, 0)
