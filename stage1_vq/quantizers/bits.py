"""Codes that are bits: their numbers, and exact entropies of bits that are drawn independently of each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.compatibility import never_compiled
from common.distributed import global_mean

TILE = 2**21  # probabilities at a time: 8 MB


def bits_to_codes(bits: Tensor) -> Tensor:
    """bits: b bits h w, bool, the most significant first; returns b h w, int64."""
    places = 2 ** torch.arange(bits.shape[1] - 1, -1, -1, device=bits.device)
    return (bits * rearrange(places, "bits -> bits 1 1")).sum(1)


def codes_to_bits(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `bits_to_codes`: b bits h w, bool."""
    places = 2 ** torch.arange(bits - 1, -1, -1, device=codes.device)
    return (rearrange(codes, "b h w -> b 1 h w") & rearrange(places, "bits -> bits 1 1")) != 0


def bit_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each bit that is 1 with probability sigmoid(logits): of the same shape."""
    distance = logits.abs()
    return F.softplus(-distance) + distance * torch.sigmoid(-distance)


def joint_probabilities(logits: Tensor) -> Tensor:
    """Probability of every combination of independent bits: n bits to n 2**bits, first bit most significant."""
    joint = logits.new_ones(len(logits), 1)
    for bit in rearrange(logits, "n bits -> bits n 1"):
        joint = torch.stack([joint * torch.sigmoid(-bit), joint * torch.sigmoid(bit)], 2).flatten(1)
    return joint


def sum_of_joint_probabilities(logits: Tensor) -> Tensor:
    """The rows of `joint_probabilities` added up: 2**bits.

    A row is the outer product of the probabilities of its first and of its second half of the bits, and a sum of outer
    products is a matrix product: of the n x 2**bits table, only two sides of n x 2**(bits / 2) are ever there.
    """
    half = logits.shape[1] // 2
    high, low = joint_probabilities(logits[:, :half]), joint_probabilities(logits[:, half:])
    return (high.t() @ low).flatten()


@never_compiled  # the loop would be unrolled into the graph
def mean_joint_probabilities(logits: Tensor) -> Tensor:
    """The mean row of `joint_probabilities`: 2**bits.

    Exact, in 2 n 2**bits multiplications and additions and some ten tiles of memory: the sides of the matrix product
    are computed a tile at a time, and once more in the backward pass.
    """
    n, bits = logits.shape
    total = logits.new_zeros(2**bits)
    for tile in logits.split(max(1, TILE // 2 ** ((bits + 1) // 2))):
        total = total + checkpoint(sum_of_joint_probabilities, tile, use_reentrant=False, preserve_rng_state=False)
    return total / n


def entropy(probabilities: Tensor) -> Tensor:
    """In nats, over the last axis; where a probability is 0, so is its term, and the gradient is finite."""
    tiny = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * probabilities.clamp(min=tiny).log()).sum(-1)


def batch_entropy(logits: Tensor, bits: int) -> Tensor:
    """Entropy in nats of the mean of the codes' probabilities over the latents of all processes, a scalar; logits: of
    each bit, n by all bits.

    A micro-batch of an accumulated step has one of its own: the entropy of a mean is no mean of entropies. With more
    than `bits` of them: the sum over groups of as many, which is an upper bound. It is exact where the groups are used
    independently of each other (Zhao et al. 2024, arXiv:2406.07548, go as far as groups of one bit).
    """
    groups = logits.split(bits, 1)
    return torch.stack([entropy(global_mean(mean_joint_probabilities(group))) for group in groups]).sum()
