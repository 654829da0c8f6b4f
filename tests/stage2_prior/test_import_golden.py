"""The original implementations' own numbers: their weights here give their logits, losses, greedy codes and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from stage1_vq.imports import KINDS as AUTOENCODER_KINDS
from stage2_prior.condition import Condition
from stage2_prior.imports import KINDS, FirstStage
from stage2_prior.priors.base import AutoregressivePrior
from stage2_prior.priors.llamagen import LlamaGen
from stage2_prior.priors.mingpt import MinGPT
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.sliding_window import sample_larger_codes
from stage2_prior.stepping import GuidedStepper, Stepper, walk
from tests.golden import Golden, golden, real_shapes

TOLERANCE = 5e-5  # of all files below, as their makers measured it
GREEDY = SamplingConfig(temperature=0)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=TOLERANCE)


def imported(kind: str, reference: Golden, **changes: Any) -> Any:
    return KINDS[kind].build(reference.weights, {**reference.config, **changes}, None)


def led_along(stepper: Stepper, codes: Tensor) -> Tensor:
    """Logits `b n k` of a stepper to which codes `b n` are chosen."""
    seen: list[Tensor] = []

    def choose(position: int, logits: Tensor) -> Tensor:
        seen.append(logits)
        return codes[:, position : position + 1]

    walk(stepper, codes.shape[1], choose)
    return torch.cat(seen, dim=1)


# ---- taming-transformers: the GPT alone -----------------------------------------------------------------------------


def gpt(before: int) -> tuple[MinGPT, Golden, Codes, Condition]:
    """The reference's GPT, whose first numbers are codes of a condition, with its input as codes and condition."""
    reference = golden("taming_gpt")
    tokens = reference.inputs["idx"]
    rest = tokens.shape[1] - before
    prior = imported("taming-gpt", reference, hw=[1, rest + 1], cond_hw=[1, before])
    # The last code is no input: its logits are those after all the original's numbers.
    codes = torch.cat([tokens[:, before:], torch.zeros(len(tokens), 1, dtype=torch.int64)], dim=1)
    return prior, reference, (codes[:, None],), Condition(codes=(tokens[:, None, :before],))


@torch.no_grad()
def test_logits_behind_places_that_see_each_other_are_the_originals():
    prior, reference, codes, condition = gpt(before=4)
    assert prior.config.unmasked == 4  # which the stored mask tells
    close(prior.logits(codes, condition), reference.outputs["logits"][:, 3:])


@torch.no_grad()
def test_logits_of_all_places_and_the_loss_are_the_originals():
    prior, reference, _, _ = gpt(before=4)
    logits = prior.output(prior.hidden(prior.embedding(reference.inputs["idx"])))
    close(logits, reference.outputs["logits"])
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), reference.inputs["targets"])
    close(loss, reference.outputs["loss"])


@torch.no_grad()
def test_vectors_in_the_place_of_numbers_give_the_originals_logits():
    prior, reference, _, _ = gpt(before=4)
    embedded = torch.cat([reference.inputs["embeddings"], prior.embedding(reference.inputs["idx_short"])], dim=1)
    close(prior.output(prior.hidden(embedded)), reference.outputs["logits_embeddings"])


def test_the_stepper_gives_the_logits_of_the_originals_cache():
    prior, reference, codes, condition = gpt(before=6)  # as many as went through it at once
    close(led_along(prior.stepper(2, condition), codes[0].flatten(1)), reference.outputs["logits_past"])


# ---- taming-transformers: with the first stage ----------------------------------------------------------------------


def net2net(**changes: Any) -> tuple[MinGPT, Golden]:
    reference = golden("taming_net2net")
    weights = {**reference.weights, **{f"first_stage_model.{k}": v for k, v in golden("taming_vqgan").weights.items()}}
    prior = KINDS["taming-net2net"].build(weights, {**reference.config, **changes}, None)
    return prior, reference


@pytest.mark.parametrize("start", ["class", "token"])
@torch.no_grad()
def test_logits_given_a_class_and_given_the_start_token_are_the_originals(start):
    prior, reference = net2net()
    condition = Condition(reference.inputs["class"])
    if start == "token":
        config = {name: value for name, value in reference.config.items() if name != "n_classes"}
        prior = KINDS["taming-net2net"].build(reference.weights, {**config, "unconditional": True}, None)
        condition = Condition()
        assert prior.num_classes == 0
    codes = (reference.outputs["z_indices"].view(2, 8, 8),)
    expected = reference.outputs["logits" if start == "class" else "logits_sos"]
    close(prior.logits(codes, condition), expected)
    close(led_along(prior.stepper(2, condition), codes[0].flatten(1)), expected)
    if start == "class":
        close(prior.nll(codes, condition).mean(), reference.outputs["loss"])


