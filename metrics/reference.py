"""Features of a reference set, computed once: kept by the hash of its images and of the network that saw them.

A figure against a reference means nothing until it is said against which: a file of statistics of another crop or
another count has doubled published figures. A reference here carries the hash of the pixels that the network was given,
so two figures are of one reference where their hashes are equal, wherever the images lie and whatever they are called.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from common.errors import UserError
from common.files import atomic_folder, read_json, sha256_of_file, write_json
from common.tensor_files import load_tensors, save_tensors
from metrics.features import FeatureNetwork, Seen, rounding
from metrics.statistics import FeatureStatistics

KIND = "zellige reference"
DESCRIPTION_NAME = "reference.json"
TENSORS_NAME = "features.safetensors"
OURS = {DESCRIPTION_NAME, TENSORS_NAME}


@dataclass(frozen=True)
class Reference:
    """What distances are measured from."""

    features: Tensor  # n d, float32, in the order of the images
    probabilities: Tensor | None  # n classes, float32, of a network that is a classifier
    description: dict[str, Any]  # JSON: `images` (the hash), `count`, `rounding`, `set` (as given), `network`

    @cached_property
    def statistics(self) -> FeatureStatistics:
        return FeatureStatistics.of(self.features)


def image_digests(images: Tensor) -> list[bytes]:
    """SHA-256 over shape, type and values of each image, b c H W of any type. Digests of several processes, put into
    the order of the images, are those of one."""
    on_cpu = images.detach().cpu().contiguous()
    head = f"{tuple(on_cpu.shape[1:])} {on_cpu.dtype}".encode()
    return [hashlib.sha256(head + image.numpy().tobytes()).digest() for image in on_cpu]


def hash_of(digests: Sequence[bytes]) -> str:
    """Of a set of images in this order, whatever its batches."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def reference_of(
    batches: Callable[[], Iterable[Tensor]], network: FeatureNetwork, described: Mapping[str, Any], folder: Path | None
) -> Reference:
    """The reference of all images that `batches()` yields, from `folder` where it has been computed before.

    batches: called once to hash the images, and once more where they are to be seen: b c H W, uint8, or floats in
    [-1, 1] that are not rounded; described: of the set, as JSON values, such as path, split, crop, filter, size and
    channels; folder: the cache, None for none. Raises UserError for a set of no images and for a cache that is
    something else.
    """
    digests: list[bytes] = []
    rounded = "8 bits"
    for batch in batches():
        digests += image_digests(batch)
        rounded = rounding(batch)
    if not digests:
        raise UserError("a reference of no images at all; check which ones are meant")
    description = {
        "images": hash_of(digests),
        "count": len(digests),
        "rounding": rounded,
        "set": dict(described),
        "network": network.describe(),
    }
    if folder is not None and (kept := find(folder, description)) is not None:
        return kept
    reference = collected((network.see(batch) for batch in batches()), description)
    if folder is not None:
        keep(folder, reference)
    return reference


def collected(seen: Iterable[Seen], description: dict[str, Any]) -> Reference:
    """The reference from what a network has seen, batch by batch. Raises UserError where these are other images than
    those that were described."""
    features, probabilities = [], []
    for part in seen:
        features.append(part.features.cpu())
        if part.probabilities is not None:
            probabilities.append(part.probabilities.cpu())
    if sum(map(len, features)) != description["count"]:
        raise UserError(f"{sum(map(len, features))} images were seen and {description['count']} hashed; they change")
    return Reference(torch.cat(features), torch.cat(probabilities) if probabilities else None, description)


# ---- kept on disk ---------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where references are kept unless a person says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zellige" / "references"


def place_of(folder: Path, description: Mapping[str, Any]) -> Path:
    """Of a reference in a cache: by images and network alone, so that a set that moved is found again."""
    said = json.dumps([description["images"], description["network"]["fingerprint"]])
    return folder / hashlib.sha256(said.encode()).hexdigest()[:32]


def find(folder: Path, description: Mapping[str, Any]) -> Reference | None:
    """What the cache has of the images and the network that are described; None where it has nothing, or something
    damaged, of which it prints a line: it is to be made anew. Raises UserError where a folder of other things is in
    the way."""
    place = place_of(folder, description)
    if not place.exists():
        return None
    if not place.is_dir() or not {file.name for file in place.iterdir()} <= OURS:
        raise UserError(
            f"{place} is no reference that Zellige kept, so it is left alone: name another folder for the cache"
        )
    try:
        written = read_json(place / DESCRIPTION_NAME)
        if written.get("kind") != KIND or place_of(folder, written) != place:
            raise UserError("it is of other images or of another network")
        if written.get("sha256") != sha256_of_file(place / TENSORS_NAME):
            raise UserError("its features are not those that were written")
        tensors = load_tensors(place / TENSORS_NAME)
        features = tensors["features"]
        if len(features) != description["count"]:
            raise UserError("it is of another number of images")
    except (UserError, OSError, SafetensorError, KeyError, TypeError) as error:
        print(f"{place}: this reference is damaged ({error}) and is made anew", flush=True)
        return None
    return Reference(features, tensors.get("probabilities"), dict(description))


def keep(folder: Path, reference: Reference) -> Path:
    """Writes a reference into the cache, whole or not at all, and returns its place. Raises UserError."""
    place = place_of(folder, reference.description)
    tensors = {"features": reference.features}
    if reference.probabilities is not None:
        tensors["probabilities"] = reference.probabilities
    with atomic_folder(place) as temporary:
        save_tensors(tensors, temporary / TENSORS_NAME)
        digest = sha256_of_file(temporary / TENSORS_NAME)
        write_json(temporary / DESCRIPTION_NAME, {"kind": KIND, **reference.description, "sha256": digest})
    return place
