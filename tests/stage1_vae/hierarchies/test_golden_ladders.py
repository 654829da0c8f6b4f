"""Published ladders: their latents, KL terms, losses and gradients from our parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vae.hierarchies.base import Normal, normal_kl, product
from stage1_vae.hierarchies.dense import hidden_layers
from stage1_vae.hierarchies.markov import MarkovConfig, MarkovHierarchy
from stage1_vae.objectives.terms import Terms
from tests.golden import GoldenVAE, golden_vae, part

# ---- of the paper: federicobergamin ---------------------------------------------------------------------------------


def places(layers: int) -> dict[str, str]:
    """Our names of published ones, both without `.weight` and the like; what is behind a bar is the half of a layer."""
    found = {"reconstruction.hidden_layer": "down.0.0", "reconstruction.reconstruction": "output"}
    for i in range(layers):
        found |= {f"encoder.{i}.hidden_layer": f"up.{i}.0", f"encoder.{i}.batchnorm": f"up.{i}.1"}
        found |= {f"encoder.{i}.{head}": f"recognition.{i}.linear|{half}" for half, head in enumerate(("mu", "_var"))}
    for j in range(layers - 1):
        layer = layers - 1 - j  # of which it reads
        found |= {f"decoder.{j}.hidden_layer": f"down.{layer}.0", f"decoder.{j}.batchnorm": f"down.{layer}.1"}
        found |= {f"decoder.{j}.{h}": f"priors.{layer - 1}.linear|{half}" for half, h in enumerate(("mu", "_var"))}
    return found


def ours(name: str, layers: int) -> tuple[str, int | None]:
    """Of a published weight's name ours, and which half of that weight it is."""
    where, _, kind = name.rpartition(".")
    place, _, half = places(layers)[where].partition("|")
    return f"{place}.{kind}", int(half) if half else None


def ladder(reference: GoldenVAE) -> MarkovHierarchy:
    """Other slopes on the two paths, and no normalisation in the layer next to the image."""
    config = MarkovConfig(
        latents=reference.config["z_dims"],
        hidden=reference.config["hidden_dims"],
        hidden_layers=1,
        inference="top_down",
        activation="leaky_relu",
        batch_norm=True,
        variance="softplus",
    )
    model = MarkovHierarchy(config, (4, 5))
    for path, slope in ((model.up, 0.01), (model.down, 0.1)):
        for layers in path:
            layers[2] = nn.LeakyReLU(slope)
    model.down[0][1], model.down[0][2] = nn.Identity(), nn.ReLU()
    taken: dict[str, list[Tensor]] = {}
    for name, tensor in reference.weights.items():
        taken.setdefault(ours(name, len(config.latents))[0], []).insert(
            0 if name.split(".")[-2] == "mu" else 99, tensor
        )
    model.load_state_dict({name: torch.cat(two) if len(two) > 1 else two[0] for name, two in taken.items()})
    return model


def terms_of(reference: GoldenVAE, model: MarkovHierarchy, mode: str) -> Terms:
    images = reference.inputs["x"].view(-1, 1, 4, 5) * 2 - 1
    noise = torch.cat([reference.inputs[f"{mode}/eps{j}"] for j in range(3)], dim=1)
    return model(images, noise=noise.unsqueeze(0))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_ladder_of_the_paper(mode: str):
    reference = golden_vae("ladder_bergamin")
    model = ladder(reference).train(mode == "train")
    terms = terms_of(reference, model, mode)
    for j, latents in enumerate(terms.latents):
        reference.check(f"{mode}/z/{j}", latents[0])
    kl = torch.stack([(q - p)[0].sum(-1) for q, p in zip(terms.log_posterior, terms.log_prior, strict=True)])
    reference.check(f"{mode}/kl", kl.sum(0))
    reference.check(f"{mode}/kl_per_layer", kl.sum(1))
    loss = reference.config["beta"] * kl.sum(0).mean() - terms.log_likelihood.mean()
    reference.check(f"{mode}/loss", loss)
    groups = [latents[0].detach() for latents in terms.latents]
    if mode == "eval":
        outputs = model.generate(len(groups[0]), lambda place, _: groups[place])
        reference.check("eval/pixels_mean", outputs.sigmoid().flatten(1))
        return
    loss.backward()
    model.after_step()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    for name in part(reference.outputs, "train/grad/"):
        place, half = ours(name, 3)
        found = gradients[place]
        reference.check(f"train/grad/{name}", found if half is None else found.chunk(2)[half])
    buffers = dict(model.named_buffers())
    for name in part(reference.outputs, "train/after/"):
        reference.check(f"train/after/{name}", buffers[ours(name, 3)[0]])


