"""Entropy coding with integer frequencies: `constriction`'s range coder, and byte strings without a byte too many.

A model of a code is a row of integers, one for each of its k values, at least 1 each, which sum to TOTAL. They go to
constriction as *weights*, frequencies less one: its fast models give every value one count of the 2**24 and share out
the others by floating-point weights. Whole weights that sum to TOTAL - k are shared out without any rounding, so the
frequencies are exactly those that were meant, on any machine (tests/pipelines/codec/test_entropy_coding.py).
"""

from __future__ import annotations

import constriction
import numpy as np

TOTAL = 1 << 24  # sum of the frequencies of all values: the precision of constriction's models
LARGEST_VOCABULARY = 1 << 20  # k: beyond it the counts that every value has would cost much of TOTAL
BY_ROW = constriction.stream.model.Categorical(perfect=False)  # a model that is given with each code


class DamagedPayloadError(Exception):
    """Bytes that are no codes under the model with which they are read."""


def frequencies(shares: np.ndarray, total: int = TOTAL) -> np.ndarray:
    """Integers `n k`, at least 1, each row with the sum `total`, nearly in proportion to the shares `n k` (float64, sum
    1). What rounding leaves goes to the most probable value."""
    spread = total - shares.shape[1]
    whole = np.floor(shares * spread).astype(np.int64)
    whole[np.arange(len(whole)), whole.argmax(axis=1)] += spread - whole.sum(axis=1)
    return whole + 1


def weights_of(counts: np.ndarray) -> np.ndarray:
    """What the coders take for these frequencies. Float32 holds every integer up to TOTAL."""
    return (counts - 1).astype(np.float32)


class Encoder:
    """Codes of one image, to bytes."""

    def __init__(self) -> None:
        self.coder = constriction.stream.queue.RangeEncoder()

    def encode(self, codes: np.ndarray, weights: np.ndarray) -> None:
        """codes: n; weights: n k, or k for all of them."""
        codes = np.ascontiguousarray(codes, dtype=np.int32)
        if weights.ndim == 1:
            self.coder.encode(codes, constriction.stream.model.Categorical(weights, perfect=False))
        else:
            self.coder.encode(codes, BY_ROW, weights)

    def finish(self) -> bytes:
        """The bytes with the fewest bits from which a `Decoder` reads the codes again: see `bit_length`.

        What was encoded is a number in [lower, lower + width) of 64 bits behind the words that are settled.
        constriction chooses one that ends on a word; one that ends on a bit saves up to 31 of them. Zeros at the end
        need not be kept, for the decoder reads zeros there.
        """
        words = self.coder.get_compressed()
        settled, (lower, width) = self.coder.pos()
        data = words.astype(">u4").tobytes()
        head, tail = data[: 4 * settled], data[4 * settled :].ljust(8, b"\0")
        if len(words) == settled or len(tail) != 8:
            return data.rstrip(b"\0")
        if lower + width > 1 << 64:  # the next number of the settled words is inside, followed by zeros
            if int.from_bytes(tail, "big") >= lower:  # constriction did not choose it
                head = (int.from_bytes(head, "big") + 1).to_bytes(len(head), "big")
            return head.rstrip(b"\0")
        for length in range(64):
            unit = 1 << (64 - length)
            rounded = -(-lower // unit) * unit
            if rounded - lower < width and rounded < 1 << 64:
                return (head + rounded.to_bytes(8, "big")).rstrip(b"\0")
        return data.rstrip(b"\0")


def bit_length(payload: bytes) -> int:
    """Bits up to the last one that is not zero."""
    if not payload:
        return 0
    last = payload[-1]
    return 8 * len(payload) - (last & -last).bit_length() + 1 if last else bit_length(payload.rstrip(b"\0"))


class Decoder:
    """Bytes of one image, to codes: the weights must come in the order in which the encoder took them."""

    def __init__(self, payload: bytes):
        padded = payload + bytes(8 + -len(payload) % 4)
        self.coder = constriction.stream.queue.RangeDecoder(np.frombuffer(padded, ">u4").astype(np.uint32))

    def decode(self, weights: np.ndarray, count: int | None = None) -> np.ndarray:
        """Codes, int64 n, of weights n k; or `count` codes that share the weights k. Raises DamagedPayloadError."""
        try:
            if count is None:
                return self.coder.decode(BY_ROW, weights).astype(np.int64)
            shared = constriction.stream.model.Categorical(weights, perfect=False)
            return self.coder.decode(shared, count).astype(np.int64)
        except AssertionError as error:  # how constriction tells that the bytes fit no code
            raise DamagedPayloadError(str(error)) from error


def packed_length(codes: int, vocabulary: int) -> int:
    """Bits of so many codes at ceil(log2 k) each."""
    return codes * (vocabulary - 1).bit_length()


def pack(parts: list[tuple[np.ndarray, int]]) -> bytes:
    """Codes, each with its vocabulary k, as ceil(log2 k) bits for each code, the highest first; zeros fill the last
    byte."""
    bits = []
    for codes, vocabulary in parts:
        width = (vocabulary - 1).bit_length()
        shifts = np.arange(width - 1, -1, -1, dtype=np.int64)
        bits.append(((codes.reshape(-1, 1) >> shifts) & 1).astype(np.uint8).reshape(-1))
    return np.packbits(np.concatenate(bits)).tobytes()


def unpack(payload: bytes, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Inverse of `pack`; sizes: number of codes and vocabulary of each part. Raises DamagedPayloadError for a number
    that is no code."""
    bits = np.unpackbits(np.frombuffer(payload, np.uint8))
    parts, done = [], 0
    for count, vocabulary in sizes:
        width = (vocabulary - 1).bit_length()
        own = bits[done : done + count * width].reshape(count, width).astype(np.int64)
        done += count * width
        codes = own @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64))
        if codes.size and codes.max() >= vocabulary:
            raise DamagedPayloadError(f"code {codes.max()} of a vocabulary of {vocabulary}")
        parts.append(codes)
    return parts
