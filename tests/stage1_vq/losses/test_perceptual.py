from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models.vgg import cfgs, make_layers

from common.errors import UserError
from metrics.lpips import vgg_cache
from stage1_vq.losses.perceptual import LPIPSConfig, PerceptualLoss, TimmPerceptualConfig

SIZE = (16, 24)


def linear_names() -> dict[str, int]:
    return {f"lin{number}.model.1.weight": width for number, width in enumerate((64, 128, 256, 512, 512))}


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files as torchvision and LPIPS publish them, with random weights."""
    folder = tmp_path_factory.mktemp("vgg")
    torch.manual_seed(0)
    features = {f"features.{name}": value for name, value in make_layers(cfgs["D"]).state_dict().items()}
    torch.save({**features, "classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16.pth")
    torch.save({name: torch.rand(1, width, 1, 1) for name, width in linear_names().items()}, folder / "vgg.pth")
    return {"weights": folder / "vgg16.pth", "linear_weights": folder / "vgg.pth"}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resnet") / "test_resnet.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def lpips(vgg: dict[str, Path], channels: int = 3) -> PerceptualLoss:
    paths = {name: str(path) for name, path in vgg.items()}
    return PerceptualLoss(LPIPSConfig(weight=1.0, **paths), channels, SIZE)


def timm_loss(resnet: Path, channels: int = 3) -> PerceptualLoss:
    return PerceptualLoss(TimmPerceptualConfig(weight=1.0, backbone="test_resnet", weights=str(resnet)), channels, SIZE)


@pytest.fixture(scope="module", params=["lpips", "timm"])
def loss(request: pytest.FixtureRequest, vgg: dict[str, Path], resnet: Path) -> PerceptualLoss:
    return lpips(vgg) if request.param == "lpips" else timm_loss(resnet)


def images(seed: int, channels: int = 3) -> Tensor:
    return torch.rand(3, channels, *SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_lpips_is_that_of_torchmetrics(vgg, monkeypatch):
    module = pytest.importorskip("torchmetrics.functional.image.lpips")
    # Without the classifier, whose 120 million weights take seconds to draw and play no part.
    monkeypatch.setattr(module, "_get_tv_model_features", lambda name, pretrained: make_layers(cfgs["D"]))
    theirs = module._LPIPS(
        net="vgg", pretrained=True, pnet_rand=True, use_dropout=True, model_path=vgg["linear_weights"]
    )
    features = {name.removeprefix("features."): value for name, value in torch.load(vgg["weights"]).items()}
    for part in (theirs.net.slice1, theirs.net.slice2, theirs.net.slice3, theirs.net.slice4, theirs.net.slice5):
        part.load_state_dict({name: features[name] for name in part.state_dict()})
    ours = lpips(vgg)
    one, other = images(1).requires_grad_(), images(2)
    expected = theirs(one, other).flatten()
    torch.testing.assert_close(ours(one, other), expected)
    found_gradient = torch.autograd.grad(ours(one, other).sum(), one)[0]
    torch.testing.assert_close(found_gradient, torch.autograd.grad(expected.sum(), one)[0])


def test_the_linear_weights_of_torchmetrics_are_found(vgg):
    pytest.importorskip("torchmetrics")
    loss = PerceptualLoss(LPIPSConfig(weight=1.0, weights=str(vgg["weights"])), 3, SIZE)
    linear = loss.distance.get_buffer("linear2")
    assert linear.shape == (1, 256, 1, 1)
    assert linear.min() >= 0  # as published: distances can only add up


def test_equal_images_have_no_distance_and_each_image_has_its_own(loss):
    one, other = images(1), images(2)
    assert torch.equal(loss(one, one), torch.zeros(3))
    together = loss(one, other)
    assert together.shape == (3,)
    assert (together > 0).all()
    alone = torch.cat([loss(one[i : i + 1], other[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_gradients_reach_the_first_images_only_and_nothing_is_trained_or_saved(loss):
    one, other = images(1).requires_grad_(), images(2).requires_grad_()
    loss.train()
    loss(one, other).sum().backward()
    assert (one.grad.abs().amax((1, 2, 3)) > 0).all()
    assert other.grad is None
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}


def test_a_black_image_has_a_finite_gradient(loss):
    one = torch.zeros(2, 3, *SIZE).requires_grad_()
    loss(one, one.detach()).sum().backward()
    assert one.grad.isfinite().all()


def test_bfloat16_autocast_gives_float32_that_is_nearly_the_same(loss):
    expected = loss(images(1), images(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(images(1), images(2))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.01)


def test_grey_images_are_seen_as_colour_images_without_colour(vgg, resnet):
    one, other = images(1, channels=1), images(2, channels=1)
    for make, source in ((lpips, vgg), (timm_loss, resnet)):
        loss = make(source, channels=1)
        torch.testing.assert_close(loss(one, other), loss(one.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1)))


# ---- weights that are not there -------------------------------------------------------------------------------------


def test_without_weights_lpips_says_which_file_goes_where(tmp_path):
    with pytest.raises(UserError) as caught:
        PerceptualLoss(LPIPSConfig(weight=1.0), 3, SIZE)
    message = str(caught.value)
    for part in (
        str(tmp_path / "torch" / "hub" / "checkpoints" / "vgg16-397923af.pth"),
        "https://download.pytorch.org/models/vgg16-397923af.pth (528 MB)",
        "perceptual.weights",
        "perceptual.download=true",
        "perceptual.weight=0",
    ):
        assert part in message


def test_the_file_in_torchs_cache_is_used_without_a_word(vgg, capsys):
    vgg_cache().parent.mkdir(parents=True)
    vgg_cache().symlink_to(vgg["weights"])
    loss = PerceptualLoss(LPIPSConfig(weight=1.0, linear_weights=str(vgg["linear_weights"])), 3, SIZE)
    assert torch.equal(loss(images(1), images(2)), lpips(vgg)(images(1), images(2)))
    assert capsys.readouterr().out == ""


def test_a_download_says_what_and_how_large_and_its_failure_what_to_do(monkeypatch, capsys):
    def offline(url: str, path: str, hash_prefix: str) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        UserError, match=r"could not be fetched \(Network is unreachable\): put the file at .*vgg16-397"
    ):
        PerceptualLoss(LPIPSConfig(weight=1.0, download=True), 3, SIZE)
    assert "fetching VGG16, 528 MB, from https://" in capsys.readouterr().out


def test_a_download_goes_to_the_cache_and_happens_once(vgg, monkeypatch):
    fetched = []

    def fetch(url: str, path: str, hash_prefix: str) -> None:
        fetched.append(url)
        Path(path).write_bytes(vgg["weights"].read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    config = LPIPSConfig(weight=1.0, download=True, linear_weights=str(vgg["linear_weights"]))
    for _ in range(2):
        PerceptualLoss(config, 3, SIZE)
    assert len(fetched) == 1


@pytest.mark.parametrize("content", [b"", b"no weights at all", pickle.dumps(Path("x"))])
def test_a_damaged_or_untrusted_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "vgg16.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"vgg16.pth is damaged or no weights file .*perceptual.weights"):
        PerceptualLoss(LPIPSConfig(weight=1.0, weights=str(path)), 3, SIZE)


def test_files_of_something_else_are_refused(tmp_path, vgg, resnet):
    other = tmp_path / "other.pth"
    torch.save([torch.zeros(3)], other)
    with pytest.raises(UserError, match=r"other.pth holds other things than named tensors, expected torchvision's"):
        PerceptualLoss(LPIPSConfig(weight=1.0, weights=str(other)), 3, SIZE)
    narrow = {name: tensor[:1] for name, tensor in torch.load(vgg["weights"]).items()}
    for content in ({"features.conv0.weight": torch.zeros(3)}, narrow):  # a DenseNet's names; the names, other shapes
        torch.save(content, other)
        with pytest.raises(UserError, match=r"other.pth does not hold torchvision's VGG16"):
            PerceptualLoss(LPIPSConfig(weight=1.0, weights=str(other)), 3, SIZE)
    linear = LPIPSConfig(weight=1.0, weights=str(vgg["weights"]), linear_weights=str(other))
    with pytest.raises(UserError, match=r"other.pth does not hold the linear weights of LPIPS"):
        PerceptualLoss(linear, 3, SIZE)
    wrong = TimmPerceptualConfig(weight=1.0, backbone="test_vit", weights=str(resnet))
    with pytest.raises(
        UserError, match=r"cannot be read as weights of perceptual.backbone=test_vit .*, or perceptual.weight=0"
    ):
        PerceptualLoss(wrong, 3, SIZE)


def test_timm_without_weights_or_with_a_name_that_is_none(tmp_path):
    with pytest.raises(UserError) as caught:
        PerceptualLoss(TimmPerceptualConfig(weight=1.0), 3, SIZE)
    for part in ("https://huggingface.co/timm/resnet50.a1_in1k", "perceptual.weights", "perceptual.download=true"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"perceptual.backbone=resnet51 is no network of timm .* did you mean"):
        PerceptualLoss(TimmPerceptualConfig(weight=1.0, backbone="resnet51"), 3, SIZE)
    missing = TimmPerceptualConfig(weight=1.0, weights=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"perceptual.weights=.*none: there is no such file"):
        PerceptualLoss(missing, 3, SIZE)


def test_what_cannot_be_seen_is_refused(vgg):
    paths = {name: str(path) for name, path in vgg.items()}
    with pytest.raises(UserError, match=r"images of at least 16x16 pixels, got 8x32"):
        PerceptualLoss(LPIPSConfig(weight=1.0, **paths), 3, (8, 32))
    with pytest.raises(UserError, match=r"perceptual sees grey and colour images, and data.channels is 4"):
        PerceptualLoss(LPIPSConfig(weight=1.0, **paths), 4, SIZE)
    with pytest.raises(UserError, match=r"perceptual.weight=-1"):
        LPIPSConfig(weight=-1)
