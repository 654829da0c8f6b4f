"""Captions for decoders that read them: what CLIP says, a small one with random weights; and that generate, reconstruct
and the pipeline hand it over."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from common.errors import UserError
from pipelines.captions import CaptionEncoder, DecoderCaptions
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.commands.reconstruct import ReconstructConfig, reconstruct_files
from pipelines.image_folders import to_images
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import TATiTok, TATiTokConfig
from stage1_vq.quantizers import FSQConfig
from stage2_prior.condition import TextSpec
from stage2_prior.text import train_tokenizer, vocabulary_of
from tests.clip import LONGEST, save_clip
from tests.pipelines.conftest import make_autoencoder
from tests.stage2_prior.tiny import tiny_prior

WIDTH, LENGTH = 12, 6


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "clip", WIDTH)


def tiny(encoder: str) -> TATiTok:
    torch.manual_seed(0)
    sizes = {f"{half}_{size}": 1 for half in ("encoder", "decoder") for size in ("blocks", "heads")}
    config = TATiTokConfig(
        patch=4,
        tokens=4,
        **sizes,
        encoder_width=16,
        decoder_width=16,
        text_length=LENGTH,
        text_width=WIDTH,
        text_encoder=encoder,
        quantizer=FSQConfig(levels=(5, 3), dim=2),
    )
    return TATiTok(config, (8, 8)).eval()


@torch.no_grad()
def test_vectors_are_those_of_clips_text_model_with_zeros_behind_the_text(clip: Path):
    encoder, whole = CaptionEncoder.load(str(clip)), CLIPModel.from_pretrained(clip).eval()
    for text in ("a red fox", ""):
        ids = encoder.tokenizer.encode(text).ids
        tokens = torch.tensor([ids + (LENGTH - len(ids)) * [0]])
        assert len(ids) < LENGTH
        expected = whole.text_model(input_ids=tokens).last_hidden_state[0]
        torch.testing.assert_close(encoder.of(text, LENGTH), expected)
    assert encoder.of("a red fox", LENGTH) is encoder.of("a red fox", LENGTH)


def test_a_long_text_is_cut_but_for_its_end(clip: Path):
    encoder = CaptionEncoder.load(str(clip))
    encoder.of(20 * "grey ", LENGTH)
    ids = encoder.tokenizer.encode(20 * "grey ").ids
    assert len(ids) == LENGTH
    assert ids[-1] == encoder.tokenizer.token_to_id("<end>")
    with pytest.raises(UserError, match=f"captions of 10 vectors, but this CLIP reads {LONGEST} at most"):
        encoder.of("fox", LONGEST + 1)


def test_no_encoder_is_needed_where_nothing_is_said():
    captions = DecoderCaptions(tiny("nowhere"))
    assert captions.of(None) is captions.of(["", ""]) is None
    assert DecoderCaptions(make_autoencoder()).of(["a prior's own"]) is None
    with pytest.raises(UserError, match="nowhere cannot be read"):
        captions.of(["", "fox"])


def test_a_clip_of_another_width_and_a_decoder_that_reads_none_are_refused(clip: Path, tmp_path: Path):
    other = save_clip(tmp_path / "other", WIDTH + 4)
    with pytest.raises(UserError, match=f"gives vectors of {WIDTH + 4} numbers, expected {WIDTH}: those that the dec"):
        DecoderCaptions(tiny(str(clip))).load(str(other))
    with pytest.raises(UserError, match="the decoder of a vqvae model reads codes alone: leave it out"):
        DecoderCaptions(make_autoencoder()).load()
    with pytest.raises(UserError, match="the decoder of a vqvae model reads codes alone: leave it out"):
        make_autoencoder().decode_with_text((), torch.zeros(1, 2, 3))


@pytest.mark.parametrize("shape", [(1, LENGTH, WIDTH), (2, LENGTH - 1, WIDTH), (2, LENGTH)])
def test_wrong_vectors_are_refused(shape):
    model = tiny("nowhere")
    codes = (torch.zeros(2, 1, 4, dtype=torch.int64),)
    with pytest.raises(UserError, match=r"got vectors of captions of shape .* expected floats \(2, 6, 12\)"):
        model.decode_with_text(codes, torch.zeros(shape))


def pipeline_of(model: TATiTok) -> TwoStagePipeline:
    tokenizer = train_tokenizer(["a red fox", "a grey owl"], 260)
    prior = tiny_prior("transformer", 0, model.code_spec(), text=TextSpec(6, vocabulary_of(tokenizer)))
    prior.tokenizer = tokenizer
    return TwoStagePipeline(model, prior)


@torch.no_grad()
def test_images_are_made_of_codes_and_of_the_prompts_own_vectors(clip: Path, tmp_path: Path):
    model = tiny(str(clip))
    pipeline = pipeline_of(model)
    prompts = ["a red fox", "", "a grey owl"]
    made = pipeline.generate(prompts=prompts, seed=3)
    encoder = CaptionEncoder.load(str(clip))
    for place, prompt in enumerate(prompts):
        codes = (made.codes[0][place : place + 1],)
        expected = model.decode_with_text(codes, encoder.of(prompt, LENGTH)[None])
        torch.testing.assert_close(made.images[place], expected[0])
    silent = pipeline.decode(made.codes)
    assert (silent - made.images)[0].abs().max() > 1e-4
    torch.testing.assert_close(pipeline.decode(made.codes, prompts=["", "", ""]), silent)
    redrawn = pipeline.redraw(made.codes, prompts=prompts)
    torch.testing.assert_close(redrawn.images, made.images)
    saved = pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "plan.csv").write_text("prompt\na red fox\na grey owl\n")
    generate_files(GenerateConfig(model=str(saved), out=str(tmp_path / "made"), plan=str(tmp_path / "plan.csv")))
    again = pipeline.generate(prompts=["a red fox", "a grey owl"])
    for place in range(2):
        picture = to_images(Image.open(tmp_path / "made" / f"00000{place}.png"))
        assert (picture[0] - again.images[place]).abs().max() < 0.01


def test_another_place_of_the_decoders_clip_is_named_when_generating(clip: Path, tmp_path: Path):
    pipeline = pipeline_of(tiny("nowhere"))
    saved = pipeline.save_pretrained(tmp_path / "model")
    config = GenerateConfig(model=str(saved), out=str(tmp_path / "made"), prompt="a red fox", num=1)
    with pytest.raises(UserError, match="nowhere cannot be read"):
        generate_files(config)
    generate_files(replace(config, text_encoder=str(clip)))
    assert pipeline.load_text_encoder(str(clip)) is pipeline.captions.encoder
    made = pipeline.generate(1, prompts="a red fox").images
    picture = to_images(Image.open(tmp_path / "made" / "000000.png"))
    assert (picture - made).abs().max() < 0.01


def test_reconstruct_reads_a_caption_of_all_or_of_each(clip: Path, tmp_path: Path):
    model = tiny(str(clip))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    for name, picture in zip(("fox", "owl"), pixels, strict=True):
        Image.fromarray(picture).save(tmp_path / "images" / f"{name}.png")
    lines = [{"file": f"{name}.png", "caption": f"a {name}"} for name in ("fox", "owl")]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = {"model": str(tmp_path / "model"), "images": str(tmp_path / "images"), "alone": True}

    def made(out: str, **settings: str) -> list[np.ndarray]:
        reconstruct_files(ReconstructConfig(**common, out=str(tmp_path / out), **settings))
        return [np.asarray(Image.open(tmp_path / out / f"{name}.png")).astype(int) for name in ("fox", "owl")]

    silent, prompted = made("silent"), made("prompted", prompt="a fox")
    each, named = made("each", captions=str(tmp_path / "captions.jsonl")), made("named", captions="file-names")
    assert (prompted[0] == each[0]).all()
    assert (prompted[1] != each[1]).any()
    assert (silent[0] != prompted[0]).any()
    assert (named[0] != each[0]).any()
    with pytest.raises(UserError, match="captions"):  # not in a folder of other captions
        made("each", captions="file-names")
    with pytest.raises(UserError, match="got a prompt and captions=file-names, expected one"):
        made("both", prompt="a fox", captions="file-names")
    with pytest.raises(UserError, match="text_encoder=here without a caption to read: give prompt or captions"):
        made("without", text_encoder="here")


def test_reconstruct_refuses_a_caption_that_the_decoder_does_not_read(tmp_path: Path):
    make_autoencoder().save_pretrained(tmp_path / "model")
    Image.new("L", (16, 16)).save(tmp_path / "image.png")
    config = ReconstructConfig(
        model=str(tmp_path / "model"), images=str(tmp_path / "image.png"), out=str(tmp_path / "out"), prompt="a fox"
    )
    with pytest.raises(UserError, match="the decoder of a vqvae model reads codes alone"):
        reconstruct_files(config)
