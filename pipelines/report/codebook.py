"""What codes look like, how often each is used, and how much each place of a grid varies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codes.shards import CodeDataset
from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from common.wording import counted
from pipelines.figures import bits_of_codes, entropy
from pipelines.pictures import to_pil
from pipelines.report.charts import Bars, HeatMap, bars, heat_map, number
from pipelines.report.pictures import Picture, shown, zoom_to
from stage1_vq.autoencoders import Autoencoder
from stage2_prior.priors import Prior

MOST_CODES = 256  # of a codebook that are shown: those in use the most
FIELD = 5  # codes along each side of the field in which a code stands, of the coarsest grid
MOST_COUNTS = 2**25  # places times codes that are counted
IN_PLACE = 400  # images whose patches are averaged
SIDE = 42  # pixels that a code's picture is shown at
ALONE = (
    "What a code changes where it stands alone in the middle of the codes of a mid-grey image, with one cell "
    "around it: grey is no change. Many codes mean little alone, as decoders look at neighbours too."
)


class Tile(NamedTuple):
    code: int
    picture: Picture
    said: str
    unused: bool


class CodeSet(NamedTuple):
    """Codes of many images: how often each occurs, and where."""

    title: str
    images: int
    totals: tuple[Tensor, ...]  # of each grid, k int64
    places: tuple[Tensor | None, ...]  # of each grid, (h w) k int64; None where that is too much
    some: Codes  # of up to IN_PLACE of the images


class GridBook(NamedTuple):
    """What the page shows of one grid."""

    grid: Grid
    tabs: list[tuple[str, str, list[Tile]]]  # name, caption, tiles
    left_out: int  # codes that are not shown


class GridUse(NamedTuple):
    grid: Grid
    used: int
    codes: int  # that were counted
    images: int
    entropy: float
    perplexity: float
    ten: float  # share of the ten most frequent codes
    histogram: Bars

    @property
    def log2(self) -> float:
        """Bits of a code where all are equally likely."""
        return math.log2(self.grid.vocabulary)


class GridPlaces(NamedTuple):
    grid: Grid
    maps: list[HeatMap]
    why_not: str  # why there is none; empty where there is
    few: bool  # whether the images are fewer than the codes of the vocabulary


def codes_of_images(codes: Codes, spec: CodeSpec, title: str) -> CodeSet:
    """Codes of images, one n h w for each grid."""
    counts = [Counter(grid) for grid in spec.grids]
    for counter, of_grid in zip(counts, codes, strict=True):
        counter.add(of_grid.numpy())
    return CodeSet(
        title,
        len(codes[0]),
        tuple(counter.totals for counter in counts),
        tuple(counter.places for counter in counts),
        tuple(of_grid[:IN_PLACE] for of_grid in codes),
    )


def codes_of_shards(dataset: CodeDataset, title: str) -> CodeSet:
    """Codes of all images of a split of shards. Raises UserError for codes that cannot be."""
    counts = [Counter(grid) for grid in dataset.code_spec.grids]
    for parts in dataset.stored():
        for counter, part in zip(counts, parts, strict=True):
            counter.add(np.asarray(part))
    chosen = [i * len(dataset) // min(IN_PLACE, len(dataset)) for i in range(min(IN_PLACE, len(dataset)))]
    return CodeSet(
        title,
        len(dataset),
        tuple(counter.totals for counter in counts),
        tuple(counter.places for counter in counts),
        dataset.fetch(chosen, chosen)["codes"],
    )


class Counter:
    """How often each code occurs at each place of a grid, or, of many places and codes, in all together."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.by_place = grid.size * grid.vocabulary <= MOST_COUNTS
        self.counts = np.zeros((grid.size if self.by_place else 1) * grid.vocabulary, np.int64)

    def add(self, codes: np.ndarray) -> None:
        """codes: b h w, whole numbers of any type."""
        flat = codes.reshape(len(codes), -1).astype(np.int64)
        if self.by_place:
            flat = flat + np.arange(self.grid.size) * self.grid.vocabulary
        self.counts += np.bincount(flat.ravel(), minlength=len(self.counts))

    @property
    def places(self) -> Tensor | None:
        return torch.from_numpy(self.counts.reshape(self.grid.size, -1)) if self.by_place else None

    @property
    def totals(self) -> Tensor:
        return torch.from_numpy(self.counts.reshape(-1, self.grid.vocabulary).sum(0))


