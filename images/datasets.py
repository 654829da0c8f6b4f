"""Images for training and encoding: split, resized, cropped and augmented to uint8 batches `b c H W`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.short_repr import changes
from common.wording import counted
from images.aspect_buckets import Buckets, Shape, bucket_shapes, nearest_shapes, read_sizes, shared_shapes
from images.contract import ImageSource, SourceSettings
from images.crops import part_of_draw, seen_part
from images.files import JPEG_MARGIN, MAX_BAD_SHARE, MAX_PIXELS, BadImageError, BadImages, Crop, covering_size
from images.random_numbers import uniforms
from images.sources import ArraySource, open_source
from images.splitting import some_labels, split_blocks, split_indices, take_classes_of
from training.task import Batch

TRIES = 10  # of a random part to fit into its image
RESIZED = 2**40  # apart from the seeds of all else that is drawn for an image


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how each becomes `channels` x H x W."""

    path: str = ""  # a folder, an .npz file, tars, hf:NAME, or a name: mnist (./mnist is a folder), cifar10 ...
    split: Literal["train", "test"] = "train"  # part of a source that has both: .npz, hf:, torchvision's sets
    download_folder: str = "~/.cache/zellige"  # where torchvision's sets are, or are downloaded to
    image_size: int | tuple[int, int] = 256  # pixels: side of a square, or (H, W)
    aspect_buckets: int = 0  # train at so many shapes of image_size's area, each image at the nearest; 0: at image_size
    aspect_limit: float = 2.0  # proportions of the longest of these shapes, the tallest and the widest
    channels: Literal[1, 3] = 3  # 1 is grey, 3 is RGB; images of the other kind are converted
    crop: Literal["center", "random", "random_resized"] = "center"  # where H x W is cut from training images
    crop_scale: tuple[float, float] = (0.08, 1.0)  # of random_resized: least and greatest share of the image's area
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # and of a part's proportions to those of H x W
    flip: bool = False  # mirror training images left to right, each second one by chance
    shift: int = 0  # move training images by up to so many pixels each way; their border is repeated
    validation_path: str | None = None  # a source of held-out images; None: they are taken from `path`
    validation_share: float = 0.02  # how many, of each class alike; at least one image, unless 0
    validation_count: int | None = None  # how many, in place of the share
    validation_seed: int = 0  # which ones; apart from train.seed, so that runs hold out the same
    labels_per_class: int | None = None  # keep the labels of so many training images of each class; None: all of them
    labels_seed: int = 0  # which ones; apart from train.seed, so that runs know the same
    max_bad_share: float = MAX_BAD_SHARE  # of the images may be unreadable; 0 stops at the first, else a few may be
    max_pixels: int = MAX_PIXELS  # of an image by its header; larger ones count as unreadable and are not decoded
    jpeg_margin: float = JPEG_MARGIN  # a JPEG is decoded at 1/2, 1/4 or 1/8 if that leaves so many times what is needed
    relist: bool = False  # look into a large folder, or tars, anew, though they have not changed since they were listed
    image_field: str | None = None  # which image of a sample: its ending in tars, its column of hf:; None: the only one
    label_field: str | None = None  # the column of classes of hf:; None: the only one of them

    __repr__ = changes

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.image_size, int):
            if len(self.image_size) != 2:
                raise UserError(f"data.image_size={self.image_size}, expected one number, or height and width")
            object.__setattr__(self, "image_size", tuple(self.image_size))  # YAML and JSON know lists only
        for name, valid, expected in (
            ("image_size", min(self.height, self.width) >= 1, "at least 1 pixel"),
            (
                "aspect_buckets",
                self.aspect_buckets == 0 or (self.aspect_buckets >= 3 and self.aspect_buckets % 2 == 1),
                "0, which is off, or an odd number from 3 on: a square, and as many tall shapes as wide ones",
            ),
            ("aspect_limit", 1 < self.aspect_limit < np.inf, "above 1; 2 goes from 1:2 to 2:1"),
            ("channels", self.channels in (1, 3), "1 (grey) or 3 (RGB)"),
            (
                "crop_scale",
                len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1,
                "two shares above 0, up to 1, the lesser first",
            ),
            (
                "crop_ratio",
                len(self.crop_ratio) == 2 and 0 < self.crop_ratio[0] <= self.crop_ratio[1] < np.inf,
                "two numbers above 0, the lesser first",
            ),
            (
                "shift",
                0 <= self.shift < min(self.height, self.width),
                "0 or more, less than the shorter side",
            ),
            ("validation_share", 0 <= self.validation_share < 1, "0 or more, less than 1"),
            ("validation_count", (self.validation_count or 0) >= 0, "0 or more images"),
            ("labels_per_class", (self.labels_per_class or 1) >= 1, "at least 1 of each class"),
            ("labels_seed", self.labels_seed >= 0, "0 or more"),
            ("max_bad_share", 0 <= self.max_bad_share <= 1, "from 0 to 1"),
            ("max_pixels", self.max_pixels >= 1, "at least 1"),
            (
                "jpeg_margin",
                1 <= self.jpeg_margin < np.inf,
                "at least 1: what is needed itself",
            ),
        ):
            if not valid:
                raise UserError(f"data.{name}={getattr(self, name)}, expected {expected}")

    @property
    def height(self) -> int:
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def width(self) -> int:
        return self.image_size if isinstance(self.image_size, int) else self.image_size[1]

    @property
    def augments(self) -> bool:
        """Whether two draws of one training image can differ."""
        return self.crop != "center" or self.flip or self.shift > 0

    @property
    def source_settings(self) -> SourceSettings:
        return SourceSettings(self.max_pixels, self.relist, self.image_field, self.label_field, self.jpeg_margin)


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1], any shape."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float in [-1, 1] to uint8 in 0..255, rounded; what lies outside is clamped. Inverse of `to_float`."""
    levels = images.float().clamp(-1, 1)  # a copy, so that the rest needs none
    return levels.add_(1).mul_(127.5).round_().to(torch.uint8)


