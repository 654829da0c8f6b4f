"""`zellige codes info`, `verify` and `export`: look into code shards, check them, take them elsewhere."""

from __future__ import annotations

import io
import json
import math
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from codes.shard_folder import INDEX_NAME, Split
from codes.shards import CHUNK, CodeDataset, check_range, smallest_type
from codes.spec import Grid
from common.errors import UserError
from common.files import atomic_file, sha256_of_file
from common.model_io import load_pretrained
from common.processes import process_state
from common.wording import counted
from pipelines.codec.entropy_coding import packed_length
from pipelines.folder_kinds import LATENT_SHARDS, check_kind, kind_of_folder
from pipelines.latents.shards import describe_latents, verify_latents
from pipelines.model_folders import stage_folder
from pipelines.settings import results_folder
from pipelines.stages import check_made_by
from stage1_vq.autoencoders import AUTOENCODERS

SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, kw_only=True)
class CodesInfoConfig:
    """Shows what a folder of code shards holds, and how evenly its codes are used; of latent shards likewise."""

    codes: str  # folder that `zellige encode` wrote


@dataclass(frozen=True, kw_only=True)
class CodesVerifyConfig:
    """Reads every byte of a folder of code shards, or latent shards, and compares it with what its index promises."""

    codes: str  # folder that `zellige encode` wrote
    model: str | None = None  # also checks that this autoencoder made them: run, model folder, assembled model, hub id


@dataclass(frozen=True, kw_only=True)
class CodesExportConfig:
    """Code shards as files that other programs read."""

    codes: str  # folder that `zellige encode` wrote
    out: str  # folder for the files
    format: Literal["npz", "webdataset"] = "npz"  # one file of arrays for each split, or tar files of samples
    images_per_file: int = 10_000  # of webdataset: samples in a tar file

    def __post_init__(self) -> None:
        if self.images_per_file < 1:
            raise UserError(f"images_per_file={self.images_per_file}, expected at least 1")


def chunks(codes: CodeDataset) -> Iterator[tuple[dict[str, np.ndarray], list[str]]]:
    """Tensors of up to `CHUNK` images of one shard, as they are stored, and the images' names. Raises UserError for a
    shard that does not name its images."""
    for tensors in codes.maps:
        count = len(tensors["labels"])
        stored = tensors.get("names", np.empty(0, np.uint8))
        names = stored.tobytes().decode(errors="surrogateescape").split("\0") if count else []
        if len(names) != count:
            raise UserError(f"{codes.folder} names {len(names)} images of {count} in one shard; encode the images anew")
        for start in range(0, count, CHUNK):
            rows = slice(start, start + CHUNK)
            yield {name: array[rows] for name, array in tensors.items() if name != "names"}, names[rows]


def info(config: CodesInfoConfig) -> str:
    """Several lines. Raises UserError when the folder is not complete."""
    if holds_latents(config.codes):
        return describe_latents(config.codes)
    train, held_out = (CodeDataset(config.codes, split) for split in SPLITS)
    index, spec = train.index, train.code_spec
    paths = [Path(config.codes) / shard.file for shard in index.shards]
    size = sum(path.stat().st_size for path in paths)
    images = len(train) + len(held_out)
    made_from = ", ".join(f"{key} {value}" for key, value in index.source.items() if value is not None)
    classes = "none" if index.class_names is None else f"{len(index.class_names)}: {', '.join(index.class_names[:10])}"
    lines = [
        f"{len(train)} training and {len(held_out)} held-out images as {spec.describe()}, "
        f"{sum(packed_length(grid.size, grid.vocabulary) for grid in spec.grids)} bits per image packed",
        f"files:       {len(paths)}, {size / 1e6:.2f} MB, {size / max(1, images):.0f} bytes per image",
        f"classes:     {classes}{', ...' if train.num_classes > 10 else ''}",
        f"autoencoder: fingerprint {index.stage1_fingerprint[:12] or 'not recorded'}",
        f"made from:   {made_from or 'not recorded'}",
    ]
    if len(train):
        counts = zip(spec.grids, train.counts(), strict=True)
        lines += [f"training codes of {grid.name}: {describe_counts(count.numpy())}" for grid, count in counts]
    return "\n".join(lines)


def holds_latents(folder: str) -> bool:
    kind = kind_of_folder(Path(folder))
    return kind is not None and kind.what == LATENT_SHARDS


def describe_counts(counts: np.ndarray) -> str:
    """Usage, perplexity and entropy of codes that were counted: int64 k."""
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * np.log2(shares)).sum())
    return (
        f"{len(shares)} of {len(counts)} used, perplexity {2**entropy:.1f}, entropy {entropy:.2f} of "
        f"{math.log2(len(counts)):.2f} bits"
    )


