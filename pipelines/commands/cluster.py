"""`zellige cluster`: images sorted by a VAE whose prior is made of clusters."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from accelerate import PartialState
from PIL import Image

from common.errors import UserError
from common.files import write_text
from common.owned_folder import SHEET_NAME
from common.wording import counted
from images.datasets import ImageDataset, to_float
from images.files import MAX_BAD_SHARE
from images.sources import NAMES
from pipelines.devices import open_device
from pipelines.evaluation.gathering import know_all_bad_images, results_of_all
from pipelines.evaluation.images import check_there, evenly, images_of_size, in_batches
from pipelines.latents.judging import binarisation_of
from pipelines.latents.models import load_vae
from pipelines.pictures import contact_sheet, save_png, to_pil
from pipelines.settings import check_apart, results_folder
from stage1_vae.binarise import Binarisation, NumberedImages
from stage1_vae.clustering import agreement, cluster_probabilities, prior_of_clusters
from stage1_vae.model import LikelihoodVAE

TABLE_NAME = "clusters.csv"
MEMBERS = 10  # of each cluster, in the picture


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Sorts images into the clusters of a model, and says how far they agree with the images' classes."""

    model: str  # run or model folder of a VAE with clusters, or a hub id
    images: str  # a folder of images, an .npz file or a name such as mnist
    out: str  # folder for clusters.csv and sheet.png
    split: Literal["train", "test"] = "test"  # of an .npz file or a named set; a folder has no such parts
    num: int | None = None  # so many of the images, evenly spread; left out: all
    binarised: Binarisation | None = None  # how images are made black and white; left out: as in the training
    max_bad_share: float = MAX_BAD_SHARE  # of the images may be unreadable; 0 stops at the first, else a few may be
    batch_size: int = 256  # images at a time
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        for name in ("num", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value}, expected at least 1")


def cluster_images(config: ClusterConfig) -> str:
    """Writes `config.out`; returns one line that says how many images went where. Raises UserError."""
    state, device = open_device(config.device)
    check_there("images", config.images)
    out = Path(config.out)
    if config.images not in NAMES:
        check_apart(out, Path(config.images))
    model = load_vae(config.model).to(device)
    prior, how = prior_of_clusters(model), binarisation_of(model, config.binarised)
    images = images_of_size(config.images, config.split, config.max_bad_share, model.image_size, model.config.channels)
    chosen = evenly(config.num, len(images))
    data = NumberedImages(images, how.how, how.seed, training=False)
    settings = {"model": model.fingerprint(), "images": images.fingerprint(), "num": config.num, "binarised": str(how)}
    with results_folder(out, "cluster", settings, state):
        found = sorted_images(model, data, in_batches(chosen, config.batch_size), state)
        know_all_bad_images(images, state)
        if not state.is_main_process:
            return ""
        if found is None:
            raise UserError(f"none of the {len(chosen)} images of {config.images} that were chosen can be read")
        indices, probabilities = found
        write_text(out / TABLE_NAME, table(images, indices, probabilities))
        save_png(members(data, indices, probabilities), out / SHEET_NAME)
    sizes = np.bincount(probabilities.argmax(1), minlength=prior.config.clusters)
    line = (
        f"{counted(len(indices), 'image')} in {int((sizes > 0).sum())} of {prior.config.clusters} clusters of "
        f"{sizes.min()} to {sizes.max()} images: {out / TABLE_NAME}, ten of each: {out / SHEET_NAME}"
    )
    labels = images.labels[indices]
    if (known := labels >= 0).any():
        told = agreement(probabilities.argmax(1)[known], labels[known], prior.config.clusters)
        line += (
            f"; of {counted(int(known.sum()), 'image')} with a class: accuracy {told.accuracy:.1%} by the best "
            f"matching of clusters and classes, purity {told.purity:.1%}"
        )
    return line


def sorted_images(
    model: LikelihoodVAE, data: NumberedImages, batches: Sequence[Sequence[int]], state: PartialState
) -> tuple[np.ndarray, np.ndarray] | None:
    """Of all images that can be read, on the first process: their positions, n, and the probabilities of clusters,
    n K."""

    def sort(indices: Sequence[int]) -> tuple[list[int], np.ndarray] | None:
        batch, found = data.fetch_readable(indices, indices)
        if not found:
            return None
        probabilities = cluster_probabilities(model, to_float(batch["images"]).to(state.device))
        return list(found), probabilities.cpu().numpy()

    parts = [part for part in results_of_all(batches, sort, state, "images") if part is not None]
    if not parts:
        return None
    return np.concatenate([np.array(part[0]) for part in parts]), np.concatenate([part[1] for part in parts])


def table(images: ImageDataset, indices: np.ndarray, probabilities: np.ndarray) -> str:
    """A line for each image: what it is called, its cluster, how probable that is, and its class where it has one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "cluster", "probability", "class"])
    names = images.class_names
    for name, cluster, probability, label in zip(
        images.names(indices.tolist()),
        probabilities.argmax(1).tolist(),
        probabilities.max(1).tolist(),
        images.labels[indices].tolist(),
        strict=True,
    ):
        known = "" if label < 0 else names[label] if names else str(label)
        writer.writerow([name, cluster, f"{probability:.4f}", known])
    return text.getvalue()


def members(data: NumberedImages, indices: np.ndarray, probabilities: np.ndarray) -> Image.Image:
    """The most probable images of each cluster, a row each."""
    rows, names = [], []
    for cluster in range(probabilities.shape[1]):
        own = np.flatnonzero(probabilities.argmax(1) == cluster)
        best = own[np.argsort(-probabilities[own, cluster], kind="stable")][:MEMBERS]
        shown = [int(indices[i]) for i in best]
        pictures = [to_pil(image) for image in to_float(data.fetch(shown, shown)["images"])] if shown else []
        rows.append(pictures)
        names.append(f"{cluster}: {len(own)}")
    return contact_sheet(rows, names)
