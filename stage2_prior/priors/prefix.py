"""What a transformer reads before the codes: a caption, and codes of other grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from codes.spec import Grid
from stage2_prior.condition import Condition, EmbeddingSpec, TextSpec


class Prefix(nn.Module):
    """Tokens of a condition in the order text, embeddings, given codes. A prior without any has no weights here.

    Text as in DALL-E (Ramesh et al. 2021, arXiv:2102.12092): a vocabulary and learned positions of its own, and where a
    caption has ended a learned token for each position, so that attention needs no mask. Embeddings of a text encoder,
    which know their positions, are projected to the width, and those that do not count are replaced in the same way.
    """

    def __init__(
        self,
        width: int,
        text: TextSpec | None = None,
        embeddings: EmbeddingSpec | None = None,
        given: Sequence[Grid] = (),
    ):
        super().__init__()
        self.text_length = text.length if text else 0
        self.embeddings_length = embeddings.length if embeddings else 0
        self.first_given = [sum(grid.vocabulary for grid in given[:number]) for number in range(len(given))]
        self.length = self.text_length + self.embeddings_length + sum(grid.size for grid in given)
        if text:
            self.text = nn.Embedding(text.vocabulary, width)
            self.text_positions = nn.Parameter(torch.empty(text.length, width))
            self.text_ended = nn.Parameter(torch.empty(text.length, width))
        if embeddings:
            self.projection = nn.Linear(embeddings.width, width, bias=False)
            self.embeddings_ended = nn.Parameter(torch.empty(embeddings.length, width))
        if given:
            self.given = nn.Embedding(sum(grid.vocabulary for grid in given), width)

    def forward(self, condition: Condition) -> Tensor:
        """`b length d`. The condition must have what `Prior.check` asks for."""
        parts = []
        if condition.text is not None:
            tokens = self.text(condition.text.clamp(min=0)) + self.text_positions
            parts.append(torch.where((condition.text < 0)[..., None], self.text_ended, tokens))
        if condition.embeddings is not None and condition.embedding_mask is not None:
            vectors = self.projection(condition.embeddings.to(self.projection.weight.dtype))
            parts.append(
                torch.where(condition.embedding_mask[..., None], vectors, self.embeddings_ended.to(vectors.dtype))
            )
        for first, grid in zip(self.first_given, condition.codes or (), strict=True):
            parts.append(self.given(grid.flatten(1) + first))
        return torch.cat(parts, dim=1)