def verify(config: CodesVerifyConfig) -> str:
    """Checksums of all files, the range of every code and label, and that no image stands there too often. Returns one
    line. Raises UserError for the first thing that is wrong."""
    if holds_latents(config.codes):
        return verify_latents(config.codes, config.model)
    datasets = [CodeDataset(config.codes, split) for split in SPLITS]
    index = datasets[0].index
    if config.model is not None:
        check_made_by(datasets[0], load_pretrained(stage_folder(config.model, "stage1"), AUTOENCODERS))
    for codes, split in zip(datasets, SPLITS, strict=True):
        codes.verify()
        copies = int(index.source.get("augment_copies", 1)) if split == "train" else 1
        seen: Counter[str] = Counter()
        for tensors, names in chunks(codes):
            for grid in codes.code_spec.grids:
                check_range(tensors[f"codes.{grid.name}"], grid, config.codes)
            labels = tensors["labels"]
            if not -1 <= labels.min() <= labels.max() < codes.num_classes:
                expected = f"-1 to {codes.num_classes - 1}" if codes.num_classes else "-1, as there are no classes"
                raise UserError(
                    f"{config.codes} holds labels from {labels.min()} to {labels.max()}, expected {expected}; encode "
                    "the images anew"
                )
            seen.update(names)
        if seen and max(seen.values()) > copies:
            name, count = seen.most_common(1)[0]
            raise UserError(
                f"{config.codes} holds image {name!r} {counted(count, 'time')} among the {split} images, expected at "
                f"most {copies}; encode the images anew"
            )
    return (
        f"{config.codes} is sound: {counted(len(index.shards), 'shard')}, {len(datasets[0])} training and "
        f"{len(datasets[1])} held-out images, all checksums right, no image more often than asked for"
    )


def export(config: CodesExportConfig) -> str:
    """Writes the files, each whole or not at all; returns one line. Raises UserError for damaged codes, for a folder
    with an export of other codes or in other files, which a reader would take for these, and for one of anything else.
    """
    out = Path(config.out)
    check_kind(Path(config.codes), "code shards", "latents are .safetensors files already", but=(LATENT_SHARDS,))
    for split in SPLITS:
        CodeDataset(config.codes, split).verify()
    settings = {
        "codes": sha256_of_file(Path(config.codes) / INDEX_NAME),
        "format": config.format,
        "images_per_file": config.images_per_file if config.format == "webdataset" else None,
    }
    files: list[Path] = []
    with results_folder(out, "codes export", settings, process_state(), results="*.[nt][pa][zr]"):  # npz, tar
        for split in SPLITS:
            codes = CodeDataset(config.codes, split)
            if len(codes) == 0:
                continue
            if config.format == "npz":
                files.append(write_npz(codes, out / f"{split}.npz"))
            else:
                files += write_webdataset(codes, out, split, config.images_per_file)
    names = ", ".join(file.name for file in files[:3])
    return f"{counted(len(files), 'file')} in {out}: {names}{', ...' if len(files) > 3 else ''}"


def write_npz(codes: CodeDataset, path: Path) -> Path:
    """Arrays `codes.NAME` n h w of each grid, `labels` n, `names` n and `description`, a JSON text. Written chunk by
    chunk: memory does not grow with the number of images."""
    spec, count = codes.code_spec, len(codes)
    description = {
        "code_spec": spec.to_json(),
        "class_names": codes.class_names,
        "stage1_fingerprint": codes.stage1_fingerprint,
    }
    longest = max(1, max((len(name) for _, names in chunks(codes) for name in names), default=1))
    text = np.dtype(f"<U{longest}")
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for grid in spec.grids:
            name, dtype = f"codes.{grid.name}", stored_type(grid)
            parts = (tensors[name].astype(dtype) for tensors, _ in chunks(codes))
            write_array(archive, name, (count, grid.height, grid.width), dtype, parts)
        labels = (tensors["labels"] for tensors, _ in chunks(codes))
        write_array(archive, "labels", (count,), np.dtype("<i4"), labels)
        write_array(archive, "names", (count,), text, (np.array(names, text) for _, names in chunks(codes)))
        described = np.array(json.dumps(description))
        write_array(archive, "description", (), described.dtype, [described])
    return path


def write_array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype, parts: Iterable[np.ndarray]
) -> None:
    """One array of an .npz file, from its parts along the first dimension."""
    entry = zipfile.ZipInfo(f"{name}.npy")  # with a constant date: the same codes give the same bytes
    entry.compress_type = zipfile.ZIP_DEFLATED
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(entry, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_2_0(member, header)
        for part in parts:
            member.write(part.tobytes())


def stored_type(grid: Grid) -> np.dtype:
    """The type in which a grid's codes are stored."""
    return np.dtype(str(smallest_type(grid.vocabulary)).removeprefix("torch."))


def write_webdataset(codes: CodeDataset, out: Path, split: Split, images_per_file: int) -> list[Path]:
    """SPLIT-000000.tar and up. Of each image NUMBER.GRID.npy with its codes h w, NUMBER.cls with its label as text,
    if it has one, and NUMBER.json with its name. The same codes give the same bytes."""
    samples = (
        ({name: array[row] for name, array in tensors.items()}, image)
        for tensors, names in chunks(codes)
        for row, image in enumerate(names)
    )
    paths = [out / f"{split}-{number:06d}.tar" for number in range(math.ceil(len(codes) / images_per_file))]
    for first, path in zip(range(0, len(codes), images_per_file), paths, strict=True):
        with atomic_file(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(first, min(first + images_per_file, len(codes))):
                for name, content in sample_files(codes, *next(samples)).items():
                    entry = tarfile.TarInfo(f"{number:09d}.{name}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return paths


def sample_files(codes: CodeDataset, sample: dict[str, np.ndarray], image: str) -> dict[str, bytes]:
    """The files of one image in a tar file."""
    files = {}
    for grid in codes.code_spec.grids:
        buffer = io.BytesIO()
        np.save(buffer, sample[f"codes.{grid.name}"], allow_pickle=False)
        files[f"{grid.name}.npy"] = buffer.getvalue()
    if sample["labels"] >= 0:
        files["cls"] = str(int(sample["labels"])).encode()
    files["json"] = json.dumps({"name": image}).encode()
    return files
