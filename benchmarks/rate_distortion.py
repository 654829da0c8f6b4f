"""How good images are for so many bits: our models in every mode beside JPEG, WebP, AVIF and learned codecs.

    python -m benchmarks.rate_distortion --model photos=runs/photos/model --data PHOTOS --images 100 \\
      --out docs/images/rate_distortion_photos.png

Every codec gets the same 8-bit images, cut to the size of the first model, and counts every byte of its files: one file
for each image, and for our models also one archive of all. PSNR and SSIM are means over the images of what the files
decode to; LPIPS stands beside them where `--vgg` names VGG16's weights (see `perceptual.weights` of a stage-one
recipe). CompressAI's scale hyperprior takes part where that package and its weights are installed;
of it the coded strings count, without a head. Prints a
Markdown table and draws the picture.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, features
from torch import Tensor

from benchmarks.codec import modes_of, read_images
from images.datasets import to_float, to_uint8
from metrics.lpips import LPIPS
from metrics.similarity import psnr, ssim
from pipelines.codec.codec import Codec
from pipelines.pictures import to_pil

QUALITIES = {"JPEG": (5, 10, 20, 35, 50, 75, 90), "WEBP": (0, 5, 15, 30, 50, 75, 90), "AVIF": (5, 15, 30, 45, 60, 80)}
BATCH = 50


class Point(NamedTuple):
    codec: str
    setting: str
    bits_per_pixel: float
    figures: dict[str, float]  # psnr, and ssim and lpips where they can be had


class Measure:
    """Means over images of what is decoded, against what was encoded."""

    def __init__(self, images: Tensor, lpips: LPIPS | None):
        """images: b c H W in [-1, 1]."""
        self.images, self.lpips = images, lpips

    @torch.no_grad()
    def __call__(self, decoded: Tensor) -> dict[str, float]:
        total: dict[str, float] = {}
        for ours, theirs in zip(decoded.split(BATCH), self.images.split(BATCH), strict=True):
            found: dict[str, Tensor | None] = {
                "psnr": psnr((ours - theirs).square().mean(dim=(1, 2, 3))),
                "ssim": ssim(ours, theirs),
                "lpips": None if self.lpips is None else self.lpips(ours, theirs),
            }
            for name, values in found.items():
                if values is not None:
                    total[name] = total.get(name, 0.0) + float(values.double().sum())
        return {name: value / len(decoded) for name, value in total.items()}


def our_points(name: str, codec: Codec, images: Tensor, measure: Measure) -> list[Point]:
    """Of each mode one point for files of one image each and one for an archive of all. The image is the same in all
    modes, so it is decoded from one of them, and compared with the others'."""
    pixels, points, decoded = images[:, 0].numel(), [], None
    for mode in modes_of(codec):
        alone = sum(len(codec.compress(image[None], mode).data) for image in images)
        coded = codec.compress(images, mode)
        if coded.notes:
            raise SystemExit(f"{name}: {'; '.join(coded.notes)}")
        archive = coded.data
        own = torch.stack(codec.decompress(archive))
        own = to_float(torch.stack([to_uint8(image) for image in own]))
        if decoded is not None and not torch.equal(own, decoded):
            raise AssertionError(f"{name}: mode {mode} decodes to other images")
        decoded = own
        figures = measure(own)
        points.append(Point(name, f"{mode}, a file each", 8 * alone / pixels, figures))
        points.append(Point(name, f"{mode}, one archive", 8 * len(archive) / pixels, figures))
    return points


def pillow_points(kind: str, images: list[Image.Image], measure: Measure) -> list[Point]:
    points = []
    for quality in QUALITIES[kind]:
        size, decoded = 0, []
        for image in images:
            buffer = io.BytesIO()
            (image if kind == "JPEG" else image.convert("RGB")).save(buffer, format=kind, quality=quality)
            size += len(buffer.getvalue())
            decoded.append(to_tensor(Image.open(buffer).convert(image.mode)))
        pixels = sum(image.width * image.height for image in images)
        points.append(Point(kind, f"quality {quality}", 8 * size / pixels, measure(torch.stack(decoded))))
    return points


def to_tensor(image: Image.Image) -> Tensor:
    """c H W in [-1, 1]"""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, -1)
    return to_float(pixels.permute(2, 0, 1))


