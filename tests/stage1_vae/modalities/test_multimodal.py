"""The model of two modalities: its bounds, what is missing, and training runs of every pair."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from images.datasets import DataConfig, image_datasets, to_float
from stage1_vae.binarise import NumberedImages
from stage1_vae.evaluation import judge
from stage1_vae.hierarchies.base import Normal
from stage1_vae.modalities.multimodal import PAIRS, Multimodal, MultimodalConfig
from stage1_vae.modalities.task import MultimodalTask, check_symbols, symbols_of
from stage1_vae.modalities.views import bytes_of, text_of
from stage1_vae.networks import DenseConfig
from stage1_vae.objectives import MixtureBoundConfig, SubsampledConfig, TrainingFacts, build_objective
from stage1_vae.objectives.terms import elbo
from stage1_vae.task import noise_of
from stage1_vae.train import train_vae
from tests.stage1_vae.test_train import config, images

__all__ = ["images"]  # a fixture

TINY = DenseConfig(hidden=(6,))


def model_of(pair: str, experts: str = "product", **changes: Any) -> Multimodal:
    torch.manual_seed(0)
    settings = {"pair": pair, "experts": experts, "latents": 2, "encoder": TINY, "decoder": TINY, "hidden": (5,)}
    return Multimodal(MultimodalConfig(**{**settings, "classes": 3, "length": 4, **changes}), (4, 6)).eval()


def binary(count: int) -> Tensor:
    return torch.randint(0, 2, (count, 1, 4, 6), generator=torch.Generator().manual_seed(1)) * 2.0 - 1


def symbols_for(model: Multimodal, count: int) -> Tensor | None:
    if "label" in PAIRS[model.config.pair]:
        return torch.arange(count).remainder(3).unsqueeze(1)
    return bytes_of(["one", "two", "a"], 4)[torch.arange(count) % 3] if "tokens" in PAIRS[model.config.pair] else None


def facts(model: Multimodal) -> TrainingFacts:
    return TrainingFacts(10, 10, model.shape, tuple(model.generator_parameters()))


@pytest.mark.parametrize("tells", ["none", "first", "all"])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_loss_of_a_product_is_the_sum_of_three_elbos_written_out(pair: str, tells: Any):
    model, pictures = model_of(pair, second_weight=3.0), binary(4)
    symbols, noise = symbols_for(model, 4), torch.randn(3, 4, 2)
    objective = build_objective(SubsampledConfig(beta=0.7, tells_both=tells), facts(model))
    ours = objective.loss(model, pictures, 0, noise, symbols).loss  # type: ignore[call-arg]
    seen = model.seen(pictures, symbols)
    first, second = model.experts(seen)
    total = torch.zeros(())
    for number, (one, other) in enumerate(((1, 1), (1, 0), (0, 1))):
        precision = 1 + one / first.log_scale.exp() ** 2 + other / second.log_scale.exp() ** 2
        pulls = one * first.mean / first.log_scale.exp() ** 2 + other * second.mean / second.log_scale.exp() ** 2
        posterior = torch.distributions.Normal(pulls / precision, precision**-0.5)
        z = posterior.mean + posterior.stddev * noise[number]
        kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
        of_first = one or tells == "all"
        of_second = other or tells != "none"
        told = of_first * model.first.log_likelihood(z[None], seen[0].target)[0]
        told = told + of_second * 3.0 * model.second.log_likelihood(z[None], seen[1].target)[0]
        total = total - (told - 0.7 * kl).mean()
    torch.testing.assert_close(ours, total)
    weights = list(model.parameters())
    for mine, theirs in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(total, weights), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pair", ["image_label", "left_right"])
def test_the_bound_of_a_mixture_written_out(pair: str):
    model, pictures = model_of(pair, "mixture", second_weight=2.0), binary(3)
    symbols, noise = symbols_for(model, 3), torch.randn(2 * 4, 3, 2)
    objective = build_objective(MixtureBoundConfig(draws_of_each=4), facts(model))
    ours = objective.loss(model, pictures, 0, noise, symbols).loss  # type: ignore[call-arg]
    seen = model.seen(pictures, symbols)
    experts = [torch.distributions.Normal(one.mean, one.log_scale.exp()) for one in model.experts(seen)]
    bounds = []
    for number, expert in enumerate(experts):
        z = expert.mean + expert.stddev * noise[4 * number : 4 * number + 4]
        mixed = 0.5 * (experts[0].log_prob(z).sum(-1).exp() + experts[1].log_prob(z).sum(-1).exp())
        told = model.first.log_likelihood(z, seen[0].target) + 2.0 * model.second.log_likelihood(z, seen[1].target)
        joint = told + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        bounds.append((joint - mixed.log()).exp().mean(0).log())
    torch.testing.assert_close(ours, -torch.stack(bounds).mean(), atol=1e-4, rtol=1e-5)


def test_a_missing_class_leaves_the_image_alone():
    """The same loss as of the image's ELBO twice, and nothing for the class; of a mixture, that of the one expert."""
    pictures, nowhere = binary(3), torch.full((3, 1), -1)
    product = model_of("image_label")
    noise = torch.randn(1, 3, 2)
    found = product.training_terms(pictures, nowhere, noise.expand(3, -1, -1, -1))
    torch.testing.assert_close(elbo(found[0]), elbo(found[1]))
    torch.testing.assert_close(elbo(found[1]), elbo(product.terms(pictures, noise=noise)))
    torch.testing.assert_close(elbo(found[2]), torch.zeros(3))
    mixture = model_of("image_label", "mixture")
    objective = build_objective(MixtureBoundConfig(draws_of_each=1), facts(mixture))
    loss = objective.loss(mixture, pictures, 0, torch.cat([noise, torch.randn(1, 3, 2)]), nowhere).loss  # type: ignore[call-arg]
    terms = mixture.terms(pictures, noise=noise)
    torch.testing.assert_close(loss, -terms.log_weights.mean())


