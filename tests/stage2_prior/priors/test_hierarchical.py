"""The hierarchical prior's own properties; those that all priors share are in test_conformance.py."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codes.shards import CodeDataset
from codes.spec import CodeSpec, Grid
from common.errors import UserError
from common.model_io import load_pretrained
from stage2_prior.condition import Condition
from stage2_prior.priors import PRIORS, Hierarchical, HierarchicalConfig, Transformer, TransformerConfig
from stage2_prior.priors.hierarchical import prior_of_level
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.train import Stage2Config, Stage2Task, train_stage2
from tests.stage2_prior.test_train import NAMES, write_codes
from tests.stage2_prior.tiny import CLASSES, SPECS, TINY, condition_for, labelled, random_codes, tiny_prior
from training.loop import TrainConfig

SPEC = SPECS["hierarchical"]  # three levels
CONFIG = TINY["hierarchical"]


def alone(hierarchical: Hierarchical) -> list[Any]:
    """Each level as a model of its own, with the same weights."""
    facts = {name: getattr(hierarchical, name) for name in ("class_names", "stage1_fingerprint", "knows_null_label")}
    levels = []
    for number, own in enumerate(hierarchical.levels):
        level = prior_of_level(hierarchical.config, SPEC, number, hierarchical.num_classes, **facts)
        level.load_state_dict(own.state_dict())
        levels.append(level.eval())
    return levels


def test_every_level_goes_by_all_levels_above_it():
    prior = tiny_prior("hierarchical")
    assert [level.given for level in prior.levels] == [(), SPEC.grids[:1], SPEC.grids[:2]]
    assert [level.code_spec.grids for level in prior.levels] == [(grid,) for grid in SPEC.grids]
    assert [level.config for level in prior.levels] == [CONFIG.top, CONFIG.middle, CONFIG.bottom]
    two = Hierarchical(CONFIG, replace(SPEC, grids=SPEC.grids[:2]), 0)
    assert [level.config for level in two.levels] == [CONFIG.top, CONFIG.bottom]
    four = Hierarchical(CONFIG, replace(SPEC, grids=(*SPEC.grids, Grid("level3", 4, 8, 5))), 0)
    assert [level.config for level in four.levels] == [CONFIG.top, CONFIG.middle, CONFIG.middle, CONFIG.bottom]


def test_the_nll_is_the_sum_of_the_levels_alone():
    prior = tiny_prior("hierarchical")
    codes, condition = random_codes(5, prior), condition_for(5, prior)
    with torch.no_grad():
        parts = [
            level.nll((codes[n],), replace(condition, codes=codes[:n] or None)) for n, level in enumerate(alone(prior))
        ]
        joint = prior.nll(codes, condition)
    assert torch.equal(joint, torch.cat(parts, dim=1))
    assert (torch.stack([part.sum(1) for part in parts]).std(0) > 0).all()  # no level's part passes for another's


def test_sampling_level_by_level_draws_what_one_call_draws():
    prior, condition = tiny_prior("hierarchical"), labelled(6, tiny_prior("hierarchical"))
    joint = sample_codes(prior, range(6), condition, 3, SamplingConfig(temperature=0))
    known: tuple[Tensor, ...] = ()
    for level in alone(prior):
        own = replace(condition, codes=known or None)
        known += sample_codes(level, range(6), own, 3, SamplingConfig(temperature=0))
    assert all(torch.equal(one, other) for one, other in zip(joint, known, strict=True))


def test_guidance_leaves_given_codes_as_they_are():
    """Greedy codes by whole passes with the formula of guidance: the null label's logits know the same levels above."""
    prior, batch = tiny_prior("hierarchical"), 4
    condition = labelled(batch, prior)
    null = Condition(torch.full((batch,), CLASSES))
    codes = torch.zeros(batch, SPEC.codes_per_image, dtype=torch.int64)
    for position in range(codes.shape[1]):
        with torch.no_grad():
            label, without = (prior.logits(prior.grids_of(codes), c)[:, position] for c in (condition, null))
        codes[:, position] = (without + 2.0 * (label - without)).argmax(-1)
    sampled = sample_codes(prior, range(batch), condition, 0, SamplingConfig(temperature=0, guidance=2.0))
    assert torch.equal(prior.sequence(sampled, condition), codes)


def test_known_codes_of_every_level_are_kept():
    prior = tiny_prior("hierarchical")
    kept = random_codes(5, prior)
    known = (kept[0], torch.where(torch.rand(kept[1].shape) < 0.5, kept[1], -1), torch.full_like(kept[2], -1))
    samples = sample_codes(prior, range(5), labelled(5, prior), 0, SamplingConfig(), known)
    SPEC.check(samples)
    assert torch.equal(samples[0], kept[0])
    assert torch.equal(samples[1][known[1] >= 0], kept[1][known[1] >= 0])


