"""What every hierarchy owes its users: a table of configs times properties.

A new kind is one row; a test fails until it has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.model_io import load_pretrained
from images.datasets import DataConfig
from pipelines.latents.pipeline import LatentPipeline
from stage1_vae.binarise import Binarised, NumberedImages
from stage1_vae.evaluation import judge
from stage1_vae.hierarchies.base import HierarchicalVAE, Normal, normal_kl, product
from stage1_vae.hierarchies.deep_latent_gaussian import DeepLatentGaussianConfig
from stage1_vae.hierarchies.markov import MarkovConfig
from stage1_vae.hierarchies.nvae import NVAEConfig
from stage1_vae.hierarchies.vdvae import VDVAEConfig
from stage1_vae.likelihoods import BernoulliConfig
from stage1_vae.models import MODEL_CLASSES, MODELS, ModelConfig, build_model
from stage1_vae.objectives import OBJECTIVES, ELBOConfig, ImportanceConfig, TrainingFacts, build_objective
from stage1_vae.objectives.terms import Terms, total_kl
from stage1_vae.pictures import spread, walked
from stage1_vae.train import Stage1VAEConfig, VAETask, train_vae
from training.config import TrainConfig


class Row(NamedTuple):
    config: Any
    size: tuple[int, int] = (4, 4)  # of its images, black and white; few pixels, so that p(x) is not all in few latents
    closed_kl: bool = True  # whether each group's KL has a closed form given the other groups' draws
    apart: bool = True  # whether what is computed of an image in training depends on no other image


SMALL: dict[str, Any] = {"latents": (4, 3, 2), "hidden": (12, 8, 6)}
CELLS = {"blocks": 1, "preprocess_cells": 1, "postprocess_cells": 1, "encoder_cells": 1, "decoder_cells": 1}
SMALL_NVAE: dict[str, Any] = {"channels": 1, "latents": 1, "scales": 2, "groups": 2, **CELLS}
SMALL_NVAE |= {"encoder_width": 2, "decoder_width": 2, "likelihood": BernoulliConfig()}

ROWS: dict[str, Row] = {
    "Markov": Row(MarkovConfig(**SMALL), closed_kl=False),
    "Markov, one layer": Row(MarkovConfig(latents=(3,), hidden=(8,))),
    "ladder": Row(
        MarkovConfig(
            **SMALL,
            inference="top_down",
            batch_norm=True,
            variance="softplus",
            activation="leaky_relu",
            hidden_layers=1,
        ),
        apart=False,
    ),
    "ladder without batch normalisation": Row(MarkovConfig(**SMALL, inference="top_down")),
    "deep latent Gaussian": Row(DeepLatentGaussianConfig(**SMALL, activation="tanh")),
    "deep latent Gaussian, rank one": Row(DeepLatentGaussianConfig(**SMALL, posterior="rank_one", activation="tanh")),
    "VD-VAE": Row(
        VDVAEConfig(
            channels=1,
            width=4,
            latents=1,
            encoder_layers="4x1,4d2,2d2,1x1",
            decoder_layers="1x1,2m1,4m2",
            bottleneck_multiple=0.5,
            likelihood=BernoulliConfig(),
        )
    ),
    "deep latent Gaussian, product": Row(DeepLatentGaussianConfig(**SMALL, posterior="product", activation="tanh")),
    "NVAE": Row(NVAEConfig(**SMALL_NVAE), apart=False),
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_of(row: Row, farther: float = 0.2) -> HierarchicalVAE:
    """Weights farther from 0 than they begin, so that groups depend on each other and on the image; statistics of batch
    normalisation that are none of those it begins with."""
    torch.manual_seed(5)
    model = build_model(row.config, row.size, Binarised("once", 0))
    assert isinstance(model, HierarchicalVAE)
    for weight in model.parameters():
        weight.data += farther * torch.randn(weight.shape)
    with torch.no_grad():
        model.train()(images_for(row, 32))
    return model.eval()


def images_for(row: Row, count: int = 3, seed: int = 1) -> Tensor:
    """Black and white, half of their pixels alike in all."""
    noise = torch.rand(count, row.config.channels, *row.size, generator=seeded(seed))
    noise[..., : row.size[1] // 2] = noise[:1, ..., : row.size[1] // 2]
    return (noise > 0.5).float() * 2 - 1


def noise_for(model: HierarchicalVAE, draws: int, images: int, seed: int = 2) -> Tensor:
    return torch.randn(draws, images, *model.shape, generator=seeded(seed))


@contextmanager
def in_float64() -> Iterator[None]:
    """What casts to float32 casts to float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        yield


