"""Published flows: networks, planar and radial ones alone, and inside VAEs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from common.masked_dense import MaskedDense
from stage1_vae.posteriors.diagonal import DiagonalGaussian
from stage1_vae.posteriors.linear_flows import Radial, planar
from stage1_vae.priors import PRIORS, StandardNormalConfig
from tests.golden import GoldenVAE, golden_vae, part
from tests.stage1_vae.posteriors.test_golden import check_loss, networks

Flow = Callable[[Tensor], tuple[Tensor, Tensor]]  # b d -> b d, and the log-determinant, b


def masked_network(weights: Mapping[str, Tensor], prefix: str) -> MaskedDense:
    """Ours with their weights, and with the masks of the file, which are random numbers: it is not autoregressive."""
    own = part(weights, prefix)
    places = sorted({int(key.split(".")[0]) for key in own})
    sizes = [len(own[f"{place}.bias"]) for place in places]
    network = MaskedDense(sizes[-1] // 2, sizes[:-1], 2)
    for layer, place in zip(network.layers, places, strict=True):
        layer.weight.data, layer.bias.data = own[f"{place}.weight"], own[f"{place}.bias"]
        layer.mask = own[f"{place}.mask"]
    return network


def scaled(network: MaskedDense, x: Tensor, forward: bool, one_by_one: bool) -> tuple[Tensor, Tensor]:
    """Forward (x - shift) / scale, else x scale + shift: of all numbers at once, by those of x before each, or one by
    one, by those of the result."""
    read, log_scales = torch.zeros_like(x) if one_by_one else x, torch.zeros_like(x)
    for number in range(x.shape[1] if one_by_one else 1):
        shift, log_scale = network(read).unbind(-2)
        result = (x - shift) * (-log_scale).exp() if forward else x * log_scale.exp() + shift
        if one_by_one:
            now = torch.arange(x.shape[1]) == number
            read = torch.where(now, result, read)
            log_scales = torch.where(now, log_scale, log_scales)
        else:
            log_scales = log_scale
    return read if one_by_one else result, (-log_scales if forward else log_scales).sum(-1)


@pytest.mark.parametrize("flow", ["iaf", "iaf_bn", "maf", "maf_bn"])
@pytest.mark.parametrize("direction", ["forward", "inverse", "train"])
def test_published_masked_flows(flow: str, direction: str):
    """Numbers are turned round after every layer. A masked autoregressive flow takes them all at once forward, an
    inverse one backward. Ours have gates in the place of scales, and no batch normalisation: that is written out."""
    reference = golden_vae("pythae_flow_modules")
    weights = part(reference.weights, f"{flow}.net.")
    forward = direction != "inverse"
    if direction == "train" and flow != "maf_bn":
        pytest.skip("the file has it of one alone")
    x, total = reference.inputs["x"], torch.zeros(6)
    layers = range(4 if flow.endswith("_bn") else 2)
    for place in layers if forward else reversed(layers):
        x = x if forward else x.flip(1)
        if f"{place}.log_gamma" in weights:
            norm = part(weights, f"{place}.")
            if direction == "train":  # by the batch, of whose mean and variance a tenth is taken down
                batch = {"running_mean": x.mean(0), "running_var": x.var(0)}
                for name, value in batch.items():
                    reference.check(f"{flow}/train/after/net.{place}.{name}", 0.9 * norm[name] + 0.1 * value)
                norm |= batch
            log_scale = norm["log_gamma"] - 0.5 * (norm["running_var"] + 1e-5).log()
            mean, beta = norm["running_mean"], norm["beta"]
            x = (x - mean) * log_scale.exp() + beta if forward else (x - beta) * (-log_scale).exp() + mean
            total = total + (log_scale.sum() if forward else -log_scale.sum())
        else:
            network = masked_network(weights, f"{place}.net.")
            x, log_determinant = scaled(network, x, forward, one_by_one=forward == flow.startswith("iaf"))
            total = total + log_determinant
        x = x.flip(1) if forward else x
    reference.check(f"{flow}/{direction}/out", x)
    reference.check(f"{flow}/{direction}/log_det", total)


def published_planar(weights: Mapping[str, Tensor], prefix: str, activation: str = "tanh") -> Flow:
    """Theirs does not constrain u, and adds 1e-4 to the determinant."""
    u, w, bias = (weights[f"{prefix}{name}"] for name in ("u", "w", "b"))

    def flow(z: Tensor) -> tuple[Tensor, Tensor]:
        moved, slope = planar(z, u, w, bias, activation)
        return moved, ((1 + slope * (u * w).sum()).abs() + 1e-4).log()[:, 0]

    return flow


def published_radial(weights: Mapping[str, Tensor], prefix: str) -> Flow:
    return Radial(*(weights[f"{prefix}{name}"] for name in ("x0", "log_alpha", "beta"))).forward


@pytest.mark.parametrize("flow", ["planar_tanh", "planar_elu", "radial"])
def test_published_linear_flows(flow: str):
    reference = golden_vae("pythae_flow_modules")
    if flow == "radial":
        function = published_radial(reference.weights, "radial.")
    else:
        function = published_planar(reference.weights, f"{flow}.", flow.removeprefix("planar_"))
    moved, log_determinant = function(reference.inputs["x"])
    reference.check(f"{flow}/out", moved)
    reference.check(f"{flow}/log_det", log_determinant)


def check_vae(reference: GoldenVAE, flow: Flow) -> None:
    heads = ("embedding", "log_var")
    encoder, decoder = networks(reference, heads)
    mean, log_variance = encoder(reference.inputs["x"].flatten(1)).chunk(2, dim=-1)
    reference.check("enc/embedding", mean)
    reference.check("enc/log_covariance", log_variance)
    start, log_density = DiagonalGaussian(mean, 0.5 * log_variance).draw(reference.inputs["eps0"][None])
    latents, log_determinant = flow(start[0])
    prior = PRIORS["standard_normal"][0](StandardNormalConfig(), latents.shape[1:])
    kl = (log_density - prior.log_density(latents[None])).sum(-1)[0] - log_determinant
    check_loss(reference, (encoder, decoder), heads, latents, kl)


def test_the_vae_with_inverse_autoregressive_flows():
    reference = golden_vae("pythae_flows").variant("iaf")
    layers = [masked_network(reference.weights, f"iaf_flow.net.{place}.net.") for place in range(2)]

    def flow(z: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(z))
        for network in reversed(layers):
            z, log_determinant = scaled(network, z.flip(1), forward=False, one_by_one=False)
            total = total + log_determinant
        return z, total

    check_vae(reference, flow)
    for place, network in enumerate(layers):
        for number, layer in enumerate(network.layers):
            reference.check(f"grad_loss/iaf_flow.net.{place}.net.{2 * number}.bias", layer.bias.grad)


@pytest.mark.parametrize("variant", ["linnf", "linnf_bce"])
def test_the_vae_with_linear_flows(variant: str):
    reference = golden_vae("pythae_flows").variant(variant)
    weights = {key: value.requires_grad_(key.startswith("net.")) for key, value in reference.weights.items()}
    flows = [
        {"Planar": published_planar, "Radial": published_radial}[kind](weights, f"net.{place}.")
        for place, kind in enumerate(reference.config["flows"])
    ]

    def flow(z: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(z))
        for one in flows:
            z, log_determinant = one(z)
            total = total + log_determinant
        return z, total

    check_vae(reference, flow)
    for key, value in weights.items():
        if key.startswith("net."):
            reference.check(f"grad_loss/{key}", value.grad)
