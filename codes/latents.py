"""Folders of latent shards: the posterior of each image by a likelihood VAE, for priors that are learned after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from codes.shard_folder import ShardDataset, ShardIndex, ShardWriter, Split, as_read, planned_shards
from common.errors import UserError
from training.task import Batch


@dataclass(frozen=True)
class LatentSpec:
    """What is known of the latents of one image, and the image that they stand for."""

    shape: tuple[int, ...]  # (d,), or (c, h, w) of a map
    scales: bool  # whether posteriors are diagonal Gaussians, whose scales are stored beside the means
    image_height: int  # H, pixels
    image_width: int  # W, pixels
    image_channels: int

    @property
    def size(self) -> int:
        """Numbers in the latents of an image."""
        return math.prod(self.shape)

    @property
    def image_dimensions(self) -> int:
        """H * W * c: what "bits per image-dimension" divides by."""
        return self.image_height * self.image_width * self.image_channels

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors of an image."""
        return ("mean", "log_scale") if self.scales else ("mean",)

    def check(self, latents: Mapping[str, Tensor]) -> None:
        """Raises UserError unless `latents` are the tensors of this spec, b *shape each, and finite."""
        if latents.keys() != set(self.names):
            raise UserError(f"got latents of {', '.join(sorted(latents))}, expected {' and '.join(self.names)}")
        for name, tensor in latents.items():
            if tuple(tensor.shape[1:]) != self.shape:
                raise UserError(f"{name} of latents has shape {tuple(tensor.shape[1:])}, expected {self.shape}")
            if not tensor.isfinite().all():
                raise UserError(
                    f"{name} of latents holds numbers that are not finite: the VAE has diverged; take its weights of "
                    "an earlier checkpoint, or train it with a lower learning rate"
                )

    def describe(self) -> str:
        """One phrase for messages: `20 latents (28x28x1 images)`."""
        shape = "x".join(map(str, self.shape))
        return f"{shape} latents ({self.image_height}x{self.image_width}x{self.image_channels} images)"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`. Raises UserError when fields are missing or unknown."""
        try:
            return cls(**{**value, "shape": tuple(value["shape"])})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"not a description of latents: {error}; the file is damaged or from another version"
            ) from error


@dataclass(frozen=True, kw_only=True)
class LatentIndex(ShardIndex):
    """What `index.json` says of a folder of latent shards."""

    what: ClassVar[str] = "latent"
    spec_name: ClassVar[str] = "latent_spec"

    latent_spec: LatentSpec

    @classmethod
    def from_json(cls, value: Mapping[str, Any], **own: Any) -> Self:
        return super().from_json(value, latent_spec=LatentSpec.from_json(value["latent_spec"]), **own)


class LatentShardWriter(ShardWriter[LatentIndex]):
    """Writes a folder of latent shards."""

    def __init__(
        self,
        folder: str | Path,
        latent_spec: LatentSpec,
        splits: Sequence[Split],
        *,
        class_names: Sequence[str] | None = None,
        stage1_fingerprint: str = "",
        source: Mapping[str, Any] | None = None,
        source_defaults: Mapping[str, Any] | None = None,
    ):
        """As `CodeShardWriter`. Raises UserError when the folder holds anything else."""
        plan = LatentIndex(
            latent_spec=latent_spec,
            class_names=None if class_names is None else tuple(class_names),
            stage1_fingerprint=stage1_fingerprint,
            source=as_read(source),
            shards=planned_shards("latents", splits),
        )
        super().__init__(folder, plan, source_defaults)

    def write(self, number: int, latents: Mapping[str, Tensor], labels: Tensor, names: Sequence[str]) -> None:
        """Writes shard `number`. latents: the tensors of the LatentSpec by name, b *shape each; labels: b, -1 for none;
        names: b, the images.

        Raises UserError when the latents do not fit the LatentSpec or the disk is full.
        """
        self.plan.latent_spec.check(latents)
        self.write_tensors(number, {name: tensor.float() for name, tensor in latents.items()}, labels, names)


class LatentDataset(ShardDataset[LatentIndex]):
    """training.task.Dataset over one split of a folder of latent shards, which stay on disk, mapped.

    A batch is {"mean": float32 `b *shape`, "log_scale": likewise, where the spec has scales, "labels": int64 b, -1
    without classes, "numbers": int64 b, where in the split each image stands}.
    """

    index_class = LatentIndex

    @property
    def latent_spec(self) -> LatentSpec:
        return self.index.latent_spec

    def describe(self) -> str:
        return self.latent_spec.describe()

    def content(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        spec = self.latent_spec
        return {"labels": ((), np.int64), **dict.fromkeys(spec.names, (spec.shape, np.float32))}

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        """Latents and labels of images `indices`. `draws` changes nothing: latents know no augmentation."""
        names = list(self.content())
        tensors = dict(zip(names, map(torch.from_numpy, self.rows(indices, names)), strict=True))
        return {**tensors, "numbers": torch.tensor(indices, dtype=torch.int64)}