@pytest.mark.parametrize("experts", ["product", "mixture"])
@pytest.mark.parametrize("pair", PAIRS)
def test_log_weights_are_of_the_posterior_that_draws_come_from(pair: str, experts: str):
    """Importance estimates of log p(x) by the model's posterior and by the prior agree."""
    model, pictures = model_of(pair, experts), binary(2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        terms = model.terms(pictures, noise=torch.randn(6_000, 2, model.noise_numbers, generator=generator))
        by_posterior = terms.log_weights.logsumexp(0) - math.log(6_000)
        z = torch.randn(20_000, 1, 2, generator=generator).expand(-1, 2, -1)
        seen = model.seen(pictures)
        weights = (1.0, 0.0) if "label" in pair or "tokens" in pair else (1.0, 1.0)
        by_prior = model.log_likelihood(z, seen, weights).logsumexp(0) - math.log(20_000)
    torch.testing.assert_close(by_posterior, by_prior, atol=0.1, rtol=0)


def apart() -> Multimodal:
    """A mixture whose experts say different things."""
    model = model_of("left_right", "mixture")
    for view, shift in zip((model.first, model.second), (1.0, -1.0), strict=True):
        last = [layer for layer in view.encoder.modules() if isinstance(layer, torch.nn.Linear)][-1]  # type: ignore[union-attr]
        last.bias.data = torch.tensor([2 * shift, 2 * shift, -2.5 + 0.5 * shift, -2.5 + 0.5 * shift])
    return model


def test_figures_of_a_mixture_do_not_depend_on_how_draws_are_parted():
    model, pictures = apart(), binary(2)
    whole, *parts = (judge(model, pictures, [0, 1], 12, at_once=at_once) for at_once in (10_000, 1, 7))
    for part in parts:
        torch.testing.assert_close(part.log_p, whole.log_p)
        torch.testing.assert_close(part.elbo, whole.elbo)


def test_one_draw_of_each_image_estimates_the_bound_of_the_mixture():
    """As validations take it, against the integral over all latents."""
    model, picture = apart(), binary(1)
    axis = torch.linspace(-6, 6, 241)
    z = torch.cartesian_prod(axis, axis).unsqueeze(1)  # k 1 d
    with torch.no_grad():
        seen = model.seen(picture)
        densities = [expert.log_density(z[:, 0]).sum(1) for expert in model.experts(seen)]
        log_q = torch.stack(densities).logsumexp(0) - math.log(2)
        log_joint = model.log_likelihood(z, seen)[:, 0] + torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 0]).sum(1)
        exact = (log_q.exp() * (log_joint - log_q)).sum() * (axis[1] - axis[0]) ** 2
        count = 4_000
        found = elbo(model.terms(picture.expand(count, -1, -1, -1), noise=noise_of(model, picture, range(count), 1)))
    error = float(found.std()) / math.sqrt(count)
    assert abs(float(found.mean() - exact)) < 4 * error
    assert error < 0.05


