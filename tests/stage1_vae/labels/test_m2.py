from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn.functional import softplus

from common.errors import UserError
from common.model_io import load_pretrained
from stage1_vae.labels.m2 import M2, M2Config
from stage1_vae.likelihoods import GaussianConfig
from stage1_vae.networks import ConvolutionalConfig, DenseConfig
from stage1_vae.objectives.terms import elbo, total_kl
from tests.golden import golden_vae, part

K, D = 3, 2


def small(**changes: object) -> M2:
    torch.manual_seed(0)
    network = DenseConfig(hidden=(6,), activation="tanh")
    config = M2Config(
        **{"classes": K, "latents": D, "classifier": network, "encoder": network, "decoder": network} | changes
    )
    model = M2(config, (4, 4))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    return model


def pictures(count: int = 5) -> Tensor:
    return torch.bernoulli(torch.full((count, 1, 4, 4), 0.5), generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---- the published arithmetic ---------------------------------------------------------------------------------------

PUBLISHED = {  # layers of wohlert/semi-supervised-pytorch by the names of ours
    "classifier.dense": "classifier.layers.layers.0",
    "classifier.logits": "classifier.layers.layers.1",
    "encoder.hidden.0": "encoder.layers.layers.0",
    "encoder.hidden.1": "encoder.layers.layers.1",
    "encoder.sample.mu": "encoder.layers.layers.2",
    "encoder.sample.log_var": "encoder.layers.layers.2",
    "decoder.hidden.0": "decoder.network.layers.layers.0",
    "decoder.hidden.1": "decoder.network.layers.layers.1",
    "decoder.reconstruction": "decoder.network.layers.layers.2",
}


def as_ours(published: str, value: Tensor, latents: int) -> tuple[str, slice, Tensor]:
    """Of a published weight or its gradient: the name of ours, which rows of it, and their values."""
    layer, kind = published.rsplit(".", 1)
    rows = {"encoder.sample.mu": slice(0, latents), "encoder.sample.log_var": slice(latents, None)}
    if published == "decoder.hidden.0.weight":  # the style stands before the class there
        value = torch.cat([value[:, latents:], value[:, :latents]], dim=1)
    return f"{PUBLISHED[layer]}.{kind}", rows.get(layer, slice(None)), value


class Published(M2):
    """Its logarithms of variances are never below 0."""

    def style(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = super().style(images, classes)
        return mean, 0.5 * softplus(2 * log_scale)


def published_bounds(model: M2, images: Tensor, classes: Tensor, noise: Tensor, mc: int, iw: int) -> list[Tensor]:
    """Of images in c classes, c b: their bounds, c b, and the KL terms and mean images of all draws, draw after draw.
    KL terms are of single draws, each class has noise of its own, mc * iw of (c b) d, and 1e-8 stands in a logarithm.
    """
    noise = noise.view(mc * iw, *classes.shape, -1)
    found = [model.of_classes(images, classes[c : c + 1], noise[:, c]) for c in range(len(classes))]
    likelihood, prior, posterior, latents = (
        torch.cat([getattr(one, field) for one in found], dim=1)
        for field in ("log_likelihood", "log_prior", "log_posterior", "latents")
    )
    kl = (posterior - prior).sum(-1)  # k c b
    single = (likelihood - math.log(model.num_classes) - kl).unflatten(0, (mc, iw))
    largest = single.amax(dim=1)
    bounds = (((single - largest.unsqueeze(1)).exp().mean(dim=1) + 1e-8).log() + largest).mean(dim=0)
    units = model.unit_vectors(classes).expand(mc * iw, -1, -1, -1)
    decoded = model.decoder.mean(torch.cat([units, latents], dim=-1).flatten(0, 2))
    return [bounds, kl.flatten(), (decoded.flatten(1) + 1) / 2]


def test_bounds_and_their_gradient_are_the_published_ones():
    whole = golden_vae("m2_wohlert")
    file = whole.variant("m2")
    pixels, classes, latents, hidden = file.config["dims"]
    config = M2Config(
        classes=classes,
        latents=latents,
        classifier=DenseConfig(hidden=hidden[:1]),
        encoder=DenseConfig(hidden=hidden),
        decoder=DenseConfig(hidden=hidden[::-1]),
    )
    model = Published(config, (3, pixels // 3))
    for published, value in file.weights.items():
        name, rows, value = as_ours(published, value, latents)
        model.get_parameter(name).data[rows] = value

    x, u = (file.inputs[name].view(-1, 1, 3, pixels // 3) * 2 - 1 for name in ("x", "u"))
    labels = file.inputs["y"].argmax(1)
    log_q, q = model.class_log_probabilities(x), model.class_log_probabilities(u).exp()
    file.check("q_y_labelled", log_q.exp())
    file.check("q_y_unlabelled", q)
    classification = log_q.gather(1, labels[:, None]).mean()
    file.check("classification_log_prob", classification)
    entropy = -(q * (q + 1e-8).log()).sum(1)
    every = torch.arange(classes)[:, None].expand(-1, len(u))
    for mc, iw in file.config["samples"]:
        name, elbos = f"mc{mc}_iw{iw}", {}
        for kind, images, asked in (("labelled", x, labels[None]), ("unlabelled", u, every)):
            noise = whole.inputs[f"m2/{name}/{kind}/eps0"]
            bounds, kl, decoded = published_bounds(model, images, asked, noise, mc, iw)
            elbos[kind] = (bounds[0] if kind == "labelled" else (q.T * bounds).sum(0) + entropy).mean()
            file.check(f"{name}/{kind}/elbo", elbos[kind])
            file.check(f"{name}/{kind}/kl", kl)
            file.check(f"{name}/{kind}/recon", decoded)
    objective = -elbos["labelled"] - file.config["alpha"] * classification - elbos["unlabelled"]
    file.check("J_alpha", objective)
    objective.backward()
    gradients = part(file.outputs, "grad/")
    assert len(gradients) == 10
    for published, value in gradients.items():
        name, rows, value = as_ours(published, value, latents)
        found = model.get_parameter(name).grad
        assert found is not None
        torch.testing.assert_close(found[rows], value, rtol=1e-5, atol=file.atol)


# ---- the bounds, term by term ---------------------------------------------------------------------------------------


def plain_bound(model: M2, image: Tensor, label: int, noise: Tensor) -> Tensor:
    """-L(x, y) of one image, c H W, by the words of the paper and torch's distributions: one draw, its KL in closed
    form."""
    unit = torch.eye(K)[label]
    x = (image.flatten() + 1) / 2
    mean, log_variance = model.encoder.layers(torch.cat([x, unit])).chunk(2)
    q, prior = Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros(D), torch.ones(D))
    logits = model.decoder.network.layers(torch.cat([unit, q.loc + q.scale * noise]))
    return Bernoulli(logits=logits).log_prob(x).sum() - math.log(K) - kl_divergence(q, prior).sum()


def test_labelled_and_unlabelled_bounds_and_their_gradients():
    """Against loops over images and classes: images with and without a label in one batch, in any order."""
    model, images, labels = small(), pictures(), torch.tensor([-1, 2, -1, 0, -1])
    noise = torch.randn(1, 5, D, generator=torch.Generator().manual_seed(2))
    terms = model(images, noise=noise, labels=labels)
    expected = []
    for image, label, of_image in zip(images, labels.tolist(), noise[0], strict=True):
        if label >= 0:
            expected.append(plain_bound(model, image, label, of_image))
            continue
        q = model.classifier(image[None])[0].softmax(0)
        bounds = torch.stack([plain_bound(model, image, y, of_image) for y in range(K)])
        expected.append((q * bounds).sum() - (q * q.log()).sum())
    torch.testing.assert_close(elbo(terms), torch.stack(expected))
    weights = torch.arange(1.0, 6.0)  # so that no two images can change places
    found = torch.autograd.grad((weights * elbo(terms)).sum(), list(model.parameters()))
    true = torch.autograd.grad((weights * torch.stack(expected)).sum(), list(model.parameters()))
    for name, a, b in zip(dict(model.named_parameters()), found, true, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_of_a_label_the_terms_say_how_sure_the_classifier_is_of_it():
    model, images = small(), pictures()
    labels = torch.tensor([0, 1, 2, -1, 1])
    terms = model(images, 3, labels=labels)
    said = model.class_log_probabilities(images)
    known = [0, 1, 2, 4]
    for draw in terms.log_posterior[0]:
        torch.testing.assert_close(draw[known, 0], said[known, labels[known]])


def test_without_labels_the_class_is_a_group_of_latents_with_its_kl():
    model, images = small(), pictures()
    terms = model(images, draws=2)
    q = model.class_log_probabilities(images)
    torch.testing.assert_close(terms.kl[0][:, 0], (q.exp() * (q + math.log(K))).sum(1))
    assert total_kl(terms).shape == (5,)
    best = q.argmax(1)
    assert torch.equal(terms.latents[0], torch.eye(K)[best].expand(2, -1, -1))
    given = model(images, noise=torch.zeros(1, 5, D)).latents[1][0]
    torch.testing.assert_close(given, model.encode(images)[:, K:])


def test_weights_are_those_of_the_likelihood_in_which_classes_are_summed_over():
    """Against an integral over a grid of one latent number: their mean is p(x), that of their logs lies between it and
    the bound."""
    model, images = small(latents=1), pictures(4)
    for weight in model.encoder.parameters():
        weight.data *= 0.3  # q(z|x,y) is then wide enough to be drawn from for the posterior
    grid = torch.linspace(-8, 8, 4001)[:, None]
    log_prior = -0.5 * grid[:, 0].square() - 0.5 * math.log(2 * math.pi) + math.log(16 / 4000)
    log_p = []
    for image in images:
        of_classes = []
        for label in range(K):
            latents = torch.cat([torch.eye(K)[label].expand(len(grid), -1), grid], dim=1)
            likelihood = model.decoder.log_likelihood(latents[:, None], image[None])[:, 0]
            of_classes.append((likelihood + log_prior).logsumexp(0) - math.log(K))
        log_p.append(torch.stack(of_classes).logsumexp(0))
    terms = model(images, draws=20_000)
    log_weights = terms.log_weights
    torch.testing.assert_close(log_weights.logsumexp(0) - math.log(20_000), torch.stack(log_p), atol=0.02, rtol=0)
    assert (elbo(terms) < log_weights.mean(0)).all()
    assert (log_weights.mean(0) < torch.stack(log_p)).all()


def test_a_dense_encoder_computes_what_layers_over_pixels_and_class_do():
    model, images = small(), pictures()
    classes = torch.tensor([[0, 1, 2, 1, 0], [2, 2, 0, 0, 1]])
    both = torch.cat([(images.flatten(1) + 1).expand(2, -1, -1) / 2, torch.eye(K)[classes]], dim=-1)
    torch.testing.assert_close(model.encoder(images, classes), model.encoder.layers(both))


# ---- as a model -----------------------------------------------------------------------------------------------------


def test_classes_are_drawn_as_asked_and_styles_go_from_one_to_another():
    model = small()
    labels = torch.tensor([2, 0, 2, 1])
    latents = model.draw_latents(4, torch.Generator().manual_seed(0), labels=labels)
    assert torch.equal(latents[:, :K], torch.eye(K)[labels])
    moved = model.in_class(latents, torch.tensor([0, 0, 1, 2]))
    assert torch.equal(moved[:, :K], torch.eye(K)[[0, 0, 1, 2]])
    assert torch.equal(moved[:, K:], latents[:, K:])
    drawn = model.draw_latents(3000, torch.Generator().manual_seed(0))[:, :K].mean(0)
    torch.testing.assert_close(drawn, torch.full((K,), 1 / K), atol=0.03, rtol=0)


@pytest.mark.parametrize("network", [DenseConfig(hidden=(6,)), ConvolutionalConfig(widths=(4, 8))])
def test_a_folder_holds_it_with_the_names_of_its_classes(tmp_path: Path, network: DenseConfig | ConvolutionalConfig):
    config = M2Config(classes=K, classifier=network, encoder=network, decoder=network, likelihood=GaussianConfig())
    model = M2(config, (4, 4), class_names=("ant", "bee", "cat")).eval()
    model.save_pretrained(tmp_path / "model")
    again = load_pretrained(tmp_path / "model", {"m2": M2})
    images, noise = pictures(), torch.randn(2, 5, 50)
    assert again.class_names == ("ant", "bee", "cat")
    assert again.fingerprint() == model.fingerprint()
    torch.testing.assert_close(elbo(again(images, noise=noise)), elbo(model(images, noise=noise)))
    assert again.decode(again.encode(images)).shape == images.shape


def test_what_it_cannot_be_is_refused():
    with pytest.raises(UserError, match="classes=1, expected at least 2"):
        M2Config(classes=1)
    with pytest.raises(UserError, match=r"encoder\.map=True, expected False"):
        M2Config(encoder=ConvolutionalConfig(map=True))
    with pytest.raises(UserError, match=r"classifier\.skip=True, expected False"):
        M2Config(classifier=DenseConfig(skip=True))
    with pytest.raises(UserError, match=r"model\.classes=3, but the images have 2 classes, a, b: give model.classes=2"):
        small().name_classes(("a", "b"))
