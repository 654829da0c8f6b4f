"""A VAE in exact arithmetic is the VAE, image by image, and made of operations that round in one way only."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common import exact, exact_distributions
from common.errors import UserError
from stage1_vae.decoders import InterleavedDecoder
from stage1_vae.exact import ONE_BITS, ExactModel, ExactVAE, Grid, bins_of, exact_model, latents_of, posterior_shares
from stage1_vae.exact.distributions import MixturePixels
from stage1_vae.likelihoods import LogisticMixtureConfig
from stage1_vae.posteriors import RankOneConfig
from stage1_vae.vae import VAE, VAEConfig
from tests.stage1_vae.exact.tiny import CONFIGS, NAMES, SIZE, random_values, tiny_vae
from tests.stage2_prior.test_exact_operations import OnlyAdmitted

CACHED = (
    exact.powers_of_two,
    exact_distributions.normal_lines,
    exact_distributions.logistic_lines,
    exact_distributions.normal_quantiles,
)


def as_images(vae: VAE, values: torch.Tensor) -> torch.Tensor:
    """b c H W in [-1, 1], float64."""
    return (values.double() / (0.5 if vae.config.likelihood.kind == "bernoulli" else 127.5) - 1).movedim(-1, 1)


def posterior_of(model: ExactModel, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of all groups: means, scales and the bins of the means, which each group takes; n d each."""
    told = []

    def chosen(posterior):
        told.append((*posterior, bins_of(posterior.mean, model.latent_bits)))
        return told[-1][-1]

    bins, _ = model.infer(values, chosen)
    mean, scale, found = (torch.cat(parts, dim=1) for parts in zip(*told, strict=True))
    assert bins.shape == found.shape
    return mean, scale, bins


