"""A VAE in exact arithmetic is the VAE, image by image, and made of operations that round in one way only."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common import exact, exact_distributions
from common.errors import UserError
from stage1_vae.decoders import InterleavedDecoder
from stage1_vae.exact import LATENT_BITS, ONE_BITS, ExactVAE, Grid, bins_of, latents_of, posterior_shares
from stage1_vae.exact.distributions import MixturePixels
from stage1_vae.likelihoods import LogisticMixtureConfig
from stage1_vae.posteriors import RankOneConfig
from stage1_vae.vae import VAE, VAEConfig
from tests.stage1_vae.exact.tiny import CONFIGS, SIZE, random_values, tiny_vae
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


def outputs_of(model: ExactVAE, bins: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """What the decoder says of each grid of pixels, n h w o, given the pixels before it."""
    found = []

    def given(grid, outputs):
        found.append(outputs)
        return grid.of(values.movedim(-1, 1)).movedim(1, -1)

    walked = model.decoder.walk(latents_of(bins.flatten()).view(bins.shape), given)
    assert torch.equal(walked, values)
    return found


@pytest.mark.parametrize("name", list(CONFIGS))
def test_networks_say_what_those_of_the_vae_say(name):
    vae, values = tiny_vae(name), random_values(tiny_vae(name), 5)
    model = ExactVAE(vae)
    mean, scale = model.posterior(values)
    vae = vae.double()
    with torch.no_grad():
        posterior = vae.posterior(as_images(vae, values))  # its features become float32
        torch.testing.assert_close(mean, posterior.mean.flatten(1).double(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scale, posterior.scale.flatten(1).double(), rtol=1e-4, atol=1e-6)
        latents = latents_of(bins_of(mean.flatten())).view(mean.shape)
        assert float((latents - mean)[mean.abs() < 3].abs().max()) < 1e-2
        found, expected = outputs_of(model, bins_of(mean), values), []

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


@pytest.mark.parametrize("name", list(CONFIGS))
def test_an_image_does_not_depend_on_its_batch(name):
    vae = tiny_vae(name)
    model, values = ExactVAE(vae), random_values(vae, 6)
    mean, scale = model.posterior(values)
    outputs = outputs_of(model, bins_of(mean), values)
    alone = [model.posterior(one[None]) for one in values]
    assert torch.equal(mean, torch.cat([one for one, _ in alone]))
    assert torch.equal(scale, torch.cat([one for _, one in alone]))
    by_image = [outputs_of(model, bins_of(row[None]), one[None]) for row, one in zip(mean, values, strict=True)]
    assert all(map(torch.equal, outputs, map(torch.cat, zip(*by_image, strict=True))))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_shares_are_those_of_the_likelihood(name):
    """The product of what each channel's number has, given those before it, is p of the pixels."""
    vae = tiny_vae(name)
    model, values = ExactVAE(vae), random_values(vae, 2)
    bins, last = bins_of(model.posterior(values)[0]), 2**model.bits - 1
    latents = latents_of(bins.flatten()).view(2, *vae.shape).float()
    with torch.no_grad():  # images that the model finds likely: less than 2**-38 is a number of no image
        images = vae.decoder.sample(latents, torch.Generator().manual_seed(0))
        expected = vae.decoder.log_likelihood(latents[None], images)[0]
    values = ((images + 1) / 2 * last).round().long().movedim(1, -1)
    log_probability = torch.zeros(2, dtype=torch.float64)

    def given(grid, pixels):
        own = grid.of(values.movedim(-1, 1))
        for channel in own.movedim(1, 0).flatten(1):
            shares = pixels.shares()
            below = torch.where(channel == 0, 0, shares(channel.clamp(min=1)))
            above = torch.where(channel == last, 2**ONE_BITS, shares((channel + 1).clamp(max=last)))
            log_probability.add_(((above - below + 1).double() * 2.0**-ONE_BITS).log().view(2, -1).sum(1))
            pixels.tell(channel)
        return own.movedim(1, -1)

    model.walk(bins, given)
    torch.testing.assert_close(log_probability, expected.double(), rtol=3e-4, atol=3e-3)


