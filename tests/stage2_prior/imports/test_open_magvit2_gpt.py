"""Open-MAGVIT2's transformer by its original's own numbers: its weights here give its logits and the codes it draws."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import yaml
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common import exact
from common.errors import UserError
from common.model_io import load_pretrained
from pipelines import TwoStagePipeline
from pipelines.commands.import_weights import ImportConfig, import_weights
from stage1_vq.autoencoders import AUTOENCODERS
from stage2_prior.condition import Condition
from stage2_prior.exact import exact_stepper
from stage2_prior.imports.first_stage import FirstStage
from stage2_prior.imports.open_magvit2_gpt import build_open_magvit2_gpt
from stage2_prior.priors import PRIORS, OpenMAGVIT2GPT, OpenMAGVIT2GPTConfig
from stage2_prior.stepping import GuidedStepper, Stepper, walk
from tests.golden import Golden, golden_frontier, real_shapes_frontier


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-4)  # of the file, as its makers measured it


def open_magvit2_gpt() -> tuple[OpenMAGVIT2GPT, Golden]:
    reference = golden_frontier("openmagvit2_gpt")
    return build_open_magvit2_gpt(reference.weights, reference.config), reference


def by_factor(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each place, b n 4 and b n 16, from those of all codes, b 2n 16."""
    return logits[:, ::2, :4], logits[:, 1::2]


