"""The properties of IBQ's transformer that not all priors share; the others are in test_conformance.py."""

from __future__ import annotations

import cmath

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.priors.ibq_gpt import IBQGPT, IBQGPTConfig
from tests.stage2_prior.tiny import random_codes, tiny_prior


def plain_logits(prior: IBQGPT, named: dict[str, Tensor], codes: Tensor, label: int) -> Tensor:
    """Of one sample, codes h w: one place, one head and one pair of numbers at a time."""
    width, heads = prior.config.width, prior.config.heads
    size, columns = width // heads, codes.shape[1]
    vector = named["classes.weight"][label]
    x = torch.stack([vector, *named["embedding.weight"][codes.flatten()[:-1]]])

    def parts(name: str, number: int) -> tuple[Tensor, ...]:
        of_class = named[f"{name}.linear.weight"] @ F.silu(vector) + named[f"{name}.linear.bias"]
        return of_class.chunk(number)

    def normed(x: Tensor, name: str, scale: Tensor, shift: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * named[f"{name}.weight"] * (1 + scale) + shift

    def turned(x: Tensor, place: int) -> Tensor:
        """One head of a query or key, in pairs: half of them by the row of the place's code, half by its column."""
        if place == 0:
            return torch.zeros_like(x)
        row, column = divmod(place - 1, columns)
        pairs = []
        for number in range(size // 2):
            axis, rank = (row, number) if number < size // 4 else (column, number - size // 4)
            factor = cmath.exp(1j * axis * 10000.0 ** (-rank / (size // 4)))
            a, b = x[2 * number], x[2 * number + 1]
            pairs += [a * factor.real - b * factor.imag, a * factor.imag + b * factor.real]
        return torch.stack(pairs)

    for layer in range(prior.config.layers):
        block = f"blocks.{layer}"
        gain1, gain2, scale1, scale2, shift1, shift2 = parts(f"{block}.modulation", 6)
        y = normed(x, f"{block}.attention_norm", scale1, shift1)
        q, k, v = (y @ named[f"{block}.attention.qkv.weight"].T).chunk(3, dim=1)
        answers = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            queries, keys = (torch.stack([turned(row[own], i) for i, row in enumerate(rows)]) for rows in (q, k))
            rows = []
            for place in range(len(x)):
                scores = (queries[place] @ keys[: place + 1].T) / size**0.5
                rows.append(scores.softmax(0) @ v[: place + 1, own])
            answers.append(torch.stack(rows))
        x = x + gain1 * (torch.cat(answers, dim=1) @ named[f"{block}.attention.out.weight"].T)
        y = normed(x, f"{block}.feed_forward_norm", scale2, shift2)
        gate, up = (y @ named[f"{block}.feed_forward.gate_up.weight"].T).chunk(2, dim=1)
        x = x + gain2 * ((F.silu(gate) * up) @ named[f"{block}.feed_forward.down.weight"].T)
    return normed(x, "norm", *parts("output_modulation", 2)) @ named["output.weight"].T


def test_logits_and_gradients_are_those_of_plain_arithmetic():
    prior = tiny_prior("ibq_gpt")
    (codes,), labels = random_codes(2, prior), torch.tensor([1, 4])  # the last is the null label
    prior((codes,), Condition(labels)).loss.mean().backward()
    named = {name: weight.detach().clone().requires_grad_() for name, weight in prior.named_parameters()}
    expected = torch.stack([plain_logits(prior, named, codes[i], int(labels[i])) for i in range(2)])
    with torch.no_grad():
        torch.testing.assert_close(prior.logits((codes,), Condition(labels)), expected, rtol=1e-4, atol=1e-5)
    F.cross_entropy(expected.flatten(0, 1), codes.flatten()).backward()
    for name, weight in prior.named_parameters():
        torch.testing.assert_close(weight.grad, named[name].grad, rtol=1e-3, atol=1e-5, msg=name)
        assert named[name].grad.abs().max() > 0


def test_a_fresh_block_adds_nothing_and_its_gains_learn_first():
    prior = IBQGPT(IBQGPTConfig(layers=2, width=16, heads=2), CodeSpec((Grid("codes", 2, 3, 7),), 8, 12, 3), 4)
    x, vectors = torch.randn(2, 6, 16), torch.randn(2, 16)
    assert torch.equal(prior.blocks[0](x, vectors, prior.turns()), x)
    prior(random_codes(2, prior), Condition(torch.tensor([0, 1]))).loss.mean().backward()
    gains, others = prior.blocks[0].modulation.linear.weight.grad.split([32, 64])
    assert (gains != 0).any()
    assert (others == 0).all()


@torch.no_grad()
def test_the_class_speaks_at_every_place_by_the_norms_alone():
    """Where attention carries nothing, and so nothing of the class's token, the modulation still does."""
    prior = tiny_prior("ibq_gpt")
    for block in prior.blocks:
        block.attention.qkv.weight[-prior.config.width :] = 0  # of the values
    (codes,) = random_codes(1, prior)
    logits, others = (prior.logits((codes,), Condition(torch.tensor([label]))) for label in (0, 1))
    assert ((logits - others).abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layers": 0}, "layers=0, expected at least 1"),
        ({"width": 20, "heads": 2}, "width=20 with heads=2, expected a width that is a multiple of 8"),
        ({"residual_dropout": 1.0}, "residual_dropout=1.0, expected a share from 0 to below 1"),
    ],
)
def test_impossible_configs_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        IBQGPTConfig(**setting)
