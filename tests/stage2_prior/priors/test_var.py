"""VAR's own properties; those that all priors share are in test_conformance.py, the original's numbers in imports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from codes.shards import CodeShardWriter
from codes.spec import CodeSpec, Grid
from common.errors import UserError
from common.model_io import load_pretrained
from stage1_vq.quantizers import (
    GroupedQuantizer,
    GroupedQuantizerConfig,
    MultiscaleQuantizer,
    MultiscaleQuantizerConfig,
)
from stage2_prior.condition import Condition
from stage2_prior.exact.var import ExactVAR
from stage2_prior.priors.scale_latents import ScaleLatents
from stage2_prior.priors.var import VAR, Attention, Block, VARConfig
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.stepping import walk
from stage2_prior.train import Stage2Config, train_stage2
from tests.stage2_prior.tiny import CLASSES, condition_for, labelled, random_codes, tiny_prior
from training.loop import TrainConfig

TINY = VARConfig(layers=2, width=32, heads=2)


def quantizer() -> MultiscaleQuantizer:
    """Of maps 6x9 in five scales, with three different phis."""
    torch.manual_seed(1)
    config = MultiscaleQuantizerConfig(scales=(1, 2, 3, 4, 6), codebook_size=13, dim=7, phis=3, phi_share=0.4)
    made = MultiscaleQuantizer(config).eval()
    for tensor in (made.layer.codebook, *made.phis.parameters()):
        torch.nn.init.normal_(tensor)
    return made


SPEC = CodeSpec(quantizer().grids(6, 9), 24, 36)


def filled(config: VARConfig = TINY, num_classes: int = CLASSES, **facts: Any) -> VAR:
    """Untrained, with the quantizer's latents and no weight that is zero by accident."""
    torch.manual_seed(0)
    prior = VAR(config, SPEC, num_classes, latent_width=7, **facts)
    latents = quantizer().scale_latents()
    assert latents is not None
    prior.latents.fill(latents)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return prior.eval()


# ---- what a scale sees ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_scale_sees_what_the_tokenizer_has_summed_before_it():
    prior = filled()
    codes = random_codes(3, prior)
    expected = quantizer().next_scale_inputs(codes)
    seen = prior.latents(codes)
    assert seen.shape == (3, SPEC.codes_per_image - SPEC.grids[0].size, 7)
    torch.testing.assert_close(
        seen, torch.cat([rearrange(x, "b d h w -> b (h w) d") for x in expected], 1), rtol=0, atol=1e-4
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prior.latents(codes), seen)  # float32 all the same


def test_the_tokenizers_latents_are_frozen_and_a_priors_own_learn():
    given, own = filled(), VAR(TINY, SPEC, 0)
    names = {"latents.codebook", "latents.phi_weight", "latents.phi_bias"}
    assert names <= dict(given.named_buffers()).keys()
    assert not names & dict(given.named_parameters()).keys()
    assert names <= dict(own.named_parameters()).keys()
    with pytest.raises(UserError, match=r"have shapes \{.*\(13, 7\).*\}, expected \{.*\(13, 32\).*\}: encode anew"):
        own.latents.fill(quantizer().scale_latents() or {})


def test_learned_latents_begin_as_plain_sums():
    latents = ScaleLatents(CodeSpec((Grid("a", 1, 1, 5), Grid("b", 2, 2, 5)), 8, 8), None)
    seen = latents((torch.tensor([[[3]]]), torch.zeros(1, 2, 2, dtype=torch.int64)))
    torch.testing.assert_close(seen, latents.codebook[3].expand(1, 4, -1))


# ---- codes in groups ------------------------------------------------------------------------------------------------


def product() -> GroupedQuantizer:
    """Two groups of scales, no two of whose weights are alike."""
    torch.manual_seed(1)
    layer = MultiscaleQuantizerConfig(scales=(1, 2, 4, 6), codebook_size=13, dim=3, phis=2, phi_share=0.4)
    made = GroupedQuantizer(GroupedQuantizerConfig(layer=layer)).eval()
    for group in made.groups():
        for tensor in (*group.parameters(), group.layer.codebook):
            torch.nn.init.normal_(tensor)
    return made