# ---- pictures --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def books_of(autoencoder: Autoencoder, found: CodeSet | None, batch_size: int) -> list[GridBook]:
    """Pictures of the codes of each grid, those in use the most first; without counts, in their order."""
    spec = autoencoder.code_spec()
    field = field_of(autoencoder)
    books = []
    for number_of_grid, grid in enumerate(spec.grids):
        counts = torch.zeros(grid.vocabulary, dtype=torch.int64) if found is None else found.totals[number_of_grid]
        order = torch.argsort(counts, descending=True, stable=True)[:MOST_CODES]
        alone = alone_in(autoencoder, field, number_of_grid, order, batch_size)
        tabs = [("Alone, on grey", ALONE, tiles_of(order, alone, counts))]
        if found is not None and (means := in_place(autoencoder, found, number_of_grid, order, batch_size)) is not None:
            shares, pictures = means
            tabs.insert(0, ("Where it occurs", place_caption(len(found.some[0])), tiles_of(order, pictures, shares)))
        books.append(GridBook(grid, tabs, grid.vocabulary - len(order)))
    return books


def tiles_of(order: Tensor, pictures: Sequence[Tensor | None], counts: Tensor) -> list[Tile]:
    """counts: how often each code occurs, k."""
    total = max(1, int(counts.sum()))
    tiles = []
    for code, pixels in zip(order.tolist(), pictures, strict=True):
        share = int(counts[code]) / total
        said = f"code {code}, {share:.2%} of all codes" if counts.any() else f"code {code}"
        if pixels is not None:
            picture = shown(to_pil(pixels))
            tiles.append(
                Tile(
                    code,
                    Picture(picture, said, zoom_to(picture.height, SIDE)),
                    said,
                    not counts[code] and bool(counts.any()),
                )
            )
    return tiles


def field_of(autoencoder: Autoencoder) -> Codes:
    """The codes of a small mid-grey image, 1 h w for each grid; of the training size for a model of one size only."""
    small = tuple(min(side, FIELD * autoencoder.stride) for side in autoencoder.image_size)
    device = next(autoencoder.parameters()).device
    try:
        codes = autoencoder.encode(torch.zeros(1, autoencoder.channels, *small, device=device))
        autoencoder.decode(codes)
    except UserError:
        return autoencoder.encode(torch.zeros(1, autoencoder.channels, *autoencoder.image_size, device=device))
    return codes


def alone_in(autoencoder: Autoencoder, field: Codes, which: int, order: Tensor, batch_size: int) -> list[Tensor]:
    """What each of the codes `order` of grid `which` changes in the middle of a field, as a picture on mid-grey: its
    cell and, of larger grids, one around it, c H W each."""
    rows, columns = field[which].shape[1:]
    row, column = rows // 2, columns // 2
    before = autoencoder.decode(field).float().cpu()
    found = []
    for codes in order.split(batch_size):
        together = tuple(grid.repeat(len(codes), 1, 1) for grid in field)
        together[which][:, row, column] = codes.to(together[which].device)
        images = autoencoder.decode(together).float().cpu() - before
        top, bottom = bounds(row, rows, images.shape[2])
        left, right = bounds(column, columns, images.shape[3])
        found += list(images[:, :, top:bottom, left:right])
    return found


def bounds(place: int, count: int, pixels: int) -> tuple[int, int]:
    """Pixels of a cell, among `count` of them, and of its neighbours."""
    first, last = max(0, place - 1), min(count, place + 2)
    return first * pixels // count, math.ceil(last * pixels / count)


def place_caption(images: int) -> str:
    return (
        f"The mean of what the model decodes where a code stands in {counted(images, 'real image')}, with one cell "
        "around it: sharp where a code always looks alike, blurred where its neighbours decide. Codes that do not "
        "occur there are left out."
    )


