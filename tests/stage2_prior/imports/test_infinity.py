"""Infinity's own numbers: its weights here give its logits, losses and greedy bits, and its tokenizer's bits what its
transformer sees."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codes.spec import Codes, CodeSpec, Grid
from common import exact
from common.errors import UserError
from common.model_io import load_pretrained
from pipelines import TwoStagePipeline
from pipelines.commands.import_weights import ImportConfig, import_weights
from stage1_vq.autoencoders import InfinityTokenizer, InfinityTokenizerConfig
from stage1_vq.quantizers import MultiscaleBSQConfig
from stage2_prior.condition import Condition, EmbeddingSpec
from stage2_prior.exact import exact_stepper
from stage2_prior.imports.first_stage import FirstStage
from stage2_prior.imports.infinity import build_infinity, null_words
from stage2_prior.priors import PRIORS
from stage2_prior.priors.bit_latents import BitLatents
from stage2_prior.priors.infinity import Infinity
from stage2_prior.priors.infinity_layers import InfinityConfig
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.golden import Golden, golden_frontier

ATOL = 5e-5  # that the file's makers measured
SPEC = CodeSpec(tuple(Grid(f"scale{n}", side, side, 2**5) for n, side in enumerate((1, 2, 3, 4))), 16, 16)


def imported(**config: Any) -> tuple[Infinity, Golden]:
    reference = golden_frontier("infinity_transformer")
    return build_infinity(
        reference.weights, {**reference.config["model"], **config}, FirstStage(SPEC, "f00d")
    ), reference


def captions(prior: Infinity, *sentences: Tensor) -> Condition:
    """Sentences of words, t d each, filled up."""
    assert prior.embeddings is not None
    length = prior.embeddings.length
    embeddings = torch.stack([F.pad(words, (0, 0, 0, length - len(words))) for words in sentences])
    mask = torch.stack([torch.arange(length) < len(words) for words in sentences])
    return Condition(embeddings=embeddings, embedding_mask=mask)


def both(prior: Infinity, reference: Golden) -> Condition:
    return captions(prior, *reference.inputs["text"].split(reference.config["text_lens"]))


def codes_of(bits: Tensor) -> Tensor:
    """Of bits `... d`, the first most significant."""
    return (bits << torch.arange(bits.shape[-1] - 1, -1, -1)).sum(dim=-1)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=ATOL)


# ---- the transformer ------------------------------------------------------------------------------------------------


def test_logits_and_losses_are_the_originals(monkeypatch):
    prior, reference = imported()
    monkeypatch.setattr(prior, "seen", lambda _: reference.inputs["x_BLC"])  # which are of no codes there
    codes, condition = prior.grids_of(codes_of(reference.inputs["bits"])), both(prior, reference)
    with torch.no_grad():
        close(prior.bit_logits(codes, condition), reference.outputs["logits"])
        close(prior.nll(codes, condition), reference.outputs["bit_loss"].sum(dim=-1))
        loss, nll = prior(codes, condition)
    assert nll is not None
    close(nll.mean() / 5, reference.outputs["loss"])
    close(loss.mean() / 5, reference.outputs["loss_reweighted"])


def test_gradients_of_the_weighed_loss_are_those_of_the_original_formula(monkeypatch):
    prior, reference = imported()
    monkeypatch.setattr(prior, "seen", lambda _: reference.inputs["x_BLC"])
    bits = reference.inputs["bits"]
    codes, condition = prior.grids_of(codes_of(bits)), both(prior, reference)
    prior(codes, condition).loss.mean().backward()
    ours = {name: weight.grad.clone() for name, weight in prior.named_parameters() if weight.grad is not None}
    prior.zero_grad()
    of_bits = F.cross_entropy(
        prior.bit_logits(codes, condition).unflatten(-1, (5, 2)).flatten(0, 2), bits.flatten(), reduction="none"
    ).view(bits.shape)
    sides = torch.tensor([1, 2, 3, 4])
    weights = (4 / sides).repeat_interleave(sides.square())  # the root of 16 places per its own
    (5 * (of_bits.mean(dim=-1) * weights / weights.sum()).sum(dim=-1).mean()).backward()
    assert set(ours) == {name for name, weight in prior.named_parameters() if weight.grad is not None}
    for name, weight in prior.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name], weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layer", "name"), [(0, "greedy_cfg_logits"), (1, "greedy_cfg_layer")])
def test_greedy_bits_with_guidance_of_the_logits_or_of_a_layer_are_the_originals(layer, name):
    prior, reference = imported()
    condition = captions(prior, reference.inputs["gen_text"])
    sampling = SamplingConfig(temperature=0, guidance=reference.config["cfg"], guidance_layer=layer)
    for precision in (torch.float32, torch.float64):
        found = sample_codes(prior.to(precision), [0], condition, 0, sampling)
        for number, grid in enumerate(found):
            assert torch.equal(grid, codes_of(reference.outputs[f"{name}/bits_{number}"][:, 0]))


@torch.no_grad()
def test_steps_and_the_exact_walk_give_the_imported_priors_logits():
    prior, reference = imported()
    codes, condition = prior.grids_of(codes_of(reference.inputs["bits"])), both(prior, reference)
    expected = prior.logits(codes, condition)
    with patch.object(exact, "COARSE", exact.FINE):  # what attention is rounded to for speed, these weights magnify
        for stepper, tolerance in ((prior.stepper(2, condition), ATOL), (exact_stepper(prior, 2, condition), 5e-4)):
            steps = [stepper.next(codes[n - 1].flatten(1) if n else None) for n in range(prior.steps)]
            torch.testing.assert_close(torch.cat(steps, dim=1).float(), expected, rtol=1e-5, atol=tolerance)


# ---- what it sees ---------------------------------------------------------------------------------------------------


def flipped_bits(reference: Golden) -> tuple[list[Tensor], Codes, Codes]:
    """Which bits of each scale the original flipped, the codes as it told them, and as it gave them."""
    strengths, flips = reference.inputs["bsc_strength"], list[Tensor]()
    told, given = list[Tensor](), list[Tensor]()
    for number, strength in enumerate(strengths):
        flipped = reference.inputs[f"bsc_uniform_{number}"][:, 0] < strength
        flips.append(flipped if number < reference.config["bsc_layers"] else torch.zeros_like(flipped))
        bits = reference.outputs[f"bsc_requant/gt_bits_{number}"].view(flipped.shape)
        told.append(codes_of(bits))
        given.append(codes_of(bits ^ flips[-1]))
    return flips, tuple(told), tuple(given)


def of_tokenizer(groups: int) -> tuple[CodeSpec, Infinity]:
    """A prior of the tokenizer's codes of 6 bits, which lie in so many grids for each scale."""
    bits = 6 // groups
    grids = [Grid(f"scale{n}_bits{g}", n, n, 2**bits) for n in (1, 2, 3, 4) for g in range(groups)]
    spec = CodeSpec(tuple(grids), 16, 16)
    return spec, Infinity(InfinityConfig(layers=1, width=32, heads=2), spec, 0)