@torch.no_grad()
def compressai_points(images: Tensor, measure: Measure) -> list[Point]:
    """Of bmshj2018-hyperprior (Ballé et al. 2018, arXiv:1802.01436), for colour images of at least 64 pixels; none
    where CompressAI or its weights are missing, which is said."""
    if images.shape[1] != 3 or min(images.shape[2:]) < 64:
        return []
    try:
        from compressai.zoo import bmshj2018_hyperprior
    except ImportError:
        print("without CompressAI: it is not installed (pip install compressai)")
        return []
    points = []
    for quality in (1, 2, 3, 4):
        try:
            network = bmshj2018_hyperprior(quality=quality, pretrained=True).eval()
        except OSError as error:
            print(f"without CompressAI's quality {quality}: its weights cannot be had ({error})")
            continue
        size, decoded = 0, []
        for image in images:
            padded = torch.nn.functional.pad(image[None] / 2 + 0.5, [0, -image.shape[2] % 64, 0, -image.shape[1] % 64])
            coded = network.compress(padded)
            size += sum(len(string) for part in coded["strings"] for string in part)
            back = network.decompress(coded["strings"], coded["shape"])["x_hat"]
            decoded.append(back[0, :, : image.shape[1], : image.shape[2]].clamp(0, 1) * 2 - 1)
        figures = measure(to_float(torch.stack([to_uint8(image) for image in decoded])))
        points.append(Point("hyperprior", f"quality {quality}", 8 * size / images[:, 0].numel(), figures))
    return points


def draw(points: list[Point], title: str, path: Path) -> None:
    """A panel for each figure: curves of the classical codecs, and a mark for each of our points."""
    from matplotlib.figure import Figure

    names = [name for name in ("psnr", "ssim", "lpips") if all(name in point.figures for point in points)]
    figure = Figure(figsize=(5.5 * len(names), 4.2), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for codec in dict.fromkeys(point.codec for point in points):
            own = [point for point in points if point.codec == codec]
            if codec in (*QUALITIES, "hyperprior"):
                panel.plot([p.bits_per_pixel for p in own], [p.figures[name] for p in own], "o-", ms=3, label=codec)
            else:
                for point, mark in zip(own, "sp^vDd", strict=False):
                    where = ([point.bits_per_pixel], [point.figures[name]])
                    panel.plot(*where, mark, ms=7, label=f"{codec}: {point.setting}")
        panel.set(xscale="log", xlabel="bits per pixel", ylabel={"psnr": "PSNR, dB"}.get(name, name.upper()))
        panel.xaxis.set_minor_formatter("")  # only powers of ten have room
        panel.grid(alpha=0.3, which="both")
    figure.axes[-1].legend(fontsize=7)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, help="NAME=FOLDER of each of our models")
    parser.add_argument("--data", required=True, help="folder of images, .npz file or a name such as cifar10")
    parser.add_argument("--split", default="train", help="train or test")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--vgg", default=None, help="VGG16's weights, for LPIPS")
    parser.add_argument("--out", type=Path, default=Path("runs/rate_distortion.png"))
    args = parser.parse_args()
    codecs = {name: Codec.from_pretrained(path) for name, path in (pair.split("=", 1) for pair in args.model)}
    images = read_images(next(iter(codecs.values())), args.data, args.split, args.images)
    measure = Measure(images, None if args.vgg is None else LPIPS(args.vgg))
    pictures = [to_pil(image) for image in images]
    title = f"{len(images)} images of {Path(args.data).name} {args.split}, {images.shape[2]}x{images.shape[3]} pixels"
    points: list[Point] = []
    works: list[Callable[[], list[Point]]] = [
        *(lambda name=name, codec=codec: our_points(name, codec, images, measure) for name, codec in codecs.items()),
        *(lambda kind=kind: pillow_points(kind, pictures, measure) for kind in QUALITIES if supported(kind)),
        lambda: compressai_points(images, measure),
    ]
    for work in works:
        points += work()
    names = list(points[0].figures)
    print(f"\n{title}; torch {torch.__version__}, Pillow {Image.__version__}\n")
    print(f"| codec | setting | bits per pixel | {' | '.join(name.upper() for name in names)} |")
    print(f"|---|---|---:|{'---:|' * len(names)}")
    for point in points:
        cells = " | ".join(
            f"{point.figures[name]:.2f}" if name == "psnr" else f"{point.figures[name]:.4f}" for name in names
        )
        print(f"| {point.codec} | {point.setting} | {point.bits_per_pixel:.4f} | {cells} |")
    draw(points, title, args.out)


def supported(kind: Any) -> bool:
    """Whether this Pillow was built with the codec."""
    there = kind == "JPEG" or bool(features.check(kind.lower()))
    if not there:
        print(f"without {kind}: this Pillow was built without it")
    return there


if __name__ == "__main__":
    main()
