"""A CLIP small enough to test with: random weights, and a tokenizer that puts a beginning and an end around a text as
CLIP's does."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from stage2_prior.text import train_tokenizer

CAPTIONS = ["a red fox", "a grey owl"]
LONGEST = 9


def save_clip(folder: Path, width: int) -> Path:
    """width: of the vectors, a multiple of 4. The whole model, pictures too, as the hub has it."""
    folder.mkdir()
    tokenizer = Tokenizer.from_str(train_tokenizer(CAPTIONS, 270))
    tokenizer.add_special_tokens(["<start>", "<end>"])
    start, end = tokenizer.token_to_id("<start>"), tokenizer.token_to_id("<end>")
    tokenizer.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=end + 1, max_position_embeddings=LONGEST, eos_token_id=end, **sizes)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).save_pretrained(folder)
    return folder
