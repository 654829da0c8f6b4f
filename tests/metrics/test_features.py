"""Features are those of the networks themselves, whatever the batch; the treatment is stated; mistakes are told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import UserError
from common.float32 import float32_island
from images.datasets import to_float
from metrics import inception
from metrics.features import FeatureNetwork, exact, open_features, rounding


def images(b: int = 4, c: int = 3, size: int = 20) -> Tensor:
    return torch.randint(0, 256, (b, c, size, size + 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def resnet(timm_weights: Path) -> FeatureNetwork:
    return open_features("timm:test_resnet", str(timm_weights))


# ---- Inception ------------------------------------------------------------------------------------------------------


def test_inception_is_torch_fidelitys(inception_weights: Path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(inception_weights))
    grey = images(1, 1)
    features, logits = theirs(torch.cat([images(1), grey.expand(-1, 3, -1, -1)]))
    ours = open_features("inception", str(inception_weights))
    seen = ours.see(images(1))
    scale = float(features.std())
    torch.testing.assert_close(seen.features, features[:1], rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(seen.probabilities, logits[:1].softmax(dim=1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ours(grey), features[1:], rtol=1e-4, atol=1e-5 * scale)
    assert (ours.width, ours.classes) == (2048, 1008)
    described = ours.describe()
    assert "bilinear as in TensorFlow 1, not anti-aliased" in described["resize"]
    assert described["network"] == "inception"


def test_a_file_of_another_network_is_no_inception(timm_weights: Path):
    with pytest.raises(UserError, match=r"does not hold the Inception of FID .* torchvision's inception_v3 is another"):
        open_features("inception", str(timm_weights))


def test_weights_are_fetched_with_consent_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"features=inception needs its weights, .* or give download=true"):
        open_features("inception")

    def offline(url: str, path: str, hash_prefix: str) -> None:
        assert (url, hash_prefix) == (inception.URL, "6726825d")
        assert path == str(tmp_path / "checkpoints" / inception.FILE)
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"could not be fetched \(no route to host\): put the file at"):
        open_features("inception", download=True)
    assert "inception: fetching the weights, 91 MB, from https://github.com/toshas" in capsys.readouterr().out


def test_what_is_in_the_cache_needs_no_consent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / inception.FILE).touch()
    assert inception.find(None, False) == tmp_path / "checkpoints" / inception.FILE


# ---- 8 bits or not --------------------------------------------------------------------------------------------------


def test_floats_are_seen_unrounded_and_say_so(resnet: FeatureNetwork):
    exactly = to_float(images())
    torch.testing.assert_close(resnet(exactly), resnet(images()), rtol=1e-4, atol=1e-5)
    between = exactly + 0.3 / 127.5
    assert (resnet(between) - resnet(images())).abs().max() > 1e-4
    assert (rounding(images()), rounding(between)) == ("8 bits", "none")
    assert torch.equal(resnet(exactly + 9), resnet(torch.full_like(exactly, 1.0)))  # clamped


# ---- timm -----------------------------------------------------------------------------------------------------------


def test_a_timm_network_is_timms_own_on_the_whole_image(resnet: FeatureNetwork, timm_weights: Path):
    network = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(timm_weights)).eval()
    settings = timm.data.resolve_model_data_config(network)
    side = settings["input_size"][-1]
    assert settings["crop_pct"] < 1
    pixels = nn.functional.interpolate(
        images().float(), (side, side), mode=settings["interpolation"], antialias=True, align_corners=False
    )
    mean, std = (torch.tensor(settings[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        maps = network.forward_features((pixels.clamp(0, 255) / 255 - mean) / std)
        logits = network.forward_head(maps)
    seen = resnet.see(images())
    torch.testing.assert_close(seen.features, network.forward_head(maps, pre_logits=True))
    torch.testing.assert_close(seen.probabilities, logits.softmax(dim=1))
    assert (
        resnet.describe()["resize"]
        == f"{side}x{side}, the whole image, {resnet.network.filter}, anti-aliased, not rounded"
    )
    assert resnet.describe()["classes"] == 5
    json.dumps(resnet.describe())


def test_weights_without_a_classifier_have_features_alone(tmp_path: Path):
    network = timm.create_model("test_vit", num_classes=0)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    ours = open_features("timm:test_vit", str(tmp_path / "weights.safetensors"))
    assert ours.probabilities(images()) is None
    assert ours(images()).shape == (4, ours.width) == (4, network.num_features)


def test_weights_of_timm_need_a_file_or_consent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timm_weights: Path):
    with pytest.raises(UserError, match=r"features=timm:test_resnet needs its pretrained weights: .*download=true"):
        open_features("timm:test_resnet")
    with pytest.raises(UserError, match=r"weights=none.pt: there is no such file"):
        open_features("timm:test_resnet", "none.pt")
    with pytest.raises(UserError, match="cannot be read as weights of features=test_vit"):
        open_features("timm:test_vit", str(timm_weights))
    with pytest.raises(UserError, match=r"features=resnet9999 is no network of timm"):
        open_features("timm:resnet9999", str(timm_weights))
    # What an earlier download has left in the hub's cache counts as consent.
    monkeypatch.setattr("metrics.features.in_cache", lambda name: str(timm_weights))
    assert open_features("timm:test_resnet").classes == 5


def test_batches_do_not_change_features(resnet: FeatureNetwork):
    resnet.train()
    together = resnet(images(9))
    for size in (1, 2, 5):
        apart = torch.cat([resnet(batch) for batch in images(9).split(size)])
        torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together[0], together[1])


def test_the_fingerprint_is_of_weights_and_treatment(resnet: FeatureNetwork, timm_weights: Path, tmp_path: Path):
    again = open_features("timm:test_resnet", str(timm_weights))
    assert again.fingerprint == resnet.fingerprint
    torch.manual_seed(1)
    save_file(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "other.safetensors")
    assert open_features("timm:test_resnet", str(tmp_path / "other.safetensors")).fingerprint != resnet.fingerprint
    treated = FeatureNetwork(resnet.name, resnet.network, {**resnet.treatment, "resize": "64x64"})
    assert treated.fingerprint != resnet.fingerprint


# ---- a person's own -------------------------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn

class Means(nn.Module):
    def forward(self, images):
        assert images.dtype == torch.uint8 or images.max() > 2
        means = images.float().mean(dim=(2, 3)).mean(dim=1, keepdim=True)
        return torch.cat([means, -means], dim=1)

class Classes(Means):
    def forward(self, images):
        features = super().forward(images)
        return features, features[:, :1] * torch.zeros(1, 3)

class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 5)

    def forward(self, images):
        return self.layer(images.float().flatten(1))

class Nothing(nn.Module):
    def forward(self, images):
        raise RuntimeError("out of order")

class Flat(nn.Module):
    def forward(self, images):
        return images.float().mean()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("own_networks", None)
    return tmp_path / "own_networks.py"


def test_a_network_of_a_persons_own(own: Path):
    network = open_features("own_networks:Means")
    assert network(images(3, 1))[:, 0].tolist() == pytest.approx(images(3, 1).float().mean(dim=(1, 2, 3)).tolist())
    assert (network.width, network.classes, network.probabilities(images())) == (2, 0, None)
    assert network(to_float(images()))[:, 0].max() > 2  # floats are given to it in 0..255 too
    classes = open_features("own_networks:Classes")
    assert torch.equal(classes.probabilities(images()), torch.full((4, 3), 1 / 3))
    digits = open_features("own_networks:Digits")  # one that knows a single shape
    assert (digits.width, digits(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape) == (5, (2, 5))
    with pytest.raises(UserError, match=r"own_networks:Digits cannot see images of shape \(4, 3, 20, 24\) \(.*784"):
        digits(images())
    before = network.fingerprint
    own.write_text(OWN + "\n# another treatment\n")
    sys.modules.pop("own_networks")
    assert open_features("own_networks:Means").fingerprint != before


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet50", None, "features=resnet50, expected inception, timm:MODEL or MODULE:FUNCTION"),
        ("nothing_here:network", None, r"features=nothing_here:network cannot be had \(No module named"),
        ("own_networks:Missing", None, "features=own_networks:Missing cannot be had"),
        ("os:getcwd", None, "features=os:getcwd returned str, expected a torch.nn.Module"),
        ("own_networks:Means", "file.pt", "let own_networks:Means load its own weights"),
        ("own_networks:Nothing", None, r"takes no black image of uint8, 3x64x64, .* \(of the first .*: out of order\)"),
        ("own_networks:Flat", None, r"features=own_networks:Flat gave \(\) for 1 images, expected a tensor b d"),
    ],
)
def test_what_is_no_network_is_refused(own: Path, name: str, weights: str | None, message: str):
    with pytest.raises(UserError, match=message):
        open_features(name, weights)


def test_images_of_two_channels_are_refused(resnet: FeatureNetwork):
    with pytest.raises(UserError, match=r"images of shape \(1, 2, 8, 8\), expected b c H W with 1 or 3 channels"):
        resnet(torch.zeros(1, 2, 8, 8, dtype=torch.uint8))


def test_features_are_float32_proper_under_autocast_and_the_users_settings(resnet: FeatureNetwork):
    expected = resnet(images())
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(resnet(images()), expected)
    finally:
        torch.set_float32_matmul_precision("highest")
    before = torch.backends.cudnn.conv.fp32_precision
    with exact("cpu"):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        with float32_island("cpu"):
            pass
    assert torch.backends.cudnn.conv.fp32_precision == before
