#!/usr/bin/env bash
# torch-fidelity: statistics that it has cached are used again with other weights, and with other images of that name.
#
# Guess: a cache is asked by what the number depends on. Seen in 0.4.0: by the name of the data set, of the extractor and of
# the layer alone (`NAME-inception-v3-compat-stat-fid-64.pt`). With another file of weights the distance is one between
# features of two networks, 7 in place of 0.005 here, and with other images under the same name it is that of the
# earlier ones; not a word of either. Registered sets such as cifar10-train are cached without being asked, in ~/.cache.
# Way out: cache=False, or a cache_root for each file of weights. (Random weights here: nothing is downloaded.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 torchvision==0.29.2 numpy==2.4.6 \
    scipy==1.17.1 torch-fidelity==0.4.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import io

import torch
import torch_fidelity
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class Fresh(FeatureExtractorInceptionV3):
    def load_state_dict(self, *arguments, **settings):
        """Leaves the weights as they were initialised."""


def weights(seed: int) -> str:
    torch.manual_seed(seed)
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    state = Fresh("fresh", ["64"], feature_extractor_weights_path=nothing).state_dict()
    for tensor in state.values():
        if tensor.ndim == 4:
            torch.nn.init.kaiming_normal_(tensor)
    torch.save(state, f"weights{seed}.pth")
    return f"weights{seed}.pth"


class Images(Dataset):
    def __init__(self, seed: int):
        self.images = torch.randint(
            0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def fid(reference: int, weights: str, **cache) -> float:
    return torch_fidelity.calculate_metrics(
        input1=Images(1), input2=Images(reference), fid=True, feature_layer_fid="64", batch_size=8, cuda=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=weights, verbose=False, **cache,
    )["frechet_inception_distance"]


one, other = weights(0), weights(1)
named = {"cache": True, "cache_root": "cache", "input2_cache_name": "reference"}
first = fid(2, one, **named)
print(f"first weights: {fid(2, one, cache=False):.6f}, cached {first:.6f}")
right, cached = fid(2, other, cache=False), fid(2, other, **named)
print(f"other weights: {right:.6f}, cached {cached:.6f}")
right_images, cached_images = fid(3, one, cache=False), fid(3, one, **named)
print(f"other images:  {right_images:.6f}, cached {cached_images:.6f}")
assert cached > 100 * right, "this has changed"
assert cached_images == first != right_images, "this has changed"
PYTHON
