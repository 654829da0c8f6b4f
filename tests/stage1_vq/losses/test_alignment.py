"""The loss beside a slow way to say it, whose gradient goes where; every autoencoder is heard; a run; errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError
from stage1_vq.losses.alignment import Alignment, AlignmentConfig
from stage1_vq.train import Stage1Task, alignment_of, train_stage1
from tests.stage1_vq.test_adversarial_runs import ImageStub, make_config, squares  # noqa: F401
from tests.stage1_vq.test_train import lines
from tests.stage1_vq.tiny import AUTOENCODER_ROWS, images_for, make_autoencoder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> AlignmentConfig:
    """Of a small network that stands in for the published one."""
    path = tmp_path_factory.mktemp("resnet") / "test_resnet.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), path)
    return AlignmentConfig(weight=0.25, backbone="test_resnet", weights=str(path), layer=1)


def make(config: AlignmentConfig, *, places: bool = True) -> Alignment:
    torch.manual_seed(1)
    return Alignment(config, 3, 5, places=places)


def some(b: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z_q = torch.randn(b, 5, 4, 6, generator=generator).requires_grad_()
    return z_q, torch.rand(b, 3, 32, 48, generator=generator) * 2 - 1


@pytest.mark.parametrize("places", [True, False])
def test_it_is_one_minus_the_mean_cosine_of_a_slow_way(config, places):
    alignment, (z_q, images) = make(config, places=places), some()
    loss, own = alignment.losses(z_q, images)
    with torch.no_grad():
        features = alignment.features(images)[-1]
    projected = torch.einsum("oi,bihw->bohw", alignment.projection.weight[:, :, 0, 0], z_q)
    projected = projected + alignment.projection.bias.view(1, -1, 1, 1)
    cosines = []
    for image in range(2):
        if not places:
            mean, target = projected[image].mean((1, 2)), features[image].mean((1, 2))
            cosines.append(mean @ target / mean.norm() / target.norm())
            continue
        target = F.interpolate(features[image : image + 1], (4, 6), mode="bilinear", antialias=True)[0]
        for row in range(4):
            for column in range(6):
                one, other = projected[image, :, row, column], target[:, row, column]
                cosines.append(one @ other / one.norm() / other.norm())
    expected = 1 - torch.stack(cosines).mean()
    torch.testing.assert_close(own["alignment"], expected)
    torch.testing.assert_close(loss, 0.25 * expected)
    (ours,) = torch.autograd.grad(loss, z_q)
    (theirs,) = torch.autograd.grad(0.25 * expected, z_q, retain_graph=True)
    torch.testing.assert_close(ours, theirs)
    of_map = torch.autograd.grad(own["alignment"], list(alignment.projection.parameters()))
    torch.testing.assert_close(of_map, torch.autograd.grad(expected, list(alignment.projection.parameters())))


def test_code_vectors_and_the_linear_map_each_hear_their_own_loss(config):
    alignment, (z_q, images) = make(config), some()
    loss, own = alignment.losses(z_q, images)
    loss.backward()
    assert all(weight.grad is None for weight in alignment.parameters())
    heard = z_q.grad.clone()
    assert heard.abs().sum() > 0
    own["alignment"].backward()
    assert torch.equal(z_q.grad, heard)
    assert all(weight.grad.abs().sum() > 0 for weight in alignment.parameters())
    assert {name.split(".")[0] for name, _ in alignment.named_parameters()} == {"projection"}


def test_it_stays_float32_under_autocast(config):
    alignment, (z_q, images) = make(config), some()
    with torch.autocast("cpu", torch.bfloat16):
        loss, own = alignment.losses(z_q.bfloat16(), images)
    assert loss.dtype == own["alignment"].dtype == torch.float32


ONE_OF_EACH_KIND = list({each.kind: row for row, each in AUTOENCODER_ROWS.items()}.values())


@pytest.mark.parametrize("row", ONE_OF_EACH_KIND)
def test_every_autoencoder_learns_from_it(row, config):
    autoencoder = make_autoencoder(row)
    alignment = Alignment(
        replace(config, weight=1.0),
        autoencoder.channels,
        autoencoder.aligned_width(),
        places=autoencoder.aligned_has_places,
    )
    output = autoencoder(images_for(autoencoder, 3))
    assert output.aligned.shape[1] == autoencoder.aligned_width()
    task = Stage1Task(autoencoder, ImageStub(), 3, alignment=alignment)
    batch = {"images": torch.randint(256, (3, autoencoder.channels, *autoencoder.image_size), dtype=torch.uint8)}
    _, figures, companion_losses, _ = task.step(autoencoder, batch, 0)
    assert 0 < figures["alignment_loss"] < 2
    heard, _ = alignment.losses(output.aligned, images_for(autoencoder, 3))
    heard.backward()
    encoders = [weight for name, weight in autoencoder.named_parameters() if "encoder" in name or "to_latents" in name]
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in encoders)
    assert companion_losses.keys() == {"alignment"}


def test_a_run_brings_code_vectors_nearer_to_the_features_and_weight_0_builds_nothing(config, squares, tmp_path):  # noqa: F811
    plain = replace(make_config(squares, steps=30, log_every=1), adversarial=type(make_config(squares).adversarial)())
    assert "alignment" not in plain.resolved()
    assert alignment_of(plain, make_autoencoder("vqvae")) is None
    aligned = replace(plain, alignment=replace(config, weight=1.0, learning_rate=1e-2, layer=0))
    assert aligned.resolved()["alignment"]["weight"] == 1.0
    assert train_stage1(aligned, tmp_path / "run").finished
    found = [line["alignment_loss"] for line in lines(tmp_path / "run") if line["split"] == "train"]
    assert sum(found[-5:]) < 0.7 * sum(found[:5])
    facts = (tmp_path / "run" / "run.json").read_text()
    assert "alignment.weights" in facts
    assert train_stage1(aligned, tmp_path / "run").finished  # it is there already


def test_without_weights_it_says_how_to_get_them():
    with pytest.raises(UserError) as caught:
        Alignment(AlignmentConfig(weight=0.5), 3, 8, places=True)
    for part in ("dinov2", "alignment.weights", "alignment.download=true", "alignment.weight=0 to train without"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "alignment.weight=-1.0, expected 0"),
        ({"layer": -1}, "alignment.layer=-1, expected a feature map's number"),
        ({"learning_rate": 0.0}, "alignment.learning_rate=0.0, expected above 0"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        AlignmentConfig(**settings)


def test_images_of_other_than_one_or_three_channels_are_refused(config):
    with pytest.raises(UserError, match=r"alignment sees grey and colour images, and data\.channels is 4"):
        Alignment(config, 4, 8, places=True)