def test_a_stepper_keeps_the_caches_of_one_level_only():
    prior = tiny_prior("hierarchical")
    codes, condition = random_codes(2, prior), condition_for(2, prior)
    sequence = prior.sequence(codes, condition)
    stepper, made = prior.stepper(2, condition), []
    for position in range(sequence.shape[1]):
        stepper.next(sequence[:, position - 1 : position] if position else None)
        made.append(stepper.stepper)
    sizes = [len({id(made[p]) for p in range(start, end)}) for start, end in ((0, 4), (4, 12), (12, 28))]
    assert sizes == [1, 1, 1]
    assert len({id(one) for one in made}) == 3


def test_levels_compute_in_the_type_that_the_first_was_made_in():
    prior = tiny_prior("hierarchical")
    codes, condition = random_codes(2, prior), condition_for(2, prior)
    sequence = prior.sequence(codes, condition)

    def walked(lead: Any) -> Tensor:
        return torch.cat([lead.next(sequence[:, p - 1 : p] if p else None)[..., :7] for p in range(28)], dim=1)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = prior.logits(codes, condition)[..., :7].float()
        lead = prior.stepper(2, condition)
    outside = walked(lead)  # autocast is over: the levels to come are made as the first was
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outside, walked(prior.stepper(2, condition)))
    assert (outside - expected).abs().max() < 0.1 * expected.std()
    assert not torch.equal(outside, walked(prior.stepper(2, condition)))


def test_a_hierarchy_may_itself_be_given_codes():
    other = Grid("other", 1, 2, 6)
    prior = Hierarchical(
        HierarchicalConfig(top=CONFIG.middle, middle=CONFIG.middle, bottom=CONFIG.bottom), SPEC, 0, given=[other]
    )
    assert [level.given for level in prior.levels] == [(other, *SPEC.grids[:n]) for n in range(3)]
    codes, given = random_codes(3, prior), torch.randint(6, (3, 1, 2))
    with torch.no_grad():
        logits, moved = (prior.logits(codes, Condition(None, (g,))) for g in (given, (given + 1) % 6))
    assert ((logits - moved).abs().amax(dim=(0, 2)) > 0).all()
    samples = sample_codes(prior, range(3), Condition(None, (given,)), 0, SamplingConfig())
    SPEC.check(samples)


# ---- level by level -------------------------------------------------------------------------------------------------


def test_levels_put_together_are_the_joint_model(tmp_path: Path):
    facts = {"class_names": NAMES, "stage1_fingerprint": "f00d"}
    prior = tiny_prior("hierarchical", **facts)
    folders = [level.save_pretrained(tmp_path / f"level{n}") for n, level in enumerate(alone(prior))]
    levels = [load_pretrained(folder, PRIORS) for folder in folders]
    joined = Hierarchical.from_levels([levels[2], levels[0], levels[1]])
    assert joined.fingerprint() == prior.fingerprint()
    assert (joined.class_names, joined.stage1_fingerprint, joined.knows_null_label) == (NAMES, "f00d", True)
    assert not joined.training
    levels[1].knows_null_label = False
    assert not Hierarchical.from_levels(levels).knows_null_label


def test_levels_in_bfloat16_are_put_together_in_bfloat16():
    prior = tiny_prior("hierarchical")
    joined = Hierarchical.from_levels([level.bfloat16() for level in alone(prior)])
    assert {tensor.dtype for tensor in joined.parameters()} == {torch.bfloat16}
    assert joined.fingerprint() == prior.bfloat16().fingerprint()


def changed(prior: Any, **facts: Any) -> Any:
    other = copy.deepcopy(prior)
    for name, value in facts.items():
        setattr(other, name, value)
    return other


def test_levels_that_do_not_belong_together_are_refused():
    top, middle, bottom = alone(tiny_prior("hierarchical", class_names=NAMES, stage1_fingerprint="f00d"))
    for levels, message in (
        (
            [top, bottom],
            "the levels do not belong together: the prior of 4x4 codes of 9 goes by "
            r"2x2 codes of 7 \+ 2x4 codes of 11, the others are of 2x2 codes of 7; name one run for each level",
        ),
        ([top, top, middle, bottom], "the prior of 2x2 codes of 7 goes by no codes, the others are of 2x2 codes of 7"),
        (
            [top, changed(middle, stage1_fingerprint="beef"), bottom],
            "stage1_fingerprint is f00d of level 0 and beef of level 1; train all of them on the same codes",
        ),
        (
            [changed(top, given_fingerprint="maps"), middle, bottom],
            "given_fingerprint is maps of level 0 and None of level 1",
        ),
        ([top, middle, changed(bottom, num_classes=3)], "num_classes is 4 of level 0 and 3 of level 2"),
        (
            [top, middle, changed(bottom, class_names=None)],
            r"class_names is \(.*\) of level 0 and None of level 2",
        ),
        (
            [tiny_prior("rq_transformer"), bottom],
            r"a rq_transformer prior of .* is no level of a hierarchy, expected one of kind .* that models one grid; "
            "train it by `zellige train-stage2 --level`",
        ),
        ([top], "got codes of one grid .*, expected several levels"),
    ):
        with pytest.raises(UserError, match=message):
            Hierarchical.from_levels(levels)


