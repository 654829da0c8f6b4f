"""Code shards together with what goes with each image: the codes of another folder, and captions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from codes.shards import CodeDataset
from common.errors import UserError
from training.task import Batch


class Texts:
    """Tokens of the captions of every image, at least one each."""

    def __init__(self, tokens: Tensor, counts: Sequence[int]):
        """tokens: `m t`, int64, image after image; counts: captions of each image."""
        self.tokens = tokens.to(torch.int32)
        self.counts = np.asarray(counts)
        self.first = np.cumsum(self.counts) - self.counts

    def fetch(self, indices: Sequence[int], epochs: Sequence[int]) -> Tensor:
        """`b t`, int64: an image with several captions shows them in turn, epoch after epoch."""
        at = np.asarray(indices)
        return self.tokens[self.first[at] + np.asarray(epochs) % self.counts[at]].long()


class CodesInCompany:
    """training.task.Dataset: the batches of `codes` with "given", one int64 `b h w` for each grid of another folder of
    the same images, and "text", int64 `b t`, where there are any. Raises UserError when the folders differ."""

    def __init__(self, codes: CodeDataset, given: CodeDataset | None = None, texts: Texts | None = None):
        if given is not None:
            check_same_images(codes, given)
        self.codes, self.given, self.texts = codes, given, texts

    def __len__(self) -> int:
        return len(self.codes)

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        batch = dict(self.codes.fetch(indices, draws))
        if self.given is not None:
            batch["given"] = self.given.fetch(indices, draws)["codes"]
        if self.texts is not None:
            batch["text"] = self.texts.fetch(indices, [draw // len(self) for draw in draws])
        return batch


def check_same_images(codes: CodeDataset, given: CodeDataset) -> None:
    """Raises UserError, which names the first difference, unless both hold the same images in the same order."""
    for number, (ours, theirs) in enumerate(zip_longest(codes.names(), given.names())):
        if ours != theirs:
            ours, theirs = ("no more" if name is None else repr(name) for name in (ours, theirs))
            raise UserError(
                f"image {number} is {ours} in {codes.folder} and {theirs} in {given.folder}; encode the same images in "
                "the same order with both autoencoders"
            )
