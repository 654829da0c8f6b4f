"""What a folder of latent shards holds, and whether it is sound."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from codes.latents import LatentDataset
from common.errors import UserError
from common.wording import counted
from pipelines.latents.models import check_latents_of, load_vae

AT_ONCE = 8192  # images that are looked at at a time


def describe_latents(folder: str) -> str:
    """Several lines. Raises UserError when the folder is not complete."""
    train, held_out = LatentDataset(folder, "train"), LatentDataset(folder, "validation")
    index, spec = train.index, train.latent_spec
    size = sum((Path(folder) / shard.file).stat().st_size for shard in index.shards)
    images = len(train) + len(held_out)
    made_from = ", ".join(f"{key} {value}" for key, value in index.source.items() if value is not None)
    classes = "none" if index.class_names is None else f"{len(index.class_names)}: {', '.join(index.class_names[:10])}"
    lines = [
        f"{len(train)} training and {len(held_out)} held-out images as {spec.describe()}, "
        + ("mean and scale of each posterior" if spec.scales else "the mean of each posterior"),
        f"files:       {len(index.shards)}, {size / 1e6:.2f} MB, {size / max(1, images):.0f} bytes per image",
        f"classes:     {classes}{', ...' if train.num_classes > 10 else ''}",
        f"VAE:         fingerprint {index.stage1_fingerprint[:12] or 'not recorded'}",
        f"made from:   {made_from or 'not recorded'}",
    ]
    return "\n".join(lines + ([usage(train)] if len(train) else []))


def usage(train: LatentDataset) -> str:
    """How many numbers tell images apart, by the variance of their means over the training images (Burda et al. 2015,
    arXiv:1509.00519, section 3.1, who call those above 0.01 active)."""
    count, (total, squares) = 0, torch.zeros(2, train.latent_spec.size, dtype=torch.float64)
    for start in range(0, len(train), AT_ONCE):
        indices = range(start, min(start + AT_ONCE, len(train)))
        means = torch.from_numpy(train.rows(indices, ["mean"])[0]).flatten(1).double()
        count, total, squares = count + len(means), total + means.sum(0), squares + means.square().sum(0)
    variances = squares / count - (total / count).square()
    return (
        f"training means: variance above 0.01 in {int((variances > 0.01).sum())} of {len(variances)} numbers, largest "
        f"{float(variances.max()):.2f}"
    )


def verify_latents(folder: str, model: str | None) -> str:
    """Checksums of all files, that all numbers are finite, labels, and that no image stands there too often. Returns
    one line. Raises UserError for the first thing that is wrong."""
    counts = []
    for split in ("train", "validation"):
        latents = LatentDataset(folder, split)
        if model is not None and split == "train":
            check_latents_of(latents, load_vae(model))
        latents.verify()
        for start in range(0, len(latents), AT_ONCE):
            batch = latents.fetch(range(start, min(start + AT_ONCE, len(latents))), [])
            latents.latent_spec.check({name: batch[name] for name in latents.latent_spec.names})
            labels = batch["labels"]
            if not -1 <= int(labels.min()) <= int(labels.max()) < latents.num_classes:
                raise UserError(
                    f"{folder} holds labels from {int(labels.min())} to {int(labels.max())}, expected -1 to "
                    f"{latents.num_classes - 1}; encode the images anew"
                )
        copies = int(latents.index.source.get("augment_copies", 1)) if split == "train" else 1
        name, most = max(Counter(latents.names()).items(), key=lambda entry: entry[1], default=("", 0))
        if most > copies:
            raise UserError(
                f"{folder} holds image {name!r} {counted(most, 'time')} among the {split} images, expected at most "
                f"{copies}; encode the images anew"
            )
        counts.append(len(latents))
    return (
        f"{folder} is sound: {counted(len(latents.index.shards), 'shard')}, {counts[0]} training and {counts[1]} "
        "held-out images, all checksums right, no image more often than asked for"
    )
