"""RAR's and RandAR's own numbers: their weights here give their logits in any order, losses and codes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from common.model_io import load_pretrained
from common.tensor_files import save_tensors
from pipelines.commands.import_weights import ImportConfig, import_weights
from stage2_prior.condition import Condition
from stage2_prior.imports.first_stage import FirstStage
from stage2_prior.imports.randar import build_randar
from stage2_prior.imports.rar import build_rar
from stage2_prior.masked_sampling import codes_per_step, cosine_share
from stage2_prior.priors import PRIORS, RAR, RandAR, RandARConfig, RARConfig
from stage2_prior.sampling import SamplingConfig, draw_in_groups
from stage2_prior.stepping import GuidedStepper, Stepper, walk
from tests.golden import Golden, golden_frontier, real_shapes_frontier

TOLERANCE = 5e-5  # of both files, as their makers measured it


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=TOLERANCE)


def led_along(stepper: Stepper, codes: Tensor) -> Tensor:
    """Logits `b n k` of a stepper to which codes `b n` are chosen."""
    seen: list[Tensor] = []

    def choose(position: int, logits: Tensor) -> Tensor:
        seen.append(logits)
        return codes[:, position : position + 1]

    walk(stepper, codes.shape[1], choose)
    return torch.cat(seen, dim=1)


# ---- RAR ------------------------------------------------------------------------------------------------------------


def rar() -> tuple[RAR, Golden]:
    reference = golden_frontier("rar")
    return build_rar(reference.weights, reference.config), reference


@torch.no_grad()
def test_rar_in_raster_order():
    prior, reference = rar()
    codes, condition = (reference.inputs["ids"].view(2, 4, 4),), Condition(reference.inputs["condition"])
    # The original's last output, after all codes, predicts nothing.
    expected = reference.outputs["raster/logits_cond"][:, :-1]
    close(prior.logits(codes, condition), expected)
    close(led_along(prior.stepper(2, condition), reference.inputs["ids"]), expected)
    close(prior.logits(codes, prior.unconditional(condition)), reference.outputs["raster/logits_uncond"][:, :-1])
    prefix = reference.outputs["sampling/logits_prefix"]
    close(prior.logits(codes, condition)[:, : prefix.shape[1]], prefix)


@torch.no_grad()
def test_rar_in_other_orders():
    prior, reference = rar()
    codes = (reference.inputs["ids"].view(2, 4, 4),)
    condition = Condition(reference.inputs["condition"], order=reference.inputs["orders"])
    expected, labels = reference.outputs["permuted/logits_cond"][:, :-1], reference.outputs["permuted/labels"]
    assert torch.equal(prior.sequence(codes, condition), labels)
    close(prior.logits(codes, condition), expected)
    close(led_along(prior.stepper(2, condition), labels), expected)
    close(prior.logits(codes, prior.unconditional(condition)), reference.outputs["permuted/logits_uncond"][:, :-1])
    close(prior(codes, condition).loss.mean(), reference.outputs["permuted/loss"])


@pytest.mark.parametrize("choice", ["greedy", "gumbel"])
def test_rar_draws_the_originals_codes_with_its_guidance(choice):
    prior, reference = rar()
    condition, noise = Condition(reference.inputs["gen_condition"]), reference.inputs["gumbel"]
    scale = reference.outputs["cfg_scale"].tolist()
    stepper = GuidedStepper(prior.stepper(4, prior.doubled_for_guidance(condition)), scale)

    def choose(position: int, logits: Tensor) -> Tensor:
        noisy = logits.log_softmax(dim=-1) + noise[position][:, None]
        return (logits if choice == "greedy" else noisy).argmax(dim=-1)

    assert torch.equal(walk(stepper, 16, choose), reference.outputs[f"generate/{choice}_kv"])
    # The schedule is ours, but that the original's last step is one before its end.
    ours = SamplingConfig(guidance=4.0, guidance_schedule="cosine", guidance_power=2.75)
    assert [ours.guidance_at(step, 17) for step in range(16)] == pytest.approx(scale, abs=1e-5)


def test_rars_loss_pulls_at_every_weight_as_plain_arithmetic_does():
    """Gradients of the permuted loss, against those of a plain restatement with the original's names."""
    prior, reference = rar()
    named = {name: weight.clone().requires_grad_() for name, weight in reference.weights.items()}
    codes = (reference.inputs["ids"].view(2, 4, 4),)
    condition = Condition(reference.inputs["condition"], order=reference.inputs["orders"])
    prior(codes, condition).loss.mean().backward()
    loss = plain_rar_loss(named, reference)
    torch.testing.assert_close(loss, reference.outputs["permuted/loss"], rtol=1e-5, atol=1e-5)
    loss.backward()
    close(prior.blocks[1].attention.qkv.weight.grad, named["blocks.1.attn.qkv.weight"].grad)
    close(prior.blocks[0].modulation.weight.grad, named["blocks.0.adaLN_modulation.1.weight"].grad)
    close(prior.blocks[2].attention.key_norm.weight.grad, named["blocks.2.attn.k_norm.weight"].grad)
    close(prior.targets.grad, named["target_aware_pos_embed"].grad[0, 2:18])
    close(prior.places.grad, named["pos_embed"].grad[0, :18])
    close(prior.progress.grad, named["timesteps_embeddings"].grad[0, :17])
    close(prior.classes.weight.grad, named["embeddings.weight"].grad[21:])
    close(prior.start.grad, named["cls_token"].grad)