def of_product() -> VAR:
    torch.manual_seed(0)
    spec = CodeSpec(product().grids(6, 9), 24, 36)
    prior = VAR(TINY, spec, CLASSES, latent_width=6, latent_gains=True)
    prior.latents.fill(product().scale_latents() or {})
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return prior.eval()


@torch.no_grad()
def test_of_codes_in_groups_a_grid_sees_the_sums_of_all_groups_before_it():
    prior, quantizer = of_product(), product()
    codes = random_codes(3, prior)
    seen = prior.latents(codes)
    start = 0
    for number, grid in enumerate(prior.code_spec.grids[1:], 1):
        sums = []
        for of_group, group in enumerate(quantizer.groups()):
            before = codes[of_group:number:2]
            total = group.latents_of_prefix(before, 6, 9) if before else torch.zeros(3, 3, 6, 9)
            sums.append(F.interpolate(total, size=(grid.height, grid.width), mode="area"))
        expected = rearrange(torch.cat(sums, 1), "b d h w -> b (h w) d")
        torch.testing.assert_close(seen[:, start : start + grid.size], expected, rtol=0, atol=1e-4)
        start += grid.size


@torch.no_grad()
def test_of_codes_in_groups_steps_and_the_exact_walk_give_the_teacher_forced_logits():
    prior = of_product()
    codes, condition = random_codes(2, prior), condition_for(2, prior)
    expected = prior.logits(codes, condition)
    for stepper, atol in ((prior.stepper(2, condition), 1e-5), (ExactVAR(prior, 2, condition), 2e-2)):
        steps = [stepper.next(codes[n - 1].flatten(1) if n else None) for n in range(prior.steps)]
        torch.testing.assert_close(torch.cat(steps, dim=1).float(), expected, rtol=0, atol=atol)


@torch.no_grad()
def test_of_codes_in_groups_each_mends_its_own_mistakes_as_it_would_alone():
    prior, quantizer = of_product(), product()
    codes, by = random_codes(8, prior, 3), random_codes(8, prior, 4)
    flips = [torch.rand(grid.shape, generator=torch.Generator().manual_seed(5)) < 0.2 for grid in codes]
    told, given = prior.latents.corrected(codes, flips, by)
    for number, group in enumerate(quantizer.groups()):
        own = ScaleLatents(CodeSpec(prior.code_spec.grids[number::2], 24, 36), 3)
        own.fill(group.scale_latents() or {})
        told_alone, given_alone = own.corrected(codes[number::2], flips[number::2], by[number::2])
        assert all(map(torch.equal, told[number::2], told_alone))
        assert all(map(torch.equal, given[number::2], given_alone))
    assert not torch.equal(told[-1], codes[-1])