@torch.no_grad()
def test_codes_that_the_original_permutes_have_its_logits():
    """Its GPT sees codes[forward_shuffle_idx]: of grids whose codes, so shuffled, are those of the file, its logits."""
    _, reference = net2net()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    weights = {
        **reference.weights,
        "permuter.forward_shuffle_idx": order,
        "permuter.backward_shuffle_idx": order.argsort(),
    }
    config = {**reference.config, "permuter_config": {"target": "taming.modules.transformer.permuter.RandomPermute"}}
    stage1 = FirstStage(CodeSpec((Grid("codes", 8, 8, 64),), 16, 16), "f00d")
    prior = KINDS["taming-net2net"].build(weights, config, stage1)
    assert prior.config.order == tuple(order.tolist())
    shuffled = reference.outputs["z_indices"].view(2, 64)
    grid = torch.empty_like(shuffled).scatter_(1, order.expand(2, -1), shuffled)
    codes, condition = (grid.view(2, 8, 8),), Condition(reference.inputs["class"])
    close(prior.logits(codes, condition), reference.outputs["logits"])
    assert torch.equal(prior.grids_of(prior.sequence(codes, condition))[0], codes[0])
    drawn = sample_codes(prior, range(2), condition, 0, GREEDY)[0].flatten(1)
    assert torch.equal(drawn[:, order], reference.outputs["greedy_indices"])
    with pytest.raises(UserError, match="walks its codes in an order of its own"):
        sample_larger_codes(prior, CodeSpec((Grid("codes", 9, 9, 64),), 18, 18), [0], Condition(), 0, GREEDY)


@torch.no_grad()
def test_greedy_codes_and_their_image_are_the_originals():
    prior, reference = net2net()
    first_stage = golden("taming_vqgan")
    vqgan = AUTOENCODER_KINDS["taming-vqgan"].build(first_stage.weights, first_stage.config)
    codes = sample_codes(prior, range(2), Condition(reference.inputs["class"]), 0, GREEDY)
    assert torch.equal(codes[0].flatten(1), reference.outputs["greedy_indices"])
    images = reference.outputs["greedy_img"].clamp(-1, 1)
    torch.testing.assert_close(vqgan.decode(codes), images, rtol=1e-5, atol=2e-4)  # the decoder's tolerance
    assert torch.equal(vqgan.encode(reference.inputs["x"])[0].flatten(1), reference.outputs["z_indices"])


# ---- LlamaGen -------------------------------------------------------------------------------------------------------

EACH_LLAMAGEN = pytest.mark.parametrize("name", ["llamagen_gpt_c2i", "llamagen_gpt_t2i"])


def llamagen(name: str) -> tuple[LlamaGen, Golden, Codes]:
    reference = golden(name)
    prior = imported("llamagen-gpt", reference)
    side = prior.grid.height
    return prior, reference, (reference.inputs["idx"].view(2, side, side),)


def conditions(reference: Golden) -> dict[str, Condition]:
    """By the name of the logits that the original recorded under it."""
    given = reference.inputs["cond"]
    if given.ndim == 1:
        null = torch.full_like(given, reference.config["num_classes"])
        return {"logits": Condition(given), "logits_uncond": Condition(null)}
    all_count = torch.ones(given.shape[:2], dtype=torch.bool)
    return {
        "logits": Condition(embeddings=given, embedding_mask=all_count),
        "logits_uncond": Condition(embeddings=torch.zeros_like(given), embedding_mask=all_count),
        "logits_masked": Condition(embeddings=given, embedding_mask=reference.inputs["emb_masks"].bool()),
    }


@EACH_LLAMAGEN
@torch.no_grad()
def test_logits_are_the_originals_with_and_without_condition(name):
    prior, reference, codes = llamagen(name)
    for output, condition in conditions(reference).items():
        close(prior.logits(codes, condition), reference.outputs[output][:, :-1])  # the last is beyond the image
        close(led_along(prior.stepper(2, condition), codes[0].flatten(1)), reference.outputs[output][:, :-1])
    assert reference.outputs["logits"].sub(reference.outputs["logits_uncond"]).abs().max() > 0.1