def plain_rar_loss(named: dict[str, Tensor], reference: Golden) -> Tensor:
    """One sample, one head and one row at a time."""
    losses, width, heads = [], 32, 4
    for ids, label, order in zip(*(reference.inputs[name] for name in ("ids", "condition", "orders")), strict=True):
        class_vector, seen = named["embeddings.weight"][21 + label], ids[order]
        rows = [named["cls_token"][0, 0] + named["pos_embed"][0, 0]]
        for number in range(16):
            token = class_vector if number == 0 else named["embeddings.weight"][seen[number - 1]]
            position = 1 if number == 0 else 2 + order[number - 1]
            rows.append(token + named["pos_embed"][0, position] + named["target_aware_pos_embed"][0, 2 + order[number]])
        x = torch.stack(rows)
        condition = torch.nn.functional.silu(class_vector + named["timesteps_embeddings"][0, :17])

        def norm(x: Tensor, name: str) -> Tensor:
            gain, bias = named[f"{name}.weight"], named[f"{name}.bias"]
            return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() * gain + bias

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ named[f"{name}.weight"].T + named[f"{name}.bias"]

        for block in ("blocks.0", "blocks.1", "blocks.2"):
            parts = linear(condition, f"{block}.adaLN_modulation.1").split(width, dim=1)
            qkv = linear(norm(x, f"{block}.norm1") * (1 + parts[1]) + parts[0], f"{block}.attn.qkv")
            attended = []
            for head in range(heads):
                q, k, v = (qkv[:, part * width + head * 8 : part * width + head * 8 + 8] for part in range(3))
                q, k = norm(q, f"{block}.attn.q_norm"), norm(k, f"{block}.attn.k_norm")
                scores = (q @ k.T / 8**0.5).masked_fill(torch.ones(17, 17).triu(1).bool(), -torch.inf)
                attended.append(scores.softmax(1) @ v)
            x = x + parts[2] * linear(torch.cat(attended, dim=1), f"{block}.attn.proj")
            opened = torch.nn.functional.gelu(
                linear(norm(x, f"{block}.norm2") * (1 + parts[4]) + parts[3], f"{block}.mlp.fc1")
            )
            x = x + parts[5] * linear(opened, f"{block}.mlp.fc2")
        scale, shift = linear(condition, "adaln_before_head.adaLN_modulation.1").split(width, dim=1)
        plain = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        logits = linear(plain * (1 + scale) + shift, "lm_head")[1:]
        losses.append(torch.nn.functional.cross_entropy(logits, seen))
    return torch.stack(losses).mean()


def test_rar_of_the_published_sizes():
    shapes = real_shapes_frontier("rar_b")
    with torch.device("meta"):
        prior = build_rar({name: torch.empty(shape) for name, shape in shapes.items()})
    assert prior.config == RARConfig(layers=24, width=768, heads=16, hidden_width=3072)
    assert prior.code_spec == CodeSpec((Grid("codes", 16, 16, 1024),), 256, 256)
    assert prior.num_classes == 1000
    assert sum(weight.numel() for weight in prior.parameters()) == pytest.approx(261e6, rel=0.01)  # as published


def test_rar_takes_the_whole_config_of_the_original_and_refuses_what_is_not_its_own():
    reference = golden_frontier("rar")
    generator = {**reference.config["model"]["generator"], "dropout": 0.3}
    assert build_rar(reference.weights, generator).config.dropout == 0.3
    with pytest.raises(UserError, match=r"the weights have no lm_head\.weight: they are not those of RAR"):
        build_rar({k: v for k, v in reference.weights.items() if k != "lm_head.weight"})
    with pytest.raises(UserError, match=r"missing: blocks\.1\.mlp\.fc2\.bias"):
        build_rar({k: v for k, v in reference.weights.items() if k != "blocks.1.mlp.fc2.bias"}, generator)
    with pytest.raises(UserError, match="positions of -1002 codes, expected a square number"):
        build_rar(reference.weights)  # whose tables have fewer spare rows than the published ones
    other = FirstStage(CodeSpec((Grid("codes", 2, 8, 19),), 64, 64))
    with pytest.raises(
        UserError, match="the weights predict 16 codes of 20, and the first stage makes 2x8 codes of 19"
    ):
        build_rar(reference.weights, generator, other)


