"""Pictures of a VAE for people: reconstructions, samples, and a plane of latents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from images.datasets import to_float
from images.sheets import contact_sheet, to_pil, to_tensor
from stage1_vae.vae import VAE
from training.data import batches_of
from training.previews import preview_rows
from training.task import Dataset

SIDE = 56  # pixels: smaller images are magnified
SAMPLE_SEED = 0
PLANE = 20  # images along each side of a plane of latents
COLOURS = (  # of classes, told apart by people who see colours otherwise too (Okabe and Ito 2008)
    ["#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#888888", "#44aa99"]
)


@torch.no_grad()
def preview(model: VAE, data: Dataset, labels: np.ndarray, class_names: Sequence[str] | None) -> Tensor:
    """Held-out images, always the same, each row above what is decoded of the means of their posteriors, and samples of
    the prior by the same noise in every preview: a sheet with names, 3 H W in [-1, 1]."""
    device = next(model.parameters()).device
    rows, pictures, names, titles = preview_rows(labels), [], [], []
    for row in rows:
        for batch in batches_of(data, row, len(row)):
            images = to_float(data.fetch(batch, batch)["images"]).to(device)
            pictures += [list(map(to_pil, images)), list(map(to_pil, model.decode(model.encode(images))))]
        names += ["real", "decoded"]
        titles += [[class_names[labels[i]] if class_names and labels[i] >= 0 else "" for i in row], []]
    columns = max(map(len, pictures))
    samples = model.sample(2 * columns, torch.Generator(device).manual_seed(SAMPLE_SEED))
    pictures += [list(map(to_pil, samples[:columns])), list(map(to_pil, samples[columns:]))]
    return to_tensor(contact_sheet(pictures, [*names, "sampled", "sampled"], [*titles, [], []], legible=SIDE))


@torch.no_grad()
def latent_plane(model: VAE, means: Tensor, labels: np.ndarray) -> Image.Image:
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
