"""Generation by a prompt, and of images larger than the training size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.commands.vary import VaryConfig, vary_files
from pipelines.encoded_prompts import EncodedPrompts
from pipelines.two_stage import TwoStagePipeline
from stage2_prior.condition import Condition, EmbeddingSpec, TextSpec
from stage2_prior.priors import Transformer, TransformerConfig
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.sliding_window import sample_larger_codes
from stage2_prior.text import tokenize, train_tokenizer, vocabulary_of
from stage2_prior.text_encoder import TextEncoder
from tests.pipelines.conftest import make_autoencoder, make_pipeline
from tests.stage2_prior.tiny import tiny_prior
from tests.stage2_prior.tiny_text_encoder import WIDTH, save_text_encoder


def text_pipeline(knows_null_label: bool = True, num_classes: int = 0) -> TwoStagePipeline:
    autoencoder, tokenizer = make_autoencoder(), train_tokenizer(["a red fox", "a grey owl"], 260)
    torch.manual_seed(1)
    prior = Transformer(
        TransformerConfig(layers=1, width=16, heads=2),
        autoencoder.code_spec(),
        num_classes,
        text=TextSpec(6, vocabulary_of(tokenizer)),
        knows_null_label=knows_null_label,
    )
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    prior.tokenizer = tokenizer
    return TwoStagePipeline(autoencoder, prior)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pipeline().save_pretrained(tmp_path_factory.mktemp("text") / "model")


def test_images_follow_their_prompts_and_the_model_folder_holds_the_tokenizer(text_model):
    assert (text_model / "stage2" / "tokenizer.json").is_file()
    pipeline = TwoStagePipeline.from_pretrained(text_model)
    made = pipeline.generate(prompts=["a red fox", "a grey owl", "a red fox"], seed=3, batch_size=2)
    assert made.images.shape == (3, 1, 16, 16)
    text = pipeline.prior.tokenize(["a red fox", "a grey owl", "a red fox"])
    expected = sample_codes(pipeline.prior, range(3), Condition(text=text), 3, SamplingConfig())
    assert torch.equal(made.codes[0], expected[0])
    greedy = SamplingConfig(temperature=0)
    fox, owl, again = pipeline.generate(prompts=["a red fox", "a grey owl", "a red fox"], sampling=greedy).codes[0]
    assert torch.equal(fox, again)
    assert not torch.equal(fox, owl)
    assert torch.equal(pipeline.generate(2, prompts="a red fox", sampling=greedy).codes[0], torch.stack([fox, fox]))


def test_without_a_prompt_a_prior_of_captions_draws_anything():
    pipeline = text_pipeline()
    text = torch.full((2, 6), -1)
    expected = sample_codes(pipeline.prior, range(2), Condition(text=text), 0, SamplingConfig())
    assert torch.equal(pipeline.generate(2).codes[0], expected[0])
    assert torch.equal(pipeline.generate(2, prompts=["", " "]).codes[0], expected[0])
    with pytest.raises(UserError, match="trained with label_dropout=0 and must be told what to draw; give a prompt"):
        text_pipeline(knows_null_label=False).generate(2)


def test_vary_takes_a_prompt(text_model, pictures, tmp_path):
    asked = {"model": str(text_model), "images": str(pictures / "0.png"), "variants": 1, "share": 1.0}
    made = {}
    for prompt in ("a red fox", "a grey owl"):
        out = tmp_path / prompt
        vary_files(VaryConfig(**asked, out=str(out), prompt=prompt, temperature=0.0))
        with Image.open(out / "0_0.png") as picture:
            made[prompt] = np.array(picture)
        drawn = text_pipeline().vary(pictures / "0.png", 1.0, prompts=prompt, temperature=0.0)
        assert (made[prompt] == np.array(drawn.pil()[0])).all()
    assert (made["a red fox"] != made["a grey owl"]).any()


def test_what_is_drawn_anew_follows_the_prompt():
    pipeline, greedy = text_pipeline(), SamplingConfig(temperature=0)
    nothing_known = (torch.full((1, 4, 4), -1),)
    drawn = pipeline.redraw(nothing_known, prompts="a red fox", sampling=greedy).codes[0]
    assert torch.equal(drawn, pipeline.generate(1, prompts="a red fox", sampling=greedy).codes[0])


def test_prompts_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="got 2 prompts for 3 images, expected one for each"):
        text_pipeline().generate(3, prompts=["a", "b"])
    with pytest.raises(UserError, match="this model was not trained on captions and knows no prompt; leave the prompt"):
        make_pipeline().generate(3, prompts="a fox")


def test_images_larger_than_the_training_size_come_from_the_sliding_window():
    pipeline = make_pipeline()
    made = pipeline.generate(labels=[0, 2], size=(20, 28), seed=4)
    assert made.images.shape == (2, 1, 20, 28)
    spec, condition = pipeline.autoencoder.code_spec(20, 28), Condition(torch.tensor([0, 2]))
    expected = sample_larger_codes(pipeline.prior, spec, range(2), condition, 4, SamplingConfig())
    assert torch.equal(made.codes[0], expected[0])
    with pytest.raises(UserError, match="cannot encode 20x27 images: both sides must be multiples of 4"):
        pipeline.generate(1, size=(20, 27))
    with pytest.raises(UserError, match="an image of 12x16 is smaller than the 16x16 that the prior was trained on"):
        pipeline.generate(1, size=(12, 16))


def test_the_command_writes_prompt_and_size_to_what_it_records(text_model, tmp_path):
    config = GenerateConfig(
        model=str(text_model), out=str(tmp_path), num=2, prompt="a grey owl", size=(16, 20), device="cpu"
    )
    generate_files(config)
    pipeline = TwoStagePipeline.from_pretrained(text_model)
    expected = pipeline.generate(2, prompts="a grey owl", size=(16, 20)).images
    for i in range(2):
        with Image.open(tmp_path / f"{i:06d}.png") as image:
            assert image.size == (20, 16)
            pixels = torch.from_numpy(np.asarray(image).copy())
        assert ((expected[i, 0] + 1) * 127.5 - pixels).abs().max() <= 1
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["prompt"], settings["size"]) == ("a grey owl", [16, 20])
    assert "0 of them new" in generate_files(config)
    other = GenerateConfig(model=str(text_model), out=str(tmp_path), num=2, prompt="a red fox", device="cpu")
    with pytest.raises(UserError, match=r"prompt was 'a grey owl' and is now 'a red fox'; size was \[16, 20\] and is"):
        generate_files(other)
    with pytest.raises(UserError, match="got a judge with a prompt, given codes or a size, expected either"):
        GenerateConfig(model="m", out="o", candidates=2, judge="timm:x", size=(16, 20))


# ---- vectors of a text encoder --------------------------------------------------------------------------------------


def embedding_pipeline(kind: str, encoder: str | None) -> TwoStagePipeline:
    autoencoder = make_autoencoder()
    facts = {"embeddings": EmbeddingSpec(6, WIDTH, encoder)}
    return TwoStagePipeline(autoencoder, tiny_prior(kind, 0, autoencoder.code_spec(), **facts))


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize("kind", ["transformer", "llamagen"])
def test_prompts_become_the_vectors_of_the_encoder_that_the_prior_records(kind, encoder_folder, tmp_path):
    saved = embedding_pipeline(kind, str(encoder_folder)).save_pretrained(tmp_path / "model")
    pipeline, prompts = TwoStagePipeline.from_pretrained(saved), ["red", "a grey owl", ""]
    encoder = TextEncoder.load(str(encoder_folder))
    vectors, mask = encoder.encode(tokenize(encoder.tokenizer, prompts, 6), padded_left=kind == "llamagen")
    condition = Condition(embeddings=vectors, embedding_mask=mask)
    for sampling in (SamplingConfig(), SamplingConfig(guidance=2.0)):
        expected = sample_codes(pipeline.prior, range(3), condition, 5, sampling)
        assert torch.equal(pipeline.generate(prompts=prompts, seed=5, sampling=sampling).codes[0], expected[0])
    greedy = pipeline.generate(prompts=prompts, sampling=SamplingConfig(temperature=0)).codes[0]
    assert not torch.equal(greedy[0], greedy[1])
    config = GenerateConfig(model=str(saved), out=str(tmp_path / "out"), num=2, prompt="red")
    assert "2 images" in generate_files(config)


def test_a_text_goes_through_the_encoder_once(encoder_folder, monkeypatch):
    pipeline, seen = embedding_pipeline("llamagen", str(encoder_folder)), []
    encoder = pipeline.load_text_encoder()
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda tokens, left: seen.append(len(tokens)) or encode(tokens, left))
    texts = ["red", "a grey owl", "red", "", "red", "a grey owl"]
    told = pipeline.generate(prompts=texts, batch_size=2, guidance=2.0)
    assert seen == [1, 1, 1]  # guidance against no prompt asks for no vectors
    pipeline.generate(4, prompts="red", batch_size=1)
    pipeline.generate(2, prompts=texts[1:3], seed=3)
    assert len(seen) == 3
    tokens = tokenize(encoder.tokenizer, texts, 6)
    alone = [encode(row[None], True) for row in tokens]
    condition = pipeline.condition(None, texts)
    assert torch.equal(condition.embeddings, torch.cat([one.embeddings for one in alone]))
    assert torch.equal(condition.embedding_mask, torch.cat([one.mask for one in alone]))
    other = embedding_pipeline("llamagen", str(encoder_folder)).generate(prompts=texts, guidance=2.0)
    assert torch.equal(told.codes[0], other.codes[0])
    pipeline.load_text_encoder(str(encoder_folder))  # another one knows nothing yet
    assert not pipeline.prompts.kept


def test_vectors_that_were_asked_for_last_are_kept_within_a_bound(encoder_folder):
    pipeline = embedding_pipeline("transformer", str(encoder_folder))
    one = pipeline.condition(None, ["red"])
    size = one.embeddings.nbytes + one.embedding_mask.nbytes
    pipeline.prompts = EncodedPrompts(most_bytes=3 * size)
    for asked in (["a", "b", "c"], ["a"], ["d"], ["c", "a"], list("efghij")):
        vectors = pipeline.condition(None, asked).embeddings
        assert len(vectors) == len(asked)
        kept = [text for text, *_ in pipeline.prompts.kept]
        assert pipeline.prompts.bytes == len(kept) * size <= 3 * size
    assert kept == ["h", "i", "j"]


def test_another_place_of_the_encoder_is_named_when_generating(encoder_folder, tmp_path):
    model = embedding_pipeline("llamagen", None).save_pretrained(tmp_path / "model")
    config = GenerateConfig(model=str(model), out=str(tmp_path / "out"), num=1, prompt="red")
    with pytest.raises(UserError, match="reads vectors of captions, but does not record whose; give text_encoder"):
        generate_files(config)
    assert "1 image in" in generate_files(replace(config, text_encoder=str(encoder_folder)))
    other = save_text_encoder(tmp_path, width=WIDTH + 4)
    with pytest.raises(UserError, match=f"gives vectors of {WIDTH + 4} numbers, expected {WIDTH}: those that"):
        generate_files(replace(config, text_encoder=str(other)))
    with pytest.raises(UserError, match=r"text_encoder=.*, but this model reads no vectors of captions; leave it out"):
        make_pipeline().load_text_encoder(str(encoder_folder))


def test_an_edit_follows_its_prompt_where_the_model_has_classes_too():
    pipeline, images = text_pipeline(num_classes=3), torch.zeros(2, 1, 16, 16)
    plain = pipeline.vary(images, 1.0, prompts="a red fox").codes[0]
    assert not torch.equal(pipeline.vary(images, 1.0, prompts="a red fox", guidance=5.0).codes[0], plain)
    alone = pipeline.vary(images, 1.0).codes[0]  # nothing is asked for that guidance could follow
    assert torch.equal(pipeline.vary(images, 1.0, guidance=5.0).codes[0], alone)