@pytest.mark.parametrize("groups", [1, 2])
def test_scales_see_what_the_originals_transformer_was_trained_on(groups):
    reference = golden_frontier("infinity_vae")
    _, prior = of_tokenizer(groups)

    def in_grids(codes: Codes) -> Codes:
        return tuple(g for grid in codes for g in ((grid,) if groups == 1 else (grid >> 3, grid & 7)))

    _, told, given = flipped_bits(reference)
    assert any(not torch.equal(a, b) for a, b in zip(told, given, strict=True))
    close(prior.seen(in_grids(given)), reference.outputs["bsc_requant/x_BLC"])
    plain = tuple(codes_of(reference.outputs[f"bits_{n}"][:, 0]) for n in range(4))
    close(prior.seen(in_grids(plain)), reference.outputs["bsc_norequant/x_BLC"])


def test_the_sum_of_all_scales_is_the_tokenizers():
    reference = golden_frontier("infinity_vae")
    latents, total = BitLatents(of_tokenizer(1)[0]), None
    for number in range(4):
        total = latents.add(total, codes_of(reference.outputs[f"bits_{number}"][:, 0]), number)
    assert total is not None
    close(total, reference.outputs["quant"])


# ---- how files are read ---------------------------------------------------------------------------------------------


def test_the_weights_tell_all_but_dropout():
    prior, _ = imported()
    expected = InfinityConfig(layers=2, width=32, heads=4, mlp_ratio=8.0, drop_path=0.1, coarse_weight=0.5)
    assert prior.config == expected
    assert prior.embeddings == EmbeddingSpec(6, 128, "google/flan-t5-xl")
    assert (prior.stage1_fingerprint, prior.num_classes, prior.training) == ("f00d", 0, False)
    other, _ = imported(drop_rate=0.2, drop_path_rate=0.3)
    assert (other.config.dropout, other.config.drop_path) == (0.2, 0.3)


@torch.no_grad()
def test_blocks_are_read_from_chunks_of_any_size_and_from_one_row():
    prior, reference = imported()
    codes, condition = prior.grids_of(codes_of(reference.inputs["bits"])), both(prior, reference)
    one_row = {name.replace("block_chunks.1.module.0", "blocks.1"): w for name, w in reference.weights.items()}
    one_row = {name.replace("block_chunks.0.module.0", "blocks.0"): w for name, w in one_row.items()}
    one_chunk = {name.replace("blocks.", "block_chunks.0.module."): w for name, w in one_row.items()}
    for weights in (one_row, one_chunk):
        same = build_infinity(weights, None, FirstStage(SPEC, "f00d"))
        assert torch.equal(same.logits(codes, condition), prior.logits(codes, condition))
    four = {}
    for name, weight in one_row.items():  # two chunks of two
        four[name] = weight
        if name.startswith("blocks."):
            four[name.replace("blocks.1", "blocks.3").replace("blocks.0", "blocks.2")] = weight + 1
    chunked = {}
    for name, weight in four.items():
        number = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        chunked[name.replace(f"blocks.{number}", f"block_chunks.{number // 2}.module.{number % 2}")] = weight
    rows, chunks = (build_infinity(weights, None, FirstStage(SPEC, "f00d")) for weights in (four, chunked))
    assert chunks.config.layers == 4
    assert all(torch.equal(a, b) for a, b in zip(rows.parameters(), chunks.parameters(), strict=True))