def led_along(stepper: Stepper, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Logits by factor of a stepper to which codes `b n` are chosen."""
    seen: list[Tensor] = []

    def choose(position: int, logits: Tensor) -> Tensor:
        seen.append(logits)
        return sequence[:, position : position + 1]

    walk(stepper, sequence.shape[1], choose)
    return torch.cat(seen[::2], dim=1), torch.cat(seen[1::2], dim=1)


@torch.no_grad()
def test_the_originals_logits_in_one_pass_and_step_by_step():
    prior, reference = open_magvit2_gpt()
    grids = tuple(reference.inputs[name].view(2, 4, 4) for name in ("idx_pre", "idx_post"))
    condition = Condition(reference.inputs["class"][:, 0])
    sequence = prior.sequence(grids, condition)
    expected = [reference.outputs[f"logits_{factor}"] for factor in ("pre", "post")]
    for ours in (by_factor(prior.logits(grids, condition)), led_along(prior.stepper(2, condition), sequence)):
        for logits, theirs in zip(ours, expected, strict=True):
            close(logits, theirs)
    without = by_factor(prior.logits(grids, prior.unconditional(condition)))
    for factor, logits in zip(("pre", "post"), without, strict=True):
        close(logits, reference.outputs[f"uncond/logits_{factor}"])
    with patch.object(exact, "COARSE", exact.FINE):  # what attention is rounded to for speed, these weights magnify
        exactly = led_along(exact_stepper(prior, 2, condition), sequence)
    for logits, theirs in zip(exactly, expected, strict=True):
        torch.testing.assert_close(logits.float(), theirs, rtol=0, atol=5e-4)


def test_the_originals_codes_with_a_guidance_for_each_factor():
    """Ours is one for all codes; the walk and its steps can have any."""
    prior, reference = open_magvit2_gpt()
    condition = Condition(reference.inputs["gen_class"][:, 0])
    stepper = prior.stepper(4, prior.doubled_for_guidance(condition))
    guided = GuidedStepper(stepper, 16 * reference.config["cfg_scale"])
    pre, post = prior.grids_of(walk(guided, 32, lambda position, logits: logits.argmax(-1)))
    assert torch.equal(pre.flatten(1), reference.outputs["greedy/cfg_pre"])
    assert torch.equal(post.flatten(1), reference.outputs["greedy/cfg_post"])


def test_the_published_size():
    shapes = {f"transformer.{name}": shape for name, shape in real_shapes_frontier("openmagvit2_ar_b").items()}
    with torch.device("meta"):
        prior = build_open_magvit2_gpt({name: torch.empty(shape) for name, shape in shapes.items()})
    assert prior.config == OpenMAGVIT2GPTConfig(layers=24, factor_layers=2, width=1024, heads=16, hidden_width=2816)
    assert prior.config.network.hidden == OpenMAGVIT2GPTConfig(layers=24, width=1024, heads=16).network.hidden
    factors = Grid("factor0", 16, 16, 64), Grid("factor1", 16, 16, 4096)
    assert prior.code_spec == CodeSpec(factors, 256, 256)
    assert prior.num_classes == 1000
    assert sum(weight.numel() for weight in prior.parameters()) == pytest.approx(343e6, rel=0.01)  # as published


def test_what_is_not_its_own_is_refused():
    reference = golden_frontier("openmagvit2_gpt")
    with pytest.raises(UserError, match=r"the weights have no pre_emb\.weight: they are not those of Open-MAGVIT2's"):
        build_open_magvit2_gpt({k: v for k, v in reference.weights.items() if k != "pre_emb.weight"})
    fewer = {k: v for k, v in reference.weights.items() if k != "spatial_blocks.1.ffn_norm.weight"}
    with pytest.raises(UserError, match=r"missing: spatial_blocks\.1\.ffn_norm\.weight"):
        build_open_magvit2_gpt(fewer, reference.config)
    with pytest.raises(UserError, match="no published model has 2 layers of width 32"):
        build_open_magvit2_gpt(reference.weights, {"block_size": 16})
    with pytest.raises(UserError, match="the original's token_factorization=False is not supported: expected True"):
        build_open_magvit2_gpt(reference.weights, {**reference.config, "token_factorization": False})
    with pytest.raises(UserError, match=r"factorized_bits=\[4, 2\], but .* factorized_bits=\[2, 4\]; give the config"):
        build_open_magvit2_gpt(reference.weights, {**reference.config, "factorized_bits": [4, 2]})
    whole = FirstStage(CodeSpec((Grid("codes", 4, 4, 64),), 16, 16))
    with pytest.raises(UserError, match=r"the first stage makes 4x4 codes of 64 .* two grids, of 4 and 16; .*_bits"):
        build_open_magvit2_gpt(reference.weights, reference.config, whole)


def test_the_command_makes_both_stages_of_one_checkpoint(tmp_path):
    prior, first = golden_frontier("openmagvit2_gpt"), golden_frontier("openmagvit2_tokenizer")
    stored = {f"transformer.{name}": weight for name, weight in prior.weights.items()}
    stored |= {f"first_stage_model.{name}": weight for name, weight in first.weights.items()}
    torch.save({"state_dict": stored, "epoch": 1}, tmp_path / "ar.ckpt")
    arguments = {
        "transformer_config": {"params": {**prior.config, "downsample_size": 4}},
        "first_stage_config": {"params": {**first.config, "token_factorization": True}},
    }
    (tmp_path / "ar.yaml").write_text(yaml.safe_dump({"model": {"class_path": "any", "init_args": arguments}}))
    files = {"weights": str(tmp_path / "ar.ckpt"), "config": str(tmp_path / "ar.yaml")}
    line = import_weights(ImportConfig(kind="open-magvit2-gpt", **files, out=str(tmp_path / "prior")))
    assert line.startswith("4x4 codes of 4 + 4x4 codes of 16 (16x16x3 images): the open_magvit2_gpt prior is in ")
    assert f"zellige import --kind open-magvit2 --weights {files['weights']} --config {files['config']}" in line

    import_weights(ImportConfig(kind="open-magvit2", **files, image_size=(16, 16), out=str(tmp_path / "first")))
    model = load_pretrained(tmp_path / "first", AUTOENCODERS)
    assert model.code_spec() == load_pretrained(tmp_path / "prior", PRIORS).code_spec
    files["stage1"] = str(tmp_path / "first")
    import_weights(ImportConfig(kind="open-magvit2-gpt", **files, out=str(tmp_path / "again")))
    pipeline = TwoStagePipeline(model, load_pretrained(tmp_path / "again", PRIORS))
    images = pipeline.generate(2, labels=[0, 5], seed=0).images
    assert tuple(images.shape) == (2, 3, 16, 16)
