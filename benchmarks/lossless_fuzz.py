"""Hostile files of images without loss: random corruptions, truncations and edits of valid ones, of format version 3.

`python -m benchmarks.lossless_fuzz` makes 100,000 of them, as `benchmarks.codec_fuzz` does of files of codes, and says
what became of each: a one-sentence error, or the very images that were compressed. Anything else, an exception of
another kind, other images or more than 5 s for one file, fails. Half of them get right checksums of head, segments and
file again, so that they reach the code behind these. Files: one image, several groups, and several segments, with and
without names, of tiny untrained VAEs of 8-bit and of binary images. Each is read as a whole, one image of it by itself,
and its names.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.codec_fuzz import arguments_of, hostile, run, seal
from common.errors import UserError
from images.datasets import to_float
from pipelines.codec.contents import FINGERPRINT_BYTES
from pipelines.codec.fields import Fields, WrongFieldError, place_of_page
from pipelines.codec.lossless import LosslessCodec
from pipelines.codec.lossless_archive import open_lossless
from stage1_vae.likelihoods import BernoulliConfig, LogisticMixtureConfig
from stage1_vae.networks import DenseConfig
from stage1_vae.vae import VAE, VAEConfig


def tiny_codec(binary: bool) -> LosslessCodec:
    torch.manual_seed(0)
    network = DenseConfig(hidden=(8,))
    likelihood = BernoulliConfig() if binary else LogisticMixtureConfig()
    vae = VAE(VAEConfig(channels=1, latents=3, encoder=network, decoder=network, likelihood=likelihood), (4, 3))
    return LosslessCodec(vae.eval())


def valid_files(codec: LosslessCodec) -> list[tuple[bytes, Tensor]]:
    """Files, and the images in them."""
    top = 2 if codec.exact.bits == 1 else 256
    images = torch.randint(top, (80, 1, 4, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    images = images * (255 if top == 2 else 1)
    names = [f"kept/{number:03}.png" for number in range(len(images))]
    several = [codec.segment(part.movedim(1, -1).numpy(), names[:30]) for part in (images[:30], images[30:60])]
    files = [
        (codec.compress(images[:1]), images[:1]),
        (codec.compress(images, names), images),
        (codec.archive(several), images[:60]),
    ]
    return [(data, to_float(part)) for data, part in files]


def resealed(data: bytes) -> bytes:
    """With right checksums of head, segments and file, wherever there is a place for one."""
    changed = bytearray(data)
    try:
        fields = Fields(data, 6)
        end = fields.number("bytes of the head", 0, len(data)) + fields.position
        seal(changed, 0, end)
        fields.bytes(FINGERPRINT_BYTES)
        for what in ("arithmetic", "rows", "columns", "channels"):
            fields.number(what, 0, 1 << 62)
        for number in range(fields.number("segments", 0, 1 << 16)):
            fields.number("images", 0, 1 << 62)
            start, end = end, end + fields.number("bytes of facts", 0, len(data))
            seal(changed, start, end, place_of_page(number))
            end += fields.number("bytes of a stack", 0, len(data))
    except WrongFieldError:
        pass
    seal(changed, 0, len(changed))
    return bytes(changed)


def outcome(codec: LosslessCodec, data: bytes, images: Tensor, number: int | None) -> str:
    """What became of reading all images, or image `number`. Raises AssertionError for other images, and what a crash
    is."""
    try:
        found = codec.decompress(data, None if number is None else [number])
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError("more than a sentence") from error
        return re.sub(r"\w*\d\w*", "#", " ".join(str(error).split()[:6]))
    expected = images if number is None else images[number : number + 1]
    assert torch.equal(found, expected), "wrong images"
    return "right images" if number is None else "one image: the right one"


def read_names(data: bytes) -> None:
    try:
        with open_lossless(data) as file:
            for name in file.names():
                assert len(name) < 1 << 13
    except UserError:
        pass


def main() -> None:
    args = arguments_of(__doc__)
    files = [(codec, *file) for codec in map(tiny_codec, (False, True)) for file in valid_files(codec)]

    def attempt(number: int, generator: np.random.Generator) -> tuple[bytes, Callable[[], list[str]]]:
        codec, data, images = files[number % len(files)]
        changed = hostile(data, generator, resealed)
        place = int(generator.integers(len(images)))

        def read() -> list[str]:
            read_names(changed)
            return [outcome(codec, changed, images, which) for which in (None, place)]

        return changed, read

    sys.exit(run(args.files, args.seed, attempt))


if __name__ == "__main__":
    main()
