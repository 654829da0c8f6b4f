"""Products and mixtures of experts: the published ones to their last digits, and what they promise."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_vae.hierarchies.base import Normal, normal_kl
from stage1_vae.modalities.experts import Expert, Laplace, joint_normal, log_mixture, product_of_experts
from stage1_vae.objectives.multimodal import doubly_reparameterised_bound, plain_bound
from tests.golden import GoldenVAE, golden_vae

NAMES = ("a", "b", "c")


def layers(found: GoldenVAE, prefix: str, x: Tensor) -> Tensor:
    """The published default networks: layers of ReLU, the last of a decoder with a sigmoid."""
    of = found.weights
    return (x @ of[f"{prefix}.weight"].T) + of[f"{prefix}.bias"]


def encoded(found: GoldenVAE, name: str, target: Tensor, scale: str = "exp") -> tuple[Tensor, Tensor]:
    """Mean and what is said of the scale."""
    hidden = target.flatten(1)
    for layer in ("0.0", "1.0"):
        hidden = layers(found, f"encoders.{name}.layers.{layer}", hidden).relu()
    return tuple(layers(found, f"encoders.{name}.{head}", hidden) for head in ("embedding", "log_var"))  # type: ignore[return-value]


def decoded(found: GoldenVAE, name: str, latents: Tensor) -> Tensor:
    hidden = layers(found, f"decoders.{name}.layers.0.0", latents).relu()
    return layers(found, f"decoders.{name}.layers.1.0", hidden).sigmoid()


def normals(found: GoldenVAE) -> list[Normal]:
    experts = []
    for name in NAMES:
        mean, log_variance = encoded(found, name, found.inputs[f"x.{name}"])
        found.check(f"enc/{name}/mu", mean)
        found.check(f"enc/{name}/log_var", log_variance)
        experts.append(Normal(mean, 0.5 * log_variance))
    return experts


def presence(found: GoldenVAE) -> list[Tensor]:
    everything = torch.ones(len(found.inputs["x.a"]), dtype=torch.bool)
    return [found.inputs[f"mask.{name}"].bool() if f"mask.{name}" in found.inputs else everything for name in NAMES]


def test_the_product_is_the_published_one():
    found = golden_vae("multivae_poe_fn")
    mean, log_variance = product_of_experts(found.inputs["mu"], found.inputs["log_var"], prior=False)
    found.check("stable/mu", mean)
    found.check("stable/log_var", log_variance)


@pytest.mark.parametrize("name", ["mvae", "mvae_dist", "mvae_joint_only", "mvae_missing"])
def test_posteriors_of_all_subsets_are_those_published(name: str):
    found = golden_vae("multivae_poe").variant(name)
    experts, present = normals(found), presence(found)
    joint = joint_normal(experts, present)
    found.check("joint/mu", joint.mean)
    found.check("joint/log_var", 2 * joint.log_scale)
    for size in (1, 2):
        for chosen in itertools.combinations(range(3), size):
            subset = joint_normal([experts[m] for m in chosen], [present[m] for m in chosen])
            key = "subset/" + "+".join(NAMES[m] for m in chosen)
            if f"{key}/mu" in found.outputs:
                found.check(f"{key}/mu", subset.mean)
                found.check(f"{key}/log_var", 2 * subset.log_scale)


def test_one_expert_alone_times_the_prior_is_exact():
    """With all but one modality missing: N(m, s^2) N(0, 1) is N(m / (1 + s^2), s^2 / (1 + s^2))."""
    torch.manual_seed(0)
    experts = [Normal(torch.randn(5, 3).double(), torch.randn(5, 3).double()) for _ in range(3)]
    for there in range(3):
        present = [torch.full((5,), number == there) for number in range(3)]
        joint = joint_normal(experts, present)
        mean, variance = experts[there].mean, (2 * experts[there].log_scale).exp()
        torch.testing.assert_close(joint.mean, mean / (1 + variance))
        torch.testing.assert_close((2 * joint.log_scale).exp(), variance / (1 + variance))
    nothing = joint_normal(experts, [torch.zeros(5, dtype=torch.bool)] * 3)
    assert torch.equal(nothing.mean, torch.zeros(5, 3).double())
    assert torch.equal(nothing.log_scale, torch.zeros(5, 3).double())


def test_the_product_is_proportional_to_the_densities():
    torch.manual_seed(1)
    experts = [Normal(torch.randn(1, 2).double(), 0.5 * torch.randn(1, 2).double()) for _ in range(2)]
    joint = joint_normal(experts, [torch.ones(1, dtype=torch.bool)] * 2)
    z = torch.randn(7, 2).double()
    prior = Normal(torch.zeros(1, 2).double(), torch.zeros(1, 2).double())
    apart = sum(one.log_density(z).sum(1) for one in [*experts, prior]) - joint.log_density(z).sum(1)
    assert float(apart.std()) < 1e-12


def test_gradients_of_a_missing_expert_vanish_and_no_other_is_lost():
    experts = [Normal(torch.randn(4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)) for _ in range(2)]
    joint = joint_normal(experts, [torch.tensor([True, True, False, False]), torch.ones(4, dtype=torch.bool)])
    (joint.mean + joint.log_scale).sum().backward()
    first, second = experts
    assert first.mean.grad is not None
    assert (first.mean.grad[2:] == 0).all()
    assert (first.log_scale.grad[2:] == 0).all()  # type: ignore[index]
    assert (first.mean.grad[:2] != 0).all()
    assert all(part.grad.isfinite().all() for one in experts for part in one)  # type: ignore[union-attr]
    assert (second.mean.grad != 0).all()  # type: ignore[union-attr]


# ---- mixtures -------------------------------------------------------------------------------------------------------


def log_likelihood(kind: str, target: Tensor, output: Tensor, scale: float) -> Tensor:
    if kind == "bernoulli":  # the published one takes the output of a sigmoid for logits
        return -torch.nn.functional.binary_cross_entropy_with_logits(output, target.expand_as(output), reduction="none")
    law: Any = {"normal": torch.distributions.Normal, "laplace": torch.distributions.Laplace}[kind]
    return law(output, scale).log_prob(target)


@pytest.mark.parametrize("name", ["laplace", "normal", "missing"])
def test_bounds_of_mixtures_are_those_published(name: str):
    found = golden_vae("multivae_moe").variant(name)
    for weight in found.weights.values():
        weight.requires_grad_()
    config, present = found.config, presence(found)
    kinds = config.get("decoders_dist", dict.fromkeys(NAMES, "normal"))
    scales = {m: config.get("decoder_dist_params", {}).get(m, {}).get("scale", 1.0) for m in NAMES}
    laplace = config["prior_and_posterior_dist"] == "laplace_with_softmax"
    experts: list[Expert] = []
    for m in NAMES:
        mean, raw = encoded(found, m, found.inputs[f"x.{m}"])
        if laplace:
            scale = raw.softmax(-1) * raw.shape[-1] + 1e-6
            found.check(f"call0/std/{m}", scale)
            experts.append(Laplace(mean, scale.log()))
        else:
            experts.append(Normal(mean, 0.5 * raw))
    sizes = {m: found.inputs[f"x.{m}"][0].numel() for m in NAMES}
    rescale = {m: max(sizes.values()) / sizes[m] if config.get("uses_likelihood_rescaling") else 1.0 for m in NAMES}
    noise = [key for key in found.inputs if key.startswith("call0.")]
    doubly = config["calls"][0]["loss"] == "dreg_looser"
    told = [type(one)(*(part.detach() for part in one)) for one in experts] if doubly else experts
    bounds = []
    for number, m in enumerate(NAMES):
        draws = torch.stack([experts[number].draw(part) for part in found.inputs[noise[number]]])
        found.check(f"call0/z/{m}", draws)
        prior_mean, prior_scale = found.outputs["call0/prior_mean"], found.outputs["call0/prior_std"]
        prior: Expert = (Laplace if laplace else Normal)(prior_mean, prior_scale.log())
        log_prior = torch.stack([prior.log_density(draw).sum(-1) for draw in draws])
        log_p: Tensor | float = 0.0
        for other, there in zip(NAMES, present, strict=True):
            target = found.inputs[f"x.{other}"].flatten(1)
            of_other = log_likelihood(kinds[other], target, decoded(found, other, draws), scales[other]).sum(-1)
            log_p = log_p + rescale[other] * of_other * there
        log_weights = log_p + log_prior - log_mixture(told, present, draws)
        if f"call0/log_w/{m}" in found.outputs:
            found.check(f"call0/log_w/{m}", log_weights * present[number])
        of_weights = doubly_reparameterised_bound if doubly else plain_bound
        bounds.append(of_weights(log_weights, draws) * present[number])
    loss = -(torch.stack(bounds).sum(0) / torch.stack(present).sum(0)).sum()
    if not doubly:  # whose published value is that of a surrogate
        found.check("call0/loss", loss)
    loss.backward()
    # The published prior's scale may learn too; ours is N(0, I).
    gradients = [key for key in found.outputs if key.startswith("call0/grad/") and "prior" not in key]
    assert len(gradients) > 2
    for key in gradients:
        found.check(key, found.weights[key.removeprefix("call0/grad/")].grad)  # type: ignore[arg-type]


def test_a_mixture_is_the_mean_of_the_densities_that_are_there():
    torch.manual_seed(0)
    experts = [Normal(torch.randn(3, 2), torch.randn(3, 2)) for _ in range(2)]
    z = torch.randn(4, 3, 2)
    both = [torch.ones(3, dtype=torch.bool), torch.tensor([True, False, True])]
    found = log_mixture(experts, both, z)
    densities = torch.stack([torch.stack([one.log_density(draw).sum(1) for draw in z]) for one in experts]).exp()
    torch.testing.assert_close(found[:, 0], densities[:, :, 0].mean(0).log())
    torch.testing.assert_close(found[:, 1], densities[0, :, 1].log())


def test_laplace_draws_have_their_density():
    one = Laplace(torch.tensor([[0.7]]), torch.tensor([[math.log(0.5)]]))
    noise = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    drawn = one.draw(noise)
    assert float(drawn.mean()) == pytest.approx(0.7, abs=0.01)
    assert float((drawn - 0.7).abs().mean()) == pytest.approx(0.5, abs=0.01)
    grid = torch.linspace(-9, 11, 20_001)[:, None]
    assert float(one.log_density(grid).exp().sum() * 0.001) == pytest.approx(1, abs=1e-3)


def test_kl_of_a_joint_normal_to_the_prior_is_the_closed_form():
    torch.manual_seed(0)
    joint = joint_normal([Normal(torch.randn(2, 3), torch.randn(2, 3))], [torch.ones(2, dtype=torch.bool)])
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(joint.mean, joint.log_scale.exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(normal_kl(joint, Normal(torch.zeros(2, 3), torch.zeros(2, 3))), expected)
