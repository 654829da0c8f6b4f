"""Samples, schedules and divergence of the Gumbel-softmax quantizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from stage1_vq.autoencoders import VQVAE, VQVAE2, VQVAE2Config, VQVAEConfig
from stage1_vq.quantizers.gumbel import SURENESS, GumbelQuantizer, GumbelQuantizerConfig, divergence_from_uniform

K, D = 8, 4
FINGERPRINT = "2e56455135b4f709c20663de959ad2a758a6a784cf6b0c2d14fa33873a778ea8"  # found by commit 060388a


def make(**settings: Any) -> GumbelQuantizer:
    torch.manual_seed(0)
    return GumbelQuantizer(GumbelQuantizerConfig(**{"codebook_size": K, "dim": D, **settings}))


def latents(b: int = 2) -> Tensor:
    return torch.randn(b, D, 3, 5, generator=torch.Generator().manual_seed(1))


def test_the_temperature_falls_as_half_a_cosine_and_then_stays():
    quantizer = make(temperature_start=1, temperature_end=0.0625, temperature_steps=4)
    found = []
    for step in range(7):
        quantizer.begin_step(step)
        found.append(float(quantizer(latents()).statistics["temperature"]))
        quantizer.update()
    shares = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0, 0, 0]
    assert found == pytest.approx([0.0625 + 0.9375 * share for share in shares])
    assert make(temperature_steps=0).temperature() == 0.0625


def test_the_weight_of_the_divergence_rises_and_then_stays():
    quantizer = make(kl_weight=6, kl_warmup_steps=3)
    kl = divergence_from_uniform(quantizer.logits_of(latents()))
    for step, share in enumerate((0, 1 / 3, 2 / 3, 1, 1)):
        quantizer.begin_step(step)
        torch.testing.assert_close(quantizer(latents()).losses["kl_loss"], 6 * share * kl)
        quantizer.update()
    torch.testing.assert_close(make(kl_weight=6, kl_warmup_steps=0)(latents()).losses["kl_loss"], 6 * kl)
    assert make(kl_weight=0)(latents()).losses == {}


def test_the_schedules_go_by_the_step_of_the_run_whatever_was_skipped_or_loaded():
    quantizer, young = make(temperature_steps=100), make(temperature_steps=100)
    quantizer.begin_step(20)
    quantizer.update()
    quantizer.begin_step(21)
    quantizer.discard()  # a skipped step counts as it does for the learning rate
    quantizer.begin_step(22)
    at_22 = float(quantizer.temperature())
    quantizer.load_state_dict(young.state_dict())  # a rollback to weights from the beginning
    quantizer.begin_step(23)
    assert 0.8 < float(quantizer.temperature()) < at_22 < 1


def test_an_autoencoder_tells_all_its_quantizers_the_step():
    quantizer = GumbelQuantizerConfig(codebook_size=K, dim=D)
    for model in (
        VQVAE(VQVAEConfig(width=4, residual_width=4, quantizer=quantizer), (8, 8)),
        VQVAE2(VQVAE2Config(width=4, residual_width=4, quantizer=quantizer), (16, 16)),
    ):
        model.begin_step(7)
        found = [int(module.updates) for module in model.modules() if isinstance(module, GumbelQuantizer)]
        assert found in ([7], [7, 7])


def test_a_model_of_before_keeps_its_fingerprint():
    # A prior knows its autoencoder by the fingerprint, which all tensors are in, also those that training alone needs.
    config = VQVAEConfig(channels=1, width=4, residual_width=4, quantizer=GumbelQuantizerConfig(codebook_size=K, dim=D))
    torch.manual_seed(0)
    model = VQVAE(config, (8, 8))
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 7 if "usage" not in name else tensor)
    model.quantizer.updates.fill_(1234)
    assert model.fingerprint() == FINGERPRINT


def test_the_divergence_from_uniform_is_0_for_uniform_and_log_k_for_certain_codes():
    uniform, certain = torch.zeros(2, K, 3, 3), torch.zeros(2, K, 3, 3)
    certain[:, 3] = 1000
    assert divergence_from_uniform(uniform).item() == pytest.approx(0, abs=1e-6)
    assert divergence_from_uniform(certain).item() == pytest.approx(math.log(K))


def test_noise_comes_from_the_global_generator_and_in_training_mode_only():
    quantizer = make()
    torch.manual_seed(5)
    one = quantizer(latents()).z_q
    other = quantizer(latents()).z_q
    torch.manual_seed(5)
    assert torch.equal(quantizer(latents()).z_q, one)
    assert not torch.equal(one, other)
    quantizer.eval()
    drawn = torch.get_rng_state()
    assert torch.equal(quantizer(latents()).z_q, quantizer(latents()).z_q)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_samples_have_the_shares_of_the_posterior():
    quantizer = make(sample="straight-through", embedding_dim=1)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.arange(float(K)).view(K, 1))
    logits = torch.randn(K, generator=torch.Generator().manual_seed(2))
    many = logits.view(1, K, 1, 1).expand(1, K, 200, 200)
    torch.manual_seed(0)
    noise = -torch.empty_like(many).exponential_().log()
    drawn = quantizer.sample(many, noise, 1.0).flatten().long()
    shares = torch.bincount(drawn, minlength=K) / drawn.numel()
    torch.testing.assert_close(shares, logits.softmax(0), rtol=0, atol=0.01)


def test_straight_through_has_the_value_of_one_code_and_the_gradient_of_the_mixture():
    hard, soft = make(sample="straight-through"), make(sample="soft")
    logits = torch.randn(2, K, 3, 5, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(2, K, 3, 5, generator=torch.Generator().manual_seed(3))
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    z_q, mixture = hard.sample(one, noise, 0.5), soft.sample(other, noise, 0.5)
    torch.testing.assert_close(z_q, hard.codes_to_latents(((logits + noise).argmax(1),)))
    assert not torch.allclose(z_q, mixture)
    upstream = torch.randn_like(z_q)
    z_q.backward(upstream)
    mixture.backward(upstream)
    torch.testing.assert_close(one.grad, other.grad)


def clusters(b: int) -> Tensor:
    """Latents around K centres."""
    generator = torch.Generator().manual_seed(4)
    centres = 3 * torch.randn(K, D, generator=generator)
    drawn = centres[torch.randint(K, (b, 4, 4), generator=generator)]
    return rearrange(drawn + 0.1 * torch.randn(drawn.shape, generator=generator), "b h w d -> b d h w")


def test_from_k_means_each_latent_starts_at_its_nearest_centre():
    quantizer, z = make(kmeans_iterations=10), clusters(6)
    quantizer.initialise([z[:3], z[3:]])
    centres = quantizer.embedding.weight.detach()
    rows = rearrange(z, "b d h w -> (b h w) d")
    squares = torch.cdist(rows, centres).square()
    assert torch.equal(quantizer.codes(z)[0].flatten(), squares.argmin(1))
    scale = SURENESS / squares.amin(1).mean()
    expected = (-scale * squares).log_softmax(1)
    found = rearrange(quantizer.logits_of(z).log_softmax(1), "b k h w -> (b h w) k")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)
    other = make(kmeans_iterations=10, embedding_dim=D + 1)
    before = other.embedding.weight.detach().clone()
    other.initialise([z])
    assert torch.equal(other.embedding.weight, before)  # of another width than the centres
    noise = make()
    noise.initialise([z])
    assert torch.equal(noise.logits.weight, make().logits.weight)


def test_the_diversity_loss_is_minus_the_entropy_of_the_mean_posterior_in_training_alone():
    quantizer, z = make(diversity_weight=0.3, kl_weight=0), latents()
    quantized = quantizer(z)
    mean = quantizer.logits_of(z).softmax(1).mean((0, 2, 3))
    torch.testing.assert_close(quantized.losses["diversity_loss"], -0.3 * torch.special.entr(mean).sum())
    torch.testing.assert_close(quantized.statistics["batch_entropy"], torch.special.entr(mean).sum().detach())
    assert quantizer.eval()(z).losses == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"diversity_weight": -1}, "diversity_weight=-1, expected 0 or more; wav2vec 2.0 has 0.1"),
        ({"kmeans_iterations": -1}, "kmeans_iterations=-1, expected 0 or more"),
        ({"embedding_dim": 0}, "embedding_dim=0, expected at least 1, or null for dim"),
        ({"temperature_end": 0}, "temperature_end=0, expected above 0; the paper has 0.0625"),
        ({"sample": "hard"}, "sample=hard, expected soft or straight-through"),
    ],
)
def test_a_config_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        GumbelQuantizerConfig(**settings)


def test_what_is_set_already_is_no_remedy():
    for settings, expected in (
        ({}, ("kmeans_iterations=10", "diversity_weight=0.1")),
        ({"kmeans_iterations": 10}, ("diversity_weight=0.1",)),
        ({"kmeans_iterations": 10, "diversity_weight": 0.1}, ()),
    ):
        quantizer = make(**settings)
        quantizer(latents())
        quantizer.update()
        (line,) = quantizer.warnings({"codes_used_share": 0.1}, 1)
        smaller, *others = line.partition("; try ")[2].split(", or ")
        assert smaller == "a smaller model.quantizer.codebook_size"
        assert others == [f"model.quantizer.{name}" for name in expected]


def test_dalle_begins_with_logits_and_code_vectors_of_its_convolutions():
    """Of the variance of the input, and of 1 / k: the decoder's first layer is a convolution of one-hot codes."""
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(GumbelQuantizerConfig(codebook_size=1024, dim=256, embedding_dim=64, init="dalle"))
    assert float(quantizer.embedding.weight.detach().std()) == pytest.approx(1 / 32, rel=0.02)
    assert float(quantizer.logits_of(torch.randn(8, 256, 4, 4)).detach().std()) == pytest.approx(1, rel=0.02)
    assert not quantizer.logits.bias.any()
    plain = GumbelQuantizer(GumbelQuantizerConfig(codebook_size=1024, dim=256, embedding_dim=64))
    assert float(plain.embedding.weight.detach().std()) == pytest.approx(1, rel=0.02)
