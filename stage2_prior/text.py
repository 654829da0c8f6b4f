"""Captions: which belongs to which image, and how they become tokens."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.errors import UserError
from common.files import json_value

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE_NAMES = "file-names"  # in place of a file of captions
TOKENIZER_NAME = "tokenizer.json"
BYTES = 256  # tokens that a byte-level vocabulary holds before any word


def captions_of(source: str, images: Sequence[str]) -> list[list[str]]:
    """The captions of each image, at least one. source: a CSV file with the columns file and caption, a JSONL file of
    such objects, or `file-names`; an image may have several lines. images: as the code shards name them.

    Raises UserError for a file that cannot be read so, and for an image without a caption.
    """
    if source == FILE_NAMES:
        return [[caption_in_name(image)] for image in images]
    path = Path(source)
    captions: dict[str, list[str]] = {}
    for file, caption in read_captions(path):
        captions.setdefault(file, []).append(caption)
    missing = [image for image in images if image not in captions]
    if missing:
        raise UserError(
            f"{path} has no caption for {len(missing)} of {len(images)} images, the first is {missing[0]!r}; name "
            f"files as the codes do, such as {images[0]!r}, or encode only the images that have captions"
        )
    return [captions[image] for image in images]


def read_captions(path: Path) -> list[tuple[str, str]]:
    """Pairs of a file and its caption, in the order of the lines."""
    if path.suffix not in (".csv", ".jsonl"):
        raise UserError(f"captions={path}, expected a .csv or .jsonl file, or the word {FILE_NAMES}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            if path.suffix == ".csv":
                rows = list(csv.DictReader(file))
            else:
                rows = [json_value(line) for line in file if line.strip()]
        pairs = [(row["file"], row["caption"]) for row in rows]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a file of captions") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path} is no file of captions ({error!r}): expected columns or fields named file and caption"
        ) from error
    for number, pair in enumerate(pairs, start=1):
        if None in pair:
            raise UserError(f"{path}: entry {number} has no file or no caption; complete it, or leave it out")
    return [(str(file), str(caption)) for file, caption in pairs]


def caption_in_name(file: str) -> str:
    """The words in a file's name, without numbers: `n01440764_great_white_shark.jpg` -> `great white shark`."""
    words = re.split(r"[\W_]+", Path(file).stem)
    return " ".join(word for word in words if word and not any(letter.isdigit() for letter in word)).lower()


def require_tokenizers() -> None:
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise UserError("captions need the library tokenizers: pip install 'zellige[text]'") from error


def train_tokenizer(captions: Sequence[str], vocabulary: int) -> str:
    """A tokenizer of at most `vocabulary` tokens by byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) of
    bytes, in lower case, so that it can write any text: the content of a `tokenizer.json`. The same captions give the
    same tokenizer."""
    if vocabulary < BYTES:
        raise UserError(f"text_vocabulary={vocabulary}, expected at least {BYTES}: one token for each byte")
    require_tokenizers()
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer.to_str()


def read_tokenizer(source: str) -> str:
    """The content of a `tokenizer.json`: of a file, of a folder that holds one, or of a model on the Hugging Face hub.
    Raises UserError."""
    path = Path(source)
    if path.is_dir():
        path = path / TOKENIZER_NAME
    if not path.exists() and source.count("/") == 1 and not source.endswith(".json"):
        path = download_tokenizer(source)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read: expected a {TOKENIZER_NAME}, or a hub id such as owner/name"
        ) from error
    open_tokenizer(content, str(path))
    return content


def download_tokenizer(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(hub_id, TOKENIZER_NAME))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{hub_id!r} is neither a local file nor a tokenizer that the hub would give ({type(error).__name__}); "
            f"check the path, download its {TOKENIZER_NAME} and name that, or leave the tokenizer out to train one"
        ) from error


def open_tokenizer(content: str, name: str = TOKENIZER_NAME) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, without the padding and the limit that it may carry."""
    require_tokenizers()
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{name} is no tokenizer ({error}): expected the {TOKENIZER_NAME} of `tokenizers`") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def vocabulary_of(content: str) -> int:
    """One more than the largest token of a `tokenizer.json`."""
    return max(open_tokenizer(content).get_vocab(with_added_tokens=True).values()) + 1


def tokenize(content: str, captions: Sequence[str], length: int) -> Tensor:
    """Tokens `b length`, int64, then -1, of captions by the tokenizer of a `tokenizer.json`: of a longer one the first,
    with the tokenizer's own end; of an empty one none, whatever a tokenizer puts around nothing."""
    tokenizer = open_tokenizer(content)
    tokenizer.enable_truncation(length)
    tokens = torch.full((len(captions), length), -1)
    for row, caption, encoded in zip(tokens, captions, tokenizer.encode_batch(list(captions)), strict=True):
        if caption.strip():
            row[: len(encoded.ids)] = torch.tensor(encoded.ids, dtype=torch.int64)
    return tokens
