"""Vectors of prompts: a text goes through the text encoder once, however many images and batches it is asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from pipelines.prior_requests import text_encoder_of
from stage2_prior.priors import Prior
from stage2_prior.text import tokenize
from stage2_prior.text_encoder import EncodedText, TextEncoder

MOST_BYTES = 256 * 2**20  # of vectors that are kept: 128 texts of 256 vectors of 2048 numbers


class EncodedPrompts:
    """What a text encoder says of texts. Each is encoded by itself, so that its vectors depend neither on the texts
    beside it nor on what was asked before; those that were asked for last are kept."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.encoder: TextEncoder | None = None  # loaded with the first text
        self.most_bytes, self.bytes = most_bytes, 0
        self.kept: OrderedDict[object, EncodedText] = OrderedDict()  # last asked for, last

    def load(self, prior: Prior, source: str | None = None) -> TextEncoder:
        """The encoder whose vectors the prior reads, loaded once. source and errors: those of
        `prior_requests.text_encoder_of`."""
        if self.encoder is None or source is not None:
            self.encoder = text_encoder_of(prior, source)
            self.bytes = 0
            self.kept.clear()
        return self.encoder

    def of(self, prior: Prior, texts: Sequence[str]) -> EncodedText:
        """Of b texts: vectors b t d and mask b t, on the device of a prior that reads such."""
        encoder, device = self.load(prior), next(prior.parameters()).device
        found = {text: self.one(encoder, prior, text, device) for text in dict.fromkeys(texts)}
        vectors, masks = zip(*(found[text] for text in texts), strict=True)
        return EncodedText(torch.cat(vectors), torch.cat(masks))

    def one(self, encoder: TextEncoder, prior: Prior, text: str, device: torch.device) -> EncodedText:
        """1 t d and 1 t."""
        assert prior.embeddings is not None
        key = text, prior.embeddings.length, prior.padded_left, device
        if (known := self.kept.get(key)) is not None:
            self.kept.move_to_end(key)
            return known
        tokens = tokenize(encoder.tokenizer, [text], prior.embeddings.length)
        made = encoder.encode(tokens.to(device), prior.padded_left)
        self.kept[key] = made
        self.bytes += size_of(made)
        while self.bytes > self.most_bytes:
            self.bytes -= size_of(self.kept.popitem(last=False)[1])
        return made


def size_of(encoded: EncodedText) -> int:
    return encoded.embeddings.nbytes + encoded.mask.nbytes
