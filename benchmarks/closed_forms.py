"""Figures of the documentation that follow from sizes, or from a short computation with a fixed seed.

`python -m benchmarks.closed_forms` prints a line for each, `name: value`, in a few seconds, without data or training:
the head and checks of `.zlg` files, sizes of tables and caches, starts of code vectors, and how much too low the
entropy of few codes comes out.
"""

from __future__ import annotations

import argparse
import math

import torch

from pipelines.codec.archive import Archive, Entry, Mode, Shape, write_archive
from pipelines.figures import entropy
from stage1_vq.quantizers.gumbel import GumbelQuantizer, GumbelQuantizerConfig

STAGE1, PRIOR, TABLES = bytes(8), bytes([1] * 8), bytes([2] * 8)
SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def head_bytes(shape: Shape, mode: Mode, payload_bits: int, label: int | None = None) -> int:
    """Bytes of a file of one image that are not its payload."""
    payload = payload_bits + (-payload_bits) % 8
    number = (1 << payload) - (1 << (payload - payload_bits)) if mode != Mode.packed else 0
    data = number.to_bytes(payload // 8, "big")
    return len(
        write_archive(Archive((Entry(mode, shape, 2**32 - 1, data, label=label),), STAGE1, PRIOR, TABLES))
    ) - len(data)


def heads() -> None:
    digit = Shape(28, 28, ((7, 7, 128),))
    print(f"head of a digit, packed: {head_bytes(digit, Mode.packed, 49 * 7)} bytes")
    print(f"head of a digit, table: {head_bytes(digit, Mode.table, 222)} bytes")
    print(f"head of a digit, prior: {head_bytes(digit, Mode.prior, 120)} or {head_bytes(digit, Mode.prior, 132)} bytes")
    photo = Shape(256, 256, ((16, 16, 1024),))
    print(f"head of 16x16 codes of 1024 with a class: {head_bytes(photo, Mode.prior, 2000, 999)} bytes")
    scales = Shape(256, 256, tuple((side, side, 4096) for side in SCALES))
    print(f"head of ten scales of 4096 with a class: {head_bytes(scales, Mode.prior, 7000, 999)} bytes")


def sizes() -> None:
    print(f"table of 65,536 latents by 2^18 codes: {65_536 * 2**18 * 4 / 2**30:.0f} GiB")


def starts() -> None:
    norms = {}
    for init in ("normal", "dalle"):
        torch.manual_seed(0)
        config = GumbelQuantizerConfig(codebook_size=8192, dim=16, embedding_dim=16, init=init)
        norms[init] = float(GumbelQuantizer(config).embedding.weight.detach().std())
    print(f"code vectors of 8,192 codes: {norms['normal'] / norms['dalle']:.1f} times as small as the default")


def few_codes() -> None:
    """384 codes, as 24 images of 4x4 have, of 256 whose probabilities fall as 1 / (rank + 10); means of 20 draws."""
    shares = 1 / (torch.arange(256, dtype=torch.float64) + 10)
    shares /= shares.sum()
    seeds = [torch.Generator().manual_seed(seed) for seed in range(2, 22)]
    drawn = [torch.multinomial(shares, 384, replacement=True, generator=seed).bincount(minlength=256) for seed in seeds]
    plain = [-torch.xlogy(counts / 384, counts / 384).sum().item() / math.log(2) for counts in drawn]
    print(f"entropy of 256 codes: {-(shares * shares.log2()).sum():.2f} bits")
    print(f"entropy of 384 of them: {sum(plain) / 20:.2f} bits")
    print(f"entropy of 384 of them, corrected: {sum(map(entropy, drawn)) / 20:.2f} bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    heads()
    sizes()
    starts()
    few_codes()


if __name__ == "__main__":
    main()
