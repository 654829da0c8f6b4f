"""Pictures of a VAE for people: reconstructions, samples, and a plane of latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from images.sheets import contact_sheet, to_pil, to_tensor
from stage1_vae.hierarchies.base import HierarchicalVAE
from stage1_vae.holes import seen_images
from stage1_vae.labels.base import LabelledVAE
from stage1_vae.model import LikelihoodVAE
from stage1_vae.networks.spatial import SpatialDecoder
from stage1_vae.priors import StandardNormal
from stage1_vae.vae import VAE
from training.data import batches_of
from training.previews import preview_rows
from training.task import Dataset

SIDE = 56  # pixels: smaller images are magnified
SAMPLE_SEED = 0
LEVELS = 8  # rows of a hierarchy whose groups have one shape
PLANE = 20  # images along each side of a plane of latents
PLANE_MEANS = 2000  # posteriors whose means a preview shows on it
WALKS, WALK_STEPS, REACH = 10, 11, 3.0  # numbers of the latents that are walked along, steps, and how far from 0
SPREAD_IMAGES = 64  # by which the numbers of a hierarchy are put in order
COLOURS = (  # of classes, told apart by people who see colours otherwise too (Okabe and Ito 2008)
    ["#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#888888", "#44aa99"]
)


@torch.no_grad()
def preview(model: LikelihoodVAE, data: Dataset, labels: np.ndarray, class_names: Sequence[str] | None) -> Tensor:
    """Held-out images, always the same, each row above what is decoded of the means of their posteriors, and samples of
    the prior by the same noise in every preview; of a model that has one, its plane of latents below: a sheet with
    names, 3 H W in [-1, 1]."""
    device = next(model.parameters()).device
    rows, pictures, names, titles = preview_rows(labels), [], [], []
    for row in rows:
        for batch in batches_of(data, row, len(row)):
            images = seen_images(data.fetch(batch, batch)).to(device)
            pictures += [
                list(map(to_pil, images.nan_to_num(0.0))),
                list(map(to_pil, model.decode(model.encode(images)))),
            ]
        names += ["real", "decoded"]
        titles += [[class_names[labels[i]] if class_names and labels[i] >= 0 else "" for i in row], []]
    columns = max(map(len, pictures))
    drawn = samples(model, 2 * columns)
    pictures += [drawn[:columns], drawn[columns:]]
    sheet = contact_sheet(pictures, [*names, "sampled", "sampled"], [*titles, [], []], legible=SIDE)
    if has_plane(model):
        count = min(PLANE_MEANS, len(labels))
        shown = [i * len(labels) // count for i in range(count)]
        batches = [seen_images(data.fetch(batch, batch)) for batch in batches_of(data, shown, 100)]
        means = torch.cat([model.encode(images.to(device)) for images in batches])
        sheet = below(sheet, latent_plane(model, means, labels[shown]))
    return to_tensor(sheet)


@torch.no_grad()
def samples(model: LikelihoodVAE, count: int) -> list[Image.Image]:
    """Images of latents that the prior draws, always by the same noise."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(SAMPLE_SEED)
    return list(map(to_pil, model.sample(count, generator)))


