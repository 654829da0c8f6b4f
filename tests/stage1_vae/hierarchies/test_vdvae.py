"""VD-VAE against the published implementation, and what it says of itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.vdvae_step import published_pass
from common.errors import UserError
from common.foreign_weights import unwrapped
from common.model_io import load_pretrained
from stage1_vae.hierarchies.base import Normal
from stage1_vae.hierarchies.vdvae import VDVAE, VDVAEConfig
from stage1_vae.imports.vdvae import import_vdvae, original_name, published_configs
from stage1_vae.likelihoods import BernoulliConfig, LogisticMixtureConfig
from stage1_vae.objectives.terms import elbo
from tests.golden import GOLDEN_VAE, GoldenVAE, golden_file, golden_vae
from tests.stage1_vae.likelihoods.test_logistic_mixture import published_log_p, published_sample

FILES = ["vdvae", "vdvae_widths"]


def published_model(published: GoldenVAE) -> VDVAE:
    arguments = {name: value for name, value in published.config.items() if name != "dataset"}
    return import_vdvae(published.weights, arguments)


def numbered(inputs: dict[str, Tensor], prefix: str) -> list[Tensor]:
    names = [name for name in inputs if name.startswith(prefix)]
    return [inputs[f"{prefix}{number}"] for number in range(len(names))]


def stream(model: VDVAE, latents_of: Any, count: int) -> Tensor:
    """What the published decoder puts out before its last convolution."""
    return model.decoder(count, latents_of) * model.decoder.gain + model.decoder.shift


@pytest.mark.parametrize("name", FILES)
def test_published_bound_and_gradients(name: str):
    published = golden_vae(name)
    model, inputs = published_model(published), published.inputs
    target = inputs["x_target"].movedim(-1, 1)
    images = inputs["pixels"].movedim(-1, 1) / 127.5 - 1
    torch.testing.assert_close(model.network_input(images), inputs["x"].movedim(-1, 1), rtol=1e-5, atol=1e-5)
    for side, activation in model.encoder(model.network_input(images)).items():
        published.check(f"activations/{side}", activation)

    groups, outputs = model.infer(model.features(images), numbered(inputs, "elbo/eps"))
    numbers = target[0].numel()
    for place, (group, shape) in enumerate(zip(groups, model.group_shapes, strict=True)):
        assert group.kl is not None
        published.check(f"z/{place}", group.latents)
        published.check(f"kl_map/{place}", group.kl.unflatten(1, shape))
        published.check(f"kl/{place}", group.kl.sum(1))
    published.check("dmol_logits", outputs.movedim(1, -1))
    if name == "vdvae":
        nll = -model.likelihood.log_prob(outputs, images)
    else:  # its images have 5 bits
        parts = model.likelihood.parts(outputs)  # type: ignore[operator]
        nll = -published_log_p(parts, target, 1 / 31, math.log(1 / 15.5), 0.999).sum(dim=(1, 2))
    rate = torch.stack([group.kl.sum(1) for group in groups if group.kl is not None]).sum(0)
    for output, value in (("distortion", nll / numbers), ("rate", rate / numbers)):
        published.check(f"{output}_per_image", value)
        published.check(output, value.mean())
    loss = ((nll + rate) / numbers).mean()
    published.check("elbo", loss)
    loss.backward()
    compared = 0
    for key, weight in model.named_parameters():
        if f"grad/{original_name(key)}" in published.outputs:
            assert weight.grad is not None
            published.check(f"grad/{original_name(key)}", weight.grad)
            compared += 1
    assert compared == sum(output.startswith("grad/") for output in published.outputs)


def test_published_bound_by_the_terms_of_the_house():
    published = golden_vae("vdvae")
    model = published_model(published)
    images = published.inputs["pixels"].movedim(-1, 1) / 127.5 - 1
    noise = model.joined(numbered(published.inputs, "elbo/eps"))[None]
    published.check("elbo", -elbo(model(images, noise=noise)).mean() / images[0].numel())


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_published_samples(name: str):
    """At temperatures, one or one a group, and with the upper groups' latents given."""
    published = golden_vae(name)
    model, inputs, count = published_model(published), published.inputs, len(published.inputs["x"])

    def check(prefix: str, temperatures: float | list[float], known: int) -> None:
        noise = [*([None] * known), *numbered(inputs, f"{prefix}/eps")]
        of_group = temperatures if isinstance(temperatures, list) else [temperatures] * len(noise)

        def choose(place: int, prior: Normal) -> Tensor:
            if (drawn := noise[place]) is None:
                return published.outputs[f"z/{place}"]
            return prior.at_temperature(of_group[place]).draw(drawn)

        published.check(f"{prefix}/px_z", stream(model, lambda place, _, prior: choose(place, prior), count))
        parts = model.likelihood.parts(model.generate(count, choose))  # type: ignore[operator]
        uniforms = [inputs[f"{prefix}/u{number}"].movedim(-1, 1) for number in (0, 1)]
        published.check(f"{prefix}/image", published_sample(parts, *uniforms).movedim(1, -1))

    for number, temperatures in enumerate(published.config["temps"]):
        check(f"uncond{number}", temperatures, 0)
    check("set", 0.1, published.config["set_latents"])


