"""Captions as the vectors that a decoder reads beside its codes: what CLIP (Radford et al. 2021, arXiv:2103.00020) says
at each place of a text (`stage1_vq.autoencoders.base.CaptionSpec`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.wording import an
from stage1_vq.autoencoders.base import Autoencoder, CaptionSpec
from stage2_prior.text import open_tokenizer, read_tokenizer

PADDING = 0  # the token behind a text, as in open_clip: what stands there is read too, and transformers has another
MOST_KEPT = 256  # texts whose vectors are kept


class CaptionEncoder:
    """CLIP's text model, which is never trained here, with its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: str, width: int, longest: int) -> None:
        """tokenizer: the content of its tokenizer.json; width: of a vector; longest: tokens that it reads at most."""
        self.model = model.eval().requires_grad_(False)
        self.width, self.longest = width, longest
        self.tokenizer = open_tokenizer(tokenizer)
        self.kept: dict[tuple[str, int], Tensor] = {}  # t d each, on the CPU

    @classmethod
    def load(cls, source: str) -> Self:
        """source: a folder of a CLIP of `transformers` with its tokenizer.json, or its id on the Hugging Face hub.
        Raises UserError."""
        try:
            from transformers import CLIPTextModel
        except ImportError as error:
            raise UserError("captions for a decoder need transformers: pip install 'zellige[text]'") from error
        tokenizer = read_tokenizer(source)
        try:
            model = CLIPTextModel.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{source!r} is no CLIP that transformers opens ({str(error).splitlines()[0]}); name a folder or a hub "
                "id of one as text_encoder, such as openai/clip-vit-large-patch14-336"
            ) from error
        return cls(model, tokenizer, model.config.hidden_size, model.config.max_position_embeddings)

    @torch.no_grad()
    def of(self, text: str, length: int) -> Tensor:
        """The vectors of a text, t d, float32, on the CPU; length: t. A longer text is cut, but for its end token."""
        if (known := self.kept.get((text, length))) is not None:
            return known
        if length > self.longest:
            raise UserError(f"captions of {length} vectors, but this CLIP reads {self.longest} at most: name another")
        self.tokenizer.enable_truncation(length)
        tokens = torch.full((1, length), PADDING)
        ids = self.tokenizer.encode(text).ids
        tokens[0, : len(ids)] = torch.tensor(ids)
        vectors: Tensor = self.model(input_ids=tokens).last_hidden_state[0].float()
        if len(self.kept) >= MOST_KEPT:
            self.kept.pop(next(iter(self.kept)))  # the oldest
        self.kept[text, length] = vectors
        return vectors


class DecoderCaptions:
    """The vectors of captions for one autoencoder, whose text encoder is loaded with the first one."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder
        self.encoder: CaptionEncoder | None = None

    def load(self, source: str | None = None) -> CaptionEncoder:
        """source: a folder or hub id, None: what the model records. Raises UserError, also for a decoder that reads
        codes alone and for a CLIP of another width."""
        if self.encoder is None or source is not None:
            spec = self.spec()
            encoder = CaptionEncoder.load(source or spec.encoder)
            if encoder.width != spec.width:
                raise UserError(
                    f"the text encoder {source or spec.encoder} gives vectors of {encoder.width} numbers, expected "
                    f"{spec.width}: those that the decoder was trained with"
                )
            self.encoder = encoder
        return self.encoder

    def spec(self) -> CaptionSpec:
        if (spec := self.autoencoder.captions()) is None:
            raise UserError(
                f"got a caption, but the decoder of {an(self.autoencoder.kind)} model reads codes alone: leave it out"
            )
        return spec

    def of(self, texts: Sequence[str] | None) -> Tensor | None:
        """b t d of b texts, on the CPU: each goes through the encoder by itself, whatever is beside it. None, for which
        no encoder is needed, where nothing is said, and for a decoder that reads codes alone."""
        if texts is None or not any(texts) or self.autoencoder.captions() is None:
            return None
        encoder, length = self.load(), self.spec().length
        return torch.stack([encoder.of(text, length) for text in texts])
