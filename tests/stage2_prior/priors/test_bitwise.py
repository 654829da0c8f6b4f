"""Codes told bit by bit: the sum over bits is the softmax over all codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from common.model_io import load_pretrained
from stage2_prior.condition import Condition, TextSpec
from stage2_prior.exact import exact_stepper
from stage2_prior.priors import PRIORS, Transformer, TransformerConfig
from stage2_prior.priors.bitwise import BitEmbedding, BitOutput, bits_of, nll_of_bits
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.stepping import Stepper, walk
from tests.golden import golden_frontier
from tests.stage2_prior.tiny import condition_for, labelled, random_codes, tiny_prior, tiny_spec

CONFIG = TransformerConfig(layers=2, width=32, heads=4, bitwise=True)
SPEC = tiny_spec(vocabulary=64)


def bitwise(num_classes: int = 4, **facts: object) -> Transformer:
    prior = tiny_prior("transformer", num_classes, SPEC, config=CONFIG, **facts)
    assert isinstance(prior, Transformer)
    return prior


def test_bits_are_those_of_the_number():
    codes = torch.tensor([0, 1, 6, 63])
    assert bits_of(codes, 6).tolist() == [[0] * 6, [1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [1] * 6]


def test_the_loss_of_bits_is_the_originals():
    reference = golden_frontier("infinity_transformer")
    logits, bits = reference.outputs["logits"], reference.inputs["bits"]
    logits = logits.clone().requires_grad_()
    codes = (bits << torch.arange(bits.shape[-1])).sum(dim=-1)
    assert torch.equal(bits_of(codes, bits.shape[-1]), bits)
    nll = nll_of_bits(logits, codes)
    torch.testing.assert_close(nll, reference.outputs["bit_loss"].sum(dim=-1), rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(nll.mean() / bits.shape[-1], reference.outputs["loss"], rtol=1e-5, atol=5e-5)
    nll.mean().backward()
    theirs = reference.outputs["logits"].clone().requires_grad_()
    F.cross_entropy(theirs.unflatten(-1, (-1, 2)).flatten(0, 2), bits.flatten(), reduction="none").view(bits.shape).sum(
        dim=-1
    ).mean().backward()
    torch.testing.assert_close(logits.grad, theirs.grad, rtol=0, atol=1e-7)


def test_tables_are_what_codes_get_one_by_one():
    torch.manual_seed(0)
    embedding, output = BitEmbedding(6, 8), BitOutput(8, 6)
    for parameter in [*embedding.parameters(), *output.parameters()]:
        torch.nn.init.normal_(parameter)
    codes, x = torch.arange(64), torch.randn(3, 8)
    torch.testing.assert_close(embedding(codes), embedding.weight, rtol=0, atol=1e-5)
    shares = output(x).log_softmax(dim=-1)  # 3 k
    expected = torch.stack([-nll_of_bits(output.pairs(x), codes.new_full((3,), code)) for code in range(64)], dim=1)
    torch.testing.assert_close(shares, expected, rtol=0, atol=1e-5)


def test_likelihood_gradients_and_steps_agree_with_the_softmax_over_all_codes():
    prior = bitwise()
    codes, condition = random_codes(5, prior), condition_for(5, prior)
    sequence = prior.sequence(codes, condition)
    nll = prior.nll(codes, condition)
    nll.mean().backward()
    gradients = {name: weight.grad.clone() for name, weight in prior.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    prior.zero_grad()
    logits = prior.logits(codes, condition)
    expected = F.cross_entropy(logits.transpose(1, 2), sequence, reduction="none")
    torch.testing.assert_close(nll, expected, rtol=0, atol=1e-5)
    expected.mean().backward()
    for name, weight in prior.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-4, atol=1e-5)

    def led_along(stepper: Stepper) -> torch.Tensor:
        seen = []

        def choose(position: int, logits: torch.Tensor) -> torch.Tensor:
            seen.append(logits)
            return sequence[:, position : position + 1]

        walk(stepper, sequence.shape[1], choose)
        return torch.cat(seen, dim=1)

    torch.testing.assert_close(led_along(prior.stepper(5, condition)), logits.detach(), rtol=0, atol=5e-5)
    exact = led_along(exact_stepper(prior, 5, condition))
    torch.testing.assert_close(exact, logits.detach().double(), rtol=0, atol=0.1 * float(logits.detach().std()))


def test_it_learns_by_bits_alone_samples_and_is_saved(tmp_path, monkeypatch):
    """One grid for each label: of two, each bit would be one's or the other's, whatever the bits beside it."""
    torch.manual_seed(0)
    prior = PRIORS["transformer"](CONFIG, SPEC, 4)
    codes, condition = random_codes(4, prior), labelled(4, prior)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    with monkeypatch.context() as patch:
        patch.setattr(BitOutput, "forward", lambda *_: pytest.fail("logits of all codes in training"))
        for _ in range(80):
            optimizer.zero_grad()
            prior(codes, condition).loss.mean().backward()
            optimizer.step()
        assert prior.eval().nll(codes, condition).sum(dim=1).mean() < 0.2
    loaded = load_pretrained(prior.save_pretrained(tmp_path / "prior"), PRIORS)
    drawn = sample_codes(loaded, range(4), condition, 0, SamplingConfig(temperature=0))[0]
    assert torch.equal(drawn, codes[0])
    warm = [sample_codes(each, range(4), condition, 0, SamplingConfig(temperature=3.0))[0] for each in (loaded, prior)]
    assert torch.equal(*warm)


def test_eighteen_bits_take_few_weights():
    spec = CodeSpec((Grid("codes", 4, 4, 2**18),), 16, 16)
    prior = PRIORS["transformer"](CONFIG, spec, 0)
    assert sum(weight.numel() for weight in prior.parameters()) < 30_000
    codes = (torch.randint(2**18, (2, 4, 4)),)
    prior(codes, Condition()).loss.mean().backward()
    assert torch.isfinite(prior.nll(codes, Condition())).all()


def test_captions_can_be_learned_beside_bits():
    prior = tiny_prior("transformer", 0, SPEC, config=replace(CONFIG, text_loss_weight=0.25), text=TextSpec(4, 9))
    codes, text = random_codes(3, prior), torch.randint(9, (3, 4))
    with torch.no_grad():
        loss, nll = prior(codes, Condition(text=text))
        torch.testing.assert_close(nll, prior.nll(codes, Condition(text=text)).mean(dim=1))
    assert not torch.equal(loss, nll)


def test_what_has_no_bits_is_refused():
    with pytest.raises(UserError, match="bitwise for codes of 11, expected a power of two, as quantizers of bits have"):
        tiny_prior("transformer", config=CONFIG)
    with pytest.raises(UserError, match="tied and bitwise, expected one of them"):
        replace(CONFIG, tied=True)
    several = CodeSpec((Grid("a", 2, 2, 8), Grid("b", 4, 4, 8)), 8, 8)
    with pytest.raises(UserError, match="got codes of 2 grids"):
        tiny_prior("transformer", spec=several, config=CONFIG)
