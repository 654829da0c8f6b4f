"""What every prior owes: a table of all priors (TINY) times the properties below. Those that only masked priors owe
stand in test_masked_conformance.py."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from common.model_io import load_pretrained
from common.wording import an
from pipelines.fields import kinds_of
from stage2_prior.condition import Condition
from stage2_prior.priors import PRIORS, AutoregressivePrior, PriorConfig
from stage2_prior.priors.base import NO_CODE
from stage2_prior.sampling import SamplingConfig, sample_codes, with_order
from tests.stage2_prior.tiny import (
    CLASSES,
    TINY,
    condition_for,
    labelled,
    random_codes,
    spec_of,
    tiny_prior,
)

EVERY_PRIOR = pytest.mark.parametrize("kind", TINY)
ORDERED = [kind for kind in TINY if issubclass(PRIORS[kind], AutoregressivePrior)]
EVERY_ORDERED_PRIOR = pytest.mark.parametrize("kind", ORDERED)
WITH_AND_WITHOUT_CLASSES = pytest.mark.parametrize("num_classes", [0, CLASSES])


def test_the_table_holds_every_prior():
    assert set(TINY) == set(PRIORS) == set(kinds_of(PriorConfig))
    for kind, prior_class in PRIORS.items():
        assert prior_class.kind == kind == TINY[kind].kind
        assert prior_class.config_class is kinds_of(PriorConfig)[kind] is type(TINY[kind])


def step_through(prior: AutoregressivePrior, codes: Codes, condition: Condition) -> list[Tensor]:
    """Logits `b m k` of each step of a stepper that is led along `codes`."""
    sequence = prior.sequence(codes, condition)  # b n
    stepper = prior.stepper(len(sequence), condition)
    steps, previous, done = [], None, 0
    while done < sequence.shape[1]:
        steps.append(stepper.next(previous))
        previous = sequence[:, done : done + steps[-1].shape[1]]
        done += previous.shape[1]
    return steps


def joined(steps: list[Tensor]) -> Tensor:
    """`b n k`; a step over fewer codes than the most is filled up as `logits` fills up."""
    most = max(logits.shape[-1] for logits in steps)
    return torch.cat([F.pad(logits, (0, most - logits.shape[-1]), value=NO_CODE) for logits in steps], dim=1)


@EVERY_ORDERED_PRIOR
def test_logits_depend_on_all_codes_of_earlier_steps_and_on_no_other(kind):
    prior = tiny_prior(kind)
    codes, condition = random_codes(6, prior), condition_for(6, prior)
    sequence = prior.sequence(codes, condition)
    steps = step_through(prior, codes, condition)
    assert len(steps) == prior.steps
    sizes, vocabularies = zip(*(logits.shape[1:] for logits in steps), strict=True)
    step = torch.arange(len(steps)).repeat_interleave(torch.tensor(sizes))  # n
    with torch.no_grad():
        expected = prior.logits(codes, condition)
        for position in range(sequence.shape[1]):
            other = sequence.clone()
            other[:, position] = (sequence[:, position] + 1) % vocabularies[step[position]]
            change = (expected - prior.logits(prior.grids_of(other), condition)).abs().amax(dim=(0, 2))  # n
            assert (change[step <= step[position]] == 0).all(), position
            assert (change[step > step[position]] > 0).all(), position  # a prior that ignores its input must fail too


@EVERY_PRIOR
def test_logits_depend_on_the_label_from_the_first_code_on(kind):
    prior = tiny_prior(kind)
    codes = random_codes(CLASSES + 1, prior)
    same = tuple(grid[:1].expand(CLASSES + 1, -1, -1) for grid in codes)
    with torch.no_grad():
        condition = Condition(torch.arange(CLASSES + 1))  # the last is the null label
        if kind not in ORDERED:
            logits = prior.masked_logits(torch.full_like(prior.sequence(same, condition), -1), condition)
        else:
            logits = prior.logits(same, condition)  # classes+1 n k
    distances = torch.cdist(logits.transpose(0, 1), logits.transpose(0, 1))  # n classes+1 classes+1
    assert (distances + torch.eye(CLASSES + 1) > 1e-3).all()


@EVERY_ORDERED_PRIOR
@WITH_AND_WITHOUT_CLASSES
@pytest.mark.parametrize("batch", [1, 5])
def test_stepper_agrees_with_the_teacher_forced_pass(kind, num_classes, batch):
    prior = tiny_prior(kind, num_classes)
    codes, condition = random_codes(batch, prior), condition_for(batch, prior)
    with torch.no_grad():
        expected = prior.logits(codes, condition)
    stepped = joined(step_through(prior, codes, condition))
    most = max(grid.vocabulary for grid in prior.code_spec.grids)
    assert stepped.shape == expected.shape == (batch, prior.code_spec.codes_per_image, most)
    assert expected[expected > NO_CODE].std() > 0.1
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-5)


@EVERY_ORDERED_PRIOR
def test_stepper_agrees_under_autocast(kind):
    prior = tiny_prior(kind)
    codes, condition = random_codes(5, prior), condition_for(5, prior)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = prior.logits(codes, condition).float()
        stepped = joined(step_through(prior, codes, condition))
    assert stepped.dtype == torch.float32
    assert (stepped - expected).abs().max() < 0.1 * expected[expected > NO_CODE].std()  # bfloat16 knows three digits


@EVERY_ORDERED_PRIOR
def test_stepper_has_no_dropout_and_leaves_the_model_in_training(kind):
    prior = tiny_prior(kind)
    for module in prior.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    codes, condition = random_codes(3, prior), condition_for(3, prior)
    with torch.no_grad():
        expected = prior.logits(codes, condition)
        prior.train()
        assert (prior.logits(codes, condition) - expected).abs().max() > 0.01
    stepped = joined(step_through(prior, codes, condition))
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-5)
    assert prior.training


@EVERY_ORDERED_PRIOR
@WITH_AND_WITHOUT_CLASSES
def test_nll_is_the_float32_cross_entropy_of_the_logits(kind, num_classes):
    prior = tiny_prior(kind, num_classes)
    codes, condition = random_codes(5, prior), condition_for(5, prior)
    with torch.no_grad():
        nll = prior.nll(codes, condition)
        log_probabilities = prior.logits(codes, condition).double().log_softmax(-1)
        loss = prior(codes, condition)
        assert torch.equal(loss.loss, nll.mean(1))
        assert torch.equal(loss.nll, nll.mean(1))
        with torch.autocast("cpu", torch.bfloat16):
            assert prior.nll(codes, condition).dtype == torch.float32
        assert tiny_prior(kind, num_classes).bfloat16().nll(codes, condition).dtype == torch.float32
    expected = -log_probabilities.gather(-1, prior.sequence(codes, condition)[..., None])[..., 0]  # b n
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), expected, rtol=0, atol=1e-5)


@EVERY_PRIOR
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_sample_does_not_depend_on_its_batch(kind, guidance):
    prior = tiny_prior(kind)
    sampling = SamplingConfig(temperature=0.9, top_k=8, guidance=guidance)

    def sampled(batch_size: int) -> Tensor:
        batches = torch.arange(64).split(batch_size)
        parts = [sample_codes(prior, b.tolist(), Condition(b % CLASSES), 5, sampling) for b in batches]
        return torch.cat([prior.sequence(part, Condition(b % CLASSES)) for part, b in zip(parts, batches, strict=True)])

    alone = sampled(1)
    assert torch.equal(sampled(7), alone)
    assert torch.equal(sampled(64), alone)
    assert len(alone.unique(dim=0)) > 50


@EVERY_ORDERED_PRIOR
def test_guidance_of_one_is_no_guidance_and_any_other_follows_its_formula(kind):
    prior = tiny_prior(kind)
    condition = labelled(6, prior)

    def greedy(guidance: float) -> Tensor:
        codes = sample_codes(prior, range(6), condition, 0, SamplingConfig(temperature=0, guidance=guidance))
        return prior.sequence(codes, condition)

    def expected(guidance: float) -> Tensor:
        """Greedy codes by whole passes, one for each code."""
        codes = torch.zeros(6, prior.code_spec.codes_per_image, dtype=torch.int64)  # in the order of drawing
        given = with_order(prior, range(6), condition, 0, None)[0] if prior.draws_in_any_order else condition
        unconditional = replace(given, labels=torch.full((6,), CLASSES))
        for position in range(codes.shape[1]):
            grids = prior.grids_of(prior.in_raster(codes, given))
            with torch.no_grad():
                label, null = (prior.logits(grids, c)[:, position] for c in (given, unconditional))
            codes[:, position] = (null + guidance * (label - null)).argmax(-1)
        return prior.in_raster(codes, given)

    assert torch.equal(greedy(1.0), expected(1.0))
    assert torch.equal(greedy(3.0), expected(3.0))
    assert not torch.equal(greedy(1.0), greedy(3.0))


@EVERY_ORDERED_PRIOR
def test_without_guidance_the_batch_is_not_doubled(kind, monkeypatch):
    prior, batches = tiny_prior(kind), []
    make = prior.stepper
    monkeypatch.setattr(prior, "stepper", lambda batch, condition: batches.append(batch) or make(batch, condition))
    for guidance in (1.0, 2.0):
        sample_codes(prior, range(3), labelled(3, prior), 0, SamplingConfig(guidance=guidance))
    assert batches == [3, 6]


@EVERY_PRIOR
def test_learns_eight_grids_by_heart_and_samples_them(kind):
    """Two grids for each of four labels: what cannot be known is the choice between the two, ln 2 per grid. One and the
    same for a prior of bits: of two it would tell each bit as one's or the other's, whatever the bits beside it."""
    torch.manual_seed(0)
    prior = PRIORS[kind](TINY[kind], spec_of(kind), CLASSES)
    codes, condition = random_codes(8, prior), Condition(torch.arange(8) % CLASSES)
    unknown = 0.0 if prior.tells_bits else math.log(2)
    if prior.tells_bits:
        codes = tuple(grid[:CLASSES].repeat(2, 1, 1) for grid in codes)
    one_way = kind in ORDERED and not prior.draws_in_any_order
    copies = 1 if one_way else 16  # a pass learns from one of many ways to hide codes, or orders
    batch = tuple(grid.repeat(copies, 1, 1) for grid in codes)
    labels = condition.labels.repeat(copies)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for step in range(150):
        if not one_way:  # whose gradients differ from step to step
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 150)
        optimizer.zero_grad()
        order = prior.training_order(len(labels), step / 150, labels.device)
        prior(batch, Condition(labels, order=order)).loss.mean().backward()
        optimizer.step()
    nll = prior.eval().nll(codes, condition).sum(dim=1)  # of whole images
    assert nll.mean() < unknown + (0.05 if one_way else 0.4)
    samples = prior.sequence(sample_codes(prior, range(8), condition, 0, SamplingConfig()), condition)
    own = (samples[:, None] == prior.sequence(codes, condition)).all(-1)  # sample, image
    assert own.any(1).all()
    assert (own.int().argmax(1) % CLASSES == torch.arange(8) % CLASSES).all()


@EVERY_PRIOR
@WITH_AND_WITHOUT_CLASSES
def test_gradients_reach_all_parameters(kind, num_classes):
    prior = tiny_prior(kind, num_classes).train()
    prior(random_codes(20, prior), condition_for(20, prior)).loss.mean().backward()
    without = [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@EVERY_PRIOR
def test_saved_and_loaded_it_is_the_same(kind, tmp_path: Path):
    names = tuple("abcd")
    prior = tiny_prior(kind, class_names=names, stage1_fingerprint="f00d", knows_null_label=False)
    prior.save_pretrained(tmp_path / "prior")
    loaded = load_pretrained(tmp_path / "prior", PRIORS)
    assert type(loaded) is type(prior)
    assert loaded.config == prior.config
    assert loaded.code_spec == prior.code_spec
    assert (loaded.num_classes, loaded.class_names) == (CLASSES, names)
    assert (loaded.stage1_fingerprint, loaded.knows_null_label) == ("f00d", False)
    assert loaded.fingerprint() == prior.fingerprint()
    codes, condition = random_codes(3, prior), condition_for(3, prior)
    assert torch.equal(loaded.nll(codes, condition), prior.nll(codes, condition))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@EVERY_PRIOR
def test_cast_to_another_type_it_samples_and_comes_back_from_its_folder_as_it_was_saved(kind, dtype, tmp_path: Path):
    prior = tiny_prior(kind)
    sampling = SamplingConfig(guidance=1.5)
    in_float32 = sample_codes(prior, [0, 1, 2], labelled(3, prior), 0, sampling)
    prior.to(dtype)
    codes = sample_codes(prior, [0, 1, 2], labelled(3, prior), 0, sampling)
    prior.code_spec.check(codes)
    if dtype == torch.float64:
        assert all(torch.equal(grid, same) for grid, same in zip(codes, in_float32, strict=True))
    loaded = load_pretrained(prior.save_pretrained(tmp_path / "prior"), PRIORS)
    types = {name: tensor.dtype for name, tensor in prior.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == types
    assert dtype in types.values()
    assert loaded.fingerprint() == prior.fingerprint()
    again = sample_codes(loaded, [0, 1, 2], labelled(3, prior), 0, sampling)
    assert all(torch.equal(grid, same) for grid, same in zip(again, codes, strict=True))
    nll = loaded.nll(codes, labelled(3, prior))
    assert torch.isfinite(nll).all()
    assert torch.equal(nll, prior.nll(codes, labelled(3, prior)))


@EVERY_PRIOR
def test_codes_of_another_grid_are_refused(kind):
    prior = tiny_prior(kind)
    codes = (torch.zeros(2, 5, 4, dtype=torch.int64),)
    with pytest.raises(UserError, match=r"got codes of 5x4, expected .*, as the prior was made for"):
        prior.nll(codes, condition_for(2, prior))


def test_several_grids_are_refused_by_priors_of_one():
    spec = CodeSpec((Grid("top", 2, 2, 8), Grid("bottom", 4, 4, 8)), 16, 16)
    with pytest.raises(UserError, match=r"got codes of 2 grids .*, expected one grid: a pixelcnn prior models one; .*"):
        PRIORS["pixelcnn"](TINY["pixelcnn"], spec, 0)


@EVERY_PRIOR
def test_labels_are_given_exactly_to_a_prior_with_classes(kind):
    prior, without = tiny_prior(kind), tiny_prior(kind, num_classes=0)
    codes = random_codes(2, prior)
    with pytest.raises(UserError, match="got no labels for a prior of 4 classes; give each sample a label from 0 to 3"):
        prior.nll(codes, Condition())
    if isinstance(prior, AutoregressivePrior):
        with pytest.raises(UserError, match="got no labels for a prior of 4 classes"):
            prior.stepper(2, Condition())
    with pytest.raises(UserError, match=r"got labels of shape \(3,\), expected \(2,\)"):
        prior.nll(codes, Condition(torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(UserError, match="got labels for a prior without classes, expected none"):
        without.nll(codes, Condition(torch.zeros(2, dtype=torch.int64)))


@EVERY_PRIOR
def test_class_names_must_be_as_many_as_classes(kind):
    with pytest.raises(UserError, match="got 2 class names for 4 classes"):
        tiny_prior(kind, class_names=("cat", "dog"))


@EVERY_ORDERED_PRIOR
def test_given_codes_shape_the_logits_of_the_priors_that_go_by_them(kind):
    given = (Grid("low", 1, 1, 5), Grid("map", 1, 1, 3))  # sides that divide those of any grid
    if not PRIORS[kind].reads_given:
        with pytest.raises(UserError, match=f"{an(kind)} prior cannot be given codes, expected another kind"):
            tiny_prior(kind, given=given)
        return
    prior = tiny_prior(kind, given=given)
    codes, labels = random_codes(4, prior), torch.arange(4)
    known = tuple(torch.randint(grid.vocabulary, (4, grid.height, grid.width)) for grid in given)
    with torch.no_grad():
        expected = prior.logits(codes, Condition(labels, known))
        for number, grid in enumerate(given):
            other = [tensor.clone() for tensor in known]
            other[number] = (other[number] + 1) % grid.vocabulary
            change = (prior.logits(codes, Condition(labels, tuple(other))) - expected).abs().amax(dim=(0, 2))
            assert (change > 0).all()
    stepped = joined(step_through(prior, codes, Condition(labels, known)))
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="got given codes of shapes"):
        prior.nll(codes, Condition(labels))