# ---- Gaussians ------------------------------------------------------------------------------------------------------


def test_the_closed_kl_and_the_product_of_gaussians_are_those_of_torch():
    first, second = (
        Normal(2 * torch.randn(5, 2, 3, generator=seeded(s)), torch.randn(5, 2, 3, generator=seeded(s + 1)))
        for s in (1, 3)
    )
    theirs = [torch.distributions.Normal(one.mean, one.log_scale.exp()) for one in (first, second)]
    torch.testing.assert_close(
        normal_kl(first, second), torch.distributions.kl_divergence(theirs[0], theirs[1]).flatten(1)
    )
    points = torch.randn(4, 1, 1, 1, generator=seeded(9)).expand(4, 5, 2, 3)
    both, merged = sum(one.log_prob(points) for one in theirs), product(first, second)
    ours = torch.distributions.Normal(merged.mean, merged.log_scale.exp()).log_prob(points)
    apart = both - ours
    torch.testing.assert_close(apart[1:], apart[:1].expand_as(apart[1:]), rtol=1e-4, atol=1e-4)  # but for a constant


def test_a_gaussian_that_says_nothing_leaves_the_other_of_a_product():
    known = Normal(torch.tensor([[1.5]]), torch.tensor([[-2.0]]))
    for log_scale in (40.0, math.inf):
        merged = product(known, Normal(torch.tensor([[7.0]]), torch.tensor([[log_scale]])))
        assert torch.equal(merged.mean, known.mean)
        assert torch.equal(merged.log_scale, known.log_scale)


# ---- of every hierarchy ---------------------------------------------------------------------------------------------


def test_every_hierarchy_has_a_row():
    kinds = {kind for kind, model in MODEL_CLASSES.items() if issubclass(model, HierarchicalVAE)}
    assert {row.config.kind for row in ROWS.values()} == kinds
    assert set(get_args(ModelConfig)) == {config for _, config in MODELS.values()}
    assert {kind: config().kind for kind, (_, config) in MODELS.items()} == {kind: kind for kind in MODELS}


def test_terms_have_their_shapes(row: Row):
    model = model_of(row)
    terms = model(images_for(row), draws=2)
    assert len(terms.latents) == len(terms.log_prior) == len(terms.log_posterior) == len(model.group_shapes)
    for latents, log_prior, log_posterior, shape in zip(
        terms.latents, terms.log_prior, terms.log_posterior, model.group_shapes, strict=True
    ):
        assert latents.shape == (2, 3, *shape)
        assert log_prior.shape == log_posterior.shape == (2, 3, math.prod(shape))
    assert terms.log_likelihood.shape == (2, 3)
    assert all(kl is not None for kl in terms.exact_kl) == row.closed_kl
    assert [tuple(means.shape) for means in model.group_means(images_for(row))] == [(3, size) for size in model.sizes]


def test_importance_sampling_finds_what_draws_of_the_prior_find(row: Row):
    """log p(x) by draws of q(z|x) and log of the mean of p(x|z) over draws of p(z): two ways to one number. The first
    would miss it if log p(z) or log q(z|x) were the densities of other draws than these."""
    model, count = model_of(row, farther=0.06), 40_000
    with torch.no_grad():
        images = model.pixels(model.draw_latents(3, seeded(2)), "sample", seeded(2))  # not all in a few latents
    figures = judge(model, images, range(3), draws=4000, bounds=(1,))
    with torch.no_grad():
        latents = model.split(model.draw_latents(count, seeded(3)))
        outputs = model.generate(count, lambda place, _: latents[place])
        log_p = model.likelihood.log_prob(outputs.unsqueeze(1), images).double()  # count 3
    plain = log_p.logsumexp(0) - math.log(count)
    plain_error = (log_p - plain).exp().std(0) / math.sqrt(count)
    error = (plain_error.square() + figures.log_p_error.square()).sqrt()
    assert error.max() < 0.25  # a density that is not that of the draws is off by more
    assert ((plain - figures.log_p).abs() < 4 * error).all()
    again = judge(model, images, range(3), draws=4000, seed=1, bounds=(1,))
    both = (again.log_p_error.square() + figures.log_p_error.square()).sqrt()
    assert ((again.log_p - figures.log_p).abs() < 4 * both).all()
    assert (figures.elbo < figures.log_p + 4 * figures.gap_error).all()


