"""Lookup-free and binary spherical quantization beside a search and a softmax over all corners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers import BSQConfig, LFQConfig, LFQuantizer, build_quantizer, lfq
from stage1_vq.quantizers.bits import entropy

BITS = 6
each_kind = pytest.mark.parametrize("kind", [LFQConfig, BSQConfig])


def make(kind: Any, **settings: Any) -> LFQuantizer:
    torch.manual_seed(0)
    return build_quantizer(kind(**{"bits": BITS, "dim": BITS, "inverse_temperature": 0.5, **settings}))


def latents(b: int = 3) -> Tensor:
    return torch.randn(b, BITS, 4, 5, generator=torch.Generator().manual_seed(1))


def every_corner(quantizer: LFQuantizer) -> Tensor:
    """k bits."""
    return quantizer.codes_to_latents((torch.arange(2**BITS).view(1, 1, -1),))[0, :, 0].t()


def rows_of(quantizer: LFQuantizer, z: Tensor) -> Tensor:
    """n bits."""
    return rearrange(quantizer.lookup_vectors(z), "b d h w -> (b h w) d")


@each_kind
def test_codes_are_the_nearest_corners(kind):
    quantizer, z = make(kind), latents()
    distances = torch.cdist(rows_of(quantizer, z), every_corner(quantizer))
    assert torch.equal(quantizer(z).codes[0].flatten(), distances.argmin(1))


@each_kind
def test_entropy_terms_are_those_of_a_softmax_over_all_corners(kind):
    quantizer = make(kind, entropy_weight=0.3, diversity=2.0, entropy_bits=BITS)
    z = latents().requires_grad_()
    quantized = quantizer(z)
    (quantized.losses["entropy_loss"] + quantized.losses["diversity_loss"]).backward()

    dense_z = latents().requires_grad_()
    distances = torch.cdist(rows_of(quantizer, dense_z), every_corner(quantizer)).square()
    probabilities = (-0.5 * distances).softmax(1)
    sample, batch = entropy(probabilities).mean(), entropy(probabilities.mean(0))
    torch.testing.assert_close(quantized.losses["entropy_loss"], 0.3 * sample)
    torch.testing.assert_close(quantized.losses["diversity_loss"], -0.3 * 2 * batch)
    torch.testing.assert_close(quantized.statistics["sample_entropy"], sample.detach())
    torch.testing.assert_close(quantized.statistics["batch_entropy"], batch.detach())
    (0.3 * (sample - 2 * batch)).backward()
    torch.testing.assert_close(z.grad, dense_z.grad, rtol=1e-4, atol=1e-7)


def test_groups_of_bits_are_an_upper_bound_of_the_batch_entropy():
    z = latents(1)
    z[:, 3:] = z[:, :3]  # bits used together: groups cannot see it
    sizes = (BITS, 4, 3, 1)
    exact, four, three, one = (make(LFQConfig, entropy_bits=size)(z).statistics["batch_entropy"] for size in sizes)
    assert exact < three - 0.1
    assert exact < four + 1e-5
    assert three < one + 1e-5


@each_kind
def test_terms_of_weight_0_are_not_computed(kind, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(lfq, "batch_entropy", refuse)
    without = make(kind, diversity=0, commitment_weight=0)
    assert set(without(latents()).losses) == {"entropy_loss"}
    monkeypatch.setattr(lfq, "bit_entropy", refuse)
    none = make(kind, entropy_weight=0, commitment_weight=0)
    assert none(latents()).losses == {}
    at_rest = make(kind, commitment_weight=1).eval()
    assert set(at_rest(latents()).losses) == {"commitment_loss"}


def test_the_commitment_loss_pulls_the_latent_to_its_corner():
    quantizer, z = make(LFQConfig, commitment_weight=0.5, entropy_weight=0), latents().requires_grad_()
    quantized = quantizer(z)
    quantized.losses["commitment_loss"].backward()
    torch.testing.assert_close(z.grad, 0.5 * 2 * (z - z.sign()).detach() / z.numel())


def test_the_straight_through_gradient_is_the_identity():
    z, upstream = latents().requires_grad_(), torch.randn_like(latents())
    make(LFQConfig)(z).z_q.backward(upstream)
    assert torch.equal(z.grad, upstream)


def test_spherical_latents_and_corners_have_length_1_and_scale_does_not_matter():
    quantizer, z = make(BSQConfig), latents()
    torch.testing.assert_close(quantizer(z).z_q.norm(dim=1), torch.ones(3, 4, 5))
    one, other = quantizer(z), quantizer(7 * z)
    torch.testing.assert_close(one.losses, other.losses)
    assert one.statistics["quantization_error"] < 2 / BITS  # no latent is further than 2^0.5 from its corner


def test_corners_and_soft_clamp():
    quantizer, z = make(LFQConfig, corner=0.5, soft_clamp=1.5, entropy_weight=0), 9 * latents()
    assert quantizer(z).z_q.unique().tolist() == [-0.5, 0.5]
    vectors = quantizer.lookup_vectors(z)
    assert vectors.abs().max() <= 1.5
    torch.testing.assert_close(vectors, 1.5 * torch.tanh(z / 1.5))
    torch.testing.assert_close(
        quantizer(z).statistics["quantization_error"], (vectors - 0.5 * z.sign()).square().mean()
    )
    assert torch.equal(quantizer.codes(z)[0], make(LFQConfig).codes(z)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corner": 0.0}, "corner=0.0, expected above 0"),
        ({"soft_clamp": 0.5}, "soft_clamp=0.5, expected at least corner=1.0"),
    ],
)
def test_corners_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LFQConfig(**settings)


@each_kind
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0}, "bits=0, expected from 1 to 24"),
        ({"bits": 30}, "bits=30, expected from 1 to 24"),
        ({"entropy_weight": -1}, r"entropy_weight=-1, expected 0 \(no entropy terms\) or more"),
        ({"inverse_temperature": 0}, "inverse_temperature=0, expected above 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(kind, settings, message):
    with pytest.raises(UserError, match=message):
        kind(**settings)


def test_every_bit_starts_on_both_sides_of_its_border():
    torch.manual_seed(0)
    quantizer = LFQuantizer(LFQConfig(bits=10, dim=16))
    batches = [torch.randn(4, 16, 3, 3) + 5 * torch.randn(16, 1, 1) for _ in range(2)]
    shares = [(quantizer.lookup_vectors(z) > 0).float().mean((0, 2, 3)) for z in batches]
    assert torch.stack(shares).mean(0).min() < 0.01  # some bit is off in all latents
    quantizer.initialise(batches)
    numbers = torch.stack([quantizer.lookup_vectors(z) for z in batches])
    torch.testing.assert_close(numbers.mean((0, 1, 3, 4)), torch.zeros(10), rtol=0, atol=1e-5)


@pytest.mark.parametrize("factors", [(2, 4), (1, 2, 3), (6,)])
def test_factors_are_bits_of_the_code_the_least_significant_first(factors):
    whole, parted, z = make(LFQConfig), make(LFQConfig, factorized_bits=factors), latents()
    assert [grid.vocabulary for grid in parted.grids(4, 5)] == [2**bits for bits in factors]
    assert [grid.name for grid in parted.grids(4, 5)] == [f"factor{i}" for i in range(len(factors))]
    (codes,), found = whole.codes(z), parted.codes(z)
    expected, below = torch.zeros_like(codes), 0
    for bits, grid in zip(factors, found, strict=True):
        assert torch.equal(grid, codes // 2**below % 2**bits)
        expected += grid * 2**below
        below += bits
    assert torch.equal(expected, codes)
    assert torch.equal(parted.codes_to_latents(found), whole.codes_to_latents((codes,)))
    for ours, theirs in zip(parted(z).codes, found, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(parted(z).z_q, whole(z).z_q)


@pytest.mark.parametrize("factors", [(2, 3), (), (0, 6), (7, -1)])
def test_factors_that_are_not_all_bits_are_refused(factors):
    with pytest.raises(UserError, match=r"factorized_bits=.*, expected numbers of at least 1 that are bits=6 together"):
        LFQConfig(bits=6, dim=6, factorized_bits=factors)