def test_levels_between_top_and_bottom_have_one_config():
    spec = replace(SPEC, grids=(*SPEC.grids, Grid("level3", 4, 8, 5)))
    other = replace(CONFIG, middle=TransformerConfig(layers=2, width=16, heads=2))
    levels = [prior_of_level(CONFIG if level < 2 else other, spec, level, 0) for level in range(4)]
    with pytest.raises(UserError, match="level 2 has another config than level 1, expected one for all levels between"):
        Hierarchical.from_levels(levels)


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codes(tmp_path_factory.mktemp("codes") / "codes", SPEC)


def make_config(level: int | None, **changes: Any) -> Stage2Config:
    train = TrainConfig(
        steps=30, batch_size=16, learning_rate=1e-2, validate_every=30, preview_every=0, tracker="none", workers=0
    )
    return Stage2Config(model=CONFIG, train=train, level=level, **changes)


def test_a_level_is_trained_as_a_model_of_its_own_and_knows_what_it_goes_by(codes: Path, tmp_path: Path):
    results = [train_stage2(make_config(level), codes, tmp_path / f"{level}") for level in range(3)]
    levels = [load_pretrained(tmp_path / f"{level}", PRIORS) for level in range(3)]
    for number, level in enumerate(levels):
        assert level.code_spec == replace(SPEC, grids=(SPEC.grids[number],))
        assert level.given == SPEC.grids[:number]
        assert (level.class_names, level.stage1_fingerprint, level.knows_null_label) == (NAMES, "f00d", True)
    assert isinstance(levels[2], Transformer)

    joined = Hierarchical.from_levels(levels)
    batch = CodeDataset(codes, "validation").fetch(range(16), range(16))
    metrics = Stage2Task(joined, 0.1).validate(joined, batch)
    # Bits per dimension of the levels add up to those of the image; bits per code are their mean, code by code.
    of_levels = sum(result.metrics["bits_per_dimension"] for result in results)
    assert metrics["bits_per_dimension"].mean().item() == pytest.approx(of_levels, rel=1e-5)
    # All codes of an image are one number: which, the levels above tell.
    right, wrong = (tuple(grid + more for grid in batch["codes"][:2]) for more in (0, 1))
    own = (batch["codes"][2],)
    nll = [levels[2].nll(own, Condition(batch["labels"], given))[:, 0].mean() for given in (right, wrong)]
    assert nll[0] < nll[1] - 1


def test_the_joint_model_trains_on_the_mean_over_all_codes_of_all_levels(codes: Path, tmp_path: Path):
    result = train_stage2(make_config(None), codes, tmp_path / "run")
    prior = load_pretrained(tmp_path / "run", PRIORS)
    assert isinstance(prior, Hierarchical)
    assert prior.code_spec == SPEC
    batch = CodeDataset(codes, "validation").fetch(range(16), range(16))
    with torch.no_grad():
        loss = prior(batch["codes"], Condition(batch["labels"])).loss
    parts = [
        level.nll((batch["codes"][n],), Condition(batch["labels"], batch["codes"][:n] or None)).sum(1)
        for n, level in enumerate(prior.levels)
    ]
    torch.testing.assert_close(loss, sum(parts) / SPEC.codes_per_image)
    assert result.metrics["nll"] == pytest.approx(loss.mean().item(), rel=1e-5)


def test_a_level_that_there_is_not_is_refused_before_anything_is_made(codes: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"level=3, expected 0 to 2: the codes are 2x2 codes of 7 \+ .*"):
        train_stage2(make_config(3), codes, tmp_path / "run")
    with pytest.raises(UserError, match="level=-1, expected 0 to 2"):
        train_stage2(make_config(-1), codes, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_a_hierarchical_prior_has_levels():
    message = "level=0 for a transformer prior, expected none: only a hierarchical prior has levels"
    with pytest.raises(UserError, match=message):
        replace(make_config(None), model=TINY["transformer"], level=0)


def test_codes_of_one_grid_are_refused():
    message = (
        r"got codes of one grid \(3x5 codes of 11 .*\), expected several levels, as a vqvae2 autoencoder makes them; "
        "for one grid take a pixelsnail, pixelcnn or transformer prior by itself"
    )
    with pytest.raises(UserError, match=message):
        Hierarchical(CONFIG, CodeSpec((Grid("codes", 3, 5, 11),), 12, 20), 0)
