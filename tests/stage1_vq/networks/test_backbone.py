"""Features are timm's own; any size; nothing depends on the batch; weights from files; each mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import UserError
from common.model_io import load_pretrained
from stage1_vq.autoencoders import AUTOENCODERS, VQGAN, VQGANConfig
from stage1_vq.networks import timm_features
from stage1_vq.networks.backbone import TimmBackbone
from stage1_vq.quantizers import NearestQuantizerConfig
from stage1_vq.train import begun_from


def make(name: str = "test_convnext", channels: int = 3, stride: int = 8, width_out: int = 5) -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone(name, channels=channels, stride=stride, width_out=width_out).eval()


def images(channels: int = 3, height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def features(network: TimmBackbone, x: Tensor) -> Tensor:
    """What timm's network gives, before the 1x1 convolution."""
    caught: list[Tensor] = []
    handle = network.output.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    network(x)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize(("stride", "level"), [(4, 0), (8, 1), (32, 3)])
@torch.no_grad()
def test_features_are_those_of_timm_for_normalised_images(stride, level):
    network = make(stride=stride)
    timms = timm.create_model("test_convnext", features_only=True).eval()
    timms.load_state_dict(network.network.features.state_dict(), strict=False)  # ours ends with the level it needs
    mean, std = (torch.tensor(timms.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    x = images(height=64, width=96)
    expected = timms(((x + 1) / 2 - mean) / std)[level]
    assert network(x).shape == (2, 5, 64 // stride, 96 // stride)
    torch.testing.assert_close(features(network, x), expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "swin_tiny_patch4_window7_224"])
def test_other_kinds_of_networks_give_features_of_any_size(name):
    with torch.device("meta"):  # shapes without arithmetic
        network = make(name, stride=16)
        assert network(torch.zeros(1, 3, 32, 80)).shape == (1, 5, 2, 5)
        assert network(torch.zeros(1, 3, 96, 48)).shape == (1, 5, 6, 3)


def test_a_vision_transformer_gives_its_last_block():
    assert make("test_vit", stride=16).level == 5


def test_grey_images_are_normalised_by_the_mean_of_the_colours():
    network = make(channels=1)
    assert network(images(channels=1)).shape == (2, 5, 4, 6)
    colour = make()
    torch.testing.assert_close(network.network.mean.flatten(), colour.network.mean.mean().view(1))


@pytest.mark.parametrize(("name", "stride"), [("test_convnext", 8), ("test_resnet", 8), ("test_efficientnet", 8)])
def test_every_weight_that_learns_gets_a_gradient(name, stride):
    network = make(name, stride=stride).train()
    network(images()).square().mean().backward()
    learning = [(own, weight) for own, weight in network.named_parameters() if weight.requires_grad]
    assert all(weight.grad is not None for _, weight in learning)
    frozen = [own for own, weight in network.named_parameters() if not weight.requires_grad]
    assert bool(frozen) == (name == "test_efficientnet")  # which computes all levels whatever is asked for
    assert len(learning) > len(frozen) / 10


def test_batch_norms_keep_their_statistics_in_training():
    network = make("test_resnet")
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    x, expected = images(), make("test_resnet")(images())
    network.train()
    torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(network(x[:1]), expected[:1])  # whatever else is in the batch
    assert all(norm.running_mean.abs().max() == 0 for norm in norms)


# ---- weights --------------------------------------------------------------------------------------------------------


def published(tmp_path: Path, name: str = "test_convnext", suffix: str = ".safetensors") -> Path:
    """A file with the weights of a whole classifier, as they are published."""
    torch.manual_seed(7)
    weights = timm.create_model(name).state_dict()
    path = tmp_path / f"{name}{suffix}"
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@torch.no_grad()
def test_weights_come_from_a_file(tmp_path, suffix):
    network, x = make(), images()
    before = network.output.weight.clone()
    network.load_pretrained(str(published(tmp_path, suffix=suffix)))
    torch.manual_seed(7)
    timms = timm.create_model("test_convnext").eval()
    expected = timms.forward_intermediates(
        (x - network.network.mean) / network.network.deviation, indices=[1], intermediates_only=True
    )
    torch.testing.assert_close(features(network, x), expected[0])
    assert torch.equal(network.output.weight, before)


@torch.no_grad()
def test_weights_for_colour_are_summed_for_grey_images(tmp_path):
    path = published(tmp_path)
    grey, colour = make(channels=1), make()
    grey.load_pretrained(str(path))
    colour.load_pretrained(str(path))
    first = [
        next(weight for weight in network.network.features.parameters() if weight.ndim == 4)
        for network in (grey, colour)
    ]
    torch.testing.assert_close(first[0], first[1].sum(1, keepdim=True))


def test_files_that_do_not_fit_are_named(tmp_path):
    network = make()
    with pytest.raises(UserError, match=r"model.backbone_pretrained=nowhere.pth: there is no such file"):
        network.load_pretrained("nowhere.pth")
    other = published(tmp_path, "test_convnext")
    with pytest.raises(UserError, match=r"test_convnext.safetensors cannot be read as weights of .*=test_resnet"):
        make("test_resnet").load_pretrained(str(other))
    (tmp_path / "damaged.pth").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"damaged.pth cannot be read as weights"):
        network.load_pretrained(str(tmp_path / "damaged.pth"))


def test_a_download_is_announced_and_without_a_network_says_what_to_do(monkeypatch, capsys):
    network = make()

    def offline(*arguments: object, **settings: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm_features, "create", offline)
    with pytest.raises(UserError, match=r"of model.backbone=test_convnext could not be downloaded .*no route to host"):
        network.load_pretrained("download")
    assert "test_convnext: weights of https://huggingface.co/timm/test_convnext.r160_in1k" in capsys.readouterr().out


# ---- in an autoencoder ----------------------------------------------------------------------------------------------


def vqgan_config(**settings: str) -> VQGANConfig:
    quantizer = NearestQuantizerConfig(codebook_size=16, dim=6)
    sizes = {"width": 8, "multipliers": (1, 1, 1, 1), "attention_levels": (), "norm_groups": 4, "z_channels": 6}
    return VQGANConfig(**sizes, residual_blocks=1, quantizer=quantizer, **settings)


def test_a_run_begins_with_the_pretrained_weights_and_its_model_does_not_ask_for_them_again(tmp_path):
    path = published(tmp_path)
    torch.manual_seed(0)
    model = VQGAN(vqgan_config(backbone="test_convnext", backbone_pretrained=str(path)), (32, 48))
    fresh = model.encoder.body.network.features.state_dict()["stem_0.weight"].clone()
    with torch.no_grad():
        model.initialise([images()])
    begun = model.encoder.body.network.features.state_dict()["stem_0.weight"]
    torch.manual_seed(7)
    assert torch.equal(begun, timm.create_model("test_convnext").state_dict()["stem.0.weight"])
    assert not torch.equal(begun, fresh)
    folder = model.save_pretrained(tmp_path / "model")
    path.unlink()
    loaded = load_pretrained(folder, AUTOENCODERS)
    assert torch.equal(loaded.encode(images())[0], model.eval().encode(images())[0])


def test_pretrained_weights_need_a_backbone():
    with pytest.raises(UserError, match=r"model.backbone_pretrained=download without model.backbone: name the timm"):
        vqgan_config(backbone_pretrained="download")


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_told_with_close_ones():
    with pytest.raises(UserError, match=r"model.backbone=convnext_tiney is no network of timm .* convnext_tiny"):
        make("convnext_tiney")


def test_a_stride_that_is_not_offered_is_told_with_those_that_are():
    with pytest.raises(UserError, match=r"=test_convnext has no features of stride 2, .* has them at 4, 8, 16, 32"):
        make(stride=2)


def test_a_network_without_features_is_refused():
    with pytest.raises(UserError, match=r"model.backbone=mixer_s32_224 cannot be an encoder"):
        make("mixer_s32_224", stride=32)


def test_saved_models_have_the_network_under_the_names_that_they_had():
    state = make().state_dict()
    assert {name.split(".")[0] for name in state} == {"features", "mean", "deviation", "output"}
    other = make()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(images()), make()(images()))


def test_weights_of_another_model_are_not_replaced_by_published_ones(tmp_path):
    config = vqgan_config(backbone="test_convnext", backbone_pretrained=str(published(tmp_path)))
    torch.manual_seed(1)
    trained = VQGAN(config, (32, 48))
    trained.save_pretrained(tmp_path / "trained")
    model = VQGAN(config, (32, 48))
    begun_from(str(tmp_path / "trained"), model, tmp_path / "run", ())
    with torch.no_grad():
        model.initialise([images()])
    for name, weight in trained.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], weight), name
