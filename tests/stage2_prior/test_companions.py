"""Runs on code shards with what goes with each image: other codes, and captions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml

from codes.shards import CodeDataset, CodeShardWriter
from common.errors import UserError
from common.model_io import load_pretrained
from common.sealed_json import sealed
from stage2_prior.companions import CodesInCompany, Texts
from stage2_prior.condition import Condition, TextSpec
from stage2_prior.priors import PRIORS
from stage2_prior.train import Stage2Task, train_stage2
from tests.stage2_prior.pair import COLOURS, MAP, write_pair
from tests.stage2_prior.test_train import make_config
from tests.stage2_prior.tiny import random_codes, tiny_prior, tiny_spec


def test_batches_carry_the_codes_of_the_same_images_and_captions_in_turn(pair):
    codes, maps = (CodeDataset(folder) for folder in pair)
    texts = Texts(torch.arange(96).view(96, 1), [1, 3, *[2] * 46])
    batch = CodesInCompany(codes, maps, texts).fetch([1, 0, 2], [0, 47, 48 + 5])
    assert torch.equal(batch["codes"][0], codes.fetch([1, 0, 2], [0, 0, 0])["codes"][0])
    assert torch.equal(batch["given"][0], maps.fetch([1, 0, 2], [0, 0, 0])["codes"][0])
    assert batch["text"].tolist() == [[1], [0], [5]]  # the last is of the second epoch
    later = CodesInCompany(codes, None, texts).fetch([1] * 5, [48 * epoch for epoch in range(5)])
    assert later["text"].flatten().tolist() == [1, 2, 3, 1, 2]
    assert later["text"].dtype == torch.int64
    assert "given" not in later
    assert set(CodesInCompany(codes).fetch([0], [0])) == {"codes", "labels"}


def test_a_run_learns_from_given_codes(pair, tmp_path):
    codes, maps = pair
    result = train_stage2(make_config(given=str(maps)), codes, tmp_path / "run")
    assert result.metrics["bits_per_code"] < 0.05  # the map tells it all
    assert train_stage2(make_config(), codes, tmp_path / "without").metrics["bits_per_code"] > 1.5 / 15
    prior = load_pretrained(tmp_path / "run", PRIORS)
    assert prior.given == MAP.grids
    assert prior.given_fingerprint == "map"
    assert load_pretrained(tmp_path / "without", PRIORS).given_fingerprint is None
    with pytest.raises(UserError, match="given_grids is 9x9 codes of 2 in the config and 2x2 codes of 4 "):
        train_stage2(make_config(given=str(maps), given_grids="9x9 codes of 2"), codes, tmp_path / "other")


def test_a_run_goes_on_with_codes_of_the_same_tokenizer_only(pair, tmp_path):
    codes, maps = pair
    config, run = make_config(given=str(maps), train={"steps": 4}), tmp_path / "run"
    train_stage2(config, codes, run)
    index = json.loads((maps / "index.json").read_text())
    (maps / "index.json").write_text(json.dumps(sealed({**index, "stage1_fingerprint": "another"})))
    longer = replace(config, train=replace(config.train, steps=6))
    try:
        with pytest.raises(UserError, match=r"given=.* holds something else than when the run began"):
            train_stage2(longer, codes, run)
        # A run of an earlier version did not take it down.
        recorded = yaml.safe_load((run / "config.yaml").read_text())
        assert recorded.pop("given_fingerprint") == "map"
        (run / "config.yaml").write_text(yaml.safe_dump(recorded))
        (run / "run.json").unlink()
        assert train_stage2(longer, codes, run).steps_done == 6
        assert yaml.safe_load((run / "config.yaml").read_text())["given_fingerprint"] == "another"
    finally:
        (maps / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("level", [None, 0])
def test_captions_for_levels_are_refused_before_anything_is_made(level):
    """Levels that read text could not be assembled after days of training."""
    with pytest.raises(UserError, match="captions=file-names for a hierarchical prior, whole or one level of it, "):
        make_config("hierarchical", captions="file-names", level=level)


def test_codes_of_other_images_are_refused_before_anything_is_made(pair, tmp_path):
    names = CodeDataset(pair[0], "validation").names()
    codes, maps = write_pair(tmp_path, [*names[:3], "other.png", *names[4:]])
    config = make_config(given=str(maps))
    with pytest.raises(
        UserError, match=r"image 3 is '003_\w+.png' in .*codes and 'other.png' in .*map; encode the same"
    ):
        train_stage2(config, codes, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    writer = CodeShardWriter(tmp_path / "few", MAP, ["train"])
    writer.write(0, (torch.zeros(1, 2, 2, dtype=torch.int64),), torch.tensor([-1]), CodeDataset(codes).names()[:1])
    writer.finish()
    with pytest.raises(UserError, match=r"image 1 is '001_\w+.png' in .*codes and no more in .*few"):
        CodesInCompany(CodeDataset(codes), CodeDataset(tmp_path / "few"))


def test_a_run_learns_from_the_words_in_file_names_and_its_prior_keeps_the_tokenizer(pair, tmp_path):
    config = make_config(captions="file-names", text_vocabulary=300, text_length=4)
    result = train_stage2(config, pair[0], tmp_path / "run")
    assert result.metrics["bits_per_code"] < 0.05
    prior = load_pretrained(tmp_path / "run", PRIORS)
    assert (tmp_path / "run" / "model" / "tokenizer.json").read_text(encoding="utf-8") == prior.tokenizer
    assert prior.text == TextSpec(4, len(json.loads(prior.tokenizer)["model"]["vocab"]))
    text = prior.tokenize(["red", "Green ", "blue"])
    codes = torch.tensor([0, 1, 2]).view(3, 1, 1).expand(3, 3, 5)
    assert prior.nll((codes,), Condition(text=text)).sum(1).max() < 0.5
    # The tokenizer is a part of what the model is.
    fingerprint = prior.fingerprint()
    prior.tokenizer = prior.tokenizer.replace("red", "rot")
    assert prior.fingerprint() != fingerprint
    assert train_stage2(config, pair[0], tmp_path / "run").finished  # continues, with the tokenizer it began with
    with pytest.raises(UserError, match="tokenizer_fingerprint is f00d in the config and"):
        train_stage2(replace(config, tokenizer_fingerprint="f00d"), pair[0], tmp_path / "other")


def test_a_run_takes_captions_of_a_file_and_the_tokenizer_of_another_run(pair, tmp_path):
    names = {name for split in ("train", "validation") for name in CodeDataset(pair[0], split).names()}
    lines = [{"file": name, "caption": f"{name[4:-4]} all over"} for name in names]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = make_config(captions="file-names", text_vocabulary=300, train={"steps": 1})
    train_stage2(first, pair[0], tmp_path / "first")
    config = make_config(
        captions=str(tmp_path / "captions.jsonl"), tokenizer=str(tmp_path / "first" / "model"), text_length=6
    )
    result = train_stage2(config, pair[0], tmp_path / "run")
    assert result.metrics["bits_per_code"] < 0.05
    ours, theirs = (load_pretrained(tmp_path / run, PRIORS).tokenizer for run in ("run", "first"))
    assert ours == theirs
    with pytest.raises(UserError, match=r"tokenizer=\S+ without captions, expected both or none; give --captions"):
        make_config(tokenizer="tokenizer.json")


def test_with_captions_classes_are_left_out_unless_asked_for(tmp_path):
    writer = CodeShardWriter(tmp_path / "codes", tiny_spec(), ["train", "validation"], class_names=COLOURS)
    for number in range(2):
        codes = torch.zeros(4, 3, 5, dtype=torch.int64)
        writer.write(number, (codes,), torch.arange(4), [f"{colour}.png" for colour in COLOURS])
    writer.finish()
    config = make_config(captions="file-names", text_vocabulary=256, train={"steps": 1, "batch_size": 4})
    for num_classes, expected in ((None, 0), (0, 0), (4, 4)):
        run = tmp_path / f"run-{num_classes}"
        train_stage2(replace(config, num_classes=num_classes), tmp_path / "codes", run)
        assert load_pretrained(run, PRIORS).num_classes == expected


def test_label_dropout_leaves_out_label_and_text_of_the_same_samples():
    prior, seen = tiny_prior("transformer", text=TextSpec(3, 13)), []

    def model(codes, condition):
        seen.append(condition)
        return prior(codes, condition)

    text = torch.randint(13, (400, 3))
    batch = {"codes": random_codes(400, prior), "labels": torch.arange(400) % 4, "text": text}
    torch.manual_seed(0)
    Stage2Task(prior, label_dropout=0.25).step(model, batch, 0)
    dropped = seen[0].labels == prior.num_classes
    assert 60 < dropped.sum() < 140
    assert torch.equal((seen[0].text == -1).all(1), dropped)
    assert torch.equal(seen[0].text[~dropped], text[~dropped])
    nll = Stage2Task(prior, label_dropout=0.9).validate(prior, batch)["nll"]
    torch.testing.assert_close(nll, prior.nll(batch["codes"], Condition(batch["labels"], text=text)).mean(1))


def test_a_prior_without_text_or_tokenizer_knows_no_prompt():
    with pytest.raises(UserError, match="this model was not trained on captions and knows no prompt"):
        tiny_prior("transformer").tokenize(["a cat"])
    with pytest.raises(UserError, match=r"this prior reads text, but its folder has no tokenizer.json; copy that"):
        tiny_prior("transformer", text=TextSpec(3, 13)).tokenize(["a cat"])


def test_captions_for_a_prior_that_reads_none_are_refused_before_anything_is_made(pair, tmp_path):
    config = make_config("pixelcnn", captions="file-names", text_vocabulary=300)
    with pytest.raises(UserError, match="a pixelcnn prior reads no text, expected a transformer prior for captions"):
        train_stage2(config, pair[0], tmp_path / "run")
    assert not (tmp_path / "run").exists()