def outputs_of(model: ExactVAE, bins: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """What the decoder says of each grid of pixels, n h w o, given the pixels before it."""
    found = []

    def given(grid, outputs):
        found.append(outputs)
        return grid.of(values.movedim(-1, 1)).movedim(1, -1)

    walked = model.decoder.walk(latents_of(bins, model.latent_bits), given)
    assert torch.equal(walked, values)
    return found


def shares_of(model: ExactModel, bins: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What each number of the images has of its distribution, n d, in units of 2**-ONE_BITS, float64."""
    found, last = [], 2**model.bits - 1

    def given(grid, pixels):
        own = grid.of(values.movedim(-1, 1))
        for channel in own.movedim(1, 0).flatten(1):
            shares = pixels.shares()
            below = torch.where(channel == 0, 0, shares(channel.clamp(min=1)))
            above = torch.where(channel == last, 2**ONE_BITS, shares((channel + 1).clamp(max=last)))
            found.append((above - below + 1).double().view(len(values), -1))
            pixels.tell(channel)
        return own.movedim(1, -1)

    assert torch.equal(model.pixels(model.descend(bins), given), values)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_networks_say_what_those_of_the_vae_say(name):
    vae, values = tiny_vae(name), random_values(tiny_vae(name), 5)
    model = exact_model(vae)
    mean, scale, bins = posterior_of(model, values)
    vae = vae.double()
    with torch.no_grad():
        posterior = vae.posterior(as_images(vae, values))  # its features become float32
        torch.testing.assert_close(mean, posterior.mean.flatten(1).double(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scale, posterior.scale.flatten(1).double(), rtol=1e-4, atol=1e-6)
        latents = latents_of(bins, model.latent_bits)
        assert float((latents - mean)[mean.abs() < 3].abs().max()) < 1e-2
        found, expected = outputs_of(model, bins, values), []

        def given(grid, outputs):
            expected.append(outputs.movedim(1, -1))
            return grid.of(as_images(vae, values))

        if isinstance(vae.decoder, InterleavedDecoder):
            vae.decoder.float().walk(latents.view(-1, *vae.shape).float(), lambda grid, x: given(grid, x).float())
        else:
            given(Grid(0, 0, 1), vae.decoder.network(latents.view(-1, *vae.shape)))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch(name):
    vae = tiny_vae(name)
    model, values = exact_model(vae), random_values(vae, 6)
    together, alone = posterior_of(model, values), [posterior_of(model, one[None]) for one in values]
    for ours, of_each in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(of_each))
    shares, bins = shares_of(model, together[2], values), together[2]
    again = model.posteriors(values, model.descend(bins))  # as a reader finds them, who knows bins and images
    for ours, parts in zip(together, zip(*again, strict=True), strict=False):
        assert torch.equal(ours, torch.cat(parts, dim=1))
    of_images = [shares_of(model, row[None], one[None]) for row, one in zip(bins, values, strict=True)]
    assert torch.equal(shares, torch.cat(of_images))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_shares_are_those_of_the_likelihood(name):
    """The product of what each channel's number has, given those before it, is p of the pixels."""
    vae = tiny_vae(name)
    model, values = exact_model(vae), random_values(vae, 2)
    bins, last = posterior_of(model, values)[2], 2**model.bits - 1
    latents = latents_of(bins, model.latent_bits).view(2, *vae.shape).float()
    with torch.no_grad():  # images that the model finds likely: less than 2**-38 is a number of no image
        images = vae.decoder.sample(latents, torch.Generator().manual_seed(0))
        expected = vae.decoder.log_likelihood(latents[None], images)[0]
    values = ((images + 1) / 2 * last).round().long().movedim(1, -1)
    log_probability = (shares_of(model, bins, values) * 2.0**-ONE_BITS).log().sum(1)
    torch.testing.assert_close(log_probability, expected.double(), rtol=3e-4, atol=3e-3)


@pytest.mark.parametrize("name", ["dense_skip", "map_colour"])
def test_shares_never_fall(name):
    vae = tiny_vae(name)
    model, values = exact_model(vae), random_values(vae, 1)
    mean, scale, bins = posterior_of(model, values)
    (outputs,) = outputs_of(model, bins, values)
    pixels = MixturePixels(outputs * 30, vae.config.likelihood, vae.config.channels)  # narrow and wide components
    for channel in values.movedim(-1, 0):
        shares, count = pixels.shares(), channel.numel()
        found = torch.stack([shares(torch.full((count,), value)) for value in range(1, 256)])
        assert bool((found.diff(dim=0) >= 0).all())
        assert int(found.min()) >= 0
        assert int(found.max()) <= 2**ONE_BITS
        pixels.tell(channel.flatten())
    shares = posterior_shares(mean.flatten(), scale.flatten() * 0.01, model.latent_bits)
    numbers = torch.arange(1, 2**model.latent_bits, 37)
    found = torch.stack([shares(torch.full((mean.numel(),), int(number))) for number in numbers])
    assert bool((found.diff(dim=0) >= 0).all())
    assert int(found.max()) > 0.9 * 2**ONE_BITS
    assert int(found.min()) < 0.1 * 2**ONE_BITS


@pytest.mark.parametrize("name", NAMES)
def test_it_is_made_of_admitted_operations(name):
    vae = tiny_vae(name)
    values = random_values(vae, 2)
    exact.check_device.cache_clear()
    for cached in CACHED:
        cached.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.MonkeyPatch.context() as patch:
            patch.setattr("stage1_vae.exact.check_can_code", lambda vae: vae)  # of what fake numbers are, and the
            patch.setattr("stage1_vae.exact.model.check_device", lambda device: None)  # device, nothing can be told
            for module in ("model", "distributions", "vdvae"):
                patch.setattr(f"stage1_vae.exact.{module}.check_finite", lambda numbers: None)
            vae, values = vae.to("cuda"), values.to("cuda")
            with OnlyAdmitted({"floor", "floor_", "full_like", "minimum", "searchsorted"}) as admitted:
                model = exact_model(vae)
                mean, scale, bins = posterior_of(model, values)
                posterior_shares(mean.flatten(), scale.flatten(), model.latent_bits)(bins.flatten() + 1)

                def given(grid, pixels):
                    own = grid.of(values.movedim(-1, 1)).movedim(1, -1)
                    for channel in own.movedim(-1, 0).flatten(1):
                        assert pixels.shares()(channel + 1).device.type == "cuda"
                        pixels.tell(channel)
                    return own

                assert model.pixels(model.descend(bins), given).shape == values.shape
    finally:
        for cached in CACHED:
            cached.cache_clear()  # they hold fake tensors
    assert admitted.seen >= {"add", "amax", "floor", "index_select"}


def test_models_that_cannot_code_are_refused():
    mixture = LogisticMixtureConfig(components=2)
    with pytest.raises(UserError, match="the posterior rank_one and the prior standard_normal, expected diagonal"):
        exact_model(VAE(VAEConfig(posterior=RankOneConfig(), likelihood=mixture), SIZE))
    with pytest.raises(UserError, match="the likelihood of this model has 1025 components, expected at most 1024"):
        exact_model(VAE(VAEConfig(likelihood=LogisticMixtureConfig(components=1025)), (1, 1)))
    damaged = tiny_vae("dense_skip")
    next(damaged.decoder.parameters()).data[0] = float("nan")
    with pytest.raises(UserError, match="the weights of this model are not finite"):
        exact_model(damaged)
