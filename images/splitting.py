"""Which images of a source are held out, which keep their labels, and the numbers of classes of two sources."""

from __future__ import annotations

import numpy as np

from common.errors import UserError
from images.contract import ImageSource


def split_indices(images: int, labels: np.ndarray | None, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices in [0, images): all but `held_out` random ones, and these, of each class its share."""
    order = np.random.default_rng(seed).permutation(images)
    if labels is not None:
        order = order[np.argsort(labels[order], kind="stable")]
    chosen = order[np.arange(held_out) * images // max(held_out, 1)]  # evenly over the classes
    mask = np.zeros(images, dtype=bool)
    mask[chosen] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def split_blocks(blocks: np.ndarray, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As `split_indices`, of images that lie in blocks, n numbers from 0 on: those of random whole blocks, and a part
    of one, so that neither is read for the other."""
    count = int(blocks.max()) + 1
    ranks = np.random.default_rng(seed).permutation(count)[blocks]
    mask = np.zeros(len(blocks), dtype=bool)
    mask[np.argsort(ranks, kind="stable")[:held_out]] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def some_labels(labels: np.ndarray, of_each: int, seed: int, path: str) -> np.ndarray:
    """`labels`, n, but -1 for all images except `of_each` random ones of every class. path: of these images, for
    messages. Raises UserError for classes that have fewer."""
    order = np.random.default_rng(seed).permutation(len(labels))
    kept = np.full(len(labels), -1)
    classes = np.unique(labels[labels >= 0])
    if not len(classes):
        raise UserError(f"data.labels_per_class={of_each}, but {path} has no classes: sort its images into subfolders")
    for label in classes:
        chosen = order[labels[order] == label][:of_each]
        if len(chosen) < of_each:
            raise UserError(
                f"data.labels_per_class={of_each}, but {path} has {len(chosen)} training images of class {label}: "
                "lower it, or leave it out to keep all labels"
            )
        kept[chosen] = label
    return kept


def take_classes_of(source: ImageSource, validation: ImageSource) -> None:
    """Numbers the classes of `validation` as `source` does. Raises UserError when that cannot be."""
    if source.class_names is None:
        validation.labels, validation.class_names = None, None
        return
    if validation.class_names is None or validation.labels is None:
        raise UserError(
            f"{source.title} has classes and {validation.title} has none: sort the held-out images alike, "
            f"into subfolders such as {source.class_names[0]}"
        )
    if unknown := set(validation.class_names) - set(source.class_names):
        raise UserError(
            f"{validation.title} has classes that {source.title} has not: {', '.join(sorted(unknown))}; "
            "held-out images must be of the classes that are trained on"
        )
    numbers = np.array([*(source.class_names.index(name) for name in validation.class_names), -1])  # -1 stays -1
    validation.labels, validation.class_names = numbers[validation.labels], source.class_names
