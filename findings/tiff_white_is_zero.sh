#!/usr/bin/env bash
# Pillow: a grey TIFF whose 0 is white comes out right at 8 bits and as its negative at 16.
#
# Guess (and what our own reader took for granted): PhotometricInterpretation 0 (WhiteIsZero, what scanners and X-ray
# detectors write) is heeded at every depth that is read at all. Seen: white is 255 at 8 bits, and 0 at 16; the file opens
# as mode "I;16" without a word. In the other byte order the 8-bit file is read alike and the 16-bit one is refused.
# tifffile shows what is stored and declared.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 tifffile==2025.6.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import PIL
import tifffile
from PIL import Image, UnidentifiedImageError

expected = {("<", 8): [255, 0], (">", 8): [255, 0], ("<", 16): [0, 65535], (">", 16): "refused"}
for (order, bits), wanted in expected.items():
    stored = np.array([[0, 2**bits - 1]], dtype=f"u{bits // 8}")  # white, black
    tifffile.imwrite("scan.tif", stored, photometric="miniswhite", byteorder=order)
    with tifffile.TiffFile("scan.tif") as file:
        declared = file.pages[0].photometric.name
        assert declared == "MINISWHITE"
        assert (file.pages[0].asarray() == stored).all()
    try:
        with Image.open("scan.tif") as image:
            mode, found = image.mode, np.asarray(image).ravel().tolist()
    except UnidentifiedImageError:
        mode, found = "-", "refused"
    name = {"<": "little-endian", ">": "big-endian"}[order]
    print(f"Pillow {PIL.__version__} {bits:>2} bits {name:<13} {declared} stored {stored.ravel().tolist()}: {mode} {found}")
    assert found == wanted, "this has changed"
PYTHON
