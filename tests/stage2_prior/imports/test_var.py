"""VAR's own numbers: its weights here give its inputs, logits, loss, greedy codes and image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from stage1_vq.autoencoders import VQGAN
from stage1_vq.imports.var import import_var
from stage2_prior.condition import Condition
from stage2_prior.exact.var import ExactVAR
from stage2_prior.imports.first_stage import FirstStage
from stage2_prior.imports.var import build_var
from stage2_prior.priors.var import VAR, Attention, VARConfig
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.stepping import GuidedStepper
from tests.golden import Golden, golden, real_shapes

TOLERANCES = {"var_transformer": 5e-5, "var_transformer_shared_aln": 2e-4}  # that their makers measured
each_file = pytest.mark.parametrize("name", TOLERANCES)


def tokenizer() -> VQGAN:
    reference = golden("var_vqvae")
    return import_var(reference.weights, reference.config)


def first_stage(model: VQGAN) -> FirstStage:
    return FirstStage(model.code_spec(), model.fingerprint(), model.scale_latents())


def imported(name: str) -> tuple[VAR, Golden, Condition]:
    reference = golden(name)
    prior = build_var(reference.weights, reference.config, first_stage(tokenizer()))
    return prior, reference, Condition(reference.inputs["label"])


def guided_as_published(reference: Golden) -> SamplingConfig:
    """Greedy, with logits (1 + t) * label's - t * null label's, where t rises to cfg."""
    return SamplingConfig(temperature=0, guidance=1 + reference.config["cfg"], guidance_schedule="linear")


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=tolerance)


@each_file
@torch.no_grad()
def test_inputs_logits_and_loss_are_the_originals(name):
    prior, reference, condition = imported(name)
    codes = prior.grids_of(reference.inputs["codes"])
    close(prior.latents(codes), reference.inputs["x_BLCv"], TOLERANCES[name])
    close(prior.logits(codes, condition), reference.outputs["logits"], TOLERANCES[name])
    null = Condition(torch.full_like(reference.inputs["label"], prior.num_classes))
    close(prior.logits(codes, null), reference.outputs["logits_uncond"], TOLERANCES[name])
    close(prior.nll(codes, condition).mean(), reference.outputs["loss"], TOLERANCES[name])


@each_file
@torch.no_grad()
def test_greedy_codes_their_logits_and_their_image_are_the_originals(name):
    prior, reference, condition = imported(name)
    sampling = guided_as_published(reference)
    codes = sample_codes(prior, range(2), condition, 0, sampling)
    assert torch.equal(prior.sequence(codes, condition), reference.outputs["ar/idx"])
    guidance = [sampling.guidance_at(step, 4) for step in range(4)]
    stepper = GuidedStepper(prior.stepper(4, prior.doubled_for_guidance(condition)), guidance)
    logits = [stepper.next(codes[step - 1].flatten(1) if step else None) for step in range(4)]
    close(torch.cat(logits, dim=1), reference.outputs["ar/logits"], TOLERANCES[name])
    image = tokenizer().decode(tuple(grid[:1] for grid in codes))
    close((image + 1) / 2, reference.outputs["ar/img"], TOLERANCES[name])


@each_file
def test_the_weights_tell_all_but_dropout(name):
    prior, reference, _ = imported(name)
    heads, shared = reference.config["num_heads"], reference.config["shared_aln"]
    assert prior.config == VARConfig(layers=2, width=32, heads=heads, shared_adaln=shared, drop_path=2 / 240)
    model = tokenizer()
    assert prior.stage1_fingerprint == model.fingerprint()
    assert (prior.num_classes, prior.knows_null_label, prior.training) == (10, True, False)
    other = build_var(reference.weights, {"drop_rate": 0.1, "drop_path_rate": 0.3}, first_stage(model))
    assert (other.config.dropout, other.config.drop_path) == (0.1, 0.3)


@pytest.mark.parametrize("layers", [16, 20, 24, 30])
def test_published_sizes_are_told_by_the_shapes(layers):
    shapes = real_shapes("var_d16")
    block = {name: shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
    for number in range(layers):
        shapes |= {name.replace(".0.", f".{number}.", 1): shape for name, shape in block.items()}
    published = {1024: 64 * layers, 3072: 192 * layers, 4096: 256 * layers, 6144: 384 * layers, 2048: 128 * layers}

    def scaled(name: str, shape: list[Any]) -> list[int]:
        """Of d16, as `layers` have it."""
        sides = [side for side in shape if isinstance(side, int)]
        if "scale_mul" in name:
            return [1, layers, 1, 1]
        return [4096, 64 * layers][: len(sides)] if name.startswith("head.") else [published.get(s, s) for s in sides]

    spec = CodeSpec(
        tuple(Grid(f"scale{n}", s, s, 4096) for n, s in enumerate((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))), 256, 256
    )
    with torch.device("meta"):
        weights = {name: torch.empty(scaled(name, shape)) for name, shape in shapes.items()}
        sizes = {"codebook": (4096, 32), "phi_weight": (9, 32, 32, 3, 3), "phi_bias": (9, 32)}
        latents = {name: torch.empty(size) for name, size in sizes.items()}
        prior = build_var(weights, None, FirstStage(spec, "f00d", latents))
    expected = VARConfig(layers=layers, width=64 * layers, heads=layers, drop_path=layers / 240)
    assert prior.config == expected
    assert prior.num_classes == 1000
    millions = {16: 310, 20: 600, 24: 1000, 30: 2000}[layers]  # as announced
    assert sum(weight.numel() for weight in prior.parameters()) == pytest.approx(millions * 1e6, rel=0.04)


@torch.no_grad()
def test_other_networks_of_the_original_are_read():
    """Without attn_l2_norm, and with another mlp_ratio: what the weights tell, and their number of heads, which they do
    not."""
    reference, stage1 = golden("var_transformer"), first_stage(tokenizer())
    generator = torch.Generator().manual_seed(0)
    weights = {name: weight for name, weight in reference.weights.items() if "scale_mul" not in name}
    for name, weight in weights.items():
        if ".ffn." in name:
            shape = [80 if side == 128 else side for side in weight.shape]
            weights[name] = 0.1 * torch.randn(shape, generator=generator)
    with pytest.raises(UserError, match="do not tell its number of heads; give num_heads in --config"):
        build_var(weights, None, stage1)
    for wrong in ({"attn_l2_norm": True}, {"mlp_ratio": 4.0}):
        with pytest.raises(UserError, match=f"the original's {next(iter(wrong))}=.* is not supported: expected"):
            build_var(weights, {"num_heads": 2, **wrong}, stage1)
    prior = build_var(weights, {"num_heads": 2, "attn_l2_norm": False, "mlp_ratio": 2.5}, stage1)
    assert (prior.config.cosine_attention, prior.config.mlp_ratio) == (False, 2.5)
    condition = Condition(reference.inputs["label"])
    codes = prior.grids_of(reference.inputs["codes"])
    logits = prior.logits(codes, condition)
    # Products of the exact walk round their factors.
    for stepper, tolerance in (
        (prior.stepper(len(codes[0]), condition), 5e-5),
        (ExactVAR(prior, len(codes[0]), condition), 2e-2),
    ):
        found = [stepper.next(codes[step - 1].flatten(1) if step else None) for step in range(4)]
        close(torch.cat(found, dim=1).float(), logits, tolerance)


@torch.no_grad()
def test_scores_that_are_no_cosines_are_a_quarter_of_the_usual_products():
    torch.manual_seed(0)
    attention = Attention(VARConfig(width=8, heads=2, cosine_attention=False))
    x, mask = torch.randn(2, 3, 8), torch.ones(3, 3, dtype=torch.bool).tril_()
    q, k, v = (x @ attention.qkv.weight.T).view(2, 3, 3, 2, 4).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT * 0.25 / 2).masked_fill(~mask, -torch.inf)
    expected = attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    close(attention.attend(*attention.project(x), mask), expected, 1e-6)


def test_weights_without_their_tokenizer_are_refused():
    reference = golden("var_transformer")
    with pytest.raises(UserError, match="predict 30 codes of 48, and see them through their tokenizer: import"):
        build_var(reference.weights)
    spec = CodeSpec((Grid("codes", 5, 6, 48),), 64, 64)
    with pytest.raises(UserError, match=r"predict 30 codes .*, and the first stage makes 5x6 codes of 48 .*--stage1"):
        build_var(reference.weights, None, FirstStage(spec, "f00d"))
    model = first_stage(tokenizer())
    fewer = CodeSpec(model.code_spec.grids[:-1], 64, 64)
    with pytest.raises(UserError, match="predict 30 codes of 48, and the first stage makes 1x1 codes of 48"):
        build_var(reference.weights, None, model._replace(code_spec=fewer))


def test_other_weights_and_other_networks_are_refused():
    reference, stage1 = golden("var_transformer"), first_stage(tokenizer())
    with pytest.raises(UserError, match=r"the weights have no pos_1LC, head\.weight: they are not those of VAR"):
        build_var({k: v for k, v in reference.weights.items() if k not in ("pos_1LC", "head.weight")}, None, stage1)
    with pytest.raises(UserError, match=r"missing: blocks\.1\.ffn\.fc2\.bias"):
        build_var({k: v for k, v in reference.weights.items() if k != "blocks.1.ffn.fc2.bias"}, None, stage1)
    with pytest.raises(UserError, match="the original's attn_l2_norm=False is not supported: expected True"):
        build_var(reference.weights, {"attn_l2_norm": False}, stage1)  # which has the factors of such scores
