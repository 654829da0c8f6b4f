"""Image files: how they are decoded, and the record of those that cannot be."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from common.errors import UserError
from common.files import atomic_file, foreign_content

FORMATS = "png jpg jpeg jpe jfif webp bmp gif tif tiff ppm pgm pbm pnm tga jp2 avif"
SUFFIXES = frozenset(f".{name}" for name in FORMATS.split())
MASK_ENDING = ".mask.png"  # of what says which pixels of the image beside it are missing: photo.mask.png of photo.png
MAX_PIXELS = 178_956_970  # of an image, by its header, unless a person says otherwise: Pillow's own limit, 0.5 GiB
JPEG_MARGIN = 2.0  # of what the JPEG decoder leaves to the scaling, unless a person says otherwise
LARGEST = 2**26  # pixels of an image scaled for training: 1024 times as long as wide at 256 pixels

BAD_FILES_NAME = "bad_files.txt"  # the record, in the folder of what was made
NAMED = 5  # bad images in a message: the record names all
MAX_BAD_SHARE = 0.01  # of the images may be unreadable; more, and the set is broken rather than blemished
FEW = 5  # may be unreadable whatever their share, as far as they are at most a tenth of the images


File = Path | str | BytesIO
"""An image file, or its bytes."""

Crop = Callable[[int, int], tuple[float, float, float, float]]
"""Which part of an upright image is seen: its height and width -> top, left, height and width, in pixels."""


class BadImageError(Exception):
    """A file that cannot be read as an image; the text is the reason."""


def read_image(
    file: File,
    height: int,
    width: int,
    channels: int,
    *,
    crop: Crop | None = None,
    max_pixels: int = MAX_PIXELS,
    jpeg_margin: float = JPEG_MARGIN,
) -> np.ndarray:
    """The image of a file at the smallest size that covers `height` x `width`, or a part of it at just that size:
    uint8 h w c. jpeg_margin: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as that leaves so many times the
    pixels, per side, that are needed.

    Raises BadImageError with the reason.
    """
    # The margin is for the antialiased scaling, which the JPEG decoder's own reduction is not.
    if crop is None:
        longer = max(height, width)
        image = open_upright(file, channels, lambda _h, _w: math.ceil(jpeg_margin * longer), max_pixels=max_pixels)
        return to_array(scale_to_cover(image, height, width))
    size, part = (1, 1), (0.0, 0.0, 1.0, 1.0)

    def needed(image_height: int, image_width: int) -> int:
        nonlocal size, part
        size, part = (image_height, image_width), crop(image_height, image_width)
        return math.ceil(jpeg_margin * min(size) * max(height / part[2], width / part[3]))

    image = open_upright(file, channels, needed, max_pixels=max_pixels)
    return to_array(resized_part(image, size, part, height, width))


def resized_part(
    image: Image.Image, size: tuple[int, int], part: tuple[float, float, float, float], height: int, width: int
) -> Image.Image:
    """A part of an image at `height` x `width`, antialiased. size: height and width of the image in which `part`, top,
    left, height and width, is told; `image` may have been decoded at another."""
    rows, columns = image.height / size[0], image.width / size[1]
    top, left, part_height, part_width = part
    y, x = min(round(top * rows), image.height - 1), min(round(left * columns), image.width - 1)
    bottom = min(max(y + 1, round((top + part_height) * rows)), image.height)
    right = min(max(x + 1, round((left + part_width) * columns)), image.width)
    return image.crop((x, y, right, bottom)).resize((width, height), Image.Resampling.BICUBIC)


@contextmanager
def opened(file: File, max_pixels: int) -> Iterator[Image.Image]:
    """The file's image, of which only the header is read yet. Raises BadImageError for one of more pixels than
    `max_pixels`, and whatever decoders raise."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # of the process: who asks for more must not be stopped by Pillow's own
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:  # the message has the number of pixels
        raise BadImageError(f"{error}, expected at most {max_pixels:,} by its header") from error
    with image:
        if image.width * image.height > max_pixels:
            raise BadImageError(
                f"{image.width}x{image.height} pixels by its header, expected at most {max_pixels:,}: a decompression "
                "bomb, or a picture to scale down"
            )
        yield image


