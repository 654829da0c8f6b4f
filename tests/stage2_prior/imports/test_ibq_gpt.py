"""IBQ's transformer by its original's own numbers: its weights here give its logits and the codes that it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common import exact
from common.errors import UserError
from common.model_io import load_pretrained
from pipelines.commands.import_weights import ImportConfig, import_weights
from stage1_vq.autoencoders import AUTOENCODERS
from stage2_prior.condition import Condition
from stage2_prior.exact import exact_stepper
from stage2_prior.imports.first_stage import FirstStage
from stage2_prior.imports.ibq_gpt import build_ibq_gpt
from stage2_prior.priors import IBQGPT, PRIORS, IBQGPTConfig
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.stepping import Stepper, walk
from tests.golden import Golden, golden_frontier, real_shapes_frontier


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-4)  # of the file, as its makers measured it


def ibq_gpt() -> tuple[IBQGPT, Golden]:
    reference = golden_frontier("ibq_gpt")
    return build_ibq_gpt(reference.weights, reference.config), reference


def led_along(stepper: Stepper, codes: Tensor) -> Tensor:
    """Logits `b n k` of a stepper to which codes `b n` are chosen."""
    seen: list[Tensor] = []

    def choose(position: int, logits: Tensor) -> Tensor:
        seen.append(logits)
        return codes[:, position : position + 1]

    walk(stepper, codes.shape[1], choose)
    return torch.cat(seen, dim=1)


@torch.no_grad()
def test_the_originals_logits_in_one_pass_and_step_by_step():
    prior, reference = ibq_gpt()
    codes, condition = reference.inputs["idx"], Condition(reference.inputs["class"][:, 0])
    grids, expected = (codes.view(2, 4, 4),), reference.outputs["logits"]
    close(prior.logits(grids, condition), expected)
    close(led_along(prior.stepper(2, condition), codes), expected)
    close(prior.logits(grids, prior.unconditional(condition)), reference.outputs["logits_uncond"])
    with patch.object(exact, "COARSE", exact.FINE):  # what attention is rounded to for speed, these weights magnify
        exactly = led_along(exact_stepper(prior, 2, condition), codes)
    torch.testing.assert_close(exactly.float(), expected, rtol=0, atol=5e-4)


def test_the_originals_codes_with_guidance():
    prior, reference = ibq_gpt()
    condition = Condition(reference.inputs["gen_class"][:, 0])
    sampling = SamplingConfig(temperature=0, guidance=reference.config["cfg_scale"])
    (codes,) = sample_codes(prior, range(2), condition, 0, sampling)
    assert torch.equal(codes.flatten(1), reference.outputs["greedy/cfg"])


def test_the_published_size():
    shapes = {f"transformer.{name}": shape for name, shape in real_shapes_frontier("ibq_ar_b").items()}
    with torch.device("meta"):
        prior = build_ibq_gpt({name: torch.empty(shape) for name, shape in shapes.items()})
    assert prior.config == IBQGPTConfig(layers=16, width=1024, heads=16, hidden_width=2816)
    assert prior.config.network.hidden == IBQGPTConfig(layers=16, width=1024, heads=16).network.hidden
    assert prior.code_spec == CodeSpec((Grid("codes", 16, 16, 16384),), 256, 256)
    assert prior.num_classes == 1000
    assert sum(weight.numel() for weight in prior.parameters()) == pytest.approx(342e6, rel=0.01)  # as published


def test_what_is_not_its_own_is_refused():
    reference = golden_frontier("ibq_gpt")
    with pytest.raises(UserError, match=r"the weights have no head_nm\.ada_lin\.1\.weight: they are not those of IBQ"):
        build_ibq_gpt({k: v for k, v in reference.weights.items() if not k.startswith("head_nm.ada_lin")})
    with pytest.raises(UserError, match=r"missing: blocks\.1\.ada_lin\.1\.bias"):
        build_ibq_gpt({k: v for k, v in reference.weights.items() if k != "blocks.1.ada_lin.1.bias"}, reference.config)
    with pytest.raises(UserError, match="no published model has 3 layers of width 32"):
        build_ibq_gpt(reference.weights, {"block_size": 16})
    with pytest.raises(UserError, match="the original's shared_aln=True is not supported: expected False"):
        build_ibq_gpt(reference.weights, {**reference.config, "shared_aln": True})
    other = FirstStage(CodeSpec((Grid("codes", 2, 4, 24),), 32, 64))
    with pytest.raises(UserError, match=r"the config has block_size=16, but .* with block_size=8; give the config"):
        build_ibq_gpt(reference.weights, reference.config, other)


def checkpoint(folder: Path) -> tuple[dict[str, str], Golden]:
    """A file of Lightning with the prior and its first stage, and its config; the prior's golden."""
    prior, first = golden_frontier("ibq_gpt"), golden_frontier("ibq_tokenizer")
    stored = {f"transformer.{name}": weight for name, weight in prior.weights.items()}
    stored |= {f"first_stage_model.{name}": weight for name, weight in first.weights.items()}
    torch.save({"state_dict": stored, "epoch": 1}, folder / "ar.ckpt")
    arguments: dict[str, Any] = {
        "transformer_config": {"params": prior.config},
        "first_stage_config": {"params": first.config},
    }
    (folder / "ar.yaml").write_text(yaml.safe_dump({"model": {"class_path": "any", "init_args": arguments}}))
    return {"weights": str(folder / "ar.ckpt"), "config": str(folder / "ar.yaml")}, prior


def test_the_command_makes_both_stages_of_one_checkpoint(tmp_path):
    files, reference = checkpoint(tmp_path)
    line = import_weights(ImportConfig(kind="ibq-gpt", **files, out=str(tmp_path / "prior")))
    assert line == (
        f"4x4 codes of 24 (64x64x3 images): the ibq_gpt prior is in {tmp_path / 'prior'}; its first stage lies in the "
        f"same file: zellige import --kind ibq --weights {files['weights']} --config {files['config']} --out MODEL1; "
        f"next: zellige assemble --stage1 MODEL1 --stage2 {tmp_path / 'prior'} --out MODEL"
    )
    prior = load_pretrained(tmp_path / "prior", PRIORS)
    with torch.no_grad():
        logits = prior.logits((reference.inputs["idx"].view(2, 4, 4),), Condition(reference.inputs["class"][:, 0]))
    close(logits, reference.outputs["logits"])

    import_weights(ImportConfig(kind="ibq", **files, out=str(tmp_path / "first")))
    first, tokenizer = load_pretrained(tmp_path / "first", AUTOENCODERS).eval(), golden_frontier("ibq_tokenizer")
    with torch.no_grad():
        codes = first.encode(tokenizer.inputs["x"])
    assert torch.equal(codes[0], tokenizer.outputs["ema/indices"])
