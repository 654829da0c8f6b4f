"""Captions as vectors of a text encoder that somebody else has trained, such as T5 (Raffel et al. 2020,
arXiv:1910.10683): a prior that reads these begins with all the encoder knows about words."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from common.errors import UserError
from stage2_prior.text import read_tokenizer


class EncodedText(NamedTuple):
    embeddings: Tensor  # b t d, float32, 0 where nothing counts
    mask: Tensor  # b t, bool, True for an embedding that counts


class TextEncoder:
    """A model of `transformers` for the encoding of texts, which is never trained here, with its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: str, width: int):
        """tokenizer: the content of its tokenizer.json; width: of the vectors."""
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.width = width

    @classmethod
    def load(cls, source: str) -> Self:
        """source: a folder of a model of `transformers` with its tokenizer.json, or its id on the Hugging Face hub.
        Raises UserError."""
        try:
            import transformers
        except ImportError as error:
            raise UserError("a text encoder needs transformers: pip install 'zellige[text]'") from error
        tokenizer = read_tokenizer(source)
        try:
            # Left out, trust_remote_code is a question to whoever sits there: False runs no code of the folder.
            model = transformers.AutoModelForTextEncoding.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{source!r} is no text encoder that transformers opens ({str(error).splitlines()[0]}); name a folder "
                "or a hub id of one, such as google/flan-t5-base"
            ) from error
        return cls(model, tokenizer, int(model.config.hidden_size))

    @torch.no_grad()
    def encode(self, tokens: Tensor, padded_left: bool) -> EncodedText:
        """tokens: `b t`, which `tokenize` makes with `self.tokenizer`, on any device: the encoder follows. padded_left:
        the vectors stand at the end of the t places, as LlamaGen wants them, not at the beginning."""
        mask = tokens >= 0
        model = self.model.to(tokens.device)
        embeddings = model(input_ids=tokens.clamp(min=0), attention_mask=mask.long()).last_hidden_state.float()
        embeddings = embeddings.masked_fill(~mask[..., None], 0)
        if not padded_left:
            return EncodedText(embeddings, mask)
        places = torch.arange(tokens.shape[1], device=tokens.device) + mask.sum(dim=1, keepdim=True)
        places = places % tokens.shape[1]  # b t: those behind the text come first
        moved = embeddings.gather(1, places[..., None].expand_as(embeddings))
        return EncodedText(moved, mask.gather(1, places))
