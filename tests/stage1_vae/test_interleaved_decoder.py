from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.model_io import load_pretrained
from stage1_vae.decoders.interleaved import Grid, InterleavedConfig, InterleavedDecoder, grids
from stage1_vae.likelihoods import BernoulliConfig, LogisticMixtureConfig, build_likelihood
from stage1_vae.networks import ConvolutionalConfig
from stage1_vae.vae import VAE, VAEConfig


def decoder(levels: int = 2, channels: int = 1, **likelihood: int) -> InterleavedDecoder:
    torch.manual_seed(0)
    chosen = build_likelihood(LogisticMixtureConfig(**likelihood) if likelihood else BernoulliConfig(), channels)
    config = InterleavedConfig(levels=levels, width=6, residual_blocks=1, trunk_widths=(5,), trunk_blocks=1)
    return InterleavedDecoder(config, chosen, (3,), (8, 12)).eval()


def images(count: int, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 2, (count, channels, 8, 12), generator=generator) * 2.0 - 1


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_grids_are_the_image_each_pixel_once(levels: int):
    seen = torch.zeros(8, 16, dtype=torch.int64)
    for grid in grids(levels):
        grid.of(seen).add_(1)
    assert (seen == 1).all()
    assert len(grids(levels)) == 1 + 3 * levels
    assert grids(1) == [Grid(0, 0, 2), Grid(1, 1, 2), Grid(0, 1, 2), Grid(1, 0, 2)]


def outputs_of(model: InterleavedDecoder, latents: Tensor, pixels: Tensor) -> list[Tensor]:
    found = []

    def given(grid: Grid, outputs: Tensor) -> Tensor:
        found.append(outputs)
        return grid.of(pixels)

    with torch.no_grad():
        model.walk(latents, given)
    return found


@pytest.mark.parametrize("levels", [1, 2])
def test_what_is_said_of_a_grid_depends_on_the_pixels_before_it_alone_and_on_all_of_them(levels: int):
    model, latents, pixels = decoder(levels), torch.randn(1, 3), images(1)
    before = outputs_of(model, latents, pixels)
    for number, grid in enumerate(grids(levels)):
        other = pixels.clone()
        grid.of(other).neg_()
        after = outputs_of(model, latents, other)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert all(same[: number + 1])
        assert not any(same[number + 1 :])


def test_probabilities_of_all_images_add_up_to_one():
    """Of 2x2 pixels, one level: 16 images."""
    chosen = build_likelihood(BernoulliConfig(), 1)
    torch.manual_seed(3)
    config = InterleavedConfig(levels=1, width=4, residual_blocks=1, trunk_widths=(4,), trunk_blocks=0)
    model = InterleavedDecoder(config, chosen, (2,), (2, 2)).double()
    every = (
        torch.tensor([[(number >> bit) & 1 for bit in range(4)] for number in range(16)]).view(16, 1, 2, 2) * 2.0 - 1
    )
    latents = torch.randn(3, 1, 2, dtype=torch.float64).expand(3, 16, 2)
    with torch.no_grad():
        log_p = model.log_likelihood(latents, every.double())
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(3, dtype=torch.float64))
    assert log_p.exp().std(1).min() > 1e-3


def test_samples_are_as_frequent_as_their_probabilities():
    model, latents = decoder(1), torch.randn(1, 3)
    with torch.no_grad():
        drawn = model.sample(latents.expand(4_000, 3), torch.Generator().manual_seed(5))
        mean_log_p = model.log_likelihood(latents[None].expand(4_000, 1, 3), drawn[:1])[0]
        # the entropy two ways: a draw's own log-probability, and the frequencies of a pair of neighbours
        known = model.log_likelihood(latents.expand(4_000, 3)[None], drawn)
    assert torch.isfinite(mean_log_p).all()
    first = outputs_of(model, latents, drawn[:1])[0].sigmoid()[0, 0]
    frequency = (Grid(0, 0, 2).of(drawn)[:, 0] > 0).double().mean(0)
    error = (first * (1 - first) / 4_000).sqrt()
    assert ((frequency - first).abs() < 5 * error).all()
    assert known.std() > 0


def test_mode_is_most_likely_given_what_is_before_it():
    model, latents = decoder(2), torch.randn(4, 3)
    with torch.no_grad():
        mode = model.mode(latents)
        for number, outputs in enumerate(outputs_of(model, latents, mode)):
            assert torch.equal(grids(2)[number].of(mode), torch.where(outputs > 0, 1.0, -1.0))
        assert model.mean(latents).abs().max() <= 1


def test_draws_are_judged_as_one_by_one():
    model, pixels, latents = decoder(2, 3, components=2), images(2, 3), torch.randn(4, 2, 3)
    with torch.no_grad():
        together = model.log_likelihood(latents, pixels)
        alone = torch.cat([
            torch.cat([model.log_likelihood(latents[k, None, b, None], pixels[b, None]) for b in range(2)], dim=1)
            for k in range(4)
        ])  # fmt: skip
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-3)


def test_a_vae_with_it_learns_and_is_saved(tmp_path):
    torch.manual_seed(0)
    config = VAEConfig(
        latents=2,
        encoder=ConvolutionalConfig(widths=(4, 4, 4), residual_blocks=0, map=True),
        decoder=InterleavedConfig(levels=2, width=6, residual_blocks=1, trunk_widths=(6,), trunk_blocks=1, map=True),
        likelihood=LogisticMixtureConfig(components=2),
    )
    model = VAE(config, (8, 8))
    pixels = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).mul(127.5).round().div(127.5).expand(4, 1, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    first = None
    for _ in range(60):
        loss = -model(pixels).log_weights.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = float(loss.detach()) if first is None else first
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.decoder.parameters())
    assert first is not None
    assert float(loss.detach()) < 0.7 * first
    model.eval().save_pretrained(tmp_path / "model")
    again = load_pretrained(tmp_path / "model", {"vae": VAE})
    latents = torch.randn(1, 4, 2, 2, 2)
    with torch.no_grad():
        assert torch.equal(again.decoder.log_likelihood(latents, pixels), model.decoder.log_likelihood(latents, pixels))


def test_sides_that_cannot_be_halved_are_refused():
    chosen = build_likelihood(BernoulliConfig(), 1)
    with pytest.raises(UserError, match=r"levels=3, expected such that 2\*\*levels divides \(12, 8\)"):
        InterleavedDecoder(InterleavedConfig(levels=3), chosen, (3,), (12, 8))
