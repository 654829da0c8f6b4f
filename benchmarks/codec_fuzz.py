"""Hostile .zlg files: random corruptions, truncations and header edits of valid ones.

`python -m benchmarks.codec_fuzz` makes 100,000 of them and prints what became of each: a one-sentence error, or the
very images that were compressed. Anything else, an exception of another kind, other images or more than 5 s for one
file, fails. Half of them get a right checksum again, so that they reach the code behind it, as an attacker's would.
Files: one image and an archive, in each mode, and archives of several pages, of a tiny untrained model; of version 1
archives of it, and one image in each mode as a build of then wrote it. Each file is read as a whole, and one image of
it by itself.
"""

from __future__ import annotations

import argparse
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.codec_version1 import write_version1
from common.errors import UserError
from pipelines.codec.archive import (
    FINGERPRINT_BYTES,
    HAS_PRIOR,
    HAS_TABLES,
    MAX_IMAGES,
    PAGE,
    VERSION,
    Archive,
    Mode,
    open_archive,
)
from pipelines.codec.codec import MAX_PIXELS, Codec
from pipelines.codec.fields import CHECKSUM_BYTES, Fields, WrongFieldError, checksum, place_of_page, varint
from pipelines.codec.tables import fit_tables
from stage1_vq.autoencoders import VQVAE, VQVAEConfig
from stage1_vq.quantizers import NearestQuantizerConfig
from stage2_prior.priors import Transformer, TransformerConfig

KEPT = Path(__file__).parents[1] / "tests" / "earlier_builds"
LONGEST = 5.0  # seconds for one file


def tiny_codec() -> Codec:
    torch.manual_seed(0)
    quantizer = NearestQuantizerConfig(codebook_size=13, dim=4)
    config = VQVAEConfig(channels=1, width=8, residual_width=8, residual_blocks=1, quantizer=quantizer)
    autoencoder = VQVAE(config, (12, 16)).eval()
    prior = Transformer(TransformerConfig(layers=1, width=16, heads=2), autoencoder.code_spec(), 3).eval()
    with torch.no_grad():
        codes = autoencoder.encode(torch.rand(100, 1, 12, 16) * 2 - 1)
    return Codec(autoencoder, prior, fit_tables(autoencoder.code_spec(), [codes]))


def kept_files() -> tuple[Codec, list[tuple[bytes, list[Tensor]]]]:
    """What a build of version 1 wrote, and its model. Where this machine is not like the one that wrote it, the file of
    mode prior is refused: then it has no images."""
    codec, files = Codec.from_pretrained(KEPT / "model"), []
    for mode in ("packed", "table", "prior"):
        data = (KEPT / "zlg" / f"{mode}.zlg").read_bytes()
        try:
            files.append((data, codec.decompress(data)))
        except UserError:
            if mode != "prior":
                raise
            files.append((data, []))
    return codec, files


def valid_files(codec: Codec) -> list[tuple[bytes, list[Tensor]]]:
    """Files, and the images in them."""
    images = [*(torch.rand(5, 1, 12, 16) * 2 - 1), torch.rand(1, 9, 21) * 2 - 1]
    sets = [images[:1], images[5:], images]
    files = [codec.compress(part, mode).data for part in sets for mode in ("prior", "table", "packed")]
    tiny = list(torch.rand(2 * PAGE + 1, 1, 1, 1) * 2 - 1)
    for mode in (Mode.table, Mode.packed):
        entries, _ = codec.entries(tiny, mode.name, [None] * len(tiny))
        files.append(codec.archive([entry._replace(name=f"{i}.png") for i, entry in enumerate(entries)]))
        entries, _ = codec.entries(images, mode.name, [None] * len(images))
        stage1, prior = codec.version1_fingerprints
        files.append(write_version1(Archive(tuple(entries), stage1, prior, codec.tables_fingerprint)))
    return [(data, codec.decompress(data)) for data in files]


def seal(changed: bytearray, start: int, end: int, place: bytes = b"") -> None:
    """Puts a right checksum at the end of a part of the file, where there is room for one."""
    if start + CHECKSUM_BYTES <= end <= len(changed):
        changed[end - CHECKSUM_BYTES : end] = checksum(bytes(changed[start : end - CHECKSUM_BYTES]), place)


