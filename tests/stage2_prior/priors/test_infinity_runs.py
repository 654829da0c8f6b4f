"""Runs that train Infinity: from codes in shards to samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor

from codes.shards import CodeShardWriter
from codes.spec import CodeSpec
from common.errors import UserError
from common.model_io import load_pretrained
from stage1_vq.quantizers import (
    MultiscaleBitsConfig,
    MultiscaleBitsQuantizer,
)
from stage2_prior.condition import Condition, EmbeddingSpec
from stage2_prior.exact import exact_stepper
from stage2_prior.priors import PRIORS
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.text import tokenize
from stage2_prior.text_encoder import TextEncoder
from stage2_prior.train import Stage2Config, train_stage2
from tests.stage2_prior.tiny import CLASSES, condition_for, random_codes
from tests.stage2_prior.tiny_infinity import CONFIG, SCALES, led_along, spec_of
from tests.stage2_prior.tiny_text_encoder import WIDTH, save_text_encoder
from training.loop import TrainConfig

# ---- latents that bits alone do not tell ----------------------------------------------------------------------------


def lfq() -> MultiscaleBitsQuantizer:
    """XQ-GAN's, whose convolutions are no identities and whose corners shrink."""
    torch.manual_seed(1)
    made = MultiscaleBitsQuantizer(MultiscaleBitsConfig(scales=SCALES, bits=5, dim=5, phis=2, ratio=0.8)).eval()
    for tensor in made.phis.parameters():
        torch.nn.init.normal_(tensor, std=0.3)
    return made


def shards(folder: Path, spec: CodeSpec, codes_are_bits: bool | None, latents: dict[str, Tensor] | None = None) -> Path:
    """48 training and 16 validation images of four classes: a class has one code, another one on each scale."""
    writer = CodeShardWriter(
        folder, spec, ["train", "validation"], class_names=("a", "b", "c", "d"), stage1_fingerprint="f00d",
        latents=latents, codes_are_bits=codes_are_bits,
    )  # fmt: skip
    for number, count in enumerate((48, 16)):
        labels = torch.arange(count) % CLASSES
        codes = tuple(
            ((3 * labels + scale) % grid.vocabulary).view(-1, 1, 1).expand(count, grid.height, grid.width)
            for scale, grid in enumerate(spec.grids)
        )
        writer.write(number, codes, labels, [f"{'abcd'[i % CLASSES]}_{i}.png" for i in range(count)])
    writer.finish()
    return folder


def settings(steps: int = 60) -> TrainConfig:
    return TrainConfig(
        steps=steps, batch_size=16, learning_rate=1e-2, log_every=10, validate_every=steps // 3, preview_every=0,
        save_every=steps, tracker="none", workers=0,
    )  # fmt: skip


@torch.no_grad()
def test_convolutions_beside_the_codes_are_part_of_what_a_scale_sees(tmp_path):
    latents = lfq().scale_latents()
    spec = CodeSpec(lfq().grids(6, 9), 24, 36)
    config = Stage2Config(model=replace(CONFIG, layers=1), train=settings(3))
    with torch.enable_grad():
        train_stage2(config, shards(tmp_path / "codes", spec, True, latents), tmp_path / "run")
    prior = load_pretrained(tmp_path / "run", PRIORS)
    codes, condition = random_codes(3, prior), condition_for(3, prior)
    expected = [rearrange(x, "b d h w -> b (h w) d") for x in lfq().next_scale_inputs(codes)]
    torch.testing.assert_close(prior.seen(codes), torch.cat(expected, dim=1), rtol=0, atol=1e-4)
    logits = prior.logits(codes, condition)
    for stepper, atol in ((prior.stepper(3, condition), 2e-5), (exact_stepper(prior, 3, condition), 2e-2)):
        torch.testing.assert_close(led_along(stepper, codes).float(), logits, rtol=0, atol=atol)
    told, given = prior.with_mistakes(codes, 0.5)
    prior.code_spec.check(given)
    assert not torch.equal(told[-1], codes[-1])


# ---- from codes to a trained model ----------------------------------------------------------------------------------


def test_a_run_learns_the_bits_of_each_class_and_draws_them(tmp_path):
    codes = shards(tmp_path / "codes", spec_of(), True)
    result = train_stage2(Stage2Config(model=replace(CONFIG, layers=2), train=settings()), codes, tmp_path / "run")
    assert result.metrics["bits_per_code"] < 0.05  # of 7 bits in three codes before
    prior = load_pretrained(tmp_path / "run", PRIORS)
    assert prior.kind == "infinity"
    labels = torch.tensor([3, 1])
    drawn = sample_codes(prior, range(2), Condition(labels), 0, SamplingConfig())
    for scale, (grid, of) in enumerate(zip(drawn, prior.code_spec.grids, strict=True)):
        assert torch.equal(grid, ((3 * labels + scale) % of.vocabulary).view(-1, 1, 1).expand_as(grid))


@pytest.mark.parametrize("encoded", [False, True])
def test_a_run_learns_from_captions_with_and_without_a_text_encoder(tmp_path, encoded):
    """What names the images tells their class: in words that the prior learns, or in those of a small T5."""
    codes, own = shards(tmp_path / "codes", spec_of(), True), {}
    if encoded:
        (tmp_path / "t5").mkdir()
        own = {"text_encoder": str(save_text_encoder(tmp_path / "t5"))}
    config = Stage2Config(
        model=replace(CONFIG, layers=2), train=settings(), captions="file-names", text_length=4, **own
    )
    result = train_stage2(config, codes, tmp_path / "run")
    assert result.metrics["bits_per_code"] < 0.1
    prior = load_pretrained(tmp_path / "run", PRIORS)
    if encoded:
        assert prior.embeddings == EmbeddingSpec(4, WIDTH, str(tmp_path / "t5"))
        encoder = TextEncoder.load(prior.embeddings.encoder)
        vectors, mask = encoder.encode(tokenize(encoder.tokenizer, ["a", "d"], 4), prior.padded_left)
        condition = Condition(embeddings=vectors, embedding_mask=mask)
    else:
        condition = Condition(text=prior.tokenize(["a", "d"]))
    last = sample_codes(prior, range(2), condition, 0, SamplingConfig())[-2]
    assert last[:, 0, 0].tolist() == [(3 * label + 10) % 8 for label in (0, 3)]


def test_codes_that_are_not_said_to_be_bits_are_told_of_or_refused(tmp_path, capsys):
    config = Stage2Config(model=CONFIG, train=settings(3))
    with pytest.raises(UserError, match=r"whose codes are numbers of code vectors .*multiscale_bits; take a var prior"):
        train_stage2(config, shards(tmp_path / "vectors", spec_of(), False), tmp_path / "run")
    train_stage2(config, shards(tmp_path / "unsaid", spec_of(), None), tmp_path / "run")
    assert "does not say whether its codes are bits, as of quantizer.kind=multiscale_bsq" in capsys.readouterr().out