@torch.no_grad()
def test_a_text_of_which_nothing_counts_is_any_text():
    prior, reference, codes = llamagen("llamagen_gpt_t2i")
    nothing = torch.zeros(2, 120, dtype=torch.bool)
    condition = Condition(embeddings=reference.inputs["cond"], embedding_mask=nothing)
    close(prior.logits(codes, condition), reference.outputs["logits_uncond"][:, :-1])


@EACH_LLAMAGEN
@torch.no_grad()
def test_logits_and_loss_in_training_are_the_originals(name):
    prior, reference, codes = llamagen(name)
    condition = conditions(reference)["logits"]
    close(prior.train().logits(codes, condition), reference.outputs["train_logits"])
    close(prior.nll(codes, condition).mean(), reference.outputs["train_loss"])


def sampling(reference: Golden, mode: str) -> SamplingConfig:
    """Guidance of the original's `cfg_interval` c: up to code c + 1, counted from 0."""
    last = reference.config["block_size"] - 1
    end = (reference.config["cfg_interval"] + 1) / last if mode == "gen_cfg_interval" else 1.0
    guidance = 1.0 if mode == "gen" else reference.config["cfg_scale"]
    return SamplingConfig(temperature=0, guidance=guidance, guidance_end=end)


@EACH_LLAMAGEN
@pytest.mark.parametrize("mode", ["gen", "gen_cfg", "gen_cfg_interval"])
def test_greedy_codes_are_the_originals_with_guidance_and_its_interval(name, mode):
    prior, reference, _ = llamagen(name)
    known = conditions(reference)
    condition, settings = known.get("logits_masked", known["logits"]), sampling(reference, mode)
    codes = sample_codes(prior, range(2), condition, 0, settings)[0].flatten(1)
    assert torch.equal(codes, reference.outputs[f"{mode}/tokens"])
    close(guided_logits(prior, condition, codes, settings), reference.outputs[f"{mode}/logits"])


def guided_logits(prior: AutoregressivePrior, condition: Condition, codes: Tensor, settings: SamplingConfig) -> Tensor:
    doubled = prior.stepper(2 * len(codes), prior.doubled_for_guidance(condition))
    weights: Sequence[float] = [settings.guidance_at(step, prior.steps) for step in range(prior.steps)]
    return led_along(GuidedStepper(doubled, weights), codes)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_llamagens_published_size_is_told_by_the_weights_alone():
    shapes = real_shapes("llamagen_gpt_b_c2i")
    with torch.device("meta"):
        prior = KINDS["llamagen-gpt"].build({name: torch.empty(shape) for name, shape in shapes.items()}, None, None)
    config = prior.config
    assert (config.layers, config.width, config.heads, config.hidden) == (12, 768, 12, 2048)
    assert config.hidden_width == 2048 == type(config)(width=768, heads=12).hidden
    assert (prior.num_classes, prior.knows_null_label) == (1000, True)
    assert prior.code_spec.describe() == "16x16 codes of 16384 (256x256x3 images)"
    assert prior.stage1_fingerprint is None


def gpt_shapes(layers: int, width: int, vocabulary: int, positions: int) -> dict[str, Tensor]:
    """Of taming-transformers' GPT, with the prefix that it has in a Net2NetTransformer."""
    shapes = {
        "tok_emb.weight": (vocabulary, width),
        "pos_emb": (1, positions, width),
        "head.weight": (vocabulary, width),
    }
    shapes |= {f"ln_f.{name}": (width,) for name in ("weight", "bias")}
    for layer in range(layers):
        block = f"blocks.{layer}."
        linear = {f"attn.{name}": (width, width) for name in ("query", "key", "value", "proj")}
        for name, shape in {**linear, "mlp.0": (4 * width, width), "mlp.2": (width, 4 * width)}.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        shapes |= {f"{block}{norm}.{name}": (width,) for norm in ("ln1", "ln2") for name in ("weight", "bias")}
    return {f"transformer.{name}": torch.empty(shape) for name, shape in shapes.items()}


VQMODEL = {"target": "taming.models.vqgan.VQModel", "params": {
    "n_embed": 1024, "embed_dim": 256, "ddconfig": {"resolution": 256, "ch_mult": [1, 1, 2, 2, 4]},
}}  # fmt: skip


def net2net_config(condition: Any, **more: Any) -> dict[str, Any]:
    transformer = {"target": "taming.modules.transformer.mingpt.GPT", "params": {"n_head": 2, "resid_pdrop": 0.1}}
    return {
        "transformer_config": transformer,
        "first_stage_config": VQMODEL,
        "cond_stage_config": condition,
        **more,
    }


