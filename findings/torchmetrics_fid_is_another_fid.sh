#!/usr/bin/env bash
# torchmetrics: its FID, KID and inception score are not those of torch-fidelity, whose network and weights it uses.
#
# Guess: FrechetInceptionDistance(feature=2048) is the FID of the literature, since it wraps torch-fidelity's Inception,
# which reproduces TensorFlow's to the bit. Seen in 1.9.0: images are resized by another filter (antialias=True is the
# default: F.interpolate with anti-aliasing and pixel centres, in place of TensorFlow 1's bilinear). With the same weights
# and images FID is 2.7% higher at 32 pixels, 0.08% higher at 64 and 4.8% lower at 600; at 299, where nothing is resized, it
# is the same. antialias=False gives torch-fidelity's. KernelInceptionDistance and InceptionScore have the filter too and no
# argument to turn it off. (Random weights here: nothing is downloaded. The first features, of 64 numbers, show it.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 torchvision==0.29.2 numpy==2.4.6 \
    scipy==1.17.1 torchmetrics==1.9.0 torch-fidelity==0.4.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import inspect
import io
import warnings

import torch

warnings.filterwarnings("ignore")
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance


class Fresh(FeatureExtractorInceptionV3):
    def load_state_dict(self, *arguments, **settings):
        """Leaves the weights as they were initialised."""


torch.manual_seed(0)
nothing = io.BytesIO()
torch.save({}, nothing)
nothing.seek(0)
weights = Fresh("fresh", ["64"], feature_extractor_weights_path=nothing).state_dict()
for tensor in weights.values():
    if tensor.ndim == 4:
        torch.nn.init.kaiming_normal_(tensor)
torch.save(weights, "weights.pth")
network = FeatureExtractorInceptionV3("inception", ["64"], "weights.pth")


def images(seed: int, size: int) -> torch.Tensor:
    coarse = torch.rand(16, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")


for size in (32, 64, 299, 600):
    real, made = images(1, size).round().byte(), (images(2, size) * 0.9).byte()
    features = [torch.cat([network(batch)[0] for batch in images.split(8)]) for images in (real, made)]
    statistics = [fid_features_to_statistics(one) for one in features]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    found = {}
    for settings in ({}, {"antialias": False}):
        metric = FrechetInceptionDistance(64, feature_extractor_weights_path="weights.pth", **settings)
        for images_of_set, is_real in ((real, True), (made, False)):
            for batch in images_of_set.split(8):
                metric.update(batch, real=is_real)
        found[str(settings)] = float(metric.compute()) / expected - 1
    print(f"{size:>3} pixels: torch-fidelity {expected:.6f}; torchmetrics beside it {found}")
    default, as_published = found.values()
    assert abs(as_published) < 1e-5, "this has changed"
    assert abs(default) < 1e-5 if size == 299 else abs(default) > 1e-4, "this has changed"
for other in (KernelInceptionDistance, InceptionScore):
    assert "antialias" not in inspect.signature(other).parameters, "this has changed"
PYTHON
