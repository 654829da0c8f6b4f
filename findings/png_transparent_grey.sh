#!/usr/bin/env bash
# Pillow: the grey that a PNG file declares transparent (its tRNS chunk) is found at 1 and 8 bits, not at 2, 4 and 16.
#
# Guess (and what our own reader took for granted): convert("RGBA") makes the pixels of that grey transparent at every depth;
# the PNG specification has them compared before samples are rescaled. Seen: of 2 and 4 bits Pillow scales the pixels
# (1 becomes 85 or 17) and not the declared value, so nothing is transparent, and of 16 bits nothing is either. A 16-bit
# *colour* is compared in its lower halves with the pixels' upper halves: the declared one stays opaque and another one
# vanishes. No error, no warning: what lay hidden shows. Files with 2 and 4 bits are what PNG optimisers make of icons.
# pypng, which follows the specification, reads the same bytes beside it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 pypng==0.20220715.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import io

import PIL
import png
from PIL import Image

seen = {}
for bits in (1, 2, 4, 8, 16):
    grey = 257 if bits == 16 else 1
    buffer = io.BytesIO()
    writer = png.Writer(width=2, height=1, bitdepth=bits, greyscale=True, transparent=grey)
    writer.write(buffer, [[grey, 0]])  # the declared grey, and black
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        pillow = [pixel[3] for pixel in image.convert("RGBA").get_flattened_data()]
    rows = list(png.Reader(bytes=buffer.getvalue()).asRGBA()[2])
    peer = [int(alpha > 0) * 255 for alpha in rows[0][3::4]]
    seen[bits] = pillow
    print(f"Pillow {PIL.__version__} grey of {bits:>2} bits: alpha {pillow}, pypng {peer}")
    assert peer == [0, 255]

buffer = io.BytesIO()
writer = png.Writer(width=2, height=1, bitdepth=16, greyscale=False, transparent=(0x1234,) * 3)
writer.write(buffer, [[0x1234] * 3 + [0x3434] * 3])
with Image.open(io.BytesIO(buffer.getvalue())) as image:
    seen["colour"] = [pixel[3] for pixel in image.convert("RGBA").get_flattened_data()]
peer = [int(alpha > 0) * 255 for alpha in next(iter(png.Reader(bytes=buffer.getvalue()).asRGBA()[2]))[3::4]]
print(f"Pillow {PIL.__version__} colour of 16 bits, 0x1234 declared beside 0x3434: alpha {seen['colour']}, pypng {peer}")
assert peer == [0, 255]
expected = {1: [0, 255], 2: [255, 255], 4: [255, 255], 8: [0, 255], 16: [255, 255], "colour": [255, 0]}
assert seen == expected, "this has changed"
PYTHON
