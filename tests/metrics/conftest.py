"""Networks with weights that a seed makes: no test downloads any."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torch-fidelity publishes it, of an Inception whose weights are random."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Fresh(FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments, **settings):
            """Leaves the weights as they were initialised."""

    torch.manual_seed(0)
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Fresh("fresh", ["2048"], feature_extractor_weights_path=nothing)
    weights = network.state_dict()
    for tensor in weights.values():
        if tensor.ndim == 4:  # so that something is left of an image after 94 layers
            torch.nn.init.kaiming_normal_(tensor)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="session")
def timm_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of timm's test_resnet with five classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=5).state_dict(), path)
    return path