@pytest.mark.parametrize("length", [4, 9])
def test_words_of_any_sentence_are_cut_or_filled_up_to_the_longest_caption(length):
    prior, reference = imported(text_maxlen=length)
    null, given = prior.sentence.null, reference.weights["cfg_uncond"]
    assert null is not None
    assert null.shape == (length, 128)
    assert torch.equal(null[:6], given[:length])
    if length > 6:
        assert torch.equal(null[6:], null_words(given, torch.empty(9, 128))[6:])
        assert 0.5 < float(null[6:].detach().norm(dim=1).mean()) < 1.5
    condition = captions(prior, reference.inputs["gen_text"])
    forgotten = prior.forget(condition, torch.tensor([True]))
    words, count = prior.sentence(1, forgotten)
    assert count is not None
    assert count.sum() == 3  # as long as the caption was
    assert torch.equal(words[0, :3], given[:3])


def test_what_cannot_be_read_is_refused():
    reference = golden_frontier("infinity_transformer")
    weights, stage1 = reference.weights, FirstStage(SPEC, "f00d")
    with pytest.raises(UserError, match=r"the weights predict 5 bits at each place, .*import this first, .* --stage1"):
        build_infinity(weights)
    for spec in (
        CodeSpec(tuple(Grid(f"scale{n}", n, n, 64) for n in (1, 2, 3, 4)), 16, 16),
        CodeSpec(tuple(Grid(f"scale{n}", n, n, 32) for n in range(1, 17)), 64, 64),
    ):
        with pytest.raises(
            UserError, match="predict 5 bits at each place of up to 15 scales, and the first stage make"
        ):
            build_infinity(weights, None, FirstStage(spec))
    with pytest.raises(UserError, match=r"the weights have no cfg_uncond, head\.weight: they are not those of Infin"):
        build_infinity({k: v for k, v in weights.items() if k not in ("cfg_uncond", "head.weight")}, None, stage1)
    with pytest.raises(UserError, match=r"the weights have no text_proj_for_sos\.ca\.mat_q: they are not those"):
        build_infinity({k: v for k, v in weights.items() if k != "text_proj_for_sos.ca.mat_q"}, None, stage1)
    with pytest.raises(UserError, match="the original's apply_spatial_patchify=1 is not supported: expected 0"):
        build_infinity(weights, {"apply_spatial_patchify": 1}, stage1)
    layer_scale = {**weights, "block_chunks.0.module.0.ca_gamma": torch.ones(32)}
    with pytest.raises(UserError, match=r"not expected: blocks\.0\.ca_gamma"):
        build_infinity(layer_scale, None, stage1)


def test_the_command_makes_the_prior_of_its_tokenizer(tmp_path):
    reference = golden_frontier("infinity_transformer")
    quantizer = MultiscaleBSQConfig(scales=(1, 2, 3, 4), dim=5)
    config = InfinityTokenizerConfig(
        width=8, multipliers=(1, 2, 2), residual_blocks=1, norm_groups=4, quantizer=quantizer
    )
    tokenizer = InfinityTokenizer(config, (16, 16)).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    torch.save(reference.weights, tmp_path / "infinity.pth")
    files = {"weights": str(tmp_path / "infinity.pth"), "out": str(tmp_path / "prior")}
    line = import_weights(ImportConfig(kind="infinity", stage1=str(tmp_path / "tokenizer"), **files))
    assert line.startswith(
        "1x1 codes of 32 + 2x2 codes of 32 + 3x3 codes of 32 + 4x4 codes of 32 (16x16x3 images): the"
    )
    prior = load_pretrained(tmp_path / "prior", PRIORS)
    pipeline = TwoStagePipeline(tokenizer, prior)  # which refuses codes of another
    sampling = SamplingConfig(temperature=0, guidance=reference.config["cfg"], guidance_layer=1)
    codes = sample_codes(pipeline.prior, [0], captions(prior, reference.inputs["gen_text"]), 0, sampling)
    assert torch.equal(codes[-1], codes_of(reference.outputs["greedy_cfg_layer/bits_3"][:, 0]))
    assert pipeline.decode(codes).shape == (1, 3, 16, 16)
