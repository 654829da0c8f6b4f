"""The coder's frequencies are the integers that were meant, and its bytes are as few as they can be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.codec.entropy_coding import (
    TOTAL,
    DamagedPayloadError,
    Decoder,
    Encoder,
    bit_length,
    frequencies,
    pack,
    unpack,
    weights_of,
)


def random_frequencies(n: int, k: int, seed: int, total: int = TOTAL) -> np.ndarray:
    return frequencies(np.random.default_rng(seed).dirichlet(np.full(k, 0.2), n), total)


@pytest.mark.parametrize("k", [2, 11, 512, 16384])
@pytest.mark.parametrize("total", [TOTAL, TOTAL // 2])
def test_frequencies_are_positive_whole_and_sum_to_the_total(k, total):
    shares = np.random.default_rng(k).dirichlet(np.full(k, 0.2), 20)
    counts = frequencies(shares, total)
    assert counts.dtype == np.int64
    assert counts.min() >= 1
    assert (counts.sum(axis=1) == total).all()
    assert np.abs(counts / total - shares).max() < 2 * k / total  # the one that takes what is left over moves most


def test_a_certain_code_leaves_the_others_one_count_each():
    assert frequencies(np.array([[0.0, 1.0, 0.0]])).tolist() == [[1, TOTAL - 2, 1]]


@pytest.mark.parametrize("k", [2, 11, 512, 16384])
def test_the_coder_gives_each_code_exactly_its_frequency(k):
    """The first code narrows the interval of 64 bits to its own share of it: lower end and width are whole multiples of
    its cumulative frequency and its frequency."""
    counts, unit = random_frequencies(1, k, seed=k), (2**64 - 1) >> 24
    for code in {0, 1, k // 2, k - 1, int(counts.argmax())} - {k - 1}:  # the last takes what division left over
        encoder = Encoder()
        encoder.encode(np.array([code]), weights_of(counts))
        settled, (lower, width) = encoder.coder.pos()
        scale = 32 * settled  # words that are settled have left the interval
        assert lower == (int(counts[0, :code].sum()) * unit << scale) % 2**64
        assert width == int(counts[0, code]) * unit << scale


@given(seed=st.integers(0, 2**32), n=st.integers(0, 40), k=st.sampled_from([2, 3, 11, 300]), sharp=st.floats(0.01, 3))
@settings(max_examples=600, deadline=None)
def test_what_was_encoded_is_decoded_from_hardly_more_bits_than_its_information(seed, n, k, sharp):
    generator = np.random.default_rng(seed)
    counts = frequencies(generator.dirichlet(np.full(k, sharp), n)) if n else np.zeros((0, k), np.int64)
    codes = np.array([generator.choice(k, p=row / TOTAL) for row in counts], dtype=np.int64)
    encoder = Encoder()
    for code, row in zip(codes, counts, strict=True):
        encoder.encode(np.array([code]), weights_of(row[None]))
    payload = encoder.finish()
    information = sum(math.log2(TOTAL / row[code]) for code, row in zip(codes, counts, strict=True))
    # A bit that is begun; and the coder divides a width of at least 2**32 by TOTAL, which can lose a 256th each time.
    assert bit_length(payload) <= math.ceil(information + n * math.log2(1 + 1 / 256))
    decoder = Decoder(payload)
    assert [int(decoder.decode(weights_of(row[None]))[0]) for row in counts] == codes.tolist()
    assert payload[-1:] != b"\0"


def test_codes_that_share_their_weights_are_as_codes_with_weights_each():
    counts = random_frequencies(1, 11, seed=0)
    codes = np.random.default_rng(1).integers(0, 11, 50)
    together, each = Encoder(), Encoder()
    together.encode(codes, weights_of(counts)[0])
    each.encode(codes, weights_of(np.repeat(counts, 50, axis=0)))
    payload = together.finish()
    assert payload == each.finish()
    assert Decoder(payload).decode(weights_of(counts)[0], 50).tolist() == codes.tolist()
    assert Decoder(payload).decode(weights_of(np.repeat(counts, 50, axis=0))).tolist() == codes.tolist()


def test_bytes_that_fit_no_code_are_told():
    weights = weights_of(random_frequencies(1, 2, seed=0))
    decoder = Decoder(b"\xff" * 12)
    with pytest.raises(DamagedPayloadError, match="invalid for the employed entropy model"):
        decoder.decode(np.repeat(weights, 200, axis=0))


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(2, 70000), st.integers(0, 2**32)), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_packed_codes_come_back_from_exactly_their_bits(parts):
    codes = [np.random.default_rng(seed).integers(0, k, n) for n, k, seed in parts]
    data = pack([(own, k) for own, (_, k, _) in zip(codes, parts, strict=True)])
    assert len(data) == math.ceil(sum(n * math.ceil(math.log2(k)) for n, k, _ in parts) / 8)
    for ours, theirs in zip(unpack(data, [(n, k) for n, k, _ in parts]), codes, strict=True):
        assert ours.tolist() == theirs.tolist()


def test_bits_stand_highest_first():
    assert pack([(np.array([1, 4, 2]), 5), (np.array([1]), 2)]) == bytes([0b00110001, 0b01000000])


def test_a_packed_number_that_is_no_code_is_told():
    with pytest.raises(DamagedPayloadError, match="code 7 of a vocabulary of 5"):
        unpack(bytes([0b11100000]), [(1, 5)])


@pytest.mark.parametrize(("payload", "bits"), [(b"", 0), (b"\x80", 1), (b"\x01", 8), (b"a\x40", 10), (b"\x80\0\0", 1)])
def test_bits_of_a_payload_end_with_the_last_one_that_is_set(payload, bits):
    assert bit_length(payload) == bits
