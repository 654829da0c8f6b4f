"""Images to `.zlg` bytes and back: `decompress(compress(x))` is `decode(encode(x))`, or a sentence says why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from codes.spec import Codes, CodeSpec
from common.errors import UserError
from common.model_io import load_pretrained
from common.processes import usable_device
from common.wording import counted
from pipelines.any_size import decoded, encode_any_size
from pipelines.codec import float_prior
from pipelines.codec.archive import (
    DEVICES,
    FINGERPRINT_BYTES,
    VERSION,
    Archive,
    Entry,
    Environment,
    Mode,
    Shape,
    as_array,
    crc_of,
    open_archive,
    write_archive,
)
from pipelines.codec.dependencies import coding_fingerprint, decoding_fingerprint
from pipelines.codec.entropy_coding import DamagedPayloadError, pack, unpack
from pipelines.codec.image_codes import (
    grids_of,
    padded,
    sentences,
    spec_of,
    spec_of_shape,
    why_not_with_prior,
)
from pipelines.codec.prior_coding import (
    check_can_code,
    check_label,
    decode_with_prior,
    encode_with_prior,
    images_at_once,
    ready_to_code,
)
from pipelines.codec.tables import CodeTables, load_tables
from pipelines.model_folders import INDEX_NAME, any_model_folder
from pipelines.stages import load_stages
from stage1_vq.autoencoders import AUTOENCODERS, Autoencoder
from stage2_prior.priors import AutoregressivePrior, Prior

ModeName = Literal["prior", "table", "packed"]
BATCH = 64  # images at a time
PIXELS = 1 << 23  # of the images that are encoded at once: 128 of 256x256; a single one may have more
MAX_PIXELS = 1 << 26  # of all images that are decoded at once, padded to the stride
Item = TypeVar("Item")


class Compressed(NamedTuple):
    data: bytes
    notes: tuple[str, ...]  # what was not done as asked, one sentence each


class Codec:
    """A model as a codec. Its fingerprints are computed once: make a new codec when its weights have changed.

    >>> codec = Codec.from_pretrained("models/photos")
    >>> data = codec.compress(images).data  # images: b c H W in [-1, 1], or a list of c H W of any sizes
    >>> images = codec.decompress(data)  # list of c H W
    """

    def __init__(self, autoencoder: Autoencoder, prior: Prior | None = None, tables: CodeTables | None = None):
        """Raises UserError for tables of other grids."""
        if tables is not None:
            tables.check_fit(autoencoder.code_spec())
        self.autoencoder = autoencoder.eval()
        self.prior = prior
        self.tables = tables

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, *, device: torch.device | str = "cpu", revision: str | None = None
    ) -> Self:
        """Of an assembled model, or of an autoencoder alone, with the tables of its folder; revision: branch, tag or
        commit of the hub. Raises UserError."""
        folder = any_model_folder(folder_or_hub_id, revision)
        if (folder / INDEX_NAME).is_file():
            codec = cls(*load_stages(folder), load_tables(folder))
        else:
            codec = cls(load_pretrained(folder, AUTOENCODERS), None, load_tables(folder))
        return codec.to(usable_device(device))

    def to(self, device: torch.device | str) -> Self:
        self.autoencoder.to(device)
        if self.prior is not None:
            self.prior.to(device)
        return self

    @cached_property
    def stage1(self) -> bytes:
        """What of the autoencoder's fingerprint stands in files."""
        return bytes.fromhex(decoding_fingerprint(self.autoencoder))[:FINGERPRINT_BYTES]

    @cached_property
    def prior_fingerprint(self) -> bytes | None:
        return None if self.prior is None else bytes.fromhex(coding_fingerprint(self.prior))[:FINGERPRINT_BYTES]

    @cached_property
    def version1_fingerprints(self) -> tuple[bytes, bytes | None]:
        """Those of autoencoder and prior in files of version 1: of the whole models."""
        whole = [None if model is None else model.fingerprint() for model in (self.autoencoder, self.prior)]
        stage1, prior = (None if of is None else bytes.fromhex(of)[:FINGERPRINT_BYTES] for of in whole)
        assert stage1 is not None
        return stage1, prior

    @cached_property
    def tables_fingerprint(self) -> bytes | None:
        return None if self.tables is None else bytes.fromhex(self.tables.fingerprint())[:FINGERPRINT_BYTES]

    @cached_property
    def exact_prior(self) -> AutoregressivePrior:
        """The prior, ready to code. Raises UserError."""
        return ready_to_code(check_can_code(self.prior))

    @property
    def environment(self) -> Environment:
        """Where this codec computes: what a prior of a file of version 1 depends on."""
        device = next(self.autoencoder.parameters()).device.type
        major, minor, *_ = torch.__version__.split(".")
        return Environment(device if device in DEVICES else "other", (int(major), int(minor)))

    # ---- images to bytes --------------------------------------------------------------------------------------------

    def compress(
        self,
        images: Tensor | Sequence[Tensor],
        mode: ModeName | None = None,
        labels: int | Sequence[int | None] | None = None,
        tokens: int | None = None,
    ) -> Compressed:
        """One archive of images: b c H W, or a sequence of c H W of any sizes, float in [-1, 1].

        mode: None for the best that the model has, prior, table, packed. labels: the class of all, or of each, which
        the prior is told; None for the null label. tokens: of each image, the first ones, where those tell of all of it
        (`Autoencoder.prefix_spec`); None: all. An image's payload does not depend on the other images. Raises UserError
        for a mode, or a number of tokens, that the model does not have.
        """
        if labels is None or isinstance(labels, int | np.integer):
            chosen: list[int | None] = [None if labels is None else int(labels)] * len(images)
        else:
            chosen = [None if label is None else int(label) for label in labels]
        if len(chosen) != len(images) or not chosen:
            raise UserError(
                f"got {counted(len(chosen), 'label')} for {counted(len(images), 'image')}, expected one for each"
            )
        entries: list[Entry] = []
        fallbacks: Counter[str] = Counter()
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            made, more = self.entries(list(images[part]), mode, chosen[part], tokens)
            entries += made
            fallbacks.update(more)
        notes = sentences(fallbacks, self.autoencoder.code_spec(), self.tables is not None)
        return Compressed(self.archive(entries), tuple(notes))

    def archive(self, entries: Sequence[Entry]) -> bytes:
        """The file of images that `entries` coded."""
        return write_archive(Archive(tuple(entries), self.stage1, self.prior_fingerprint, self.tables_fingerprint))

    def check_mode(self, mode: ModeName | None, labels: Iterable[int | None]) -> Mode:
        """The mode that is meant. Raises UserError for one that this model does not have."""
        if mode is None:
            usable = isinstance(self.prior, AutoregressivePrior) and not self.prior.given
            mode = "prior" if usable else "table" if self.tables is not None else "packed"
        if mode not in Mode.__members__:
            raise UserError(f"mode={mode!r}, expected one of prior, table and packed")
        if mode == "table" and self.tables is None:
            raise UserError(
                "mode=table, but this model has no tables; make them by `zellige tables --model MODEL --codes CODES`, "
                "or choose packed"
            )
        if mode == "prior":
            for label in set(labels):
                check_label(self.exact_prior, label)
        return Mode[mode]

    def entries(
        self,
        images: Sequence[Tensor],
        mode: ModeName | None,
        labels: Sequence[int | None],
        tokens: int | None = None,
    ) -> tuple[list[Entry], Counter[str]]:
        """Images, c H W each, coded; and how many, by the reason, are not in mode prior as they should be. Those of one
        size are encoded together. tokens: as for `compress`."""
        wanted = self.check_mode(mode, labels)
        coded: dict[int, Entry] = {}
        fallbacks: Counter[str] = Counter()
        for places in alike(images):
            codes = encode_any_size(self.autoencoder, torch.stack([images[i] for i in places]))
            height, width = images[places[0]].shape[-2:]
            if tokens is not None:
                self.autoencoder.prefix_spec(tokens)
                codes = tuple(grid[..., :tokens] for grid in codes)
            made, more = self.code(codes, (height, width), wanted, [labels[i] for i in places], tokens)
            coded |= dict(zip(places, made, strict=True))
            fallbacks.update(more)
        return [coded[i] for i in range(len(images))], fallbacks

    def code(
        self,
        codes: Codes,
        size: tuple[int, int],
        mode: Mode,
        labels: Sequence[int | None],
        tokens: int | None = None,
    ) -> tuple[list[Entry], Counter[str]]:
        """Codes of images of one size (H, W), one b h w per grid, as entries; and fallbacks as in `entries`. tokens: of
        each grid, where they are the first ones alone."""
        spec = self.spec_of(*size, tokens)
        shape = Shape(*size, grids_of(spec))
        rows = [tuple(grid[i : i + 1] for grid in codes) for i in range(len(labels))]
        fallbacks: Counter[str] = Counter()
        if mode == Mode.prior and (why := why_not_with_prior(self.exact_prior, spec, self.spec_of(*size))) is not None:
            fallbacks[why] = len(rows)
            mode = Mode.packed if self.tables is None else Mode.table
        if mode == Mode.prior:
            payloads = [
                payload
                for rows_now in in_batches(range(len(labels)), images_at_once(self.exact_prior))
                for payload in encode_with_prior(
                    self.exact_prior, tuple(grid[rows_now] for grid in codes), [labels[i] for i in rows_now]
                )
            ]
        elif mode == Mode.table and self.tables is not None:
            payloads = [self.tables.encode(row, spec) for row in rows]
        else:
            vocabularies = [k for _, _, k in shape.grids]
            payloads = [pack([(as_array(g), k) for g, k in zip(row, vocabularies, strict=True)]) for row in rows]
        entries = [
            Entry(mode, shape, crc_of(shape, row), payload, label if mode == Mode.prior else None)
            for row, payload, label in zip(rows, payloads, labels, strict=True)
        ]
        return entries, fallbacks

    def spec_of(self, height: int, width: int, tokens: int | None = None) -> CodeSpec:
        """The codes of an image of this size, padded to the stride; tokens: of each grid, None for all."""
        return spec_of(self.autoencoder, height, width, tokens)

    # ---- bytes to images --------------------------------------------------------------------------------------------

    def decompress(
        self,
        file: bytes | Path,
        images: Sequence[int] | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
        title: str | None = None,
    ) -> list[Tensor]:
        """The images of a file, or of its bytes, c H W each, float32 in [-1, 1], on the CPU.

        images: numbers of those that are wanted, of which alone the file is read; None: all. max_pixels: of all of them
        together, padded to the stride. title: how messages name the file; None: its path. Raises UserError for a
        damaged file, another model, or codes that cannot be read here; what it returns are the images that `decode`
        makes of the codes that were compressed.
        """
        with open_archive(file, title) as opened:
            self.check_archive(opened.head, opened.title)
            if images is None:
                opened.check()
            entries = list(opened.entries(images))
        return self.decode(entries, opened.head, max_pixels, [opened.title] * len(entries))

    def wrote(self, archive: Archive) -> bool:
        """Whether this model can read the file."""
        try:
            self.check_archive(archive, "")
        except UserError:
            return False
        return True

    def check_archive(self, archive: Archive, title: str) -> None:
        """Raises UserError unless this model wrote the file."""
        stage1, prior = (
            (self.stage1, self.prior_fingerprint) if archive.version == VERSION else self.version1_fingerprints
        )
        pairs = [
            ("autoencoder", archive.stage1, stage1),
            ("prior", archive.prior, archive.prior and prior),
            ("tables", archive.tables, archive.tables and self.tables_fingerprint),
        ]
        for what, theirs, ours in pairs:
            if theirs != ours:
                raise UserError(
                    f"{title} needs the {what} {theirs.hex() if theirs else ''}, this model has "
                    f"{ours.hex() if ours else 'none'}; name the model that it was compressed with"
                )

    def decode(
        self, entries: Sequence[Entry], archive: Archive, max_pixels: int, titles: Sequence[str]
    ) -> list[Tensor]:
        """Images of `archive`, or of several that agree in all but their entries; titles: the file of each. As
        `decompress`."""
        pixels = sum(self.pixels_of(entry) for entry in entries)
        if pixels > max_pixels:
            fewer = "ask for fewer of its images, or " if len(entries) > 1 else ""
            raise UserError(
                f"{titles[0]} claims {pixels} pixels, padded to the stride, expected at most {max_pixels} at once; "
                f"{fewer}raise max_pixels if you trust it"
            )
        specs: dict[Shape, CodeSpec] = {}
        for entry, title in zip(entries, titles, strict=True):
            if entry.shape not in specs:
                specs[entry.shape] = spec_of_shape(self.autoencoder, entry.shape, title)
        decoded: dict[int, Tensor] = {}
        for start in range(0, len(entries), BATCH):
            numbers = range(start, min(start + BATCH, len(entries)))
            codes = self.codes_of({i: entries[i] for i in numbers}, archive, specs, titles)
            for shape, places in grouped(numbers, lambda i: entries[i].shape).items():
                batch = tuple(torch.cat(grids) for grids in zip(*(codes[i] for i in places), strict=True))
                made = self.pixels(batch)[..., : shape.height, : shape.width].cpu()
                # Each a tensor of its own: one that is kept must not keep the batch, nor what was cut off.
                decoded |= {place: image.clone() for place, image in zip(places, made, strict=True)}
        return [decoded[i] for i in range(len(entries))]

    def pixels_of(self, entry: Entry) -> int:
        """Of the image of an entry as it is decoded, before what pads it is cut off."""
        height, width = padded(self.autoencoder, entry.shape.height, entry.shape.width)
        return height * width

    def pixels(self, codes: Codes) -> Tensor:
        return decoded(self.autoencoder, codes)

    def codes_of(
        self, entries: Mapping[int, Entry], archive: Archive, specs: Mapping[Shape, CodeSpec], titles: Sequence[str]
    ) -> dict[int, Codes]:
        """The codes of each image, 1 h w per grid, equal to what was compressed. Raises UserError."""
        codes: dict[int, Codes] = {}
        for number, entry in entries.items():
            if entry.mode == Mode.prior:
                continue
            try:
                codes[number] = self.codes_without_prior(entry, specs[entry.shape])
            except DamagedPayloadError as error:
                raise UserError(f"{titles[number]} was edited: {error}; compress the image anew") from error
        by_prior = [number for number, entry in entries.items() if entry.mode == Mode.prior]
        if by_prior:
            prior = self.exact_prior
            for number in by_prior:
                check_label(prior, entries[number].label)
                shape = entries[number].shape
                if why_not_with_prior(prior, specs[shape], self.spec_of(shape.height, shape.width)) is not None:
                    raise UserError(
                        f"{titles[number]} was edited: its prior makes no such codes; compress the image anew"
                    )
            # In version 1 the file says how many rows a batch has, whether images are in them or not.
            size = images_at_once(prior) if archive.version == VERSION else len(by_prior)
            for grids, alike_ones in grouped(by_prior, lambda i: entries[i].shape.grids).items():
                for numbers in in_batches(alike_ones, size):
                    chosen = [entries[i] for i in numbers]
                    if archive.version == VERSION:
                        count = sum(h * w for h, w, _ in grids)
                        payloads, labels = [one.payload for one in chosen], [one.label for one in chosen]
                        read = decode_with_prior(prior, payloads, labels, count)
                    else:
                        read = float_prior.decode(cast(AutoregressivePrior, self.prior), chosen, archive.lanes)
                    codes |= {i: tuple(grid[row : row + 1] for grid in read) for row, i in enumerate(numbers)}
        for number, entry in entries.items():
            if crc_of(entry.shape, codes[number]) != entry.crc:
                raise UserError(self.wrong_codes(entry, archive, titles[number]))
        return codes

    def codes_without_prior(self, entry: Entry, spec: CodeSpec) -> Codes:
        if entry.mode == Mode.table:
            assert self.tables is not None  # its fingerprint was compared
            return self.tables.decode(entry.payload, spec)
        parts = unpack(entry.payload, [(grid.size, grid.vocabulary) for grid in spec.grids])
        return tuple(
            torch.from_numpy(part).view(1, grid.height, grid.width)
            for part, grid in zip(parts, spec.grids, strict=True)
        )

    def wrong_codes(self, entry: Entry, archive: Archive, title: str) -> str:
        if entry.mode != Mode.prior or archive.version == VERSION:
            return f"{title} was edited: its codes do not have the checksum that it names; compress the image anew"
        return (
            f"{title} cannot be decoded here: the codes do not have its checksum; it has version 1 of the format, "
            f"whose probabilities depend on where they are computed: it was written on {archive.environment}, this is "
            f"{self.environment}, and the processor and the number of threads count too, which the file does not "
            "tell: decode it where it was written, with as many threads, and compress the image anew; if that fails, "
            "it was edited"
        )


def in_batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def grouped(items: Iterable[Item], key: Callable[[Item], object]) -> dict:
    """Items by their key, in their order."""
    groups: dict[object, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def alike(images: Sequence[Tensor]) -> Iterator[list[int]]:
    """Numbers of images, c H W each, of one size, together up to PIXELS of them or one image."""
    for numbers in grouped(range(len(images)), lambda i: tuple(images[i].shape)).values():
        height, width = images[numbers[0]].shape[-2:]
        count = max(1, PIXELS // (height * width))
        yield from (numbers[start : start + count] for start in range(0, len(numbers), count))
