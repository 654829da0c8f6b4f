"""The transformer's own properties; those that all priors share are in test_conformance.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.priors.transformer import Transformer
from stage2_prior.priors.transformer_layers import Attention, RMSNorm, TransformerConfig, place_angles, turn
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.stepping import walk
from tests.stage2_prior.tiny import condition_for, random_codes, tiny_prior, tiny_spec


def test_turned_queries_and_keys_know_how_far_apart_they_are_and_nothing_else():
    angles = place_angles([Grid("codes", 6, 7, 2)], head_width=16)[1:]  # n d/2, of the codes
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 42, 16)  # the same vector at every place
    scores = (turn(q, angles) @ turn(k, angles).mT)[0, 0].view(6, 7, 6, 7)
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1])
    assert (scores[0, 0] - scores[0, 0, 0, 0]).abs().flatten()[1:].min() > 1e-3  # no two offsets look alike
    torch.testing.assert_close(turn(q, angles).norm(dim=-1), q.norm(dim=-1))


def test_rows_and_columns_turn_different_pairs():
    angles = place_angles([Grid("codes", 3, 4, 2)], head_width=8).view(-1, 4)
    assert (angles[0] == 0).all()  # the class token is not turned
    codes = angles[1:].view(3, 4, 4)
    assert codes[2, :, :2].tolist() == [pytest.approx([2.0, 0.2])] * 4
    assert codes[:, 3, 2:].tolist() == [pytest.approx([3.0, 0.3])] * 3


def test_the_code_above_stands_one_row_up_for_every_query():
    """Values that say where a key is: what a query sees of the code above it does not depend on the place."""
    config = TransformerConfig(width=8, heads=1)
    attention, angles = Attention(config), place_angles([Grid("codes", 4, 5, 2)], config.head_width)
    q, k = torch.randn(8), torch.randn(8)
    places = torch.arange(20)
    query, key = (turn(x.expand(1, 1, 20, 8), a)[0, 0] for x, a in ((q, angles[1:]), (k, angles[:-1])))
    above = torch.stack([query[p] @ key[p - 5 + 1] for p in places[5:]])  # code p - 5 is held by token p - 5 + 1
    torch.testing.assert_close(above, above[:1].expand(15))
    assert attention(torch.zeros(1, 20, 8), angles).shape == (1, 20, 8)


def test_attention_equals_its_definition():
    config = TransformerConfig(width=16, heads=2)
    attention, angles, x = (
        Attention(config),
        place_angles([Grid("codes", 2, 3, 2)], config.head_width),
        torch.randn(4, 6, 16),
    )
    q, k, v = (attention.qkv(x)[..., 16 * i : 16 * (i + 1)].unflatten(-1, (2, 8)).transpose(1, 2) for i in range(3))
    scores = turn(q, angles[1:]) @ turn(k, angles[:-1]).mT / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
    expected = attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, angles), expected)


def test_rms_norm_equals_its_definition_and_stays_finite_at_zero():
    norm, x = RMSNorm(6), torch.randn(5, 6)
    torch.nn.init.normal_(norm.gain)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6) * norm.gain)
    zero = torch.zeros(1, 6, requires_grad=True)
    norm(zero).sum().backward()
    assert norm(zero).isfinite().all()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_gradients_of_the_norm_and_of_turns_are_those_of_single_operations(monkeypatch):
    norm, x, angles = RMSNorm(8), torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(5, 4)
    torch.nn.init.normal_(norm.gain)
    given = torch.randn(2, 3, 5, 8)

    def slopes() -> tuple[torch.Tensor, ...]:
        result = turn(norm(x), angles)
        return result.detach(), *torch.autograd.grad(result, [x, norm.gain], given)

    fast = slopes()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for ours, plain in zip(fast, slopes(), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("batch", [1, 8])
def test_stepper_agrees_at_the_size_of_the_benchmark(batch):
    """8 layers of width 256 and 256 codes of 1,024: the largest difference of any logit is below 1e-4 (1e-5 measured,
    logits of standard deviation 1)."""
    torch.manual_seed(0)
    prior = Transformer(TransformerConfig(), tiny_spec(16, 16, 1024), 10).eval()
    with torch.no_grad():
        prior.output.weight.mul_(3)
    codes, condition = random_codes(batch, prior), condition_for(batch, prior)
    with torch.no_grad():
        expected = prior.logits(codes, condition)
    stepper, sequence = prior.stepper(batch, condition), codes[0].flatten(1)
    stepped = [stepper.next(sequence[:, i - 1 : i] if i else None) for i in range(256)]
    assert 0.5 < expected.std() < 2
    torch.testing.assert_close(torch.cat(stepped, dim=1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("autocast", [False, True])
def test_heads_may_share_keys_and_values(shared, autocast):
    """The stepper agrees, and the model is one whose heads have equal keys and values of their own."""
    torch.manual_seed(0)
    config = TransformerConfig(layers=2, width=32, heads=4, key_value_heads=shared)
    prior = Transformer(config, tiny_spec(), 4).eval()
    whole = Transformer(replace(config, key_value_heads=None), tiny_spec(), 4).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        state = prior.state_dict()
        for name in [name for name in state if name.endswith("qkv.weight")]:
            q, *key_value = state[name].split([32, 8 * shared, 8 * shared])
            own = [part.view(shared, 8, 32).repeat_interleave(4 // shared, 0).flatten(0, 1) for part in key_value]
            state[name] = torch.cat([q, *own])
        whole.load_state_dict(state)
        codes, condition = random_codes(5, prior), condition_for(5, prior)
        torch.testing.assert_close(prior.logits(codes, condition), whole.logits(codes, condition), rtol=0, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = prior.logits(codes, condition).float()
            stepper, sequence = prior.stepper(5, condition), codes[0].flatten(1)
            stepped = [stepper.next(sequence[:, i - 1 : i] if i else None) for i in range(15)]
    tolerance = 0.1 * float(expected.std()) if autocast else 1e-5
    assert (torch.cat(stepped, dim=1) - expected).abs().max() < tolerance
    assert stepper.decoder.cache.shape[2] == shared


def test_an_image_costs_the_arithmetic_of_one_pass():
    prior = tiny_prior("transformer", spec=tiny_spec(8, 8))
    codes, condition = random_codes(2, prior), condition_for(2, prior)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        prior.logits(codes, condition)
    with FlopCounterMode(display=False) as stepped:
        walk(prior.stepper(2, condition), 64, lambda position, logits: codes[0].flatten(1)[:, position : position + 1])
    assert 0.5 * whole.get_total_flops() < stepped.get_total_flops() <= 1.01 * whole.get_total_flops()


def test_a_stepper_keeps_the_weights_it_was_made_with():
    prior = tiny_prior("transformer")
    condition = Condition(torch.tensor([1]))
    stepper, expected = prior.stepper(1, condition), prior.stepper(1, condition).next(None)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.zero_()
    assert torch.equal(stepper.next(None), expected)


def test_tied_weights_are_one_and_save_as_one(tmp_path):
    prior = Transformer(TransformerConfig(layers=1, width=16, heads=2, tied=True), tiny_spec(), 0)
    untied = Transformer(TransformerConfig(layers=1, width=16, heads=2), tiny_spec(), 0)
    count = [sum(parameter.numel() for parameter in model.parameters()) for model in (prior, untied)]
    assert count[1] - count[0] == 11 * 16
    prior.save_pretrained(tmp_path / "prior")
    loaded = Transformer.from_pretrained(tmp_path / "prior")
    assert loaded.output.weight is loaded.embedding.weight
    codes = random_codes(2, prior)
    assert torch.equal(loaded.nll(codes, Condition()), prior.eval().nll(codes, Condition()))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"key_value_heads": 3}, "key_value_heads=3 with heads=8, expected a number that divides them"),
        ({"width": 36, "heads": 4}, "width=36 with heads=4, expected a width that is a multiple of 16"),
        ({"layers": 0}, "layers=0, expected at least 1"),
        ({"residual_dropout": 1.0}, "residual_dropout=1.0, expected a share from 0 to below 1"),
    ],
)
def test_impossible_configs_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        TransformerConfig(**setting)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-4), (True, 0.1)])
def test_stepper_agrees_on_a_gpu(autocast, tolerance):
    prior = tiny_prior("transformer").cuda()
    codes = (random_codes(5, prior)[0].cuda(),)
    condition = condition_for(5, prior).to(torch.device("cuda"))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected = prior.logits(codes, condition).float()
        stepper, sequence = prior.stepper(5, condition), codes[0].flatten(1)
        stepped = [stepper.next(sequence[:, i - 1 : i] if i else None) for i in range(15)]
    assert (torch.cat(stepped, dim=1) - expected).abs().max() < tolerance * expected.std()


# ---- several grids --------------------------------------------------------------------------------------------------

# A level with few codes, one of another shape with more, and a second depth of that.
SEVERAL = CodeSpec((Grid("top", 1, 2, 5), Grid("bottom", 2, 4, 11), Grid("residual", 2, 4, 7)), 8, 16, 3)


def codes_of_several(batch: int, seed: int = 0) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(g.vocabulary, (batch, g.height, g.width), generator=generator) for g in SEVERAL.grids)


def test_codes_of_several_grids_depend_on_all_codes_before_them_and_on_no_other():
    prior = tiny_prior("transformer", spec=SEVERAL)
    codes, condition = codes_of_several(4), condition_for(4, prior)
    position = 0
    for number, grid in enumerate(SEVERAL.grids):
        for place in range(grid.size):
            other = [tensor.clone() for tensor in codes]
            flat = other[number].view(4, -1)
            flat[:, place] = (flat[:, place] + 1) % grid.vocabulary
            with torch.no_grad():
                change = (prior.logits(codes, condition) - prior.logits(tuple(other), condition)).abs().amax(dim=(0, 2))
            assert (change[: position + 1] == 0).all()
            assert (change[position + 1 :] > 0).all()
            position += 1


def test_a_stepper_of_several_grids_gives_each_grid_its_own_logits():
    prior = tiny_prior("transformer", spec=SEVERAL)
    codes, condition = codes_of_several(5), condition_for(5, prior)
    sequence = torch.cat([tensor.flatten(1) for tensor in codes], dim=1)
    with torch.no_grad():
        expected = prior.logits(codes, condition)  # b n k
    vocabularies = [grid.vocabulary for grid in SEVERAL.grids for _ in range(grid.size)]
    stepper = prior.stepper(5, condition)
    for position, vocabulary in enumerate(vocabularies):
        logits = stepper.next(sequence[:, position - 1 : position] if position else None)
        assert logits.shape == (5, 1, vocabulary)
        torch.testing.assert_close(logits[:, 0], expected[:, position, :vocabulary], rtol=0, atol=1e-5)
        assert (expected[:, position].softmax(-1)[:, vocabulary:] == 0).all()


def test_the_nll_of_several_grids_counts_each_code_among_those_of_its_grid():
    prior = tiny_prior("transformer", spec=SEVERAL)
    codes, condition = codes_of_several(3), condition_for(3, prior)
    with torch.no_grad():
        nll, logits = prior.nll(codes, condition), prior.logits(codes, condition)
    start = 0
    for tensor, grid in zip(codes, SEVERAL.grids, strict=True):
        part = logits[:, start : start + grid.size, : grid.vocabulary].double().log_softmax(-1)
        expected = -part.gather(-1, tensor.flatten(1)[..., None])[..., 0]
        torch.testing.assert_close(nll[:, start : start + grid.size].double(), expected, rtol=0, atol=1e-5)
        start += grid.size


def test_samples_of_several_grids_fit_them_at_any_temperature_and_do_not_depend_on_their_batch():
    prior = tiny_prior("transformer", spec=SEVERAL)
    labels = torch.arange(12) % prior.num_classes
    for sampling in (SamplingConfig(), SamplingConfig(temperature=1e6), SamplingConfig(top_k=3, guidance=2.0)):
        samples = sample_codes(prior, range(12), Condition(labels), 3, sampling)
        SEVERAL.check(samples)
        alone = [sample_codes(prior, [i], Condition(labels[i : i + 1]), 3, sampling) for i in range(12)]
        for number, grid in enumerate(samples):
            assert torch.equal(grid, torch.cat([one[number] for one in alone]))


def test_places_of_a_coarse_grid_stand_at_the_middle_of_what_they_cover():
    angles = place_angles([Grid("top", 1, 2, 2), Grid("bottom", 2, 4, 2)], head_width=4)[1:]
    assert angles[:2].tolist() == [[0.5, 0.5], [0.5, 2.5]]
    assert angles[2:].tolist() == [[row, column] for row in (0.0, 1.0) for column in (0.0, 1.0, 2.0, 3.0)]


def test_tied_weights_of_several_grids_learn_the_codes_of_eight_images():
    torch.manual_seed(0)
    prior = Transformer(TransformerConfig(layers=2, width=32, heads=2, tied=True), SEVERAL, 0)
    assert prior.output.weight is prior.embedding.weight
    codes = codes_of_several(8)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(200):
        loss = prior.nll(codes, Condition()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Eight images are told apart by their first two or three codes, of some log(8) nats; the others are known then.
    assert loss < 1.2 * math.log(8) / SEVERAL.codes_per_image + 0.05