@pytest.mark.parametrize("name", ["dense_skip", "map_colour"])
def test_shares_never_fall(name):
    vae = tiny_vae(name)
    model, values = ExactVAE(vae), random_values(vae, 1)
    mean, scale = model.posterior(values)
    (outputs,) = outputs_of(model, bins_of(mean), values)
    pixels = MixturePixels(outputs * 30, vae.config.likelihood, vae.config.channels)  # narrow and wide components
    for channel in values.movedim(-1, 0):
        shares, count = pixels.shares(), channel.numel()
        found = torch.stack([shares(torch.full((count,), value)) for value in range(1, 256)])
        assert bool((found.diff(dim=0) >= 0).all())
        assert int(found.min()) >= 0
        assert int(found.max()) <= 2**ONE_BITS
        pixels.tell(channel.flatten())
    shares = posterior_shares(mean.flatten(), scale.flatten() * 0.01)
    bins = torch.arange(1, 2**LATENT_BITS, 37)
    found = torch.stack([shares(torch.full((mean.numel(),), int(number))) for number in bins])
    assert bool((found.diff(dim=0) >= 0).all())
    assert int(found.max()) > 0.9 * 2**ONE_BITS
    assert int(found.min()) < 0.1 * 2**ONE_BITS


@pytest.mark.parametrize("name", list(CONFIGS))
def test_it_is_made_of_admitted_operations(name):
    vae = tiny_vae(name)
    values = random_values(vae, 2)
    exact.check_device.cache_clear()
    for cached in CACHED:
        cached.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.MonkeyPatch.context() as patch:
            patch.setattr("stage1_vae.exact.check_can_code", lambda vae: vae)  # of what fake numbers are, and the
            patch.setattr("stage1_vae.exact.check_device", lambda device: None)  # device, nothing can be told
            patch.setattr("stage1_vae.exact.check_finite", lambda numbers: None)
            patch.setattr("stage1_vae.exact.distributions.check_finite", lambda numbers: None)
            vae, values = vae.to("cuda"), values.to("cuda")
            with OnlyAdmitted({"floor", "floor_", "full_like", "minimum", "searchsorted"}) as admitted:
                model = ExactVAE(vae)
                mean, scale = (x.flatten() for x in model.posterior(values))
                posterior_shares(mean, scale)(bins_of(mean) + 1)

                def given(grid, pixels):
                    own = grid.of(values.movedim(-1, 1)).movedim(1, -1)
                    for channel in own.movedim(-1, 0).flatten(1):
                        assert pixels.shares()(channel + 1).device.type == "cuda"
                        pixels.tell(channel)
                    return own

                assert model.walk(bins_of(mean).view(2, -1), given).shape == values.shape
    finally:
        for cached in CACHED:
            cached.cache_clear()  # they hold fake tensors
    assert admitted.seen >= {"add", "amax", "floor", "index_select"}


def test_models_that_cannot_code_are_refused():
    mixture = LogisticMixtureConfig(components=2)
    with pytest.raises(UserError, match="the posterior rank_one and the prior standard_normal, expected diagonal"):
        ExactVAE(VAE(VAEConfig(posterior=RankOneConfig(), likelihood=mixture), SIZE))
    with pytest.raises(UserError, match="the likelihood of this model has 1025 components, expected at most 1024"):
        ExactVAE(VAE(VAEConfig(likelihood=LogisticMixtureConfig(components=1025)), (1, 1)))
    damaged = tiny_vae("dense_skip")
    next(damaged.decoder.parameters()).data[0] = float("nan")
    with pytest.raises(UserError, match="the weights of this model are not finite"):
        ExactVAE(damaged)
