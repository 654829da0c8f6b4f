from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import UserError
from stage1_vq.losses.discriminators import (
    ActNorm,
    BatchNormOfAll,
    DiscriminatorConfig,
    FeatureDiscriminatorConfig,
    PatchGANConfig,
    StyleGANDiscriminatorConfig,
    build_discriminator,
    moments_of_all,
    with_stddev,
)
from tests.golden import golden

SMALL_BACKBONES = {"test_vit": (1, 3), "test_resnet": (1, 2)}  # timm's own test models, and layers of them


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files with random weights of small backbones."""
    folder, paths = tmp_path_factory.mktemp("backbones"), {}
    torch.manual_seed(0)
    for name in SMALL_BACKBONES:
        paths[name] = folder / f"{name}.safetensors"
        save_file(timm.create_model(name, pretrained=False).state_dict(), paths[name])
    return paths


def configs(backbones: dict[str, Path]) -> dict[str, DiscriminatorConfig]:
    return {
        "patchgan, batch": PatchGANConfig(width=4, layers=2),
        "patchgan, actnorm": PatchGANConfig(width=4, layers=2, norm="actnorm"),
        "patchgan, group": PatchGANConfig(width=4, layers=1, norm="group"),
        "stylegan": StyleGANDiscriminatorConfig(width=4, max_width=8),
        "stylegan, stddev": StyleGANDiscriminatorConfig(width=4, stddev_group=2),
        **{
            f"features, {name}": FeatureDiscriminatorConfig(
                backbone=name, weights=str(path), layers=SMALL_BACKBONES[name], width=8
            )
            for name, path in backbones.items()
        },
    }


ROWS = [*configs({}), *(f"features, {name}" for name in SMALL_BACKBONES)]
LOGITS = {"patchgan, batch": (4, 1, 2, 4), "patchgan, actnorm": (4, 1, 2, 4), "patchgan, group": (4, 1, 6, 10),
          "stylegan": (4, 1), "stylegan, stddev": (4, 1)}  # fmt: skip


def images(channels: int = 3, b: int = 4, size: tuple[int, int] = (16, 24), seed: int = 1) -> Tensor:
    return torch.rand(b, channels, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_for_each_image_and_gradients_for_images_and_weights(backbones, row, channels):
    torch.manual_seed(0)
    discriminator = build_discriminator(configs(backbones)[row], channels, (16, 24))
    pictures = images(channels).requires_grad_()
    logits = discriminator(pictures)
    assert logits.shape == LOGITS.get(row, logits.shape)
    assert len(logits) == 4
    assert logits.dtype == torch.float32
    (logits * torch.randn(logits.shape)).sum().backward()
    assert (pictures.grad.abs().amax((1, 2, 3)) > 0).all()
    for name, weight in discriminator.named_parameters():
        assert weight.grad is not None, name
        if not name.endswith("bias"):  # one before a norm shifts what the norm shifts back
            assert weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("row", [row for row in ROWS if row not in ("patchgan, batch", "stylegan, stddev")])
def test_a_logit_depends_on_its_image_alone(backbones, row):
    torch.manual_seed(0)
    discriminator = build_discriminator(configs(backbones)[row], 3, (16, 24))
    discriminator(images())  # starts an ActNorm
    torch.testing.assert_close(discriminator(images())[:1], discriminator(images()[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_other_sizes_than_that_of_training_have_logits_too(backbones, row):
    discriminator = build_discriminator(configs(backbones)[row], 3, (16, 24))
    for size in ((24, 16), (32, 32)):
        assert discriminator(images(size=size)).isfinite().all()


def test_frozen_features_are_neither_trained_nor_saved(backbones):
    discriminator = build_discriminator(configs(backbones)["features, test_resnet"], 3, (16, 24))
    discriminator.train()
    assert all(name.startswith("heads.") for name, _ in discriminator.named_parameters())
    assert all(name.startswith("heads.") for name in discriminator.state_dict())
    backbone = discriminator.features.network._network[0]
    assert not any(weight.requires_grad for weight in backbone.parameters())
    assert not any(module.training for module in backbone.modules())
    assert discriminator.to(torch.float64).features.network._network[0].features.conv1[0].weight.dtype == torch.float64


# ---- as published ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["bn", "actnorm"])
def test_patchgan_agrees_with_the_published_one(norm):
    config, weights, inputs, outputs = golden(f"taming_patchgan_{norm}")
    kind = "batch" if norm == "bn" else "actnorm"
    ours = PatchGANConfig(width=config["ndf"], layers=config["n_layers"], norm=kind)
    discriminator = build_discriminator(ours, config["input_nc"], (32, 32))
    discriminator.load_state_dict(weights)
    x = inputs["x"].requires_grad_()

    def close(found: Tensor, name: str) -> None:
        torch.testing.assert_close(found, outputs[name], rtol=1e-5, atol=1e-5, msg=name, check_dtype=False)

    close(discriminator.eval()(x), "logits_eval")
    logits = discriminator.train()(x)
    close(logits, "logits_train")
    logits.mean().backward()
    close(x.grad, "grad/x")
    state = discriminator.state_dict()
    after = {name.removeprefix("after/"): name for name in outputs if name.startswith("after/")}
    assert after
    for name, key in after.items():
        close(state[name], key)
    if norm == "actnorm":
        close(discriminator.eval()(x), "logits_after_init")


def test_patchgan_starts_with_small_weights():
    torch.manual_seed(0)
    discriminator = build_discriminator(PatchGANConfig(width=32), 3, (64, 64))
    convolution = discriminator.main[2]
    assert float(convolution.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_the_stylegan_block_halves_as_stylegan2_does():
    # A convolution of stride 2 after the blur: on a constant image of ones it gives gain * sum of the weights inside.
    torch.manual_seed(0)
    discriminator = build_discriminator(StyleGANDiscriminatorConfig(width=4), 3, (64, 64))
    assert len(discriminator.blocks) == 4
    block = discriminator.blocks[0]
    inside = block.skip(torch.ones(1, 4, 64, 64))[0, :, 8, 8]
    expected = block.skip.weight.sum((1, 2, 3)) * block.skip.gain
    torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-5)
    assert block(torch.ones(1, 4, 64, 64)).shape == (1, 8, 32, 32)
    wide = [block.down.weight.shape[0] for block in discriminator.blocks]
    assert wide == [8, 16, 32, 64]


def test_the_standard_deviation_of_a_group_is_one_more_channel():
    x = torch.zeros(4, 2, 3, 3)
    x[0] = 2.0  # images 0 and 2 are one group of two, 1 and 3 the other
    found = with_stddev(x, 2)
    assert found.shape == (4, 3, 3, 3)
    torch.testing.assert_close(found[:, 2, 0, 0], torch.tensor([1.0, 0.0, 1.0, 0.0]), rtol=0, atol=1e-3)


# ---- norms ----------------------------------------------------------------------------------------------------------


def test_with_one_process_the_batch_norm_is_torchs():
    torch.manual_seed(0)
    ours, theirs = BatchNormOfAll(5), nn.BatchNorm2d(5)
    for _ in range(3):
        x = torch.randn(4, 5, 3, 3) * 2 + 1
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


def test_moments():
    x = torch.randn(4, 5, 3, 3) * 2 + 1
    mean, variance, count = moments_of_all(x)
    torch.testing.assert_close(mean.flatten(), x.mean((0, 2, 3)))
    torch.testing.assert_close(variance.flatten(), x.var((0, 2, 3), correction=0))
    assert float(count) == 4 * 3 * 3


def test_an_actnorm_does_not_start_from_numbers_that_are_not_finite():
    norm = ActNorm(3)
    norm(torch.full((2, 3, 4, 4), torch.nan))
    assert not norm.initialized
    x = torch.randn(2, 3, 4, 4) * 5 + 2
    found = norm(x)
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std((0, 2, 3)), torch.ones(3))
    again = ActNorm(3)
    again.load_state_dict(norm.state_dict())
    torch.testing.assert_close(again(x + 1), norm(x + 1))  # does not start anew


# ---- what a user can get wrong --------------------------------------------------------------------------------------


def test_images_too_small_for_the_layers_are_refused_with_a_number_that_fits():
    with pytest.raises(UserError, match=r"layers=3 leaves nothing of 16x32 images: give at most 2"):
        build_discriminator(PatchGANConfig(), 3, (16, 32))
    build_discriminator(PatchGANConfig(layers=2), 3, (16, 32))(torch.zeros(2, 3, 16, 32))
    with pytest.raises(UserError, match=r"train on images of 6x6 pixels or more"):
        build_discriminator(PatchGANConfig(), 3, (4, 4))


@pytest.mark.parametrize("side", [6, 11, 12, 23, 24, 48])
def test_the_deepest_patchgan_that_is_allowed_is_the_deepest_that_works(side):
    for layers in range(1, 6):
        try:
            discriminator = build_discriminator(PatchGANConfig(width=4, layers=layers, norm="actnorm"), 1, (side, side))
        except UserError:
            break
        assert discriminator(torch.zeros(2, 1, side, side)).numel() > 0
    assert side < 3 * 2**layers


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: PatchGANConfig(width=0), "discriminator.width=0, expected at least 1"),
        (lambda: PatchGANConfig(norm="layer"), "discriminator.norm=layer, expected batch, actnorm or group"),
        (lambda: PatchGANConfig(norm="group", width=6), "discriminator.width=6, expected a multiple of 4"),
        (lambda: StyleGANDiscriminatorConfig(stddev_group=-1), "stddev_group=-1, expected 0"),
        (lambda: FeatureDiscriminatorConfig(width=3), "discriminator.width=3, expected a multiple of 4"),
    ],
)
def test_values_out_of_range_are_refused(build, sentence):
    with pytest.raises(UserError, match=sentence):
        build()


def test_features_without_weights_say_what_to_do():
    with pytest.raises(UserError) as caught:
        build_discriminator(FeatureDiscriminatorConfig(), 3, (32, 32))
    message = str(caught.value)
    for part in (
        "adversarial.discriminator.weights",
        "adversarial.discriminator.download=true",
        "adversarial.weight=0",
    ):
        assert part in message
    assert "dino" in message
