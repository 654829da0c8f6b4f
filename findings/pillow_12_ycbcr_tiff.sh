#!/usr/bin/env bash
# pillow 12.3.0 cannot read an uncompressed YCbCr TIFF that it wrote itself; 13.0.0 can.
# Guess before running: what one version writes without compression, the same version reads back.
# Seen: 12.3.0 opens the file as RGB, expects four bytes a pixel (RGBX) where the file has three, and says that the
# file is truncated. 13.0.0 opens it as YCbCr, equal byte for byte. gradio 6.31.0 requires pillow < 13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/try.py" <<'PY'
import io, sys
import numpy as np
import PIL
from PIL import Image

image = Image.fromarray((np.arange(28 * 28 * 3) % 251).astype("uint8").reshape(28, 28, 3)).convert("YCbCr")
written = io.BytesIO()
image.save(written, "TIFF")
opened = Image.open(io.BytesIO(written.getvalue()))
mode, mapping = opened.mode, opened.tile[0].args[0]
try:
    opened.load()
    seen = "equal" if np.array_equal(np.asarray(opened), np.asarray(image)) else "different"
except OSError as error:
    seen = str(error)
print(PIL.__version__, mode, mapping, seen)
sys.exit((PIL.__version__, mode, mapping, seen) not in (
    ("12.3.0", "RGB", "RGBX", "image file is truncated (0 bytes not processed)"),
    ("13.0.0", "YCbCr", "YCbCr", "equal"),
))
PY
for version in 12.3.0 13.0.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet "pillow==$version" "numpy==2.4.6"
  "$work/$version/bin/python" "$work/try.py"
done
