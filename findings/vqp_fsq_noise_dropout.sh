#!/usr/bin/env bash
# vector-quantize-pytorch: FSQ's noise_dropout moves numbers by up to a quarter of their range, not by half a level, and takes
# the gradient of outermost numbers that it leaves alone.
#
# Guess: with noise_dropout (which needs preserve_symmetry, and names arXiv:2411.19842, section 3.2: uniform noise of the width of a
# level in place of rounding) a number in training leaves the level that it was rounded to by half a level at most, for any
# number of levels; and numbers that got no noise have the gradient that they have without noise_dropout. Seen: the noise is
# uniform in [-0.5, 0.5] of numbers that are scaled to [-1, 1] already, and is added after the rounding: by up to 1 level of 5,
# 2 of 9, 4 of 17, 8 of 33. The sum is then clamped to [-1, 1], and the straight-through sum of a number on the outermost level
# often lies just beyond 1 by its rounding: clamp passes such a number no gradient, though no noise was drawn for it (chance 1e-9).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 vector-quantize-pytorch==1.32.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from vector_quantize_pytorch import FSQ

torch.set_num_threads(1)
torch.manual_seed(0)
print(f"torch {torch.__version__}, vector-quantize-pytorch {version('vector-quantize-pytorch')}")
farthest = {}
for levels in (5, 9, 17, 33):
    fsq, x = FSQ(levels=[levels], noise_dropout=1.0, preserve_symmetry=True), torch.zeros(100_000, 1, 1)
    noisy, rounded = fsq.train()(x)[0], fsq.eval()(x)[0]
    moved = (noisy - rounded).abs() / (2 / (levels - 1))
    farthest[levels] = round(moved.max().item(), 2)
    print(f"{levels} levels: moved by up to {farthest[levels]} levels, {(moved > 0.5).float().mean():.0%} by more than half a level")

places = torch.linspace(0.5, 2.0, 1_000).view(1, -1, 1)
gradients = []
for chance in (0.0, 1e-9):
    fsq, x = FSQ(levels=[5], noise_dropout=chance, preserve_symmetry=True).train(), places.clone().requires_grad_(True)
    fsq(x)[0].sum().backward()
    gradients.append(x.grad)
lost = ((gradients[0] != 0) & (gradients[1] == 0)).sum().item()
print(f"5 levels: of 1,000 numbers {lost} have a gradient without noise_dropout and none with a chance of 1e-9")
assert farthest == {5: 1.0, 9: 2.0, 17: 4.0, 33: 8.0}, "this has changed"
assert lost > 100, "this has changed"
PYTHON
