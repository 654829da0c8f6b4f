#!/usr/bin/env bash
# PyTorch: antialias=True changes bicubic interpolation where images grow, though nothing can alias there.
#
# Guess: anti-aliasing widens the filter where an image shrinks; where it grows, the flag changes nothing, as it does
# nothing to bilinear interpolation. Seen in 2.15.0: with it the cubic's constant is -0.5, as Pillow has it, and without it
# -0.75, as OpenCV has it; a picture of random pixels that doubles differs by up to 21 of 255 levels, and one hard
# edge overshoots by 7.0% and 10.5%. Evaluations that enlarge to a network's size so differ by the flag alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

print(f"torch {torch.__version__}")
picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
edge = torch.cat([torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)], dim=3)


def grown(images, mode, antialias):
    size = [2 * side for side in images.shape[2:]]
    return F.interpolate(images, size=size, mode=mode, align_corners=False, antialias=antialias)


for mode in ("bilinear", "bicubic"):
    levels = float((grown(picture, mode, True) - grown(picture, mode, False)).abs().max()) * 255
    print(f"{mode}, twice the size: at most {levels:.4f} levels between antialias True and False")
    assert levels > 10 if mode == "bicubic" else levels < 0.01, "this has changed"
with_flag, without = (float(grown(edge, "bicubic", flag).max()) - 1 for flag in (True, False))
print(f"an edge from 0 to 1 overshoots by {with_flag:.1%} with it and {without:.1%} without")
assert abs(with_flag - 0.0703) < 0.001 and abs(without - 0.1055) < 0.001, "this has changed"
PYTHON