def test_the_published_class_conditional_gpt_is_told_by_the_weights_alone():
    with torch.device("meta"):
        prior = KINDS["taming-net2net"].build(gpt_shapes(48, 1536, 16384, 256), None, None)
    assert (prior.config.layers, prior.config.width, prior.config.heads) == (48, 1536, 24)
    assert (prior.num_classes, prior.knows_null_label, prior.given) == (1000, False, ())
    assert prior.code_spec.describe() == "16x16 codes of 16384 (256x256x3 images)"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (net2net_config({"target": "taming.modules.util.Labelator", "params": {"n_classes": 7}}), (7, (), 0)),
        (net2net_config("__is_unconditional__", sos_token=3), (0, (), 3)),
        (net2net_config(VQMODEL, unconditional=True), (0, (), 0)),
        (net2net_config({"target": "taming.modules.util.SOSProvider", "params": {"sos_token": 5}}), (0, (), 5)),
        (net2net_config(VQMODEL), (0, (Grid("condition", 16, 16, 1024),), 0)),
        (net2net_config(VQMODEL, downsample_cond_size=64), (0, (Grid("condition", 4, 4, 1024),), 0)),
        (net2net_config("__is_first_stage__"), (0, (Grid("condition", 16, 16, 1024),), 0)),
        (
            net2net_config(
                {"target": "taming.modules.misc.coord.CoordStage", "params": {"n_embed": 512, "down_factor": 32}}
            ),
            (0, (Grid("condition", 8, 8, 512),), 0),
        ),
    ],
    ids=["class", "unconditional", "unconditional all the same", "start", "codes", "small codes", "own", "coordinates"],
)
def test_the_config_tells_what_comes_before_the_codes(config, expected):
    with torch.device("meta"):
        prior = KINDS["taming-net2net"].build(gpt_shapes(1, 8, 1024, 512), config, None)
    assert (prior.num_classes, prior.given, prior.config.start) == expected
    assert prior.config.residual_dropout == 0.1
    assert prior.code_spec.describe() == "16x16 codes of 1024 (256x256x3 images)"


def test_a_stored_condition_stage_tells_that_its_codes_come_first():
    stages = {}
    for prefix, codes, levels in (("first_stage_model.", 1024, 5), ("cond_stage_model.", 300, 6)):
        stages[f"{prefix}quantize.embedding.weight"] = torch.empty(codes, 4)
        stages |= {f"{prefix}encoder.down.{i}.block.0.conv1.weight": torch.empty(1) for i in range(levels)}
    with torch.device("meta"):
        prior = KINDS["taming-net2net"].build({**gpt_shapes(1, 8, 1024, 512), **stages}, {"n_head": 2}, None)
    assert prior.given == (Grid("condition", 8, 8, 300),)
    assert prior.code_spec.describe() == "16x16 codes of 1024 (256x256x3 images)"


def test_a_first_stage_that_is_at_hand_tells_the_codes():
    prior, reference = net2net()
    spec = CodeSpec((Grid("codes", 4, 6, 50),), 64, 96)
    other = KINDS["taming-net2net"].build(reference.weights, reference.config, FirstStage(spec, "f00d"))
    assert (other.code_spec, other.stage1_fingerprint) == (spec, "f00d")
    assert prior.code_spec.describe() == "8x8 codes of 64 (16x16x3 images)"  # told by the stored first stage
    with torch.no_grad():
        logits = other.logits((torch.zeros(2, 4, 6, dtype=torch.int64),), Condition(reference.inputs["class"]))
    assert logits.shape == (2, 24, 50)  # numbers that are no codes have no logits


def test_a_model_of_classes_without_a_null_label_is_not_guided():
    reference = golden("llamagen_gpt_c2i")
    prior = imported("llamagen-gpt", reference, num_classes=11)  # as many as there are rows
    assert (prior.num_classes, prior.knows_null_label) == (11, False)
    with pytest.raises(UserError, match=r"guidance=2.0, expected 1"):
        sample_codes(prior, [0], Condition(torch.tensor([1])), 0, SamplingConfig(guidance=2.0))


# ---- mistakes -------------------------------------------------------------------------------------------------------

