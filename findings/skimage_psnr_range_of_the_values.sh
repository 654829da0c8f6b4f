#!/usr/bin/env bash
# scikit-image: PSNR of float images takes their range from the sign of the darkest pixel: one pixel below 0 adds 6.02 dB.
#
# Guess: floats count as images in [0, 1], or the range must be said. Seen in 0.26.0: the range is 1 where no pixel of the
# true image is negative, and 2 where one is, be it by 1e-7. So the figure of one reconstruction changes by 6.02 dB with a
# rounding error, or with which of the two images is called the true one; and in a set in [-1, 1], images without a dark
# pixel are measured with another range than the rest, without a word. (Values above 1 are refused.) Way out: data_range.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check scikit-image==0.26.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import skimage
from skimage.metrics import peak_signal_noise_ratio as psnr

rng = np.random.default_rng(0)
true = rng.random((32, 32)).astype(np.float32)
true[0, 0] = 0
other = (true + rng.normal(0, 0.01, true.shape)).clip(0, 1).astype(np.float32)
nudged = true.copy()
nudged[0, 0] = -1e-7
plain, dark, exchanged = psnr(true, other), psnr(nudged, other), psnr(other, nudged)
print(f"scikit-image {skimage.__version__}: {plain:.2f} dB; with one pixel at -1e-7 {dark:.2f} dB; these two exchanged {exchanged:.2f} dB")
assert abs(plain - psnr(true, other, data_range=1)) < 1e-9 and abs(dark - plain - 20 * np.log10(2)) < 1e-3, "this has changed"
assert abs(exchanged - plain) < 1e-3, "this has changed"
PYTHON