def test_what_image_and_prior_say_of_the_layers_of_the_ladder_of_the_paper():
    reference = golden_vae("ladder_bergamin")
    model = ladder(reference).eval()
    with torch.no_grad():
        terms = terms_of(reference, model, "eval")
        features = model.features(reference.inputs["x"].view(-1, 1, 4, 5) * 2 - 1)
        for layer in range(3):
            check_normal(reference, f"eval/enc/{layer}", Normal(*features[2 * layer : 2 * layer + 2]))
        for j in range(2):
            prior = model.prior_given(1 - j, terms.latents[j][0])
            check_normal(reference, f"eval/dec/{j}", prior)
            seen = Normal(*features[2 * (1 - j) : 2 * (1 - j) + 2])
            check_normal(reference, f"eval/q/{j + 1}", product(seen, prior))
            closed = normal_kl(product(seen, prior), prior)
            torch.testing.assert_close(terms.exact_kl[j + 1][0], closed)
        noise = torch.cat([reference.inputs[f"sample/eps{j}"] for j in range(3)], dim=1)
        buffers = dict(model.named_buffers())
        for name, tensor in part(reference.outputs, "train/after/").items():  # samples were drawn after a step
            buffers[ours(name, 3)[0]].copy_(tensor)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *_, **__: noise)
            latents = model.draw_latents(len(noise))
        reference.check("sample/pixels_mean", (model.decode(latents).flatten(1) + 1) / 2)


def check_normal(reference: GoldenVAE, name: str, normal: Normal) -> None:
    reference.check(f"{name}/mu", normal.mean)
    reference.check(f"{name}/var", (2 * normal.log_scale).exp())


def test_the_product_of_gaussians_of_far_apart_variances():
    """The published one adds 1e-8 to variances before it takes their inverse, which counts beside one of 1e-9."""
    reference = golden_vae("ladder_bergamin")
    first, second = (
        Normal(reference.inputs[f"mu{i}"], 0.5 * (reference.inputs[f"var{i}"] + 1e-8).log()) for i in (1, 2)
    )
    check_normal(reference, "merge", product(first, second))


# ---- the second one: wohlert ----------------------------------------------------------------------------------------


class Published:
    """Weights by name, and layers of them."""

    def __init__(self, reference: GoldenVAE, *, training: bool) -> None:
        self.weights, self.training = reference.weights, training

    def linear(self, name: str, values: Tensor) -> Tensor:
        return F.linear(values, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def gaussian(self, name: str, values: Tensor) -> Normal:
        """The published softplus is of the log-variance: no variance is below 1."""
        return Normal(self.linear(f"{name}.mu", values), 0.5 * F.softplus(self.linear(f"{name}.log_var", values)))

    def hidden(self, linear: str, norm: str, values: Tensor) -> Tensor:
        units, inputs = self.weights[f"{linear}.weight"].shape
        layers = hidden_layers(inputs, units, 1, "leaky_relu", batch_norm=True)
        layers[2] = nn.LeakyReLU(0.1)
        layers[0].load_state_dict(part(self.weights, f"{linear}."))
        layers[1].load_state_dict(part(self.weights, f"{norm}."))
        return layers.train(self.training)(values)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_second_ladder(mode: str):
    """As published, the layer below reads a draw of the prior, and that of the posterior counts in the KL term alone:
    which is no bound of anything, and nothing of ours."""
    reference = golden_vae("ladder_wohlert")
    published, noise = Published(reference, training=mode == "train"), part(reference.inputs, f"{mode}/")
    seen, hidden = [], reference.inputs["x"]
    for i in range(3):
        hidden = published.hidden(f"ladder.encoder.{i}.linear", f"ladder.encoder.{i}.batchnorm", hidden)
        seen.append(published.gaussian(f"ladder.encoder.{i}.sample", hidden))
    passed_on = seen[-1].draw(noise["eps2"])
    kl = seen[-1].log_density(passed_on).sum(-1) - Normal.standard(passed_on).log_density(passed_on).sum(-1)
    for j in range(2):
        name = f"ladder.decoder.{j}"
        below = [published.hidden(f"{name}.linear{k}", f"{name}.batchnorm{k}", passed_on) for k in (1, 2)]
        posterior = product(seen[1 - j], published.gaussian(f"{name}.merge", below[0]))
        prior = published.gaussian(f"{name}.sample", below[1])
        drawn, passed_on = posterior.draw(noise[f"eps{3 + 2 * j}"]), prior.draw(noise[f"eps{4 + 2 * j}"])
        for which, normal in (("q", posterior), ("p", prior)):
            reference.check(f"{mode}/dec/{j}/{which}_mu", normal.mean)
            reference.check(f"{mode}/dec/{j}/{which}_log_var", 2 * normal.log_scale)
        reference.check(f"{mode}/dec/{j}/q_z", drawn)
        reference.check(f"{mode}/dec/{j}/z_passed_on", passed_on)
        kl = kl + posterior.log_density(drawn).sum(-1) - prior.log_density(drawn).sum(-1)
    reference.check(f"{mode}/kl", kl)


def test_the_second_product():
    reference = golden_vae("ladder_wohlert")
    said = Published(reference, training=False).gaussian("merge", reference.inputs["merge_z"])
    merged = product(Normal(reference.inputs["merge_mu1"], 0.5 * reference.inputs["merge_log_var1"]), said)
    reference.check("merge/mu", merged.mean)
    reference.check("merge/log_var", 2 * merged.log_scale)
    reference.check("merge/z", merged.draw(reference.inputs["merge/eps0"]))
