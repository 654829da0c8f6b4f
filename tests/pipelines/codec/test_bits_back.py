"""Images come back from a stack, which is as long as the model's bound says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import pipelines.codec.bits_back as bits_back
from pipelines.codec.bits_back import Stack, decode_chain, encode_chain
from pipelines.codec.entropy_coding import TOTAL, DamagedPayloadError
from pipelines.codec.lossless_archive import Chain
from stage1_vae.exact import ONE_BITS, ExactModel, exact_model
from stage1_vae.hierarchies.vdvae import VDVAE, VDVAEConfig
from stage1_vae.model import LikelihoodVAE
from stage1_vae.networks import DenseConfig
from stage1_vae.objectives.terms import elbo
from stage1_vae.vae import VAE, VAEConfig
from tests.stage1_vae.exact.tiny import CONFIGS, MIXTURE, NAMES, random_values, tiny_vae


def decoded(model: ExactModel, chain: Chain) -> np.ndarray:
    return np.concatenate(list(decode_chain(model, chain))[::-1])


@pytest.mark.parametrize("name", NAMES)
def test_images_come_back(name):
    vae = tiny_vae(name)
    model, images = exact_model(vae), random_values(vae, 21).numpy().astype(np.uint8)
    chain = encode_chain(model, images)
    assert np.array_equal(decoded(model, chain), images)
    assert [group.paid for group in chain.groups[:2]] == [False, True]
    assert max(group.images for group in chain.groups) > (4 if name in CONFIGS else 0)
    alone = encode_chain(model, images[:1])
    assert np.array_equal(decoded(model, alone), images[:1])
    assert len(alone.groups) == 1


def test_groups_may_be_of_any_size(monkeypatch):
    vae = tiny_vae("map_colour")
    model, images = exact_model(vae), random_values(vae, 20).numpy().astype(np.uint8)
    usual = encode_chain(model, images)
    monkeypatch.setattr(bits_back, "LARGEST_GROUP", 3)
    chain = encode_chain(model, images)
    assert max(group.images for group in chain.groups) == 3
    monkeypatch.undo()
    assert np.array_equal(decoded(model, chain), images)
    assert abs(len(chain.stack) - len(usual.stack)) < 0.02 * len(usual.stack)


def test_latents_that_the_stack_does_not_reach_for_wait():
    """An image of two pixels is no pledge for the latents of two more."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latents=9, encoder=DenseConfig(), decoder=DenseConfig(), likelihood=MIXTURE), (1, 2)).eval()
    model, images = exact_model(vae), np.random.default_rng(0).integers(0, 256, (40, 1, 2, 1), dtype=np.uint8)
    chain = encode_chain(model, images)
    assert np.array_equal(decoded(model, chain), images)
    sizes = [group.images for group in chain.groups]
    assert sizes[:3] != [1, 2, 4]
    assert sizes != sorted(sizes) or sizes.count(1) > 1


