#!/usr/bin/env bash
# torchmetrics: normalize=True of FID, KID and inception score cuts the decimals off, where files and everybody else round.
#
# Guess: images in [0, 1] become the 8-bit images that one would have saved. Seen in 1.9.0: (images * 255).byte(), so each
# value falls to the level below: half a level darker on average, and of 8-bit images that went through [-1, 1] and came
# back as (x + 1) / 2, as generators and autoencoders have them, 63 of the 256 levels come back one lower. An autoencoder
# that loses nothing has an rFID above 0. Way out: round to uint8 oneself, and leave normalize off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 torchvision==0.29.2 numpy==2.4.6 \
    scipy==1.17.1 torchmetrics==1.9.0 torch-fidelity==0.4.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch

warnings.filterwarnings("ignore")
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3


class Seen(torch.nn.Module):
    """In the place of Inception: keeps what it is given."""

    def forward(self, images):
        seen.append(images)
        return images.flatten(1)[:, :64].float()


seen = []
NoTrainInceptionV3.__new__ = lambda cls, *arguments, **settings: Seen()
levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
back = (levels.float() / 127.5 - 1 + 1) / 2
any_values = torch.rand(1, 1, 400, 400, generator=torch.Generator().manual_seed(0))
metric = FrechetInceptionDistance(feature=64, normalize=True)
metric.update(back, real=True)
metric.update(any_values, real=True)
assert seen[0].dtype == torch.uint8
lower = int((seen[0] != levels).sum())
darker = float((any_values * 255 - seen[1].float()).mean())
rounded = int(((back * 255).round().byte() != levels).sum())
print(f"of 256 levels {lower} come back lower, rounded {rounded}; any values get {darker:.3f} levels darker")
assert (lower, rounded) == (63, 0), "this has changed"
assert abs(darker - 0.5) < 0.01, "this has changed"
PYTHON
