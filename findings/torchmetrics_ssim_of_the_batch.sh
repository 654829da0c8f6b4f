#!/usr/bin/env bash
# torchmetrics: the SSIM of a pair of images depends on which other images are in its batch.
#
# Guess: data_range is 1 for floats, or the range of each image. Seen in 1.9.0: left out, it is the range of all values in
# the batch (and in the functional form alone nothing says so at the call), so a dim image beside a bright one has a high
# SSIM, and alone a low one: 0.94 and 0.81 for the same pair. Averages over a set depend on batch size and order, and on
# whether pixels are in [0, 1] or [-1, 1] only by the values that occur. MS-SSIM has the same default. Way out: data_range.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 torchvision==0.29.2 numpy==2.4.6 \
    scipy==1.17.1 torchmetrics==1.9.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

torch.manual_seed(0)
dim = torch.rand(1, 3, 32, 32) * 0.05
noisy = (dim + 0.01 * torch.randn_like(dim)).clamp(min=0)
bright = torch.rand(1, 3, 32, 32)
alone = float(ssim(noisy, dim))
beside = float(ssim(torch.cat([noisy, bright]), torch.cat([dim, bright]), reduction="none")[0])
told = float(ssim(noisy, dim, data_range=1.0))
print(f"SSIM of one pair: alone {alone:.3f}, beside a bright image {beside:.3f}, with data_range=1 {told:.3f}")
assert beside - alone > 0.05, "this has changed"
assert abs(beside - told) < 1e-3, "this has changed"
PYTHON
