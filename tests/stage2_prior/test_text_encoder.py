"""Captions as vectors of a text encoder: a small T5 with random weights stands for a real one."""

from __future__ import annotations

import builtins
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.model_io import load_pretrained
from stage2_prior.condition import EmbeddingSpec
from stage2_prior.priors import PRIORS
from stage2_prior.text import tokenize
from stage2_prior.text_encoder import TextEncoder
from stage2_prior.train import train_stage2
from tests.stage2_prior.test_train import make_config
from tests.stage2_prior.tiny import TINY
from tests.stage2_prior.tiny_text_encoder import CAPTIONS, WIDTH, save_text_encoder

LENGTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder.load(str(folder))


def moved_to_the_right(embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """LlamaGen's loop: what counts goes behind what does not."""
    rows = []
    for row, counts in zip(embeddings, mask.sum(dim=1).tolist(), strict=True):
        rows.append(torch.cat([row[counts:], row[:counts]]))
    return torch.stack(rows), mask.flip(1)


def test_vectors_are_those_of_the_model_for_each_caption_alone(encoder):
    tokens = tokenize(encoder.tokenizer, [*CAPTIONS, ""], LENGTH)
    embeddings, mask = encoder.encode(tokens, padded_left=False)
    assert embeddings.shape == (len(tokens), LENGTH, WIDTH)
    assert embeddings.dtype == torch.float32
    assert torch.equal(mask, tokens >= 0)
    assert not embeddings.requires_grad
    for row, vectors in zip(tokens, embeddings, strict=True):
        count = int((row >= 0).sum())
        if count:
            with torch.no_grad():
                alone = encoder.model(input_ids=row[None, :count]).last_hidden_state[0]
            assert (vectors[:count] - alone).abs().max() < 1e-5
        assert (vectors[count:] == 0).all()


def test_padded_left_they_stand_at_the_end_as_in_llamagens_loop(encoder):
    tokens = tokenize(encoder.tokenizer, [*CAPTIONS, ""], LENGTH)
    assert len(set((tokens >= 0).sum(dim=1).tolist())) > 2
    expected, expected_mask = moved_to_the_right(*encoder.encode(tokens, padded_left=False))
    embeddings, mask = encoder.encode(tokens, padded_left=True)
    assert torch.equal(embeddings, expected)
    assert torch.equal(mask, expected_mask)


def test_what_is_no_text_encoder_is_refused(folder, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    with pytest.raises(UserError, match=r"is no text encoder that transformers opens .*; name a folder or a hub id"):
        TextEncoder.load(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be read: expected a tokenizer\.json, or a hub id"):
        TextEncoder.load(str(tmp_path / "gone"))
    find = builtins.__import__

    def without_transformers(name, *rest):
        if name == "transformers":
            raise ImportError(name)
        return find(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_transformers)
    with pytest.raises(UserError, match=r"a text encoder needs transformers: pip install 'zellige\[text\]'"):
        TextEncoder.load(str(folder))


@pytest.mark.parametrize("kind", ["transformer", "llamagen"])
def test_a_run_learns_from_the_vectors_of_captions(kind, pair, folder, tmp_path):
    settings = {"captions": "file-names", "text_encoder": str(folder), "text_length": LENGTH, "num_classes": 0}
    result = train_stage2(make_config(kind, **settings), pair[0], tmp_path / "run")
    assert result.metrics["bits_per_code"] < 0.05  # the name tells the one number of all codes
    prior = load_pretrained(tmp_path / "run", PRIORS)
    assert prior.embeddings == EmbeddingSpec(LENGTH, WIDTH, str(folder))
    assert prior.text is None
    assert not list((tmp_path / "run").rglob("tokenizer.json"))  # the encoder has it
    assert not any("shared" in name or "relative_attention" in name for name in prior.state_dict())


def test_some_samples_train_without_their_caption(pair, folder, tmp_path):
    """A prior that never sees one learns nothing of it."""
    config = make_config(captions="file-names", text_encoder=str(folder), text_length=LENGTH)
    assert train_stage2(replace(config, label_dropout=0.999), pair[0], tmp_path).metrics["bits_per_code"] > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_encoder": "t5"}, "text_encoder=t5 without captions, expected both or none; give --captions"),
        (
            {"captions": "file-names", "text_encoder": "t5", "tokenizer": "bert"},
            "tokenizer=bert and text_encoder=t5, expected one of them",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make_config(**settings)


def test_a_prior_that_reads_no_vectors_is_refused(pair, folder, tmp_path):
    config = replace(make_config(captions="file-names", text_encoder=str(folder)), model=TINY["pixelcnn"])
    with pytest.raises(UserError, match="a pixelcnn prior reads no text, expected a transformer prior for captions"):
        train_stage2(config, pair[0], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_encoder_with_code_of_its_own_is_refused_and_nobody_is_asked(folder: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(folder, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForTextEncoding": "own.Model"}}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.setattr(builtins, "input", lambda question: "y")
    with pytest.raises(UserError, match="is no text encoder that transformers opens"):
        TextEncoder.load(str(tmp_path / "own"))
    assert not (tmp_path / "ran").exists()