def open_upright(
    file: File,
    channels: int,
    needed: Callable[[int, int], int] | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """The image of a file as a person sees it, EXIF rotation applied: "L" (channels=1) or "RGB" (channels=3).

    Of an animation or a multi-page file the first frame counts. needed: of the image's height and width, as a person
    sees it: a JPEG whose sides are larger by far is decoded at 1/2, 1/4 or 1/8 of its size, which is quick, with sides
    of at least so many pixels. Raises BadImageError with the reason.
    """
    try:
        with opened(file, max_pixels) as image:
            if needed is not None:
                side = needed(*upright_size(image))
                if image.format == "JPEG":
                    image.draft("", (side, side))
            key = transparent_value(image)  # before the pixels are decoded: Pillow forgets the file's bits then
            image.load()
            with suppress(Exception):  # EXIF that is damaged, or that Pillow cannot write back: the pixels are sound
                ImageOps.exif_transpose(image, in_place=True)
            if key is not None:
                image.info["transparency"] = key
            return flatten(image, channels)
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        reason = foreign_content(file) or "no image in a format that is known, or a damaged one"
        raise BadImageError(reason) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise BadImageError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def read_size(file: File, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of the image of a file as a person sees it, from its header; 0, 0 if it cannot be read."""
    try:
        with opened(file, max_pixels) as image:
            return upright_size(image)
    except Exception:  # decoders raise OSError, SyntaxError, ValueError, struct.error and others
        return 0, 0


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width, as a person sees it, of an image of which only the header has been read."""
    width, height = image.size
    if isinstance(image, TiffImageFile):  # whose `size` is turned already, or not: Pillow's versions differ
        width, height = (image.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
    orientation = 1
    with suppress(Exception):  # damaged EXIF
        # The base class's method: that of PNG files decodes the whole image for a tag that may stand behind it.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def transparent_value(image: Image.Image) -> int | tuple[int, ...] | None:
    """The grey or colour that a PNG file declares transparent, on the scale of the pixels that Pillow makes of it; None
    where its own `info` is right. Of 2 and 4 bits (and of 1 in versions before 12.1) it scales the pixels and not this
    value, of 16-bit colours it compares the upper half with the lower half of this value. (Colours that agree in their
    upper halves become one here.)"""
    value = image.info.get("transparency")
    file_mode = image.tile[0][3] if isinstance(image, PngImageFile) and image.tile else None
    if isinstance(value, int) and file_mode in ("1", "L;2", "L;4"):
        return min(255, value * {"1": 255, "L;2": 85, "L;4": 17}[file_mode])
    if isinstance(value, tuple) and file_mode == "RGB;16B":
        return tuple(part >> 8 for part in value)
    return None


def flatten(image: Image.Image, channels: int) -> Image.Image:
    """Any PIL mode as "L" (channels=1) or "RGB" (channels=3), transparency laid over white. Raises BadImageError."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I"):  # more than 8 bits; PIL's own conversion would clip at 255
        return from_deep_grey(image).convert(mode)
    if image.mode == "F":
        raise BadImageError("floating-point pixels, expected 8 or 16 bits per channel")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def from_deep_grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, a mode "I" or "I;16", as "L": its white, which the file's format and its own number of
    bits decide and never its values, becomes 255. Raises BadImageError for values beyond that.

    16 bits: white is 65,535, and of a 12-bit TIFF 4,095. Integers that have 32 bits or a sign have no agreed white.
    Label maps are such, so values up to 255 are taken as they are, and files with others are refused.
    """
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # of which Pillow makes "I" of 16 bits
        white, kind = 255, "signed or 32-bit integers, expected 0 to 255, as in label maps; save pictures as 16 bits"
    else:
        white = 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
        kind = f"expected 0 to {white}"
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > white:
        raise BadImageError(f"pixel values from {values.min()} to {values.max()}, {kind}")
    grey = np.round(values * (255 / white)).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # 0 is white, which Pillow heeds up to 8 bits only
        grey = 255 - grey
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def scale_to_cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image at the smallest size of its proportions that covers `height` x `width`, antialiased. Raises
    BadImageError for a line of pixels, which would take all memory there is."""
    size = covering_size(image.height, image.width, height, width)[::-1]
    if size[0] * size[1] > max(LARGEST, image.width * image.height):
        raise BadImageError(
            f"{image.height}x{image.width} pixels, of which {height}x{width} would be cut out of {size[1]}x{size[0]}"
        )
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def covering_size(image_height: int, image_width: int, height: int, width: int) -> tuple[int, int]:
    """Height and width at which an image covers `height` x `width` just so."""
    scale = max(height / image_height, width / image_width)
    return max(height, round(image_height * scale)), max(width, round(image_width * scale))


def to_array(image: Image.Image) -> np.ndarray:
    """An "L" or "RGB" image as uint8 h w c."""
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


class BadImages:
    """Unreadable images, named in a text file that all processes share. Too many are a UserError.

    Each is named once, unless two processes come upon it at the same instant; it counts once in any case. Those that an
    earlier run named count as long as they are there and still cannot be read.
    """

    def __init__(
        self,
        images: int,
        record: Path | None = None,
        *,
        max_share: float = MAX_BAD_SHARE,
        option: str = "--data.max_bad_share",
        still_bad: Callable[[str], bool] | None = None,
    ):
        """images: how many there are in all; record: the file, lines of location, tab and reason; max_share: of the
        images may be bad (a few may in any case, unless it is 0); option: by which a user raises it; still_bad: whether
        an image that an earlier run named is one of these and still cannot be read, left out for files. Raises
        UserError for a share that is none."""
        if not 0 <= max_share <= 1:
            raise UserError(f"{option} is {max_share}, expected a share of the images, from 0 to 1")
        self.images = images
        self.record = record
        self.max_share = max_share
        self.option = option
        self.still_bad = still_bad or is_bad_file
        self.seen: dict[str, str] = {}  # location -> reason, by this process
        self.mended: set[str] = set()  # named in the record by an earlier run, and readable or gone now

    @property
    def allowed(self) -> int:
        """How many images may be bad."""
        few = min(FEW, self.images // 10) if self.max_share else 0
        return max(few, int(self.max_share * self.images))

    def add(self, location: str, reason: str) -> None:
        """Records one image. Raises UserError when more are bad than are allowed."""
        self.seen[location] = reason
        recorded = self.recorded()
        if self.record is not None and location not in recorded:
            append_line(self.record, f"{quoted(location)}\t{reason}")
        if len(recorded | self.seen) <= self.allowed or len(bad := self.bad()) <= self.allowed:
            return
        listed = ", ".join(f"{name} ({why})" for name, why in sorted(bad.items())[:NAMED])
        rest = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        where = f"; all are listed in {self.record}" if self.record is not None else ""
        share = min(1, math.ceil(200 * len(bad) / self.images) / 100)  # twice that of those which are known by now
        raise UserError(
            f"{len(bad)} of {self.images} images cannot be read, and {self.allowed} may be: {listed}{rest}; repair or "
            f"remove them and run the same command again, or let more pass with {self.option} {share:g}{where}"
        )

    def summary(self) -> str:
        """A line on the images that any process, or an earlier run, found bad and that still are; empty if none is."""
        bad = self.bad()
        if not bad:
            return ""
        passed = "is" if len(bad) == 1 else "are"
        where = f"see {self.record}" if self.record is not None else ", ".join(sorted(bad)[:NAMED])
        return f"{len(bad)} of {self.images} images cannot be read and {passed} passed over: {where}"

    def bad(self) -> dict[str, str]:
        """The images that cannot be read, location -> reason: what the record names is tried again."""
        known = self.recorded() | self.seen
        for name in known.keys() - self.seen.keys() - self.mended:
            if not self.still_bad(name):
                self.mended.add(name)
        return {name: reason for name, reason in known.items() if name not in self.mended}

    def keep_only(self, folders: Sequence[str]) -> None:
        """Takes from the record what lies in none of these folders: the images have been copied since, and a file that
        is bad in both places would count twice. For one process, before any reads."""
        recorded = self.recorded()
        kept = {name: reason for name, reason in recorded.items() if any(map(Path(name).is_relative_to, folders))}
        if self.record is not None and len(kept) < len(recorded):
            with atomic_file(self.record) as temporary:
                lines = (f"{quoted(name)}\t{reason}\n" for name, reason in kept.items())
                temporary.write_bytes(os.fsencode("".join(lines)))

    def recorded(self) -> dict[str, str]:
        """What the record names: location -> reason."""
        if self.record is None or not self.record.exists():
            return {}
        lines = os.fsdecode(self.record.read_bytes()).split("\n")
        entries = (line.partition("\t")[::2] for line in lines if line)
        return {unquoted(location): reason for location, reason in entries}


def quoted(location: str) -> str:
    """A location as one field of a line: in JSON's quotes where it has a line's end or a tab, as file names may."""
    return json.dumps(location) if re.search(r'[\n\r\t]|^"', location) else location


def unquoted(field: str) -> str:
    """Inverse of `quoted`."""
    try:
        return json.loads(field) if field.startswith('"') else field
    except json.JSONDecodeError:
        return field


def append_line(path: Path, line: str) -> None:
    """Appends one line in one call, so that lines of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(file, os.fsencode(line + "\n"))
    finally:
        os.close(file)


def is_bad_file(name: str) -> bool:
    """Whether a file is there and cannot be read."""
    return os.path.lexists(name) and not is_readable(Path(name))


def is_readable(file: File, max_pixels: int = MAX_PIXELS) -> bool:
    try:
        read_image(file, 1, 1, 3, max_pixels=max_pixels)
    except BadImageError:
        return False
    return True