def test_a_prior_learns_codes_in_groups_by_heart_and_draws_them_again():
    """One image of each class, in the tokenizer's own codes: the grids of both groups, one after the other."""
    prior, quantizer = of_product(), product()
    codes = quantizer.codes(torch.randn(CLASSES, 6, 6, 9, generator=torch.Generator().manual_seed(3)))
    condition = Condition(torch.arange(CLASSES))
    optimizer = torch.optim.AdamW(prior.train().parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(50):
        loss = prior(codes, condition).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1  # nats a code; ln 13 is 2.6
    drawn = sample_codes(prior.eval(), range(CLASSES), condition, 0, SamplingConfig(temperature=0.5))
    agree = torch.cat([(a == b).flatten() for a, b in zip(drawn, codes, strict=True)]).float().mean()
    assert agree > 0.95


def test_a_prior_of_codes_in_groups_comes_back_from_its_folder(tmp_path: Path):
    prior = of_product()
    loaded = load_pretrained(prior.save_pretrained(tmp_path / "model"), {"var": VAR})
    assert torch.equal(loaded.latents.gains, prior.latents.gains)
    assert "latent_gains" not in filled().arguments()  # models of other codes stay as they were


# ---- the transformer ------------------------------------------------------------------------------------------------


def test_codes_see_their_own_scale_and_coarser_ones_by_gradients():
    """Two scales, 2x2 and 3x3: the logits of the first depend on its four places, those of the second on all."""
    prior = VAR(TINY, CodeSpec((Grid("a", 2, 2, 11), Grid("b", 3, 3, 11)), 12, 12), 0)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    codes = random_codes(2, prior)
    for position in (0, 3, 4, 12):
        logits = prior.logits(codes, Condition())[0, position].square().sum()
        (gradient,) = torch.autograd.grad(logits, prior.places)
        seen = gradient[0].abs().sum(-1) > 0
        assert seen.tolist() == [True] * 4 + [position >= 4] * 9


@pytest.mark.parametrize("shared_adaln", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_one_step_a_scale_gives_the_teacher_forced_logits(shared_adaln, precision):
    prior = filled(replace(TINY, shared_adaln=shared_adaln)).to(precision)
    codes, condition = random_codes(3, prior), condition_for(3, prior)
    stepper = prior.stepper(3, condition)
    steps = [stepper.next(codes[number - 1].flatten(1) if number else None) for number in range(prior.steps)]
    assert [logits.shape[1] for logits in steps] == [grid.size for grid in SPEC.grids]
    with torch.no_grad():
        expected = prior.logits(codes, condition).float()
    atol = 1e-5 if precision == torch.float32 else 0.1 * float(expected.std())
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=atol)


def test_an_image_costs_less_than_one_pass():
    """No scale is computed twice, the modulation once, and a scale attends to what there is, without a mask."""
    prior = filled()
    codes, condition = random_codes(2, prior), condition_for(2, prior)
    sequence = prior.sequence(codes, condition)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        prior.logits(codes, condition)
    with FlopCounterMode(display=False) as stepped:
        walk(prior.stepper(2, condition), sequence.shape[1], lambda at, logits: sequence[:, at : at + logits.shape[1]])
    assert 0.5 * whole.get_total_flops() < stepped.get_total_flops() <= whole.get_total_flops()


def test_a_sample_does_not_depend_on_its_batch():
    prior = filled()
    sampling = SamplingConfig(top_k=9, top_p=0.95, guidance=2.5, guidance_schedule="linear")

    def sampled(batch_size: int) -> Tensor:
        batches = torch.arange(64).split(batch_size)
        parts = [sample_codes(prior, b.tolist(), Condition(b % CLASSES), 5, sampling)[-1] for b in batches]
        return torch.cat(parts)

    alone = sampled(1)
    assert torch.equal(sampled(7), alone)
    assert torch.equal(sampled(64), alone)
    assert len(alone.flatten(1).unique(dim=0)) > 50


def test_known_codes_are_kept_and_the_rest_is_drawn_around_them():
    prior = filled()
    known = tuple(torch.where(grid % 2 == 0, grid, -1) for grid in random_codes(4, prior))
    codes = sample_codes(prior, range(4), labelled(4, prior), 0, SamplingConfig(), known)
    free = sample_codes(prior, range(4), labelled(4, prior), 0, SamplingConfig())
    for grid, kept in zip(codes, known, strict=True):
        assert torch.equal(grid[kept >= 0], kept[kept >= 0])
        assert (grid >= 0).all()
    drawn = known[-1] < 0
    assert not torch.equal(codes[-1][drawn], free[-1][drawn])  # for they see coarser scales that were kept


def test_the_factor_of_the_attention_ends_at_100():
    attention = Attention(TINY)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        lengths = []
        for factor in (50.0, 100.0, 1000.0):
            attention.log_factor.fill_(torch.tensor(factor).log())
            q, k, _ = attention.project(x)
            lengths.append(q.norm(dim=-1).mean())
            torch.testing.assert_close(k.norm(dim=-1), torch.ones(2, 2, 5))
    torch.testing.assert_close(torch.stack(lengths), torch.tensor([50.0, 100.0, 100.0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_a_fresh_block_is_nearly_the_identity_as_far_as_initial_gain_says(shared_adaln):
    added = []
    for gain in (1e-3, 1e-5):
        torch.manual_seed(0)
        prior = VAR(
            VARConfig(layers=2, width=32, heads=2, initial_gain=gain, shared_adaln=shared_adaln), SPEC, 3
        ).double()
        block, x = prior.blocks[0], torch.randn(3, 9, 32, dtype=torch.float64)
        # What all blocks share starts as any layer does: its part is left out here.
        condition = x.new_zeros(3, 1, 6, 32) if shared_adaln else prior.classes(torch.arange(3))
        mask = torch.ones(9, 9, dtype=torch.bool)
        added.append((block(x, condition, mask) - x).abs().mean())
    assert 0 < added[1] < 1e-5
    torch.testing.assert_close(added[0], 100 * added[1], rtol=0.02, atol=0)


def test_a_path_is_dropped_for_whole_samples_and_more_often_the_deeper():
    prior = VAR(VARConfig(layers=5, width=32, heads=2, drop_path=0.4), SPEC, CLASSES)
    rates = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(torch.tensor(prior.drop_paths), rates)
    kept = prior.train().kept_paths(torch.ones(2000, 3, 4))
    assert kept.shape == (5, 2, 2000, 1, 1)
    for block, rate in zip(kept, rates, strict=True):
        torch.testing.assert_close(block.unique(), torch.tensor([0.0, 1 / (1 - rate)] if rate else [1.0]))
    torch.testing.assert_close((kept == 0).float().mean(dim=(1, 2, 3, 4)), rates, atol=0.03, rtol=0)
    assert prior.eval().kept_paths(torch.ones(5, 3, 4)).unique().tolist() == [1.0]


def test_a_dropped_path_leaves_the_sample_as_it_was():
    torch.manual_seed(0)
    block, x = Block(TINY), torch.randn(3, 6, 32)
    kept = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0]]).view(2, 3, 1, 1)
    same = (block(x, torch.randn(3, 32), torch.ones(6, 6, dtype=torch.bool), kept) == x).all(dim=(1, 2))
    assert same.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layers": 0}, "layers=0, expected at least 1"),
        ({"width": 30, "heads": 4}, "width=30, expected a multiple of heads=4"),
        ({"dropout": 1.0}, "dropout=1.0, expected a share from 0 to below 1"),
        ({"drop_path": -0.1}, "drop_path=-0.1, expected a share from 0 to below 1"),
        ({"initial_gain": 0.0}, "initial_gain=0.0, expected above 0"),
    ],
)
def test_impossible_configs_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        VARConfig(**setting)