def test_any_subset_of_modalities_has_a_posterior():
    model, pictures = model_of("image_label"), binary(3)
    seen = model.seen(pictures, torch.tensor([[0], [1], [2]]))
    nothing = [replace_presence(one, present=False) for one in seen]
    assert torch.equal(model.posterior_of(nothing).mean, torch.zeros(3, 2))
    label = model.posterior_of([nothing[0], seen[1]])
    expert = model.second.posterior(seen[1].target)
    variance = (2 * expert.log_scale).exp()
    torch.testing.assert_close(label.mean, expert.mean / (1 + variance))
    mixture = model_of("left_right", "mixture")
    halves = mixture.seen(pictures)
    with pytest.raises(UserError, match="no Gaussian"):
        mixture.posterior_of(halves)
    right = mixture.posterior_of([replace_presence(halves[0], present=False), halves[1]])
    torch.testing.assert_close(right.mean, mixture.second.posterior(halves[1].target).mean)


def replace_presence(one: Any, *, present: bool) -> Any:
    return one._replace(present=torch.full_like(one.present, present))


@pytest.mark.parametrize("pair", PAIRS)
def test_images_are_put_together_and_models_come_back(pair: str, tmp_path: Path):
    model = model_of(pair)
    drawn = model.sample(3, torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 1, 4, 6)
    if pair == "left_right":
        z = model.draw_latents(3, torch.Generator().manual_seed(0))
        torch.testing.assert_close(drawn[..., 3:], model.second.decoder.mean(z))  # type: ignore[union-attr]
    again = Multimodal.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert again.fingerprint() == model.fingerprint()
    pictures = binary(2)
    torch.testing.assert_close(again.encode(pictures), model.encode(pictures))


@pytest.mark.parametrize(
    ("pair", "experts"), [("image_label", "product"), ("sizes", "product"), ("top_bottom", "mixture")]
)
def test_runs_learn_both_ways(images: Path, tmp_path: Path, pair: str, experts: str):
    network = DenseConfig(hidden=(16,))
    model = MultimodalConfig(
        pair=pair,
        experts=experts,
        latents=2,
        encoder=network,
        decoder=network,
        hidden=(16,),
        classes=2,
        second_weight=5.0,  # type: ignore[arg-type]
    )
    objective = SubsampledConfig() if experts == "product" else MixtureBoundConfig(draws_of_each=2)
    asked = replace(config(images, steps=100, learning_rate=1e-2, validate_every=100), model=model, objective=objective)
    result = train_vae(asked, tmp_path)
    assert result.metrics["negative_elbo"] < (60 if pair == "sizes" else 42)
    if pair != "image_label":
        return
    assert result.metrics["accuracy"] > 0.9
    trained = Multimodal.from_pretrained(tmp_path / "model")
    for label in (0, 1):  # from the class to the image: its bright half is where the class has it
        nothing = torch.zeros(1, 1, 8, 8)
        seen = trained.seen(nothing, torch.tensor([[label]]))
        posterior = trained.posterior_of([replace_presence(seen[0], present=False), seen[1]])
        image = trained.decode(posterior.mean)[0, 0].detach()
        halves = [float(half.mean()) for half in image.chunk(2, dim=1)]
        assert halves[label] > halves[1 - label] + 0.5