GPT_SHAPES = {"taming-gpt": "taming_gpt", "taming-net2net": "taming_net2net", "llamagen-gpt": "llamagen_gpt_c2i"}
TWO_GRIDS = CodeSpec((Grid("top", 2, 2, 64), Grid("bottom", 4, 4, 64)), 16, 16)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("taming-gpt", {}, "24 positions do not tell how many codes an image has; give --stage1 the model of the"),
        ("taming-gpt", {"hw": 3}, "unmasked=4, expected at most 1, the places before the codes"),
        ("taming-gpt", {"hw": 5, "cond_hw": 2}, "positions=24, expected at least 28 for 5x5 codes of 64"),
        ("taming-gpt", {"hw": 4, "cond_hw": 2, "n_head": None}, "no published model has 2 layers of width 32, and no"),
        (
            "taming-net2net",
            {"permuter_config": {"target": "taming.Subsample"}},
            "the original permutes the codes .*, which tells the order",
        ),
        (
            "taming-net2net",
            {"n_classes": None, "cond_stage_config": {"target": "taming.DummyCondStage"}},
            r"the original's condition \(DummyCondStage\) is not known; give the original's own config",
        ),
        ("taming-net2net", {"n_classes": None}, r"the original's condition \(no cond_stage_config\) is not known"),
        ("taming-net2net", {"target": "taming.modules.transformer.mingpt.CodeGPT"}, "target='taming.*' is not support"),
        ("llamagen-gpt", {"n_kv_head": 2}, "the original's n_kv_head=2 is not supported: expected 4"),
        ("llamagen-gpt", {"rope_base": 500}, "the original's rope_base=500 is not supported: expected 10000.0"),
        ("llamagen-gpt", {"num_classes": 14}, "num_classes=14, but the table of classes has 11 rows: expected 10, and"),
        ("llamagen-gpt", {"num_classes": 7}, "num_classes=7, but the table of classes has 11 rows: expected 10, and"),
        ("llamagen-gpt", {"n_layer": 3}, "the config has n_layer=3, but the weights are of a model with n_layer=2"),
        ("llamagen-gpt", {"dim": 64}, "the config has dim=64, but the weights are of a model with dim=32"),
        ("llamagen-gpt", {"vocab_size": 63}, "the config has vocab_size=63, but the weights are of a model with"),
        ("llamagen-gpt", {"block_size": 15}, "the config has block_size=15, expected a square number"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(kind, change, message):
    reference = golden(GPT_SHAPES[kind])
    config = {name: value for name, value in {**reference.config, **change}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        KINDS[kind].build(reference.weights, config, None)


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("taming-net2net", TWO_GRIDS, "the first stage makes 2x2 codes of 64 .*, expected one grid, which this --kind"),
        ("llamagen-gpt", TWO_GRIDS, "the first stage makes 2x2 codes of 64 .*, expected one grid, which this --kind"),
        (
            "taming-net2net",
            CodeSpec((Grid("codes", 2, 2, 65),), 8, 8),
            "the first stage has 65 codes, the prior knows 64; give --stage1 the model that it was trained with",
        ),
        (
            "llamagen-gpt",
            CodeSpec((Grid("codes", 2, 2, 64),), 8, 8),
            "the config has block_size=16, but the first stage makes 2x2 codes of 64 .* import it anew with the --imag",
        ),
    ],
)
def test_a_first_stage_that_does_not_fit_is_refused(kind, spec, message):
    reference = golden(GPT_SHAPES[kind])
    with pytest.raises(UserError, match=message):
        KINDS[kind].build(reference.weights, reference.config, FirstStage(spec))


@pytest.mark.parametrize("kind", GPT_SHAPES)
def test_weights_of_something_else_are_refused(kind):
    with pytest.raises(UserError, match=r"the weights have no tok_emb\w*.weight: they are not those of"):
        KINDS[kind].build({"encoder.weight": torch.zeros(3)}, {"n_classes": 3}, None)


def test_weights_of_llamagen_without_a_condition_are_refused():
    reference = golden("llamagen_gpt_c2i")
    weights = {name: tensor for name, tensor in reference.weights.items() if not name.startswith("cls_")}
    with pytest.raises(UserError, match=r"the weights have neither cls_embedding.embedding_table.weight nor"):
        KINDS["llamagen-gpt"].build(weights, reference.config, None)


def test_missing_and_left_over_weights_are_named():
    reference = golden("taming_net2net")
    weights = {**reference.weights, "transformer.extra": torch.zeros(1)}
    del weights["transformer.blocks.1.mlp.0.bias"]
    with pytest.raises(UserError, match=r"missing: blocks.1.mlp.0.bias; not expected: extra\)"):
        KINDS["taming-net2net"].build(weights, reference.config, None)
