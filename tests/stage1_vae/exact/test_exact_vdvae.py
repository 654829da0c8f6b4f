"""A VD-VAE in exact arithmetic is the VD-VAE, with latents in units of their priors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from stage1_vae.exact import bins_of, exact_model, latents_of
from stage1_vae.exact.vdvae import mean_of_squares
from stage1_vae.hierarchies.nvae import NVAE, NVAEConfig
from stage1_vae.hierarchies.vdvae import VDVAE, VDVAEConfig
from stage1_vae.likelihoods import GaussianConfig
from tests.stage1_vae.exact.test_exact_vae import as_images, posterior_of
from tests.stage1_vae.exact.tiny import VDVAES, random_values, tiny_vae


@pytest.mark.parametrize("name", list(VDVAES))
def test_networks_say_what_those_of_the_vae_say(name):
    vae, values = tiny_vae(name), random_values(tiny_vae(name), 5)
    model = exact_model(vae)
    mean, scale, bins = posterior_of(model, values)
    outputs, vae = [], vae.double()
    model.pixels_class = lambda told, *_: outputs.append(told)  # keeps what the decoder says
    model.pixels(model.descend(bins), lambda grid, _: values)

    told, of_groups = [], iter(latents_of(bins, model.latent_bits).split(vae.sizes, dim=1))
    with torch.no_grad():
        features = vae.features(as_images(vae, values))

        def latents_from(place, active, prior):
            posterior = vae.decoder.blocks[place].posterior_of(active, features[place])
            difference, ratio = (
                (posterior.mean - prior.mean) / prior.log_scale.exp(),
                posterior.log_scale - prior.log_scale,
            )
            told.append((difference.movedim(1, -1).flatten(1), ratio.exp().movedim(1, -1).flatten(1)))
            noise = next(of_groups).unflatten(1, prior.mean.movedim(1, -1).shape[1:]).movedim(-1, 1)
            return prior.mean + prior.log_scale.exp() * noise

        expected = vae.decoder.outputs(vae.decoder(len(values), latents_from))
    for ours, theirs in zip((mean, scale), zip(*told, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(theirs, dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[0].movedim(-1, 1), expected, rtol=1e-4, atol=5e-4)
    assert float(scale.std()) > 0.01
    assert float(mean.std()) > 0.01


def test_a_bin_is_that_of_the_nearest_median_of_bins():
    latents = torch.linspace(-2, 2, 1000, dtype=torch.float64)
    bins = bins_of(latents, 12)
    assert int(bins.max()) < 2**12
    near = (latents_of(bins, 12) - latents).abs()
    for other in (bins - 1, bins + 1):
        assert bool((near <= (latents_of(other, 12) - latents).abs() + 1e-3).all())


def test_pooling_is_that_of_the_network():
    x = torch.randn(2, 6, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(mean_of_squares(x, 3), F.avg_pool2d(x.movedim(-1, 1), 3).movedim(1, -1))


def test_other_hierarchies_are_refused():
    with pytest.raises(UserError, match=r"this model is a nvae, expected one of model.kind=vae or vdvae"):
        exact_model(NVAE(NVAEConfig(channels=1, scales=1, groups=2, encoder_width=4, decoder_width=4), (8, 8)))
    config = VDVAEConfig(encoder_layers="4d4,1x1", decoder_layers="1x1,4m1", width=4, likelihood=GaussianConfig())
    with pytest.raises(UserError, match=r"has the likelihood gaussian, expected logistic_mixture"):
        exact_model(VDVAE(config, (4, 4)))
    with torch.no_grad():
        damaged = tiny_vae("vdvae")
        damaged.decoder.gain[0] = float("nan")
    with pytest.raises(UserError, match="the weights of this model are not finite"):
        exact_model(damaged)