def resealed(data: bytes) -> bytes:
    """With right checksums of head, pages and file, wherever there is a place for one."""
    changed = bytearray(data)
    if data[4:5] == bytes([VERSION]):
        try:
            fields = Fields(data, 6)
            end = fields.number("bytes of the head", 0, len(data)) + fields.position
            seal(changed, 0, end)
            fields.bytes(FINGERPRINT_BYTES)
            if data[5] & HAS_PRIOR:
                fields.bytes(FINGERPRINT_BYTES)
                fields.number("arithmetic", 0, 1 << 62)
            fields.bytes(FINGERPRINT_BYTES if data[5] & HAS_TABLES else 0)
            images = fields.number("images", PAGE + 1, MAX_IMAGES)
            for number in range(-(-images // PAGE)):
                start, end = end, end + fields.number("bytes of a page", 0, len(data))
                seal(changed, start, end, place_of_page(number))
                fields.number("bytes of payloads", 0, len(data))
        except WrongFieldError:
            pass
    seal(changed, 0, len(changed))
    return bytes(changed)


def with_other_head(data: bytes, generator: np.random.Generator) -> bytes:
    """With up to four bytes of the head replaced by up to four others, and the right length of it, in version 2."""
    fields = Fields(data, 6)
    try:
        length = fields.number("bytes of the head", 1, len(data))
    except WrongFieldError:
        return data
    head = bytearray(data[fields.position : fields.position + length])
    place = int(generator.integers(len(head) + 1))
    head[place : place + int(generator.integers(5))] = generator.bytes(int(generator.integers(5)))
    return data[:6] + varint(len(head)) + bytes(head) + data[fields.position + length :]


def hostile(data: bytes, generator: np.random.Generator, with_checksums: Callable[[bytes], bytes] = resealed) -> bytes:
    """A corrupted, cut, lengthened or edited copy, or a mixture; half of them as `with_checksums` gives them back."""
    changed = bytearray(data)
    head = min(70, len(data))
    for _ in range(generator.integers(1, 4)):
        kind, place = generator.integers(8), int(generator.integers(max(1, len(changed))))
        if kind == 0 and changed:  # a bit
            changed[place] ^= 1 << int(generator.integers(8))
        elif kind == 1 and changed:  # a byte
            changed[place] = int(generator.integers(256))
        elif kind == 2:  # the end is missing
            del changed[place:]
        elif kind == 3:  # a part is missing
            del changed[place : place + int(generator.integers(1, 9))]
        elif kind == 4:  # a part is new
            changed[place:place] = generator.bytes(int(generator.integers(1, 9)))
        elif kind == 7:  # a part of the head is new or missing, and its length tells so
            changed = bytearray(with_other_head(bytes(changed), generator))
        elif kind == 5 and changed:  # a byte of the header
            changed[int(generator.integers(min(head, len(changed))))] = int(generator.integers(256))
        else:  # a huge number in the header
            changed[place % head : place % head + 1] = b"\xff" * int(generator.integers(1, 9)) + b"\x7f"
    if generator.random() < 0.5 and len(changed) > 4:
        if generator.random() < 0.9:  # and magic and version
            changed[:5] = data[:5]
        return with_checksums(bytes(changed))
    return bytes(changed)


def outcome(codec: Codec, data: bytes, expected: list[Tensor]) -> str:
    """`right images`, or the beginning of the error. Raises AssertionError for other images, and what a crash is."""
    try:
        images = codec.decompress(data)
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError("more than a sentence") from error
        return re.sub(r"\w*\d\w*", "#", " ".join(str(error).split()[:6]))
    assert len(images) == len(expected), "wrong images"
    assert all(map(torch.equal, images, expected)), "wrong images"
    return "right images"


def outcome_of_one(codec: Codec, data: bytes, number: int, expected: Tensor) -> str:
    """As `outcome`, of one image that is read by itself."""
    try:
        with open_archive(data) as file:
            codec.check_archive(file.head, "the file")
            (image,) = codec.decode([file.entry(number)], file.head, MAX_PIXELS, ["the file"])
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError("more than a sentence") from error
        return "one image: an error"
    # A batch of another size may round otherwise.
    assert image.shape == expected.shape, "wrong image"
    assert torch.allclose(image, expected, atol=1e-4), "wrong image"
    return "one image: the right one"


def run(
    count: int, seed: int, attempt: Callable[[int, np.random.Generator], tuple[bytes, Callable[[], list[str]]]]
) -> bool:
    """Makes and reads `count` hostile files, prints what became of them, and returns whether one took too long.

    attempt: makes file number i, and gives its bytes and what reads it: the outcomes, or an exception that is a fault.
    """
    torch.set_num_threads(1)  # of so small a model
    generator, outcomes = np.random.default_rng(seed), Counter[str]()
    slowest, begin = 0.0, time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        start = time.perf_counter()
        changed, read = attempt(number, generator)
        try:
            outcomes.update(read())
        except Exception:
            print(f"file {number} of seed {seed}: {changed.hex()}", file=sys.stderr)
            raise
        slowest = max(slowest, time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    for what, times in outcomes.most_common():
        print(f"{times:8d}  {what}")
    print(
        f"{count} files in {time.perf_counter() - begin:.0f} s, the slowest {slowest:.3f} s; peak memory grew by "
        f"{grown} MB"
    )
    return slowest > LONGEST


def arguments_of(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args, tiny = arguments_of(__doc__), tiny_codec()
    old, kept = kept_files()
    files = [(tiny, *file) for file in valid_files(tiny)] + [(old, *file) for file in kept]

    def attempt(number: int, generator: np.random.Generator) -> tuple[bytes, Callable[[], list[str]]]:
        codec, data, expected = files[number % len(files)]
        changed = hostile(data, generator)
        place = int(generator.integers(len(expected))) if expected else None

        def read() -> list[str]:
            one = [] if place is None else [outcome_of_one(codec, changed, place, expected[place])]
            return [outcome(codec, changed, expected), *one]

        return changed, read

    sys.exit(run(args.files, args.seed, attempt))


if __name__ == "__main__":
    main()
