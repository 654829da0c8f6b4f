"""The spatial decoder: the published one to its last digits, and what it promises of angles and shifts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from stage1_vae.networks import DenseConfig
from stage1_vae.networks.spatial import SpatialConfig, SpatialDecoder, places_of
from stage1_vae.vae import VAE, VAEConfig
from tests.golden import GoldenVAE, golden_vae

SPATIAL = ("mnist", "plain", "translate_only", "particles", "particles_mask", "particles_ctf")


def spatial_config(published: dict[str, Any]) -> SpatialConfig:
    return SpatialConfig(
        hidden=published["hidden_dim"],
        layers=published["num_layers"],
        activation=published["activation"],
        rotation=published["rotate"],
        translation=published["translate"],
        angle_scale=published["theta_prior"],
        shift_scale=published["dx_scale"],
        squares=published.get("expand_coords", False),
        bilinear=published.get("bilinear", False),
        residual=published.get("resid", False),
    )


def published_model(found: GoldenVAE) -> VAE:
    """With the published weights. Ours has the angle in units of its prior's scale, the published one in radians, and
    log-variances where that has logs of scales."""
    config = found.config
    size = (config["size"][0], config["size"][1])
    moves = int(config["rotate"]) + 2 * int(config["translate"])
    encoder = DenseConfig(hidden=(config["q_hidden_dim"],) * config["q_num_layers"], activation=config["activation"])
    model = VAE(VAEConfig(latents=moves + config["z_dim"], encoder=encoder, decoder=spatial_config(config)), size)
    network: Any = model.decoder.network  # type: ignore[attr-defined]
    of = found.weights
    network.of_places.load_state_dict(
        {"weight": of["p_net.coord_linear.weight"], "bias": of["p_net.coord_linear.bias"]}
    )
    scale = config.get("z_scale", 1.0)
    network.of_content.load_state_dict({"weight": of["p_net.latent_linear.weight"] * scale})
    if network.of_both is not None:
        network.of_both.load_state_dict({"weight": of["p_net.bilinear.weight"] * scale})
    later = sorted({name.rsplit(".", 1)[0] for name in of if name.startswith("p_net.layers")})
    for layer, name in zip([*network.layers, network.last], later, strict=True):
        layer.load_state_dict({"weight": of[f"{name}.weight"], "bias": of[f"{name}.bias"]})
    names = sorted({name.rsplit(".", 1)[0] for name in of if name.startswith("q_net.layers")})
    for layer, name in zip(model.encoder.layers.layers, names, strict=True):  # type: ignore[union-attr, arg-type]
        layer.load_state_dict({"weight": of[f"{name}.weight"], "bias": of[f"{name}.bias"]})
    last: Any = model.encoder.layers.layers[-1]  # type: ignore[union-attr, index]
    with torch.no_grad():
        last.weight[len(last.weight) // 2 :] *= 2
        last.bias[len(last.bias) // 2 :] *= 2
        if config["rotate"]:  # the angle's mean and scale, in units of the prior's
            last.weight[0] /= config["theta_prior"]
            last.bias[0] /= config["theta_prior"]
            last.bias[len(last.bias) // 2] -= 2 * math.log(config["theta_prior"])
    return model


@pytest.mark.parametrize("name", SPATIAL)
def test_published_outputs_come_out(name: str):
    found = golden_vae("spatial_vae").variant(name)
    config = found.config
    model = published_model(found)
    y, noise = found.inputs["y"], found.inputs["eps0"]
    images = y.unflatten(1, (1, *config["size"])) * 2 - 1
    posterior = model.posterior(images)
    unit = torch.ones_like(posterior.mean[0])
    if config["rotate"]:
        unit[0] = config["theta_prior"]
    found.check("z_mu", posterior.mean * unit)
    found.check("z_logstd", posterior.log_scale + unit.log())  # type: ignore[attr-defined]
    latents = posterior.draw(noise.unsqueeze(0)).latents[0]
    network: Any = model.decoder.network  # type: ignore[attr-defined]
    moves = network.config.moves
    found.check("coords", network.moved(latents[:, :moves]).expand(len(y), -1, -1))
    outputs = network(latents)
    raw = outputs.flatten(1).unsqueeze(-1)
    found.check("p_out", F.softplus(raw) if config.get("softplus") else raw)
    if config["likelihood"] == "bernoulli":
        log_p = model.decoder.likelihood.log_prob(outputs, images).mean()  # type: ignore[attr-defined]
        kl = model.prior.kl(posterior).sum(1).mean()  # type: ignore[union-attr]
        found.check("log_p", log_p)
        found.check("kl", kl)
        found.check("elbo", log_p - kl)
        (kl - log_p).backward()
        found.check("grad/p_net.coord_linear.bias", network.of_places.bias.grad)
        found.check("grad/p_net.latent_linear.weight", network.of_content.weight.grad)
        first: Any = model.encoder.layers.layers[0]  # type: ignore[union-attr, index]
        found.check("grad/q_net.layers.0.bias", first.bias.grad)
    elif not config.get("ctf") and not config.get("mask"):
        # The published objective of particles leaves the mean of the angle out of its divergence.
        log_p = -0.5 * (raw[..., 0] - y).square().sum(1).mean()
        kl = model.prior.kl(posterior).sum(1) - 0.5 * posterior.mean[:, 0].square()  # type: ignore[union-attr]
        found.check("log_p", log_p)
        found.check("kl", kl.mean())


def test_the_published_decoder_with_squares_products_and_residuals():
    found = golden_vae("spatial_vae").variant("rotate_only")
    config, of = found.config, found.weights
    network = SpatialDecoder(spatial_config(config), (1 + config["z_dim"],), (1, *config["size"]))
    assert network.of_both is not None
    network.load_state_dict(
        {
            "of_places.weight": of["p_net.coord_linear.weight"],
            "of_places.bias": of["p_net.coord_linear.bias"],
            "of_content.weight": of["p_net.latent_linear.weight"],
            "of_both.weight": of["p_net.bilinear.weight"],
            "layers.0.weight": of["p_net.layers.1.linear.weight"],
            "layers.0.bias": of["p_net.layers.1.linear.bias"],
            "last.weight": of["p_net.layers.2.weight"],
            "last.bias": of["p_net.layers.2.bias"],
        }
    )
    latents = found.outputs["z_mu"] + found.outputs["z_logstd"].exp() * found.inputs["eps0"]
    found.check("z_content", latents[:, 1:])
    latents = torch.cat([latents[:, :1] / config["theta_prior"], latents[:, 1:]], dim=1)
    found.check("coords", network.moved(latents[:, :1]))
    found.check("p_out", network(latents).flatten(1).unsqueeze(-1))


def test_places_are_those_of_the_published_images():
    found = golden_vae("spatial_vae").variant("mnist")
    torch.testing.assert_close(places_of(9, 9), found.inputs["x"])


@pytest.mark.parametrize(("height", "width"), [(3, 5), (5, 3), (1, 4)])
def test_places_of_other_shapes_are_as_far_apart_both_ways(height: int, width: int):
    """Those of the square that the image is the middle of, or else a turn would shear it."""
    places = places_of(height, width).view(height, width, 2)
    apart = 2 / (max(height, width) - 1)
    torch.testing.assert_close(places.mean((0, 1)), torch.zeros(2))
    torch.testing.assert_close(places.amax((0, 1)), apart / 2 * torch.tensor([width - 1.0, height - 1.0]))
    torch.testing.assert_close(places[:, 1:, 0] - places[:, :-1, 0], torch.full((height, width - 1), apart))
    torch.testing.assert_close(places[1:, :, 1] - places[:-1, :, 1], torch.full((height - 1, width), -apart))


@pytest.mark.parametrize(("rotation", "translation"), [(True, False), (False, True), (True, True), (False, False)])
def test_an_image_that_is_turned_and_shifted_is_the_same_function_elsewhere(rotation: bool, translation: bool):
    torch.manual_seed(0)
    config = SpatialConfig(hidden=8, rotation=rotation, translation=translation, shift_scale=0.5)
    network = SpatialDecoder(config, (config.moves + 2,), (1, 5, 5))
    content = torch.randn(1, 2)
    moves = torch.zeros(1, config.moves)
    still = network(torch.cat([moves, content], 1)).flatten().tolist()
    if rotation:
        moves[0, 0] = (math.pi / 2) / config.angle_scale  # a quarter turn, which takes (x, y) to (-y, x)
    if translation:
        moves[0, -2] = 0.5 / config.shift_scale  # one pixel of 5 that span 2
    moved = network(torch.cat([moves, content], 1)).flatten().tolist()
    places = [(round(x, 3), round(y, 3)) for x, y in places_of(5, 5).tolist()]
    shown = dict(zip(places, still, strict=True))
    seen = 0
    for (x, y), value in zip(places, moved, strict=True):
        x, y = (-y, x) if rotation else (x, y)
        place = (x + 0.5 if translation else x, y)
        if place in shown:
            assert value == pytest.approx(shown[place], abs=1e-5)
            seen += 1
    assert seen == (20 if translation else 25)


def test_an_angle_turns_the_image_clockwise():
    torch.manual_seed(0)
    decoder = SpatialDecoder(SpatialConfig(hidden=8, translation=False, angle_scale=math.pi / 2), (3,), (1, 6, 6))
    latents = torch.randn(4, 3)
    latents[:, 0] = 0
    straight = decoder(latents)
    latents[:, 0] = 1  # a quarter
    torch.testing.assert_close(decoder(latents), straight.rot90(-1, (2, 3)))


def test_too_few_numbers_are_refused():
    with pytest.raises(UserError, match="at least 4 numbers"):
        VAE(VAEConfig(latents=3, decoder=SpatialConfig()), (8, 8))
