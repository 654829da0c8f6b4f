"""A condition as a sentence: a row of vectors, its words, and the layers that read them (Han et al. 2024,
arXiv:2412.04431, section 3.1)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.errors import UserError
from stage2_prior.condition import Condition, EmbeddingSpec, TextSpec
from stage2_prior.priors.prefix import Prefix


class Words(NamedTuple):
    vectors: Tensor  # b t c
    there: Tensor | None  # b t, True for a word that is there; None: all are


class Sentence(nn.Module):
    """A condition as words: of the class, of tokens, of a text encoder, in this order, those that the prior goes by. A
    prior that goes by nothing has words all the same, as of any class."""

    def __init__(
        self,
        width: int,
        num_classes: int,
        class_words: int,
        text: TextSpec | None = None,
        embeddings: EmbeddingSpec | None = None,
    ):
        """width: c, of a word, that of the embeddings where there are any; class_words: words of a class."""
        super().__init__()
        self.width = width
        by_class = num_classes > 0 or not (text or embeddings)
        self.classes = nn.Embedding(num_classes + 1, class_words * width) if by_class else None  # the null last
        self.tokens = Prefix(width, text) if text else None
        self.null: nn.Parameter | None = None  # t c, any text of a text encoder
        if embeddings is not None:
            self.null = nn.Parameter(torch.empty(embeddings.length, width))

    def forward(self, batch: int, condition: Condition) -> Words:
        parts: list[Tensor] = []
        if self.classes is not None:
            labels = condition.labels
            words = self.classes.weight[-1:].expand(batch, -1) if labels is None else self.classes(labels)
            parts.append(words.unflatten(1, (-1, self.width)))
        if self.tokens is not None:
            parts.append(self.tokens(replace(condition, embeddings=None)))
        if self.null is None:
            return Words(torch.cat(parts, dim=1), None)
        assert condition.embeddings is not None
        assert condition.embedding_mask is not None
        known, mask = told_of(condition.embeddings, condition.embedding_mask)
        parts.append(torch.where(known, condition.embeddings.to(self.null.dtype), self.null))
        words = torch.cat(parts, dim=1)
        return Words(words, F.pad(mask, (words.shape[1] - mask.shape[1], 0), value=True))


def told_of(embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of a caption's vectors, b t c, and which of them count, b t: whether it says something, b 1 1, and which words
    there are. One that is left out has the null words, as many as it was long, or all where that is not known."""
    known = ((embeddings != 0) & mask[..., None]).any(dim=(1, 2), keepdim=True)
    return known, mask | ~mask.any(dim=1, keepdim=True)


class CrossAttention(nn.Module):
    """What words answer. Keys have no bias."""

    def __init__(self, width: int, words: int, heads: int):
        """words: width of a word; heads: each of width / heads numbers."""
        super().__init__()
        self.heads = heads
        self.kv = nn.Linear(words, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)

    def keys_and_values(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """words: b t c; returns two of `b heads t d`."""
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        kv = F.linear(words, self.kv.weight, bias)
        k, v = rearrange(kv, "b t (two heads d) -> two b heads t d", two=2, heads=self.heads)
        return k, v

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """q: b heads n d; mask: b 1 1 t, True for a word that is there; None: all are. Returns b n d."""
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.out(rearrange(attended, "b heads n d -> b n (heads d)"))


class Pool(nn.Module):
    """A sentence as one vector: what its words answer to one learned question."""

    def __init__(self, width: int, words: int):
        """Raises UserError where the heads, one for each 128 numbers of a word as published, do not fit the width."""
        super().__init__()
        heads = max(1, words // (64 if width > 4096 else 128))
        if width % heads:
            raise UserError(
                f"width={width}, expected a multiple of {heads}: words of {words} numbers are pooled by so many heads"
            )
        self.question = nn.Parameter(torch.empty(1, heads, 1, width // heads))
        self.attention = CrossAttention(width, words, heads)

    def forward(self, words: Tensor, mask: Tensor | None) -> Tensor:
        """words: b t c; returns b d."""
        keys, values = self.attention.keys_and_values(words)
        question = self.question.expand(len(words), -1, -1, -1).to(keys.dtype)
        return self.attention.attend(question, keys, values, mask)[:, 0]