@torch.no_grad()
def reconstructions(model: LikelihoodVAE, images: Tensor, columns: int = 10) -> Image.Image:
    """Images, n c H W, each above what the mean of its posterior decodes to, in rows of so many."""
    rows: list[list[Image.Image]] = []
    for part in images.split(columns):
        rows += [list(map(to_pil, part)), list(map(to_pil, model.decode(model.encode(part))))]
    return contact_sheet(rows, ["real", "decoded"] * (len(rows) // 2), legible=SIDE)


@torch.no_grad()
def latent_walks(model: LikelihoodVAE, image: Tensor, variances: Tensor) -> Image.Image:
    """What an image, c H W, becomes when one number of the mean of its posterior goes from -3 to 3: a row each of the
    numbers that are the most active, by their `spread` over images; the most active number first. A map of latents is
    flattened: z17 is its number 17, counted from 0; groups of a hierarchy follow each other, the top one first."""
    rows = walks_from(model, image, variances)
    titles = [[f"{value + 0.0:+.1f}" for value in walk_values().tolist()]] + [[] for _ in rows[1:]]
    pictures = [list(map(to_pil, images)) for _, images in rows]
    return contact_sheet(pictures, [f"z{number}" for number, _ in rows], titles, legible=SIDE)


def moves_of(model: LikelihoodVAE) -> int:
    """How many of the first numbers of its latents turn and shift an image; 0 of most models."""
    network = getattr(getattr(model, "decoder", None), "network", None)
    return network.config.moves if isinstance(network, SpatialDecoder) else 0


@torch.no_grad()
def straightened(model: LikelihoodVAE, images: Tensor) -> Image.Image:
    """Of a spatial-VAE: images, n c H W, each above what the mean of its posterior decodes to, and that with angle and
    shift set to 0."""
    means = model.encode(images)
    straight = torch.cat([torch.zeros_like(means[:, : moves_of(model)]), means[:, moves_of(model) :]], dim=1)
    rows = [list(map(to_pil, shown)) for shown in (images, model.decode(means), model.decode(straight))]
    return contact_sheet(rows, ["real", "decoded", "straight"], legible=SIDE)


@torch.no_grad()
def analogies(model: LabelledVAE, images: Tensor) -> Tensor:
    """The style of each image, b c H W, in every class: b K c H W in [-1, 1]."""
    latents = model.encode(images)
    labels = torch.arange(model.num_classes, device=images.device)
    in_classes = [model.decode(model.in_class(latents, label.expand(len(images)))) for label in labels]
    return torch.stack(in_classes, dim=1)


def analogy_sheet(model: LabelledVAE, images: Tensor) -> Image.Image:
    """A row for each image, b c H W: itself, then its style in every class."""
    rows = [[to_pil(image), *map(to_pil, made)] for image, made in zip(images, analogies(model, images), strict=True)]
    names = model.class_names or tuple(map(str, range(model.num_classes)))
    return contact_sheet(rows, titles=[["real", *names], *([] for _ in rows[1:])], legible=SIDE)


@torch.no_grad()
def progressive(model: HierarchicalVAE, images: Tensor) -> Image.Image:
    """What a hierarchy decodes by level. Above, of images, n c H W: each row takes more groups of latents from their
    posteriors, from the top one down, and the prior's means below those. Below, likewise, of samples: each row draws
    more groups from the prior, by the same noise, before it takes means."""
    device, count = next(model.parameters()).device, len(images)
    generator = torch.Generator(device).manual_seed(SAMPLE_SEED)
    drawn = model.split(model.draw_latents(count, generator))
    of_images = model.posterior_latents(images)
    groups, nothing = len(drawn), torch.zeros(count, *model.shape, device=device)
    rows, names = [list(map(to_pil, images))], ["real"]
    for latents, what in ((of_images, "told"), (drawn, "drawn")):
        for known in levels_shown(model):
            _, outputs = model.draw(nothing, temperatures=0.0, known=latents[:known])
            rows.append(list(map(to_pil, model.shown(outputs, "mean"))))
            names.append(f"{known} of {groups} {what}")
    return contact_sheet(rows, names, legible=SIDE)


def levels_shown(model: HierarchicalVAE) -> list[int]:
    """Of how many groups the rows of `progressive` are: none, up to the last of each resolution, all; of groups of one
    shape some, evenly."""
    shapes, count = model.group_shapes, len(model.group_shapes)
    ends = [place for place in range(1, count) if shapes[place] != shapes[place - 1]]
    if not ends:
        rows = min(count, LEVELS)
        ends = [row * count // rows for row in range(1, rows)]
    return [0, *ends, count]


def walk_values() -> Tensor:
    """What a number of the latents is set to along a walk, steps in [-3, 3]."""
    return torch.linspace(-1, 1, WALK_STEPS).round(decimals=6) * REACH


@torch.no_grad()
def walks_from(model: LikelihoodVAE, image: Tensor, variances: Tensor) -> list[tuple[int, Tensor]]:
    """The rows of `latent_walks`: which number of the latents, and what it decodes to, steps c H W in [-1, 1]."""
    mean = model.encode(image.unsqueeze(0))
    return [
        (number, model.decode(walked(model, mean, number, walk_values())))
        for number in variances.argsort(descending=True)[:WALKS].tolist()
    ]


def walked(model: LikelihoodVAE, latents: Tensor, number: int, values: Tensor) -> Tensor:
    """An image's latents, 1 *shape, with one of their numbers set to each of n values: n *shape. Of a hierarchy the
    number is of the noise of which p(z) draws them, and the groups below go along."""
    noise = model.as_noise(latents)
    moved = noise.flatten(1).repeat(len(values), 1)
    moved[:, number] = values.to(moved)
    return model.from_noise(moved.unflatten(1, noise.shape[1:]))


@torch.no_grad()
def spread(model: LikelihoodVAE, means: Tensor) -> Tensor:
    """By how much each number that is walked along varies over images, given the means of their posteriors, n *shape:
    its variance; of one image they are taken to be alike. A hierarchy, which is passed through for it, looks at a few
    images from all over them."""
    if len(model.sizes) > 1:
        means = means[:: math.ceil(len(means) / SPREAD_IMAGES)]
    noise = model.as_noise(means).flatten(1).double()
    return noise.var(dim=0) if len(noise) > 1 else torch.ones_like(noise[0])


def has_plane(model: LikelihoodVAE) -> bool:
    """Whether there is a `latent_plane` of it."""
    return isinstance(model, VAE) and model.shape == (2,) and isinstance(model.prior, StandardNormal)


def below(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Two pictures as one, on white."""
    both = Image.new("RGB", (max(upper.width, lower.width), upper.height + lower.height), "white")
    both.paste(upper, (0, 0))
    both.paste(lower, (0, upper.height))
    return both


@torch.no_grad()
def latent_plane(model: LikelihoodVAE, means: Tensor, labels: np.ndarray) -> Image.Image:
    """Of a model of two latents under N(0, I): left, what a grid of them decodes to, along each side at equal steps of
    probability; right, on the same axes, the means of the posteriors of images, n 2, by the colours of their classes.
    """
    device = next(model.parameters()).device
    levels = (torch.arange(PLANE) + 0.5) / PLANE
    quantiles = torch.special.ndtri(levels.double()).float()
    down, right = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    images = model.decode(torch.stack([right, down], dim=-1).flatten(0, 1).to(device))  # 400 c H W
    height = images.shape[-2]
    cells = images.unflatten(0, (PLANE, PLANE)).permute(2, 0, 3, 1, 4).reshape(images.shape[1], PLANE * height, -1)
    grid = to_pil(cells)
    zoom = max(1, round(560 / grid.width))
    grid = grid.resize((grid.width * zoom, grid.height * zoom), Image.Resampling.NEAREST).convert("RGB")
    sheet = Image.new("RGB", (2 * grid.width + 12, grid.height), "white")
    sheet.paste(grid, (0, 0))
    draw = ImageDraw.Draw(sheet)
    places = torch.special.ndtr(means.detach().cpu().double()).numpy()  # n 2, in (0, 1)
    left = grid.width + 12
    draw.rectangle((left, 0, left + grid.width - 1, grid.height - 1), outline="#bbbbbb")
    for (x, y), label in zip(places, labels, strict=True):
        column, row = left + x * grid.width, (1 - y) * grid.height
        draw.ellipse((column - 1.5, row - 1.5, column + 1.5, row + 1.5), fill=COLOURS[int(label) % len(COLOURS)])
    return sheet
