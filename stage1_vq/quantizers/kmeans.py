"""k-means over the latents of all processes, to start a codebook from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.distributed import draw_rows, from_first_process, sum_over_processes
from stage1_vq.quantizers.search import nearest_codes


class Clusters(NamedTuple):
    centres: Tensor  # k d
    sizes: Tensor  # k, int64: vectors in each cluster, over all processes


@torch.no_grad()
def kmeans(batches: Sequence[Tensor], k: int, iterations: int, *, spherical: bool = False) -> Clusters:
    """Lloyd's algorithm from k random vectors; the result is the same on all processes.

    batches: n d each, this process's vectors of each micro-batch. spherical: vectors have length 1, and so get the
    centres. A cluster that loses all its vectors stays where it is. Where all processes together have fewer than k
    vectors, the rest of the centres are vectors again, moved a little so that no two centres are the same.
    """
    centres = draw_rows(batches, k)
    vectors = torch.cat(list(batches))
    if missing := k - len(centres):
        again = centres[torch.arange(missing, device=vectors.device) % len(centres)]
        noise = from_first_process(torch.randn(again.shape).to(again.device))
        centres = torch.cat([centres, again + 0.01 * centres.std(0, correction=0) * noise])
        centres = F.normalize(centres, dim=1) if spherical else centres
    sizes = torch.zeros(k, dtype=torch.int64, device=vectors.device)
    for _ in range(iterations):
        codes = nearest_codes(vectors, centres)
        sizes = sum_over_processes(torch.bincount(codes, minlength=k))
        sums = sum_over_processes(torch.zeros_like(centres).index_add_(0, codes, vectors))
        means = sums / sizes.clamp(min=1).unsqueeze(1)
        centres = torch.where((sizes > 0).unsqueeze(1), F.normalize(means, dim=1) if spherical else means, centres)
    return Clusters(centres, sizes)