@pytest.mark.parametrize(("name", "dataset"), [("vdvae_cifar10", "cifar10"), ("vdvae_ffhq1024", "ffhq_1024")])
def test_published_sizes(name: str, dataset: str, monkeypatch: pytest.MonkeyPatch):
    """Of the full-size models, which are recognised by the names of their weights alone."""
    shapes = json.loads(golden_file("real_shapes.json", GOLDEN_VAE).read_text())[name]
    weights = {f"module.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}
    monkeypatch.setattr(torch.nn.Conv2d, "reset_parameters", lambda _: None)  # which takes its time there, too
    with torch.device("meta"):
        model = import_vdvae(unwrapped(weights))
    assert model.config == published_configs()[dataset]
    assert {original_name(key): list(tensor.shape) for key, tensor in model.state_dict().items()} == shapes


# ---- of our own -----------------------------------------------------------------------------------------------------


def tiny(**changes: Any) -> VDVAE:
    settings = {
        "channels": 1,
        "width": 6,
        "widths": "4:8,1:8",
        "latents": 2,
        "encoder_layers": "8x1,8d2,4x1,4d4,1x1",
        "decoder_layers": "1x2,4m1,4x1,8m4,8x1",
        "bottleneck_multiple": 0.5,
        "no_bias_above": 4,
        "likelihood": BernoulliConfig(),
    }
    torch.manual_seed(0)
    config = VDVAEConfig(**{**settings, **changes})  # type: ignore[arg-type]
    return VDVAE(config, (config.image_side, config.image_side))


def shaken(model: VDVAE) -> VDVAE:
    """With weights where training would not leave 0."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    return model


def black_and_white(count: int, side: int = 8) -> Tensor:
    return torch.randint(0, 2, (count, 1, side, side), generator=torch.Generator().manual_seed(2)) * 2.0 - 1


def test_terms_are_those_of_the_published_order_of_operations():
    """Of two draws, whose parts that depend on the image alone are computed once: KL of each group as torch has it,
    densities, the likelihood, and the gradient of the bound."""
    model, images = shaken(tiny()).double(), black_and_white(3).double()
    noise = torch.randn(2, 3, *model.shape, dtype=torch.float64)
    terms = model(images, noise=noise)
    found, outputs = published_pass(model, images.repeat(2, 1, 1, 1), model.split(noise.flatten(0, 1)))
    bound = torch.zeros(6, dtype=torch.float64)
    for place, (z, *parameters) in enumerate(found):
        posterior, prior = (
            torch.distributions.Normal(mean, log_scale.exp()) for mean, log_scale in (parameters[:2], parameters[2:])
        )
        kl = torch.distributions.kl_divergence(posterior, prior).flatten(1)
        exact = terms.exact_kl[place]
        assert exact is not None
        torch.testing.assert_close(exact.flatten(0, 1), kl)
        torch.testing.assert_close(terms.latents[place].flatten(0, 1), z)
        torch.testing.assert_close(terms.log_prior[place].flatten(0, 1), prior.log_prob(z).flatten(1))
        torch.testing.assert_close(terms.log_posterior[place].flatten(0, 1), posterior.log_prob(z).flatten(1))
        bound = bound - kl.sum(1)
    targets = (images.repeat(2, 1, 1, 1) + 1) / 2
    bound = bound - F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(dim=(1, 2, 3))
    torch.testing.assert_close(elbo(terms), bound.view(2, 3).mean(0))
    weights = list(model.parameters())
    expected = torch.autograd.grad(bound.mean(), weights)
    for one, other in zip(torch.autograd.grad(elbo(terms).mean(), weights), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_initial_weights():
    """Biases, and the prior's last convolutions, are 0; last convolutions of residual blocks are divided by the square
    root of how many there are."""
    shallow, deep = (
        tiny(decoder_layers="1x2,4m1,8m4"),
        tiny(decoder_layers="1x12,4m1,8m4", encoder_layers="8d2,4d4,1x7"),
    )
    for model in (shallow, deep):
        assert all(not weight.any() for key, weight in model.named_parameters() if key.endswith("bias"))
        assert all(not block.prior.wide.weight.any() for block in model.decoder.blocks)
        in_encoder, in_decoder = map(len, model.config.layers)
        for block, count in (
            *((block, in_encoder) for block in model.encoder.blocks),
            *((block.residual, in_decoder) for block in model.decoder.blocks),
        ):
            largest = float(block.wide.weight.detach().abs().max())  # of a uniform distribution in the original
            assert largest <= 1 / math.sqrt(block.wide.weight.shape[1] * count)
            assert largest > 0.7 / math.sqrt(block.wide.weight.shape[1] * count)
        groups, _ = model.infer(model.features(black_and_white(2)), None)
        for group in groups:  # N(0, 1) at first
            torch.testing.assert_close(
                group.log_prior, torch.distributions.Normal(0, 1).log_prob(group.latents).flatten(1)
            )


def test_generation_is_inference_without_images():
    """Of the latents that an image's pass draws the generator says what that pass did."""
    model, images = shaken(tiny()), black_and_white(3)
    noise = model.split(torch.randn(3, *model.shape))
    groups, outputs = model.infer(model.features(images), noise)
    latents = model.joined([group.latents for group in groups])
    torch.testing.assert_close(model.pixels(latents, "mean"), model.shown(outputs, "mean"))
    model.generate(3, lambda place, _: groups[place].latents.detach()).sum().backward()
    own = {id(weight) for weight in model.inference_parameters()}
    assert all((weight.grad is None) == (id(weight) in own) for weight in model.parameters())


def test_bfloat16_keeps_streams_distributions_and_likelihoods_in_float32():
    model, images = shaken(tiny()), black_and_white(3)
    noise = torch.randn(1, 3, *model.shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        activations = model.encoder(model.network_input(images))
        groups, outputs = model.infer(model.features(images), model.split(noise[0]))
    tensors = [*activations.values(), outputs, *(tensor for group in groups for tensor in group if tensor is not None)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder_layers": "8x1,8m2,4x1"}, r"the item '8m2', expected N .* NdK"),
        ({"decoder_layers": "1x2,4d1"}, r"the item '4d1', expected N .* NmK"),
        ({"decoder_layers": "1x2,,4m1"}, r"the item ''"),
        ({"encoder_layers": "8x1,4x1,4d4,1x1"}, r"block at resolution 4 behind one that leaves 8, expected 8"),
        ({"encoder_layers": "8x1,8d3,2x1"}, r"pools resolution 8 by 3"),
        ({"decoder_layers": "1x2,2m1,8m2"}, r"at resolution 2, of which .* no activation, expected one of 1, 4, 8"),
        ({"decoder_layers": "1x2,4m8,8m4"}, r"adds resolution 8 to 4"),
        ({"decoder_layers": "1x2,4m1"}, r"ends at resolution 4, expected 8"),
        ({"widths": "4:4"}, r"6 channels at resolution 1 and 4|4 channels at resolution 4 and 6 at 8"),
        ({"widths": "2:8"}, r"a width for resolution 2, expected resolutions of the layers: 1, 4, 8"),
        ({"widths": "4-8"}, r"expected RESOLUTION:WIDTH"),
        ({"bottleneck_multiple": 0.1}, r"leaves no channel"),
        ({"latents": 0}, r"latents=0"),
    ],
)
def test_layers_that_do_not_fit_are_told(changes: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        tiny(**changes)


def test_images_of_another_size_are_told():
    with pytest.raises(UserError, match=r"images of 8x16 pixels .* expected 8x8"):
        VDVAE(tiny().config, (8, 16))


def test_a_saved_model_is_the_same(tmp_path: Path):
    model = shaken(tiny(likelihood=LogisticMixtureConfig(components=2)))
    other = load_pretrained(model.save_pretrained(tmp_path / "model"), {"vdvae": VDVAE})
    assert other.fingerprint() == model.fingerprint()
    assert other.config == model.config
