"""A text encoder small enough to test with: T5 with random weights, and a tokenizer that ends a text as T5's does."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import T5Config, T5EncoderModel

from stage2_prior.text import train_tokenizer

CAPTIONS = ["red", "a grey owl", "a blue and green bird above a red house", "green", "blue"]
WIDTH = 12


def save_text_encoder(folder: Path, width: int = WIDTH) -> Path:
    tokenizer = Tokenizer.from_str(train_tokenizer(CAPTIONS, 290))
    tokenizer.add_special_tokens(["</s>"])
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = T5Config(vocab_size=end + 1, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    return folder