def in_place(
    autoencoder: Autoencoder, found: CodeSet, which: int, order: Tensor, batch_size: int
) -> tuple[Tensor, list[Tensor | None]] | None:
    """How often each code occurs in some real images, k, and the mean patch where each of `order` does, c H W. None
    for grids whose cells are no whole pixels, and for those of one cell."""
    h, w = found.some[which].shape[1:]
    H, W = autoencoder.image_size
    if H % h or W % w or h * w < 4:
        return None
    size = (H // h, W // w)
    counts = torch.bincount(found.some[which].flatten(), minlength=len(found.totals[which]))
    slots = torch.full((len(counts),), len(order))
    slots[order] = torch.arange(len(order))
    sums = torch.zeros(len(order) + 1, autoencoder.channels * 9 * size[0] * size[1])
    device = next(autoencoder.parameters()).device
    for part in zip(*(grid.split(batch_size) for grid in found.some), strict=True):
        images = autoencoder.decode(tuple(grid.to(device) for grid in part)).float().cpu()
        padded = F.pad(images, (size[1], size[1], size[0], size[0]), mode="replicate")
        patches = F.unfold(padded, (3 * size[0], 3 * size[1]), stride=size)  # b (c 3H 3W) (h w)
        sums.index_add_(0, slots[part[which].flatten()], patches.transpose(1, 2).flatten(0, 1))
    pictures: list[Tensor | None] = []
    for slot, code in enumerate(order.tolist()):
        mean = sums[slot] / max(1, int(counts[code]))
        pictures.append(mean.view(autoencoder.channels, 3 * size[0], 3 * size[1]) if counts[code] else None)
    return counts, pictures


# ---- figures ---------------------------------------------------------------------------------------------------------


def use_of(spec: CodeSpec, found: CodeSet) -> list[GridUse]:
    """How evenly the codes of each grid are used."""
    uses = []
    for grid, counts in zip(spec.grids, found.totals, strict=True):
        total = int(counts.sum())
        shares = counts.double() / total
        occurring = shares[shares > 0]
        plain = float(-(occurring * occurring.log2()).sum())
        used, ordered = len(occurring), shares.sort(descending=True).values
        said = (
            f"Use of {grid.vocabulary} codes, the most frequent first: {used} occur, the first makes up "
            f"{float(ordered[0]):.1%} of all, the median one {float(ordered[len(ordered) // 2]):.2%}."
        )
        histogram = bars(
            "Use of codes", (100 * ordered).tolist(), "codes, the most frequent first", "% of all codes", said
        )
        uses.append(GridUse(grid, used, total, found.images, plain, 2**plain, float(ordered[:10].sum()), histogram))
    return uses


def places_of(spec: CodeSpec, found: CodeSet, bits: Sequence[Tensor] | None) -> list[GridPlaces]:
    """Entropy of each place of each grid, and, where they are given, the bits that a prior needs there, h w each."""
    shown_grids = []
    for number_of_grid, grid in enumerate(spec.grids):
        counts = found.places[number_of_grid]
        if counts is None:
            why = f"{grid.size:,} places of {grid.vocabulary:,} codes are more than are counted one by one."
            shown_grids.append(GridPlaces(grid, [], why, few=False))
            continue
        entropies = [entropy(of_place) for of_place in counts]
        values = [entropies[i * grid.width : (i + 1) * grid.width] for i in range(grid.height)]
        top = math.log2(grid.vocabulary)
        maps = [heat_map("Entropy of the codes", values, top, "bits")]
        if bits is not None:
            mean = bits[number_of_grid]
            maps.append(heat_map("Bits under the prior", mean.tolist(), max(top, float(mean.max())), "bits"))
        shown_grids.append(GridPlaces(grid, maps, "", few=found.images < grid.vocabulary))
    return shown_grids


@torch.no_grad()
def bits_at_places(prior: Prior, codes: Codes, labels: Tensor, batch_size: int) -> list[Tensor]:
    """Mean bits of each place under the prior, h w for each grid, for codes n h w and labels n. Raises UserError for a
    prior that must be told more than labels."""
    device = next(prior.parameters()).device
    sums: list[Tensor] = []
    for start in range(0, len(labels), batch_size):
        part = tuple(grid[start : start + batch_size].to(device) for grid in codes)
        found = [
            of_grid.sum(0).cpu()
            for of_grid in bits_of_codes(prior, part, labels[start : start + batch_size].to(device))
        ]
        sums = [before + now for before, now in zip(sums, found, strict=True)] if sums else found
    return [total / len(labels) for total in sums]


def in_sum(use: GridUse) -> str:
    """`118 of 128 codes occur among 882,000 of 18,000 images`"""
    return (
        f"{number(use.used)} of {number(use.grid.vocabulary)} codes occur among {number(use.codes)} of "
        f"{number(use.images)} images"
    )