def test_texts_lie_beside_images_or_are_the_names_of_classes(tmp_path: Path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(np.full((4, 4), 9, np.uint8)).save(tmp_path / name / f"{number}.png")
    model = MultimodalConfig(pair="image_tokens", length=5)
    data, _ = image_datasets(DataConfig(path=str(tmp_path), image_size=4, channels=1, validation_count=1), 0)
    tokens = symbols_of(model, data)
    assert tokens is not None
    assert [text_of(row) for row in tokens] == ["cat", "cat", "dog", "dog"]
    (tmp_path / "cat" / "1.txt").write_text("a sitting cat\n", encoding="utf-8")
    tokens = symbols_of(model, data)
    assert tokens is not None
    assert text_of(tokens[1]) == "a sit"
    assert (tokens[[0, 2, 3]] == -1).all()
    with pytest.raises(UserError, match="classes=2"):
        symbols_of(MultimodalConfig(pair="image_label", classes=2), with_labels(data, 3))


def test_a_text_that_is_none_is_named(tmp_path: Path):
    Image.fromarray(np.full((4, 4), 9, np.uint8)).save(tmp_path / "a.png")
    data, _ = image_datasets(DataConfig(path=str(tmp_path), image_size=4, channels=1, validation_share=0), 0)
    tokens = MultimodalConfig(pair="image_tokens")
    with pytest.raises(UserError, match=r"pair=image_tokens, but .* have no texts"):
        check_symbols(tokens, symbols_of(tokens, data), data)
    labels = MultimodalConfig(pair="image_label")
    with pytest.raises(UserError, match=r"pair=image_label, but .* have no classes"):
        check_symbols(labels, symbols_of(labels, data), data)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt cannot be read as UTF-8"):
        symbols_of(tokens, data)
    data.config = replace(data.config, labels_per_class=1)
    with pytest.raises(UserError, match=r"labels_per_class=1, but the texts of .* are \.txt files"):
        symbols_of(tokens, data)


@pytest.mark.parametrize("pair", ["image_label", "image_tokens"])
def test_hidden_classes_are_hidden_and_held_out_ones_are_not(images: Path, pair: Any):
    model = MultimodalConfig(pair=pair, classes=2)
    asked = config(images)
    asked = replace(asked, model=model, objective=SubsampledConfig(), data=replace(asked.data, labels_per_class=3))
    train, held_out = image_datasets(asked.data, 0)
    found, of_held_out = symbols_of(model, train), symbols_of(model, held_out)
    assert found is not None
    assert of_held_out is not None
    assert np.array_equal((found[train.indices, 0] >= 0).numpy(), train.labels >= 0)
    assert int((found[train.indices, 0] >= 0).sum()) == 6
    assert bool((of_held_out[held_out.indices, 0] >= 0).all())
    with pytest.raises(UserError, match=r"labels_per_class=3 with model\.pair=sizes, which looks at no labels"):
        replace(asked, model=MultimodalConfig(pair="sizes"))


def test_accuracy_is_of_the_images_whose_class_is_known(images: Path):
    _, held_out = image_datasets(config(images).data, 0)
    data = NumberedImages(held_out, "once", 0, training=False)
    model = Multimodal(MultimodalConfig(latents=2, encoder=TINY, decoder=TINY, hidden=(5,), classes=2), (8, 8)).eval()
    task = MultimodalTask(model, build_objective(SubsampledConfig(), facts(model)), data, batch_size=4)
    batch = data.fetch(range(12), range(12))
    told = model.symbol_log_probabilities(model.encode(to_float(batch["images"]))).argmax(-1)
    task.held_out_symbols = torch.full((60, 1), -1)
    assert "accuracy" not in task.validate(model, batch)
    task.held_out_symbols[held_out.indices[:4]] = told[:4]
    task.held_out_symbols[held_out.indices[4]] = 1 - told[4]
    assert float(task.validate(model, batch)["accuracy"].mean()) == pytest.approx(4 / 5)


def with_labels(data: Any, highest: int) -> Any:
    data.source.labels = np.array([0, 1, 2, highest])
    return data


def test_what_does_not_fit_is_refused(images: Path):
    asked = config(images)
    with pytest.raises(UserError, match="both are of several modalities"):
        replace(asked, objective=SubsampledConfig())
    with pytest.raises(UserError, match=r"model.experts=mixture .* expected mixture_bound"):
        replace(asked, model=MultimodalConfig(experts="mixture"), objective=SubsampledConfig())
    with pytest.raises(UserError, match="expected even numbers"):
        Multimodal(MultimodalConfig(pair="left_right"), (4, 5))


def test_an_expert_of_a_class_is_a_normal():
    model = model_of("image_label")
    assert isinstance(model.second.posterior(torch.tensor([[0], [-1]])), Normal)