def open_images(config: DataConfig) -> ImageSource:
    """All images of `config.path`, not split and not resized yet. Raises UserError."""
    return open_source(config.path, config.split, Path(config.download_folder).expanduser(), config.source_settings)


def image_datasets(
    config: DataConfig, seed: int, bad_files: Path | None = None, *, stride: int = 1, batch_size: int = 1
) -> tuple[ImageDataset, ImageDataset]:
    """Training images, augmented as `config` says, and held-out images, which never are.

    The held-out part is empty if none is asked for. seed: of the augmentation; bad_files: text file that gets
    the names of unreadable images. With `config.aspect_buckets` the sides of every shape are multiples of `stride`, and
    at least `batch_size` training images have it. With `config.labels_per_class` the labels of all other training
    images are -1; held-out ones keep theirs. Raises UserError.
    """
    source = open_images(config)
    if config.validation_path is None:
        count = held_out_count(config, len(source))
        if (blocks := blocks_of(source)) is None:
            train, held_out = split_indices(len(source), source.labels, count, config.validation_seed)
        else:
            train, held_out = split_blocks(blocks, count, config.validation_seed)
        validation_source = source
    else:
        validation_source = open_images(replace(config, path=config.validation_path, split="train"))
        take_classes_of(source, validation_source)
        train, held_out = np.arange(len(source)), np.arange(len(validation_source))
    bad_images = BadImages(
        len(train) + len(held_out),
        bad_files,
        max_share=config.max_bad_share,
        still_bad=lambda location: source.still_bad(location) or validation_source.still_bad(location),
    )
    augment_seed = seed if config.augments else None
    buckets = validation_buckets = None
    if config.aspect_buckets:
        sizes = read_sizes(source)
        area = config.height * config.width
        shapes = bucket_shapes(area, stride, config.aspect_buckets, config.aspect_limit)
        shapes = shared_shapes(sizes[train], shapes, batch_size)
        buckets = validation_buckets = Buckets(tuple(shapes), nearest_shapes(sizes, shapes))
        if validation_source is not source:
            validation_buckets = Buckets(tuple(shapes), nearest_shapes(read_sizes(validation_source), shapes))
    train_data = ImageDataset(
        source, config, indices=train, augment_seed=augment_seed, buckets=buckets, bad_images=bad_images
    )
    if config.labels_per_class is not None:
        train_data.labels = some_labels(train_data.labels, config.labels_per_class, config.labels_seed, config.path)
    return (
        train_data,
        ImageDataset(validation_source, config, indices=held_out, buckets=validation_buckets, bad_images=bad_images),
    )