def test_closed_kl_is_the_mean_of_what_draws_say(row: Row):
    model, images = model_of(row), images_for(row)
    with torch.no_grad():
        terms: Terms = model(images, noise=noise_for(model, 10_000, 3))
    for log_prior, log_posterior, exact in zip(terms.log_prior, terms.log_posterior, terms.exact_kl, strict=True):
        if exact is None:
            continue
        drawn = (log_posterior - log_prior).sum(-1)
        apart = drawn - exact.sum(-1)
        assert (apart.mean(0).abs() < 4 * apart.std(0) / 100 + 1e-4).all()


def test_many_draws_are_single_draws_of_the_same_noise(row: Row):
    model, images = model_of(row), images_for(row)
    noise = noise_for(model, 4, 3)
    with torch.no_grad():
        together = model(images, noise=noise)
        for draw in range(4):
            for image in range(3):
                alone = model(images[image : image + 1], noise=noise[draw : draw + 1, image : image + 1])
                here = (slice(draw, draw + 1), slice(image, image + 1))
                torch.testing.assert_close(together.log_weights[here], alone.log_weights, rtol=1e-5, atol=1e-4)
                torch.testing.assert_close(together.log_likelihood[here], alone.log_likelihood, rtol=1e-5, atol=1e-4)
                for ours, theirs in zip(together.latents, alone.latents, strict=True):
                    torch.testing.assert_close(ours[here], theirs, rtol=1e-5, atol=1e-5)


def test_images_follow_from_their_latents(row: Row):
    """What `generate` makes of drawn latents is as likely as inference said, and noise moves every group."""
    model, images = model_of(row), images_for(row)
    with torch.no_grad():
        terms = model(images, noise=noise_for(model, 1, 3))
        joined = model.joined([group[0] for group in terms.latents])
        groups = model.split(joined)
        outputs = model.generate(3, lambda place, _: groups[place])
        torch.testing.assert_close(model.likelihood.log_prob(outputs, images), terms.log_likelihood[0])
        torch.testing.assert_close(model.pixels(joined, "mean"), model.likelihood.mean(outputs).clamp(-1, 1))
        other = model(images, noise=noise_for(model, 1, 3, seed=4))
        assert all((a != b).any() for a, b in zip(terms.latents, other.latents, strict=True))
        means = model(images, draws=0)
        assert torch.equal(model.encode(images), model.joined([group[0] for group in means.latents]))


def test_latents_are_drawn_by_temperature_and_around_known_groups(row: Row):
    model, count = model_of(row), len(model_of(row).group_shapes)
    with torch.no_grad():
        still = model.draw_latents(2, seeded(1), temperatures=0.0)
        assert torch.equal(still, model.draw_latents(2, seeded(2), temperatures=0))
        taken: list[Tensor] = []
        priors: list[Normal] = []

        def mean(place: int, prior: Normal) -> Tensor:
            taken.append(prior.mean)
            priors.append(prior)
            return prior.mean

        model.generate(2, mean)
        assert torch.equal(still, model.joined(taken))
        drawn = model.draw_latents(2, seeded(1))
        assert torch.equal(drawn, model.draw_latents(2, seeded(1), temperatures=[1.0] * count))
        for place in range(count):
            known: list[Tensor | None] = [None] * count
            known[place] = torch.full((2, *model.group_shapes[place]), 0.5)
            found = model.split(model.draw_latents(2, seeded(1), known=known))
            assert torch.equal(found[place], known[place])
            for above in range(place):  # what lies above a known group is as it was
                assert torch.equal(found[above], model.split(drawn)[above])
        cold = model.split(model.draw_latents(20_000, seeded(3), temperatures=[0.5, *[1.0] * (count - 1)]))[0]
        first = priors[0]
        spread = (cold - first.mean[:1]) * (-first.log_scale[:1]).exp()
        torch.testing.assert_close(spread.std(0), torch.full_like(spread[0], 0.5), rtol=0.05, atol=0)


