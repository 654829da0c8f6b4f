#!/usr/bin/env bash
# Pillow: of a TIFF that lies on its side the size is turned before anything is decoded, the tag beside it is not.
#
# Guess (and what our own reader of sizes took for granted): Image.open(...).size is the stored size for every format, and
# getexif() says how to turn it, so that height and width "as a person sees it" are the two swapped for orientations 5 to 8.
# Seen: so it is for PNG and JPEG. For TIFF Pillow 10.4 does the same, and Pillow 13 has swapped them already while the tag
# still says 6. Code that swaps is right with the one and wrong with the other: photos went to the wrong aspect-ratio bucket.
# Way out: read ImageWidth and ImageLength from tag_v2, which are the stored size in both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 10.4.0 13.0.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "pillow==$version"
    (cd "$folder" && "$folder/$version/bin/python" - <<'PYTHON'
import PIL
from PIL import Image, ImageOps

expected = {
    "10.4.0": {"TIFF": (32, 16), "PNG": (32, 16), "JPEG": (32, 16)},
    "13.0.0": {"TIFF": (16, 32), "PNG": (32, 16), "JPEG": (32, 16)},
}[PIL.__version__]
exif = Image.Exif()
exif[0x0112] = 6  # turn by 90 degrees to see it upright
for kind, size in expected.items():
    name = f"turned.{kind.lower()}"
    Image.new("RGB", (32, 16)).save(name, kind, exif=exif)  # stored 32 wide and 16 high
    with Image.open(name) as image:
        before, tag = image.size, image.getexif().get(0x0112)
        upright = ImageOps.exif_transpose(image).size
    print(f"Pillow {PIL.__version__} {kind:<5} size before decoding {before}, tag {tag}, upright {upright}")
    assert (before, tag, upright) == (size, 6, (16, 32)), "this has changed"
PYTHON
    )
done
