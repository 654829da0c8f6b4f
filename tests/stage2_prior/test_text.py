"""Captions and their tokens."""

from __future__ import annotations

import builtins
import json

import pytest
import torch

from common.errors import UserError
from stage2_prior.text import (
    caption_in_name,
    captions_of,
    open_tokenizer,
    read_tokenizer,
    tokenize,
    train_tokenizer,
    vocabulary_of,
)

CAPTIONS = ["a great white shark", "A great white heron", "tench", "goldfish", "a tiger shark"] * 4
TOKENIZER = train_tokenizer(CAPTIONS, 300)


@pytest.mark.parametrize(
    ("file", "caption"),
    [
        ("n01484850_great_white_shark.jpg", "great white shark"),
        ("train/n02097047_miniature_schnauzer.JPEG", "miniature schnauzer"),
        ("Red-Fox (2).png", "red fox"),
        ("000123.png", ""),
    ],
)
def test_a_caption_is_the_words_of_a_name(file, caption):
    assert caption_in_name(file) == caption
    assert captions_of("file-names", [file]) == [[caption]]


def test_captions_of_both_kinds_of_files_follow_the_images_whatever_their_order(tmp_path):
    rows = [("b.png", "a bee"), ("a.png", 'an "ape", red'), ("c.png", "unused"), ("b.png", "ein Käfer")]
    table, lines = tmp_path / "captions.csv", tmp_path / "captions.jsonl"
    table.write_text(
        "caption,file\n" + "".join('"{}",{}\n'.format(c.replace('"', '""'), f) for f, c in rows), encoding="utf-8"
    )
    lines.write_text("".join(json.dumps({"file": f, "caption": c}) + "\n" for f, c in rows), encoding="utf-8")
    for source in (table, lines):
        assert captions_of(str(source), ["a.png", "b.png"]) == [['an "ape", red'], ["a bee", "ein Käfer"]]


def test_a_table_of_a_spreadsheet_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.csv").write_text("file,caption\na.png,ape\n", encoding="utf-8-sig")
    assert captions_of(str(tmp_path / "a.csv"), ["a.png"]) == [["ape"]]


def test_what_is_no_file_of_captions_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("name,caption\na.png,ape\n")
    (tmp_path / "a.jsonl").write_text('{"file": "a.png", "caption": "ape"}\n{"file"\n')
    (tmp_path / "b.jsonl").write_text('{"file": "a.png", "caption": "ape"}\n')
    for name in ("a.csv", "a.jsonl"):
        with pytest.raises(UserError, match=f"{name} is no file of captions .*: expected columns or fields named file"):
            captions_of(str(tmp_path / name), ["a.png"])
    for name, content in (
        ("half.csv", "file,caption\na.png,ape\nb.png\n"),
        ("half.jsonl", '{"file": "a.png", "caption": "a"}\n{"file": "b", "caption": null}'),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name}: entry 2 has no file or no caption; complete it, or leave it out"):
            captions_of(str(tmp_path / name), ["a.png"])
    with pytest.raises(UserError, match=r"gone.csv cannot be read \(No such file or directory\): name a file"):
        captions_of(str(tmp_path / "gone.csv"), ["a.png"])
    with pytest.raises(UserError, match=r"captions=a.txt, expected a .csv or .jsonl file, or the word file-names"):
        captions_of("a.txt", ["a.png"])
    with pytest.raises(UserError, match=r"has no caption for 2 of 3 images, the first is 'b.png'; name files as the"):
        captions_of(str(tmp_path / "b.jsonl"), ["a.png", "b.png", "c.png"])


def test_a_trained_tokenizer_writes_any_text_and_words_of_its_captions_in_few_tokens():
    tokenizer = open_tokenizer(TOKENIZER)
    assert vocabulary_of(TOKENIZER) == tokenizer.get_vocab_size() <= 300
    assert train_tokenizer(CAPTIONS, 300) == TOKENIZER  # the same captions, the same tokenizer
    for text in ("a great white shark", "größe 日本 🐟 \u0000"):
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text
    assert tokenizer.encode("Great WHITE ").ids == tokenizer.encode("great white").ids
    assert len(tokenizer.encode("great white shark").ids) <= 4


def test_tokens_are_cut_and_end_in_minus_one():
    whole = open_tokenizer(TOKENIZER).encode("a tiger shark").ids
    tokens = tokenize(TOKENIZER, ["a tiger shark", ""], len(whole) + 2)
    assert tokens.tolist() == [[*whole, -1, -1], [-1] * (len(whole) + 2)]
    assert tokens.dtype == torch.int64
    assert tokenize(TOKENIZER, ["a tiger shark"], 2).tolist() == [whole[:2]]


def test_a_tokenizer_of_others_is_read_without_its_padding_and_limit(tmp_path):
    tokenizer = open_tokenizer(TOKENIZER)
    tokenizer.add_special_tokens(["[END]"])
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(1)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    content = read_tokenizer(str(tmp_path))
    assert content == read_tokenizer(str(tmp_path / "tokenizer.json"))
    assert vocabulary_of(content) == vocabulary_of(TOKENIZER) + 1
    assert torch.equal(tokenize(content, CAPTIONS, 12), tokenize(TOKENIZER, CAPTIONS, 12))


def test_what_is_no_tokenizer_is_refused(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match=r"tokenizer.json is no tokenizer \(.*\): expected the tokenizer.json of"):
        read_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"gone.json cannot be read: expected a tokenizer.json, or a hub id such as"):
        read_tokenizer(str(tmp_path / "gone.json"))
    with pytest.raises(UserError, match="text_vocabulary=255, expected at least 256: one token for each byte"):
        train_tokenizer(CAPTIONS, 255)

    def offline(*arguments, **settings):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(
        UserError, match=r"'owner/gone' is neither a local file nor a tokenizer that the hub would give"
    ):
        read_tokenizer("owner/gone")


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    load = builtins.__import__

    def without_tokenizers(name, *arguments, **settings):
        if name == "tokenizers":
            raise ImportError(name)
        return load(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    for use in (lambda: train_tokenizer(CAPTIONS, 300), lambda: tokenize(TOKENIZER, CAPTIONS, 3)):
        with pytest.raises(UserError, match=r"captions need the library tokenizers: pip install 'zellige\[text\]'"):
            use()
