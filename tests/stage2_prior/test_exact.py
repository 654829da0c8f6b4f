"""The exact walk of every prior gives the prior's own logits, and the same bits in any batch and on any device."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common import exact
from stage2_prior.condition import Condition, EmbeddingSpec, TextSpec
from stage2_prior.exact import WALKS, cache_bytes, exact_stepper
from stage2_prior.exact.hierarchical import LEVEL_WALKS
from stage2_prior.exact.var import area, cubic
from stage2_prior.priors import AutoregressivePrior, PixelSNAIL, PixelSNAILConfig
from stage2_prior.priors.hierarchical import LEVEL_PRIORS
from stage2_prior.stepping import walk
from tests.stage2_prior.tiny import CLASSES, TINY, condition_for, random_codes, tiny_prior, tiny_spec

EVERY_WALK = pytest.mark.parametrize("kind", list(WALKS))


def exact_logits(prior: AutoregressivePrior, sequence: Tensor, condition: Condition) -> list[Tensor]:
    """Of each step, b m k; sequence: b n."""
    logits: list[Tensor] = []

    def choose(position: int, given: Tensor) -> Tensor:
        logits.append(given)
        return sequence[:, position : position + given.shape[1]]

    walk(exact_stepper(prior, len(sequence), condition), sequence.shape[1], choose)
    return logits


def check_agrees(prior: AutoregressivePrior, codes: tuple[Tensor, ...], condition: Condition) -> None:
    """Within what float32 rounds, where the factors of attention have 20 bits and not 8; and then nearly."""
    coarse = torch.cat([step.flatten() for step in exact_logits(prior, prior.sequence(codes, condition), condition)])
    with patch.object(exact, "COARSE", exact.FINE):
        fine = check_finely(prior, codes, condition)
    assert float((coarse - fine).std()) < 0.02 * float(fine.std())


def check_finely(prior: AutoregressivePrior, codes: tuple[Tensor, ...], condition: Condition) -> Tensor:
    sequence = prior.sequence(codes, condition)
    with torch.no_grad():
        expected = prior.logits(codes, condition)
    done, steps = 0, exact_logits(prior, sequence, condition)
    for step in steps:
        assert step.dtype == torch.float64
        theirs = expected[:, done : done + step.shape[1], : step.shape[2]].double()
        torch.testing.assert_close(step, theirs, rtol=0, atol=6e-5 * float(theirs.abs().max()))
        done += step.shape[1]
    assert done == sequence.shape[1]
    return torch.cat([step.flatten() for step in steps])


@EVERY_WALK
@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_its_logits_are_those_of_the_prior(kind, num_classes):
    prior = tiny_prior(kind, num_classes)
    check_agrees(prior, random_codes(6, prior), condition_for(6, prior))


def check_alone(prior: AutoregressivePrior, codes: tuple[Tensor, ...], condition: Condition) -> None:
    """A sample has the same bits alone as among these seven."""
    together = exact_logits(prior, prior.sequence(codes, condition), condition)
    for rows in (slice(3, 4), slice(2, 7)):
        own = condition.map(lambda tensor, rows=rows: tensor[rows])
        alone = exact_logits(prior, prior.sequence(tuple(grid[rows] for grid in codes), own), own)
        assert all(map(torch.equal, alone, (step[rows] for step in together)))


@EVERY_WALK
def test_a_sample_has_the_same_bits_alone_and_in_any_batch(kind):
    prior = tiny_prior(kind)
    check_alone(prior, random_codes(7, prior), condition_for(7, prior))


@EVERY_WALK
def test_weights_of_one_value_in_another_type_give_the_same_bits(kind):
    prior = tiny_prior(kind)
    codes, condition = random_codes(2, prior), condition_for(2, prior)
    sequence = prior.sequence(codes, condition)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(parameter.bfloat16())
    as_float32 = exact_logits(prior, sequence, condition)
    assert all(map(torch.equal, exact_logits(prior.bfloat16(), sequence, condition), as_float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, exact_logits(prior, sequence, condition), as_float32))


def test_a_transformer_goes_by_captions_and_given_codes():
    prior = tiny_prior("transformer", given=(Grid("map", 2, 3, 5),), text=TextSpec(4, 9))
    codes = random_codes(3, prior)
    text = torch.tensor([[3, 8, 0, -1], [-1, -1, -1, -1], [1, 2, 3, 4]])
    condition = replace(condition_for(3, prior), codes=(torch.randint(5, (3, 2, 3)),), text=text)
    check_agrees(prior, codes, condition)


def given_other_codes(prior: AutoregressivePrior, batch: int) -> Condition:
    generator = torch.Generator().manual_seed(1)
    codes = tuple(
        torch.randint(grid.vocabulary, (batch, grid.height, grid.width), generator=generator) for grid in prior.given
    )
    return replace(condition_for(batch, prior), codes=codes)


@pytest.mark.parametrize("kind", ["pixelcnn", "pixelsnail", "hierarchical"])
@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_a_prior_of_convolutions_goes_by_given_codes(kind, num_classes):
    given = (Grid("coarse", 2, 1, 5), Grid("fine", 4, 6, 7))
    spec = CodeSpec((Grid("codes", 8, 6, 11),), 32, 24, 3)
    if kind == "hierarchical":
        spec = CodeSpec((Grid("top", 4, 6, 7), Grid("bottom", 8, 6, 11)), 32, 24, 3)
    prior = tiny_prior(kind, num_classes, spec, given=given)
    codes, condition = random_codes(3, prior), given_other_codes(prior, 3)
    check_agrees(prior, codes, condition)
    together = exact_logits(prior, prior.sequence(codes, condition), condition)
    own = condition.map(lambda tensor: tensor[1:2])
    alone = exact_logits(prior, prior.sequence(tuple(grid[1:2] for grid in codes), own), own)
    assert all(map(torch.equal, alone, (step[1:2] for step in together)))


def test_a_pixelsnail_without_attention():
    torch.manual_seed(0)
    config = PixelSNAILConfig(
        blocks=2, residual_blocks=3, width=16, residual_width=12, kernel_size=3, attention=False, given_kernel_size=5
    )
    given = (Grid("map", 3, 3, 5),)
    prior = PixelSNAIL(config, tiny_spec(3, 6), CLASSES, given=given).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    check_agrees(prior, random_codes(3, prior), given_other_codes(prior, 3))


def test_every_level_of_a_hierarchy_has_an_exact_walk():
    assert set(LEVEL_WALKS) == set(LEVEL_PRIORS)
    assert all(WALKS[kind] is walk for kind, walk in LEVEL_WALKS.items())


@pytest.mark.parametrize("num_classes", [0, CLASSES])
@pytest.mark.parametrize("unmasked", [0, 1, 6])
def test_mingpt_goes_by_given_codes_that_may_see_each_other(unmasked, num_classes):
    given = (Grid("map", 2, 3, 13), Grid("edges", 1, 2, 5))
    prior = tiny_prior("mingpt", num_classes, config=replace(TINY["mingpt"], unmasked=unmasked), given=given)
    known = tuple(torch.randint(grid.vocabulary, (7, grid.height, grid.width)) for grid in given)
    condition = replace(condition_for(7, prior), codes=known)
    check_agrees(prior, random_codes(7, prior), condition)
    check_alone(prior, random_codes(7, prior), condition)


def test_llamagen_goes_by_captions_padded_at_the_left():
    prior = tiny_prior("llamagen", 0, embeddings=EmbeddingSpec(5, 6))
    vectors = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(2))
    vectors[4] = 0  # as left out for guidance: the vectors of no text at the places of this one
    # The first counts in full, each next has a vector less, the sixth none.
    padding = torch.tensor([0, 1, 2, 3, 4, 5, 2])
    counts = torch.arange(5) >= padding[:, None]
    counts[6, 4] = False  # the place before the first code sees itself all the same
    condition = Condition(embeddings=vectors, embedding_mask=counts)
    check_agrees(prior, random_codes(7, prior), condition)
    check_alone(prior, random_codes(7, prior), condition)


@pytest.mark.parametrize("latent_width", [None, 7])
@pytest.mark.parametrize("shared_adaln", [False, True])
def test_var_takes_the_latents_of_a_tokenizer_and_one_modulation_for_all_blocks(shared_adaln, latent_width):
    config = replace(TINY["var"], shared_adaln=shared_adaln)
    spec = CodeSpec(tuple(Grid(f"scale{i}", *sides, 11) for i, sides in enumerate([(1, 2), (2, 3), (3, 5)])), 12, 20)
    prior = tiny_prior("var", config=config, spec=spec, latent_width=latent_width)
    generator = torch.Generator().manual_seed(4)
    if latent_width:
        state = prior.latents.state_dict()
        prior.latents.fill({name: torch.randn(part.shape, generator=generator) for name, part in state.items()})
    with torch.no_grad():
        for block in prior.blocks:
            block.attention.log_factor[0] = 6.0  # beyond the largest
    check_agrees(prior, random_codes(7, prior), condition_for(7, prior))
    check_alone(prior, random_codes(7, prior), condition_for(7, prior))


@pytest.mark.parametrize("sizes", [(1, 5), (2, 5), (3, 7), (4, 4), (5, 6), (6, 13), (13, 16)])
def test_grids_grow_and_are_averaged_as_torch_does_it(sizes):
    small, large = sizes
    for along, mode, old, new in ((cubic, "bicubic", small, large), (area, "area", large, small)):
        matrix = torch.tensor([[float(weight) for weight in row] for row in along(old, new)], dtype=torch.float64)
        numbers = torch.eye(old, dtype=torch.float64)[None, :, :, None].expand(-1, -1, -1, old)
        theirs = F.interpolate(numbers, (new, old), mode=mode)[0, :, :, 0].T
        torch.testing.assert_close(matrix, theirs, rtol=0, atol=1e-12)


@EVERY_WALK
def test_what_a_walk_keeps_of_an_image_is_within_the_bound(kind):
    prior = tiny_prior(kind)

    def kept(batch: int) -> int:
        """Bytes of tensors that are reached from the stepper, each storage once."""
        stepper = exact_stepper(prior, batch, condition_for(batch, prior))
        stepper.next(None)
        found: dict[int, int] = {}
        seen: set[int] = set()
        todo: list[object] = [stepper]
        while todo:
            item = todo.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, Tensor):
                found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
            elif isinstance(item, list | tuple):
                todo += item
            elif hasattr(item, "__dict__") and not isinstance(item, torch.nn.Module | type):
                todo += vars(item).values()
        return sum(found.values())

    assert 0 < kept(5) - kept(4) <= 2 * cache_bytes(prior)