# ---- RandAR ---------------------------------------------------------------------------------------------------------


def randar() -> tuple[RandAR, Golden, Condition]:
    """With the condition that has the original's order."""
    reference = golden_frontier("randar")
    prior = build_randar(reference.weights, reference.config["model"])
    return prior, reference, Condition(reference.inputs["class"], order=reference.inputs["order"])


@torch.no_grad()
def test_randar_in_any_order():
    prior, reference, condition = randar()
    codes, outputs = (reference.inputs["idx"].view(2, 4, 4),), reference.outputs
    close(prior.instructions()[reference.inputs["order"]], outputs["position_tokens"])
    close(prior.logits(codes, condition), outputs["logits"])
    close(prior.logits(codes, prior.unconditional(condition)), outputs["logits_uncond"])
    close(prior.logits(codes, replace(condition, order=None)), outputs["logits_raster"])
    close(prior(codes, condition).loss.mean(), outputs["loss"])
    close(led_along(prior.stepper(2, condition), prior.sequence(codes, condition)), outputs["logits"])


class ByKnown(SamplingConfig):
    """The original's guidance: in proportion to the codes that are known, of all."""

    def guidance_at(self, step: int, steps: int) -> float:
        return 1 + (self.guidance - 1) * step / steps


@pytest.mark.parametrize("steps", [None, 8, 5])
def test_randar_draws_the_originals_codes_several_at_a_step(steps):
    prior, reference, _ = randar()
    condition = Condition(reference.inputs["gen_class"], order=reference.inputs["order"])
    sampling = ByKnown(temperature=0, guidance=reference.config["cfg_scales"][1], steps=steps)
    passes: list[int] = []
    uniforms = torch.zeros(2, 16, dtype=torch.float64)
    codes, _ = draw_in_groups(prior, condition, uniforms, sampling, None, tell_passes=passes.extend)
    assert passes == [steps or 16] * 2
    assert torch.equal(prior.in_raster(codes, condition), reference.outputs[f"greedy/steps{steps or -1}"])


def test_randars_steps_have_the_originals_sizes():
    for name, counts in golden_frontier("randar").outputs.items():
        if name.startswith("tokens_per_step/"):
            codes, steps = map(int, name.removeprefix("tokens_per_step/").split("_"))
            assert codes_per_step(codes, steps, cosine_share) == counts.tolist()


def test_randar_of_the_published_sizes():
    shapes = real_shapes_frontier("randar_l")
    with torch.device("meta"):
        prior = build_randar({name: torch.empty(shape) for name, shape in shapes.items()})
    assert prior.config == RandARConfig(layers=24, width=1024, heads=16, hidden_width=2816)
    assert prior.code_spec == CodeSpec((Grid("codes", 16, 16, 16384),), 256, 256)
    assert prior.num_classes == 1000
    assert sum(weight.numel() for weight in prior.parameters()) == pytest.approx(343e6, rel=0.01)  # as published


def test_randar_refuses_what_is_not_its_own():
    reference = golden_frontier("randar")
    with pytest.raises(UserError, match="the weights have no pos_instruct_embeddings: they are not those of RandAR"):
        build_randar({k: v for k, v in reference.weights.items() if k != "pos_instruct_embeddings"})
    with pytest.raises(UserError, match="no published model has 2 layers of width 32, and no shape tells the number"):
        build_randar(reference.weights)
    with pytest.raises(UserError, match="the original's rope_base=500 is not supported"):
        build_randar(reference.weights, {**reference.config["model"], "rope_base": 500})


@pytest.mark.parametrize("kind", ["rar", "randar"])
def test_the_command_makes_a_prior(kind, tmp_path):
    reference = golden_frontier(kind)
    own: dict[str, Any] = reference.config if kind == "rar" else reference.config["model"]
    save_tensors(reference.weights, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(own))
    out = str(tmp_path / "prior")
    line = import_weights(
        ImportConfig(
            kind=kind, weights=str(tmp_path / "weights.safetensors"), config=str(tmp_path / "config.json"), out=out
        )
    )
    assert f"the {kind} prior is in {out}; next: zellige assemble" in line
    prior = load_pretrained(tmp_path / "prior", PRIORS)
    ids, labels = ("ids", "condition") if kind == "rar" else ("idx", "class")
    with torch.no_grad():
        logits = prior.logits((reference.inputs[ids].view(2, 4, 4),), Condition(reference.inputs[labels]))
    close(
        logits, reference.outputs["raster/logits_cond"][:, :-1] if kind == "rar" else reference.outputs["logits_raster"]
    )