def test_numbers_of_any_distribution_come_back():
    """Also of shares that stay where they are, as those far from the mean do; and what lay below is untouched."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(0, 2**ONE_BITS, (255, 500), generator=generator)
    edges[:, ::3] = edges[:, ::3] // 2**37 * 2**37  # all that is between 0, 1/2 and 1 in one number
    edges = edges.sort(dim=0).values
    numbers = torch.randint(0, 256, (500,), generator=generator)
    stack = Stack()
    stack.put_uniformly(torch.tensor([3, 1, 4]), 16)
    before = stack.words
    columns = torch.arange(500)

    def shares(values):
        return edges[values - 1, columns]

    stack.put(numbers, shares, 8)
    assert torch.equal(stack.take(500, shares, 8, torch.device("cpu")), numbers)
    assert np.array_equal(stack.words, before)
    assert stack.take_uniformly(3, 16, torch.device("cpu")).tolist() == [3, 1, 4]
    assert not stack.is_exhausted
    stack.take(500, shares, 8, torch.device("cpu"))
    assert stack.is_exhausted


def test_a_choice_has_at_least_one_count():
    below, above = torch.tensor([0, 0, 0]), torch.tensor([2**ONE_BITS, 2**ONE_BITS, 2**ONE_BITS])
    weights = bits_back.weights_of(below, torch.tensor([1, 2**ONE_BITS - 1, 2 ** (ONE_BITS - 1)]), above)
    assert weights.tolist() == [[0, TOTAL - 2], [TOTAL - 2, 0], [TOTAL // 2 - 1, TOTAL // 2 - 1]]


def dense_vae() -> LikelihoodVAE:
    network = DenseConfig(hidden=(40,))
    return VAE(VAEConfig(latents=4, encoder=network, decoder=network, likelihood=MIXTURE), (8, 8))


def small_vdvae() -> LikelihoodVAE:
    config = VDVAEConfig(
        channels=1,
        width=12,
        latents=2,
        encoder_layers="8d2,4d4,1x1",
        decoder_layers="1x1,4m1,8m4",
        bottleneck_multiple=0.5,
        likelihood=MIXTURE,
    )
    return VDVAE(config, (8, 8))


@pytest.mark.parametrize(("model", "steps"), [(dense_vae, 250), (small_vdvae, 150)])
def test_a_stack_is_as_long_as_the_bound_says(model, steps):
    """Of a model that was trained for seconds on blobs: within 1% of its ELBO, and 32 bits of the coder."""
    torch.manual_seed(0)
    vae = model()
    optimizer = torch.optim.Adam(vae.parameters(), 3e-3)
    for _ in range(steps):
        loss = -elbo(vae.terms(blobs(32).float() / 127.5 - 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images = blobs(200)
    with torch.no_grad():
        terms = vae.eval().terms(images.float() / 127.5 - 1, 30)
        bound = -float(elbo(terms).sum()) / math.log(2)
    chain = encode_chain(exact_model(vae), images.movedim(1, -1).numpy().astype(np.uint8))
    bits = 8 * len(chain.stack) - chain.first_bits - 32
    assert sum(float(kl.sum(-1).mean()) for kl in terms.kl) > 1  # the latents say something
    assert 0 < chain.first_bits < 16 * math.prod(vae.shape)
    assert abs(bits - bound) < 0.01 * bound
    assert bits < 0.8 * 8 * images.numel()


def blobs(count: int) -> torch.Tensor:
    """uint8 values, b 1 8 8: bright blobs here and there, with noise."""
    places, rows = torch.rand(count, 2, 1, 1) * 7, torch.arange(8.0)
    distance = (rows[:, None] - places[:, :1]) ** 2 + (rows - places[:, 1:]) ** 2
    return ((-distance / 6).exp() * 200 + 20 * torch.rand(count, 1, 8, 8)).round()


def test_a_stack_is_the_number_that_the_format_says():
    """docs/format.md, in Python's own whole numbers."""
    numbers, total, state, words = [5, 0, 3], 2**24, 2**32, []
    shares = [[i * i * 2**30 for i in range(1, 8)], [2**37] * 7, [0, 0, 2**35, 2**36, 2**38, 2**38, 2**38]]
    stack = Stack()
    stack.put(torch.tensor(numbers), lambda v: torch.tensor([s[int(i) - 1] for s, i in zip(shares, v, strict=True)]), 3)
    stack.put_uniformly(torch.tensor([7]), 16)
    choices = []
    for level in (4, 2, 1):
        for own, number in zip(shares, numbers, strict=True):
            c = [0, *(share + i for i, share in enumerate(own, 1)), 2**38 + 8]
            a = number // (2 * level) * 2 * level
            first = max(1, min(total - 1, total * (c[a + level] - c[a]) // (c[a + 2 * level] - c[a])))
            choices.append((0, first) if number < a + level else (first, total - first))
    for below, frequency in [*reversed(choices), (7 * 2**8, 2**8)]:
        if state >> 40 >= frequency:
            words.append(state % 2**32)
            state >>= 32
        state = 2**24 * (state // frequency) + state % frequency + below
    assert stack.words.tolist() == [*words, state % 2**32, state >> 32]


@pytest.mark.parametrize("name", ["dense_bernoulli", "map_colour"])
def test_other_words_are_no_images(name):
    vae = tiny_vae(name)
    model, images = exact_model(vae), random_values(vae, 9).numpy().astype(np.uint8)
    chain = encode_chain(model, images)
    generator = np.random.default_rng(0)
    for length in (1, 3, 8, len(chain.stack), 3 * len(chain.stack)):
        words = generator.integers(1, 256, length, dtype=np.uint8).tobytes()
        try:
            found = decoded(model, chain._replace(stack=words))
        except DamagedPayloadError:
            continue
        assert not np.array_equal(found, images)