@pytest.mark.parametrize("grids", [(Grid("a", 4, 4, 9),), (Grid("a", 1, 1, 9), Grid("b", 2, 2, 8))])
def test_codes_that_are_no_scales_are_refused(grids):
    with pytest.raises(UserError, match=r"expected two or more grids of one vocabulary: .* quantizer\.kind=multiscale"):
        VAR(TINY, CodeSpec(grids, 16, 16), 0)


# ---- from codes to a trained model ----------------------------------------------------------------------------------


def shards(folder: Path, latents: dict[str, Tensor] | None) -> Path:
    writer = CodeShardWriter(folder, SPEC, ["train", "validation"], stage1_fingerprint="f00d", latents=latents)
    for number, count in enumerate((24, 8)):
        codes = random_codes(count, tiny_prior("transformer", 0, SPEC), number)
        writer.write(number, codes, -torch.ones(count, dtype=torch.int64), [f"{i}.png" for i in range(count)])
    writer.finish()
    return folder


def trained(folder: Path, latents: dict[str, Tensor] | None) -> VAR:
    settings = TrainConfig(steps=3, batch_size=8, ema_decay=0.5, preview_every=0, tracker="none", workers=0)
    train_stage2(Stage2Config(model=TINY, train=settings), shards(folder / "codes", latents), folder / "run")
    return load_pretrained(folder / "run", {"var": VAR})


def test_training_keeps_the_latents_beside_the_codes_and_learns_where_there_are_none(tmp_path: Path):
    latents = quantizer().scale_latents()
    assert latents is not None
    given, own = trained(tmp_path / "given", latents), trained(tmp_path / "own", None)
    for name, tensor in latents.items():
        assert torch.equal(given.latents.state_dict()[name], tensor)
    torch.manual_seed(0)  # of the training
    assert not torch.equal(own.latents.codebook, VAR(TINY, SPEC, 0).latents.codebook)
    codes = random_codes(2, given)
    seen = torch.cat([rearrange(x, "b d h w -> b (h w) d") for x in quantizer().next_scale_inputs(codes)], 1)
    torch.testing.assert_close(given.latents(codes), seen, rtol=0, atol=1e-4)
