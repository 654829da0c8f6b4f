from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from stage1_vae.networks import ConvolutionalConfig
from stage1_vae.posteriors.matrix_normal import MatrixNormalConfig, MatrixNormalLayer
from stage1_vae.vae import VAE, VAEConfig


def test_samples_have_the_covariance_of_the_kronecker_product():
    torch.manual_seed(0)
    layer = MatrixNormalLayer(MatrixNormalConfig(height=2, width=3, rank="full"), (1, 2, 3))
    features = torch.randn(1, layer.features)
    posterior = layer(features)
    draws = posterior.draw(posterior.noise(200_000)).latents[:, 0, 0]  # k h w
    columns_first = draws.transpose(1, 2).flatten(1)  # vec(Z) puts columns one below the other
    omega, psi = features[0, 6:8].exp(), features[0, 8:].exp()
    expected = torch.kron(torch.diag(psi), torch.diag(omega))
    found = torch.cov(columns_first.T)
    assert (found - expected).abs().max() < 0.02 * expected.max()
    torch.testing.assert_close(draws.mean(0), features[0, :6].view(2, 3), atol=0.02, rtol=0)


def test_means_of_low_rank_are_products():
    torch.manual_seed(0)
    layer = MatrixNormalLayer(MatrixNormalConfig(height=4, width=5), (3, 4, 5))
    features = torch.randn(2, layer.features)
    mean = layer(features).mean
    mu, nu = features.view(2, 3, -1)[1, 2, :4], features.view(2, 3, -1)[1, 2, 4:9]
    torch.testing.assert_close(mean[1, 2], torch.outer(mu, nu))
    assert torch.linalg.matrix_rank(mean[0, 0]) == 1


@pytest.mark.parametrize("d", [1, 4, 7])
def test_numbers_of_parameters_are_those_of_the_paper(d: int):
    """For d x d maps: 2 d^2 of independent Gaussians, d^2 + 2 d of matrix-variate normals, 4 d of low rank."""
    maps = 5
    count = {
        rank: MatrixNormalLayer(MatrixNormalConfig(height=d, width=d, rank=rank), (maps, d, d)).features  # type: ignore[arg-type]
        for rank in ("full", "low")
    }
    assert count == {"full": maps * (d**2 + 2 * d), "low": maps * 4 * d}


def test_a_model_decodes_such_maps():
    torch.manual_seed(0)
    encoder, decoder = ConvolutionalConfig(widths=(4, 4, 4)), ConvolutionalConfig(widths=(4, 4, 4), map=True)
    config = VAEConfig(latents=2, encoder=encoder, posterior=MatrixNormalConfig(height=2, width=3), decoder=decoder)
    model = VAE(config, (8, 12))
    images = torch.rand(3, 1, 8, 12) * 2 - 1
    terms = model(images, draws=2)
    assert terms.latents[0].shape == (2, 3, 2, 2, 3)
    sum(terms.exact_kl[0].sum(1)).backward()
    assert model.encoder.last.weight.grad.abs().sum(1).min() > 0  # every number that the encoder says counts


def test_a_map_of_the_encoder_is_refused():
    with pytest.raises(UserError, match="rows and columns"):
        VAEConfig(encoder=ConvolutionalConfig(map=True), posterior=MatrixNormalConfig())
