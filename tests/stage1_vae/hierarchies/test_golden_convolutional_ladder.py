"""A published convolutional ladder (addtt): its latents, KL terms, four likelihoods, free bits and gradients.

Its network is a hierarchy as `stage1_vae.hierarchies.base` has them, so that the terms compared are the library's. A
learned convolution in the place of the product of Gaussians is its own, and so are free bits of each image alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_vae.hierarchies.base import Choose, Group, HierarchicalVAE, Normal
from stage1_vae.likelihoods import BernoulliConfig, LogisticMixtureConfig, build_likelihood
from stage1_vae.likelihoods.gaussian import log_density
from stage1_vae.likelihoods.logistic_mixture import chosen, components_of, log_bin, logistic, means_given
from tests.golden import GoldenVAE, golden_vae, part

VARIANTS = ["bern", "dlog", "mix", "gauss"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "leakyrelu": F.leaky_relu,
    "relu": F.relu,
    "selu": F.selu,
}


class PublishedLadder(HierarchicalVAE):
    """The published weights under their names; layer 0 is next to the image."""

    def __init__(self, reference: GoldenVAE) -> None:
        config = reference.config
        super().__init__(
            SimpleNamespace(channels=config["color_ch"], likelihood=BernoulliConfig()), config["img_shape"]
        )
        self.published, self.layers = config, len(config["z_dims"])
        self.activation = ACTIVATIONS[config["nonlin"]]
        self.values = dict(reference.weights)
        for name, tensor in self.values.items():
            if tensor.is_floating_point() and "running" not in name:
                self.values[name] = tensor.clone().requires_grad_()
        smallest = 1 if config["no_initial_downscaling"] else 2
        padded = [-(-side // self.factor) * self.factor for side in self.image_size]
        shapes, below = [], smallest
        for numbers, halvings in zip(config["z_dims"], config["downsample"], strict=True):
            below *= 2**halvings
            shapes.append((numbers, padded[0] // below, padded[1] // below))
        self.group_shapes = tuple(reversed(shapes))
        self.padding = [padded[1] - self.image_size[1], padded[0] - self.image_size[0]]

    @property
    def factor(self) -> int:
        """By which images are smaller at the top."""
        return 2 ** (sum(self.published["downsample"]) + (not self.published["no_initial_downscaling"]))

    # ---- layers ----

    def has(self, name: str) -> bool:
        return any(key.startswith(f"{name}.") for key in self.values)

    def convolution(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight, bias = self.values[f"{name}.weight"], self.values[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)

    def normalised(self, name: str, x: Tensor) -> Tensor:
        mean, variance, weight, bias = (
            self.values[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean.clone(), variance.clone(), weight, bias, self.training)

    def residual(self, name: str, x: Tensor) -> Tensor:
        """b: normalisation, a: activation, c: convolution, in the order that the type says; a gate at the end."""
        hidden, place = x, 0
        for step in self.published["res_block_type"].replace("d", ""):
            if step == "b" and not self.published["batchnorm"]:
                continue
            here = f"{name}.block.{place}"
            if step == "a":
                hidden = self.activation(hidden)
            else:
                hidden = self.normalised(here, hidden) if step == "b" else self.convolution(here, hidden)
            place += 1
        if self.has(f"{name}.block.{place}.conv"):
            kept, gate = self.convolution(f"{name}.block.{place}.conv", hidden).chunk(2, dim=1)
            hidden = self.activation(kept) * gate.sigmoid()
        return x + hidden

    def block(self, name: str, x: Tensor, *, upwards: bool) -> Tensor:
        if self.has(f"{name}.pre_conv"):
            weight, bias = self.values[f"{name}.pre_conv.weight"], self.values[f"{name}.pre_conv.bias"]
            x = F.conv2d(x, weight, bias, 2, 1) if upwards else F.conv_transpose2d(x, weight, bias, 2, 1, 1)
        return self.residual(f"{name}.res", x)

    def blocks(self, name: str, x: Tensor, *, upwards: bool, first: int = 0) -> Tensor:
        for place in range(first, first + self.published["blocks_per_layer"]):
            x = self.block(f"{name}.{place}", x, upwards=upwards)
        return x

    def merged(self, name: str, first: Tensor, second: Tensor) -> Tensor:
        both = torch.cat([first, second], dim=1)
        if self.has(f"{name}.layer.1"):
            return self.residual(f"{name}.layer.1", self.convolution(f"{name}.layer.0", both))
        return self.convolution(f"{name}.layer", both)

    # ---- the hierarchy ----

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """The path up, of images in [0, 1], padded on all sides."""
        right, down = self.padding
        x = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
        x = self.convolution("first_bottom_up.0", x, 1 if self.published["no_initial_downscaling"] else 2)
        x, found = self.block("first_bottom_up.2", self.activation(x), upwards=True), []
        for layer in range(self.layers):
            x = self.blocks(f"bottom_up_layers.{layer}.net", x, upwards=True)
            found.append(x)
        return found

    def prior(self, layer: int, above: Tensor | None, count: int) -> Normal:
        if above is None:
            said = self.values[f"top_down_layers.{layer}.top_prior_params"].expand(count, -1, -1, -1)
        else:
            said = self.convolution(f"top_down_layers.{layer}.stochastic.conv_in_p", above)
        return normal_of(said)

    def lower(self, layer: int, above: Tensor | None, latents: Tensor) -> Tensor:
        """What the layer below reads."""
        name = f"top_down_layers.{layer}"
        x = self.convolution(f"{name}.stochastic.conv_out", latents)
        if above is not None and self.has(f"{name}.skip_connection_merger"):
            x = self.merged(f"{name}.skip_connection_merger", x, above)
        return self.blocks(f"{name}.deterministic_block", x, upwards=False)

    def end(self, x: Tensor) -> Tensor:
        if self.published["no_initial_downscaling"]:
            return self.blocks("final_top_down", x, upwards=False)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.blocks("final_top_down", x, upwards=False, first=1)

    def outputs(self, x: Tensor) -> Tensor:
        right, down = self.padding
        (height, width), top, left = self.image_size, down // 2, right // 2
        return self.convolution("likelihood.parameter_net", x[..., top : top + height, left : left + width])

    def infer(self, features: Sequence[Tensor], noise: Sequence[Tensor] | None) -> tuple[list[Group], Tensor]:
        assert noise is not None
        groups: list[Group] = []
        x: Tensor | None = None
        for place, layer in enumerate(reversed(range(self.layers))):
            prior = self.prior(layer, x, len(features[0]))
            seen = features[layer] if x is None else self.merged(f"top_down_layers.{layer}.merge", features[layer], x)
            posterior = normal_of(self.convolution(f"top_down_layers.{layer}.stochastic.conv_in_q", seen))
            groups.append(Group.of(posterior.draw(noise[place]), posterior, prior))
            x = self.lower(layer, x, groups[-1].latents)
        assert x is not None
        return groups, self.outputs(self.end(x))

    def features_of(self, count: int, choose: Choose) -> Tensor:
        x: Tensor | None = None
        for place, layer in enumerate(reversed(range(self.layers))):
            x = self.lower(layer, x, choose(place, self.prior(layer, x, count)))
        assert x is not None
        return self.end(x)

    def generate(self, count: int, choose: Choose) -> Tensor:
        return self.outputs(self.features_of(count, choose))


def normal_of(said: Tensor) -> Normal:
    mean, log_variance = said.chunk(2, dim=1)
    return Normal(mean, 0.5 * log_variance)


# ---- likelihoods, of images in [0, 1] -------------------------------------------------------------------------------


def log_likelihood(form: str, outputs: Tensor, images: Tensor) -> Tensor:
    if form == "bernoulli":
        return build_likelihood(BernoulliConfig(), images.shape[1]).log_prob(outputs, 2 * images - 1)
    if form == "discr_log_mix":
        return build_likelihood(LogisticMixtureConfig(components=10), 3).log_prob(outputs, 2 * images - 1)
    if form == "gaussian":
        mean, log_variance = outputs.chunk(2, dim=1)
        return log_density(images, mean, 0.5 * log_variance).flatten(1).sum(1)
    mean, log_scale = logistic_of(outputs)
    places = (images * 255 / 256 * 256).round()  # of 256 bins between 0 and 1
    inside = log_bin((places + 0.5) / 256, 1 / 512, mean, log_scale, places < 1, places > 254)
    return (inside.exp() + 1e-7).log().flatten(1).sum(1)  # the published 1e-7: no value costs more than 16.1 nats


def logistic_of(outputs: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_scale = outputs.chunk(2, dim=1)
    return mean + 0.5, (log_scale - 1).clamp(min=-7)


def parameters_of(form: str, outputs: Tensor) -> dict[str, Tensor]:
    if form == "bernoulli":
        return {"mean": outputs.sigmoid()}
    if form == "discr_log_mix":
        return {"all_params": outputs}
    if form == "gaussian":
        return dict(zip(("mean", "logvar"), outputs.chunk(2, dim=1), strict=True))
    return dict(zip(("mean", "logscale"), logistic_of(outputs), strict=True))


def sampled(form: str, outputs: Tensor, noise: dict[str, Tensor]) -> Tensor:
    """noise: of images, by its name."""
    if form == "bernoulli":
        return (noise["u0"] < outputs.sigmoid()).float()
    if form == "gaussian":
        return normal_of(outputs).draw(noise[max(noise)])
    if form == "discr_log":
        return logistic(*logistic_of(outputs), noise["u0"]).clamp(0, 1)
    parts = components_of(outputs, 3, 10, -7.0)
    component = chosen(parts.log_weights, noise["u0"].movedim(-1, 1))
    uniforms, images = noise["u1"].movedim(-1, 1), torch.zeros_like(parts.means.select(-3, 0))
    for channel in range(3):  # the published draws are not rounded
        means = (component * means_given(parts, channel, images.unsqueeze(-3))).sum(-3)
        log_scales = (component * parts.log_scales.select(-4, channel)).sum(-3)
        images.select(-3, channel).copy_(logistic(means, log_scales, uniforms[:, channel]).clamp(-1, 1))
    return (images + 1) / 2


# ---- against what was published -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_convolutional_ladder(variant: str, mode: str):
    whole = golden_vae("ladder_addtt")
    reference, noise = whole.variant(variant), part(whole.inputs, f"{variant}/{mode}/")
    model = PublishedLadder(reference).train(mode == "train")
    images = reference.inputs["x"]
    groups, outputs = model.infer(model.features(images), [noise[f"eps{place}"] for place in range(model.layers)])
    form = reference.config["likelihood_form"]
    likelihood = log_likelihood(form, outputs, images)
    reference.check(f"{mode}/ll", likelihood)
    for name, value in parameters_of(form, outputs).items():
        reference.check(f"{mode}/params/{name}", value)
    kl = []
    for layer, group in enumerate(reversed(groups)):
        reference.check(f"{mode}/z/{layer}", group.latents)
        assert group.kl is not None
        reference.check(f"{mode}/kl_spatial/{layer}", group.kl.view_as(group.latents).sum(1))
        drawn = group.log_posterior - group.log_prior
        kl.append((group.kl if reference.config["analytical_kl"] else drawn).sum(1))
    of_layers = torch.stack(kl, dim=1)  # b layers
    free = of_layers.clamp(min=reference.config["free_bits"]) if reference.config["free_bits"] else of_layers
    kl_loss = free.sum(1).mean()
    loss = reference.config["beta"] * kl_loss - likelihood.mean()
    for name, value in {
        "kl_sep": of_layers.sum(1),
        "kl": of_layers.sum(1).mean(),
        "kl_avg_layerwise": of_layers.mean(0),
        "kl_loss": kl_loss,
        "logp": sum(group.log_prior.sum(1).mean() for group in groups),
        "elbo": (likelihood - of_layers.sum(1)).mean(),
        "loss": loss,
    }.items():
        reference.check(f"{mode}/{name}", value)
    if mode == "train":
        loss.backward()
        names = part(reference.outputs, "train/grad/")
        assert names
        for name in names:
            reference.check(f"train/grad/{name}", model.values[name].grad)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_samples_of_the_convolutional_ladder(variant: str):
    whole = golden_vae("ladder_addtt")
    reference = whole.variant(variant)
    model = PublishedLadder(reference).eval()
    noise = part(whole.inputs, f"{variant}/prior/")
    outputs = model.generate(reference.config["batch"], lambda place, prior: prior.draw(noise[f"eps{place}"]))
    reference.check("prior/sample", sampled(reference.config["likelihood_form"], outputs, noise))
    noise = part(whole.inputs, f"{variant}/mode/")
    still = {model.layers - 1 - layer for layer in reference.config["mode_layers"]}

    def choose(place: int, prior: Normal) -> Tensor:
        return prior.mean if place in still else prior.draw(noise[f"eps{place}"])

    reference.check("mode/features", model.features_of(reference.config["batch"], choose))