def blocks_of(source: ImageSource) -> np.ndarray | None:
    """Which images of a source are fetched together, n numbers; None: each by itself."""
    return getattr(source, "blocks", None)


def held_out_count(config: DataConfig, images: int) -> int:
    """How many of `images` are for validation. Raises UserError when none would be left to train on."""
    if config.validation_count is not None:
        count = config.validation_count
    else:
        count = max(1, round(config.validation_share * images)) if config.validation_share else 0
    if count >= images:
        raise UserError(
            f"{config.path} holds {counted(images, 'image')}, of which {count} would be held out: none is left to "
            "train on; add images, or lower data.validation_count or data.validation_share"
        )
    return count


class ImageDataset:
    """training.task.Dataset over images of a source. A batch is {"images": uint8 b c H W, "labels": int64 b}.

    H x W is `config.image_size`; with `buckets` it is the shape of the images' bucket, which is their group. Labels
    are -1 where they are not known, and where the source has no classes. A file that cannot be read is recorded, and
    the next one of the dataset that can be takes its place.
    """

    def __init__(
        self,
        source: ImageSource,
        config: DataConfig,
        *,
        indices: np.ndarray | None = None,
        augment_seed: int | None = None,
        buckets: Buckets | None = None,
        bad_images: BadImages | None = None,
    ):
        """indices: which images of the source, default all; augment_seed: None switches augmentation off; buckets: of
        all images of the source."""
        self.source = source
        self.config = config
        self.indices = np.arange(len(source)) if indices is None else indices
        labels = np.full(len(source), -1) if source.labels is None else source.labels
        self.labels = labels[self.indices]  # n, int64
        self.augment_seed = augment_seed
        self.buckets = buckets
        self.groups = None if buckets is None else buckets.numbers[self.indices]  # n, int64
        blocks = blocks_of(source)
        self.blocks = None if blocks is None else blocks[self.indices]  # n, int64
        self.bad_images = bad_images or BadImages(
            len(source), max_share=config.max_bad_share, still_bad=source.still_bad
        )
        self.unreadable: set[int] = set()  # known to this process, so that they are tried once only

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.source.class_names

    def without_augmentation(self) -> ImageDataset:
        return ImageDataset(
            self.source, self.config, indices=self.indices, buckets=self.buckets, bad_images=self.bad_images
        )

    def fingerprint(self) -> str:
        """SHA-256: equal for equal choices of equal images."""
        return hashlib.sha256(self.source.fingerprint().encode() + self.indices.tobytes()).hexdigest()

    def names(self, indices: Sequence[int]) -> list[str]:
        """File of each image, relative to the source's folder, or its number."""
        return [self.source.name(int(self.indices[index])) for index in indices]

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        """Images `indices`; the seed and draws[j] decide how image j is augmented. Raises UserError."""
        return self.fetch_found(indices, draws)[0]

    def fetch_found(self, indices: Sequence[int], draws: Sequence[int]) -> tuple[Batch, list[int]]:
        """As `fetch`, with the indices of the images in it, which are others where some cannot be read."""
        shape = self.shape_of(indices)
        if (pixels := self.as_they_are(indices, shape)) is not None:
            labels = torch.from_numpy(self.labels[list(indices)])
            return {"images": torch.from_numpy(pixels), "labels": labels}, list(indices)
        images, found = [], []
        for index, crop in zip(indices, self.crops(draws, shape), strict=True):
            for candidate in range(index, index + len(self)):
                if (image := self.read(candidate % len(self), shape, crop)) is not None:
                    images.append(image)
                    found.append(candidate % len(self))
                    break
            else:
                raise UserError(f"none of the {len(self)} images in this part of {self.source.title} can be read")
        return self.batch(images, found, draws, shape), found

    def fetch_readable(self, indices: Sequence[int], draws: Sequence[int]) -> tuple[Batch, list[int]]:
        """As `fetch`, but what cannot be read is left out: the batch, and the indices of the images in it."""
        shape = self.shape_of(indices)
        if (pixels := self.as_they_are(indices, shape)) is not None:
            labels = torch.from_numpy(self.labels[list(indices)])
            return {"images": torch.from_numpy(pixels), "labels": labels}, list(indices)
        images, found, kept_draws = [], [], []
        for index, draw, crop in zip(indices, draws, self.crops(draws, shape), strict=True):
            if (image := self.read(index, shape, crop)) is not None:
                images.append(image)
                found.append(index)
                kept_draws.append(draw)
        return self.batch(images, found, kept_draws, shape), found

    def as_they_are(self, indices: Sequence[int], shape: Shape) -> np.ndarray | None:
        """Images in memory that are neither scaled nor augmented, uint8 b c H W, without a loop over them; None for
        others."""
        source, config = self.source, self.config
        if self.augment_seed is not None or not isinstance(source, ArraySource):
            return None
        if source.images.shape[1:] != (*shape, config.channels):
            return None
        pixels = source.images[self.indices[np.asarray(indices, dtype=np.int64)]]  # b H W c
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

    def shape_of(self, indices: Sequence[int]) -> Shape:
        """Height and width of a batch of these images. Raises UserError if their buckets differ."""
        if self.buckets is None or self.groups is None or not len(indices):
            return self.config.height, self.config.width
        numbers = np.unique(self.groups[list(indices)])
        if len(numbers) > 1:
            shapes = ", ".join(f"{height}x{width}" for height, width in (self.buckets.shapes[n] for n in numbers))
            raise UserError(
                f"the images of one batch have different shapes, {shapes}: with data.aspect_buckets ask for images of "
                "one of the dataset's groups at a time, as training.data.batches_of does"
            )
        return self.buckets.shapes[numbers[0]]

    def crops(self, draws: Sequence[int], shape: Shape) -> list[Crop | None]:
        """Of each draw the part of an image that is read at H x W; None where the image is read whole."""
        if self.augment_seed is None or self.config.crop != "random_resized":
            return [None] * len(draws)
        return [
            part_of_draw(chance, shape, self.config.crop_scale, self.config.crop_ratio)
            for chance in uniforms(self.augment_seed + RESIZED, draws, 4 * TRIES).reshape(-1, TRIES, 4)
        ]

    def read(self, index: int, shape: Shape, crop: Crop | None = None) -> np.ndarray | None:
        """Image `index` scaled to cover H x W, or its part at H x W, uint8 h w c; None, and recorded, if it cannot be
        read."""
        if index in self.unreadable:
            return None
        position = int(self.indices[index])
        try:
            return self.source.read(position, *shape, self.config.channels, crop)
        except BadImageError as error:
            self.unreadable.add(index)
            self.bad_images.add(self.source.location(position), str(error))
            return None

    def batch(self, images: Sequence[np.ndarray], indices: Sequence[int], draws: Sequence[int], shape: Shape) -> Batch:
        """Crops, mirrors and shifts scaled images, and stacks them with their labels."""
        stacked = np.empty((len(images), self.config.channels, *shape), dtype=np.uint8)
        for row, window in enumerate(self.windows(images, draws, shape)):
            stacked[row] = window.transpose(2, 0, 1)
        return {"images": torch.from_numpy(stacked), "labels": torch.from_numpy(self.labels[list(indices)])}

    def beyond_the_middle(self, middles: Sequence[np.ndarray], indices: Sequence[int]) -> list[np.ndarray]:
        """What is told of the middle H x W of images, H W or H W c each, as `seen` takes it: at the size to which
        the image is scaled, where windows move that far; `cut` goes on beyond the border by itself."""
        if self.augment_seed is None or self.config.crop == "center":
            return list(middles)
        shape = self.shape_of(indices)
        shapes = [covering_size(height, width, *shape) for height, width in self.own_sizes(indices)]
        return [extended(middle, shape) for middle, shape in zip(middles, shapes, strict=True)]

    def own_sizes(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Height and width of each image before it is scaled; 1 1 where that is not known."""
        sizes: np.ndarray = np.maximum(self.source.sizes(self.indices[list(indices)].tolist()), 1)
        return [(height, width) for height, width in sizes.tolist()]

    def seen(self, planes: Sequence[np.ndarray], indices: Sequence[int], draws: Sequence[int]) -> Iterator[np.ndarray]:
        """What these draws see of planes, h w c each, that move with the pixels of images and are as large as these
        after scaling, or H W c: H W c each."""
        shape = self.shape_of(indices)
        crops = self.crops(draws, shape)
        if any(crops):
            sizes = self.own_sizes(indices)
            planes = [
                plane if crop is None else seen_part(plane, size, crop(*size), shape)
                for plane, size, crop in zip(planes, sizes, crops, strict=True)
            ]
        yield from self.windows(planes, draws, shape)

    def windows(self, images: Sequence[np.ndarray], draws: Sequence[int], shape: Shape) -> Iterator[np.ndarray]:
        """What these draws see, H W c each, of images as `read` has them, h w c."""
        (H, W), config = shape, self.config
        chance = None if self.augment_seed is None else uniforms(self.augment_seed, draws, 5)  # b 5
        for row, image in enumerate(images):
            slack_y, slack_x = image.shape[0] - H, image.shape[1] - W
            top, left, mirrored = slack_y // 2, slack_x // 2, False
            if chance is not None:
                crop_y, crop_x, shift_y, shift_x, mirror = chance[row]
                if config.crop == "random":
                    top, left = int(crop_y * (slack_y + 1)), int(crop_x * (slack_x + 1))
                top += int(shift_y * (2 * config.shift + 1)) - config.shift
                left += int(shift_x * (2 * config.shift + 1)) - config.shift
                mirrored = config.flip and mirror < 0.5
            window = cut(image, top, left, H, W)
            yield window[:, ::-1] if mirrored else window


def extended(middle: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What is told of the middle of an image, H W or H W c, told of the whole, h w of `shape`: what is at the border of
    the middle goes on beyond it."""
    slack = [whole - part for whole, part in zip(shape[:2], middle.shape[:2], strict=True)]
    if not any(slack):
        return middle
    around = [(rest // 2, rest - rest // 2) for rest in slack] + [(0, 0)] * (middle.ndim - 2)
    return np.pad(middle, around, mode="edge")


def cut(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Window of an image h w c; where it reaches beyond the image the border is repeated."""
    h, w, _ = image.shape
    if 0 <= top <= h - height and 0 <= left <= w - width:
        return image[top : top + height, left : left + width]
    rows = np.clip(np.arange(top, top + height), 0, h - 1)
    columns = np.clip(np.arange(left, left + width), 0, w - 1)
    return image.take(rows, axis=0).take(columns, axis=1)