def test_latents_are_noise_that_priors_have_drawn_with(row: Row):
    model = model_of(row)
    with torch.no_grad():
        noise = torch.randn(3, *model.shape, generator=seeded(1))
        latents = model.draw_latents(3, seeded(1))
        torch.testing.assert_close(model.as_noise(latents), noise, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(model.from_noise(noise), latents)


def test_walks_move_the_groups_below(row: Row):
    """Ways between images begin and end at them, and a number of any group, the top one too, moves the image."""
    model, images = model_of(row), images_for(row, 2)
    pipeline = LatentPipeline(model)
    way = pipeline.interpolate(images[0], images[1], steps=3)
    with torch.no_grad():
        torch.testing.assert_close(way.latents[[0, 2]], model.encode(images), rtol=1e-3, atol=1e-3)
        middle = model.split(model.as_noise(way.latents))
        for group in middle:  # on an arc, at whose middle the direction is that of the sum of both ends
            flat = group.flatten(1)
            both = flat[0] / flat[0].norm() + flat[2] / flat[2].norm()
            if both.norm() < 0.1:  # in opposite directions there is no arc
                continue
            torch.testing.assert_close(flat[1] / flat[1].norm(), both / both.norm(), rtol=1e-2, atol=1e-2)
        for number in (0, sum(model.sizes) - 1):
            moved = walked(model, model.encode(images[:1]), number, torch.tensor([-2.0, 2.0]))
            shown = model.decode(moved)
            assert (shown[0] != shown[1]).any()
            kept = torch.arange(moved.shape[1]) < number  # of groups above, and numbers before
            assert torch.allclose(moved[0, kept], moved[1, kept])
        means = model.encode(images_for(row, 5))
        torch.testing.assert_close(spread(model, means), model.as_noise(means).double().var(0))
        many = spread(model, means.repeat(30, 1))  # of which some are looked at
        torch.testing.assert_close(many, model.as_noise(means).double().var(0), rtol=0.2, atol=1e-6)
        assert torch.equal(spread(model, means[:1]), torch.ones(model.shape).double())


def test_gradients_are_those_of_finite_differences(row: Row):
    """Of the likelihood and of each group's terms, along a random direction of all weights, in float64."""
    model, images = model_of(row).double(), images_for(row).double()
    with in_float64():
        noise = noise_for(model, 2, 3).double()
        weights = list(model.parameters())
        along = [torch.randn(weight.shape, generator=seeded(8)).double() for weight in weights]

        def values() -> Tensor:
            terms: Terms = model(images, noise=noise)
            parts = [terms.log_likelihood, *terms.log_prior, *terms.log_posterior, *terms.kl]
            return torch.stack([part.sin().sum() for part in parts])

        def moved(step: float) -> Tensor:
            with torch.no_grad():
                for weight, direction in zip(weights, along, strict=True):
                    weight.add_(direction, alpha=step)
                found = values()
                for weight, direction in zip(weights, along, strict=True):
                    weight.sub_(direction, alpha=step)
            return found

        measured = (moved(1e-6) - moved(-1e-6)) / 2e-6
        for place, value in enumerate(values()):
            gradients = torch.autograd.grad(value, weights, allow_unused=True, retain_graph=place < len(measured) - 1)
            slope = sum(
                (one * direction).sum() for one, direction in zip(gradients, along, strict=True) if one is not None
            )
            torch.testing.assert_close(slope, measured[place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "objective",
    [ELBOConfig(draws=2), ELBOConfig(free_nats=0.01, free_nats_of="group"), ImportanceConfig(draws=3, estimates=2)],
    ids=["bound", "free bits", "importance"],
)
def test_every_weight_learns(row: Row, objective: Any):
    model, images = model_of(row), images_for(row, 8)
    one = build_objective(objective, TrainingFacts(8, 10, model.shape, tuple(model.generator_parameters())))
    torch.manual_seed(1)
    one.loss(model.train(), images, 0).loss.backward()
    still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert still == []


def test_free_bits_are_of_groups(row: Row):
    """A group whose KL is below the nats that are free costs these; another costs its KL."""
    model, images = model_of(row), images_for(row, 8)
    noise = noise_for(model, 3, 8)
    terms: Terms = model(images, noise=noise)
    kl = [float(group.detach().sum(-1).mean()) for group in terms.kl]
    nats = sum(kl) / len(kl)
    facts = TrainingFacts(8, 10, model.shape, tuple(model.generator_parameters()))
    one = build_objective(ELBOConfig(draws=3, free_nats=nats, free_nats_of="group"), facts)
    expected = sum(max(nats, group) for group in kl) - float(terms.log_likelihood.detach().mean())
    output = one.loss(model, images, 0, noise)
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(output.metrics["kl"]) == pytest.approx(float(total_kl(terms).detach().mean()), rel=1e-5)


def test_weights_of_inference_and_of_generation_are_all_weights(row: Row):
    """Those of inference move no image of given latents; all others do."""
    model = model_of(row)
    generator = {id(weight) for weight in model.generator_parameters()}
    inference = {id(weight) for weight in model.inference_parameters()}
    assert generator | inference == {id(weight) for weight in model.parameters()}
    assert not generator & inference
    drawn: list[Tensor] = []

    def choose(place: int, prior: Normal) -> Tensor:
        drawn.append(prior.draw(torch.ones_like(prior.mean)))
        return drawn[-1]

    model.generate(2, choose).sin().sum().backward()
    assert {id(weight) for weight in model.parameters() if weight.grad is not None} == generator


def test_a_saved_model_is_the_same(row: Row, tmp_path: Path):
    model, images = model_of(row), images_for(row)
    again = load_pretrained(model.save_pretrained(tmp_path / "model"), MODEL_CLASSES)
    assert again.fingerprint() == model.fingerprint()
    assert again.config == model.config
    assert again.binarised == model.binarised
    with torch.no_grad():
        noise = noise_for(model, 1, 3)
        assert torch.equal(again(images, noise=noise).log_weights, model(images, noise=noise).log_weights)
    next(again.parameters()).data += 1
    assert again.fingerprint() != model.fingerprint()


def test_samples_do_not_depend_on_the_batch(row: Row):
    pipeline = LatentPipeline(model_of(row))
    whole, parts = pipeline.generate(5, seed=3, batch_size=5), pipeline.generate(5, seed=3, batch_size=2)
    torch.testing.assert_close(whole.latents, parts.latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.images, parts.images, rtol=1e-5, atol=1e-5)
    assert whole.images.shape == (5, row.config.channels, *row.size)


def test_images_of_another_size_are_refused(row: Row):
    with pytest.raises(UserError, match="a VAE knows one size"):
        model_of(row).encode(torch.zeros(1, row.config.channels, row.size[0] + 1, row.size[1]))


# ---- trainings ------------------------------------------------------------------------------------------------------


def run_config(row: Row, images: Path, objective: Any = None) -> Stage1VAEConfig:
    train = {"steps": 2, "batch_size": 12, "save_every": 2, "validate_every": 2, "preview_every": 2}
    return Stage1VAEConfig(
        model=row.config,
        data=DataConfig(path=str(images), image_size=row.size[0], channels=row.config.channels, validation_count=12),
        train=TrainConfig(**train, workers=0, tracker="none"),
        objective=objective or ELBOConfig(draws=2),
        binarised="once",
    )


@pytest.mark.parametrize("objective", [ELBOConfig(draws=2), ImportanceConfig(draws=3)], ids=["bound", "importance"])
def test_micro_batches_are_one_batch(row: Row, objective: Any):
    """Of the same noise: gradients agree to rounding. Batch normalisation sees what is computed at once."""
    images = ((images_for(row, 12) + 1) * 127.5).to(torch.uint8)

    def gradients(parts: int) -> list[Tensor]:
        model = model_of(row).train()
        facts = TrainingFacts(12, 10, model.shape, tuple(model.generator_parameters()))
        no_images = NumberedImages.__new__(NumberedImages)
        task = VAETask(model, build_objective(objective, facts), no_images, batch_size=12)
        for some in torch.arange(12).chunk(parts):
            (task.step(model, {"images": images[some], "draws": some}, 3).loss / parts).backward()
        return [weight.grad for weight in model.parameters() if weight.grad is not None]

    near = [torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(gradients(1), gradients(3), strict=True)]
    assert all(near) == row.apart


def test_a_run_trains_validates_and_shows_a_preview(row: Row, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, *row.size, row.config.channels), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=pixels)
    result = train_vae(run_config(row, tmp_path / "noise.npz"), tmp_path / "run")
    assert set(result.metrics) == {"negative_elbo", "log_likelihood", "kl", "bits_per_dimension", "psnr"}
    assert len(list((tmp_path / "run" / "previews").glob("*.png"))) == 1
    model = load_pretrained(tmp_path / "run" / "model", MODEL_CLASSES)
    assert (model.config, model.image_size, model.binarised) == (row.config, row.size, Binarised("once", 0))


@pytest.mark.parametrize("kind", sorted(OBJECTIVES.keys() - {"elbo", "balanced", "importance"}))
def test_objectives_of_one_posterior_are_refused(row: Row, kind: str):
    named = rf"objective.kind={kind}[ ,].*expected (elbo, balanced or importance|either multimodal)"
    with pytest.raises(UserError, match=named):
        run_config(row, Path("nowhere.npz"), OBJECTIVES[kind][1]())


@pytest.mark.parametrize(
    "changes", [{"gradient": "doubly_reparameterised"}, {"generator_over_all": True, "estimates": 2}]
)
def test_gradients_that_part_at_one_posterior_are_refused(row: Row, changes: dict[str, Any]):
    with pytest.raises(UserError, match="expected reparameterised and false"):
        run_config(row, Path("nowhere.npz"), ImportanceConfig(**changes))
