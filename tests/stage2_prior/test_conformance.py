"""What every prior owes: a table of all priors (TINY) times the properties below."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.options import kinds_of
from stage1_vq.codes import CodeSpec, Grid
from stage2_prior.condition import Condition
from stage2_prior.priors import PRIORS, Prior, PriorConfig
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.stage2_prior.tiny import (
    CLASSES,
    HEIGHT,
    TINY,
    VOCABULARY,
    WIDTH,
    condition_for,
    labelled,
    random_codes,
    tiny_prior,
    tiny_spec,
)
from training.errors import UserError
from training.model_io import load_pretrained

EVERY_PRIOR = pytest.mark.parametrize("kind", TINY)
WITH_AND_WITHOUT_CLASSES = pytest.mark.parametrize("num_classes", [0, CLASSES])


def test_the_table_holds_every_prior():
    assert set(TINY) == set(PRIORS) == set(kinds_of(PriorConfig))
    for kind, prior_class in PRIORS.items():
        assert prior_class.kind == kind == TINY[kind].kind
        assert prior_class.config_class is kinds_of(PriorConfig)[kind] is type(TINY[kind])


def step_through(prior: Prior, codes: Tensor, condition: Condition) -> Tensor:
    """Logits `b n k` of a stepper that is led along `codes`, b n."""
    stepper = prior.stepper(len(codes), condition)
    return torch.cat([stepper.next(codes[:, i - 1 : i] if i else None) for i in range(codes.shape[1])], dim=1)


@EVERY_PRIOR
@pytest.mark.parametrize("position", range(HEIGHT * WIDTH))
def test_logits_depend_on_all_earlier_codes_and_on_no_other(kind, position):
    prior = tiny_prior(kind)
    codes, condition = random_codes(6, prior), condition_for(6, prior)
    other = (codes[0].clone(),)
    row, column = divmod(position, WIDTH)
    other[0][:, row, column] = (codes[0][:, row, column] + 1) % VOCABULARY
    with torch.no_grad():
        change = (prior.logits(codes, condition) - prior.logits(other, condition)).abs().amax(dim=(0, 2))  # n
    assert (change[: position + 1] == 0).all()
    assert (change[position + 1 :] > 0).all()  # a prior that ignores its input must fail too


@EVERY_PRIOR
def test_logits_depend_on_the_label_from_the_first_code_on(kind):
    prior = tiny_prior(kind)
    codes = random_codes(CLASSES + 1, prior)
    same = (codes[0][:1].expand(CLASSES + 1, -1, -1),)
    with torch.no_grad():
        logits = prior.logits(same, Condition(torch.arange(CLASSES + 1)))  # classes+1 n k, the last of the null label
    distances = torch.cdist(logits.transpose(0, 1), logits.transpose(0, 1))  # n classes+1 classes+1
    assert (distances + torch.eye(CLASSES + 1) > 1e-3).all()


@EVERY_PRIOR
@WITH_AND_WITHOUT_CLASSES
@pytest.mark.parametrize("batch", [1, 5])
def test_stepper_agrees_with_the_teacher_forced_pass(kind, num_classes, batch):
    prior = tiny_prior(kind, num_classes)
    codes, condition = random_codes(batch, prior), condition_for(batch, prior)
    with torch.no_grad():
        expected = prior.logits(codes, condition)
    stepped = step_through(prior, codes[0].flatten(1), condition)
    assert stepped.shape == expected.shape == (batch, HEIGHT * WIDTH, VOCABULARY)
    assert expected.std() > 0.1
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-5)


@EVERY_PRIOR
def test_stepper_agrees_under_autocast(kind):
    prior = tiny_prior(kind)
    codes, condition = random_codes(5, prior), condition_for(5, prior)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = prior.logits(codes, condition).float()
        stepped = step_through(prior, codes[0].flatten(1), condition)
    assert stepped.dtype == torch.float32
    assert (stepped - expected).abs().max() < 0.1 * expected.std()  # bfloat16 knows three digits


@EVERY_PRIOR
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
    stepped = step_through(prior, codes[0].flatten(1), condition)
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-5)
    assert prior.training


@EVERY_PRIOR
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
    expected = -log_probabilities.gather(-1, codes[0].flatten(1)[..., None])[..., 0]  # b n
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), expected, rtol=0, atol=1e-5)


@EVERY_PRIOR
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_sample_does_not_depend_on_its_batch(kind, guidance):
    prior = tiny_prior(kind)
    sampling = SamplingConfig(temperature=0.9, top_k=8, guidance=guidance)

    def sampled(batch_size: int) -> Tensor:
        batches = torch.arange(64).split(batch_size)
        parts = [sample_codes(prior, b.tolist(), Condition(b % CLASSES), 5, sampling)[0] for b in batches]
        return torch.cat(parts)

    alone = sampled(1)
    assert torch.equal(sampled(7), alone)
    assert torch.equal(sampled(64), alone)
    assert len(alone.flatten(1).unique(dim=0)) > 50


@EVERY_PRIOR
def test_guidance_of_one_is_no_guidance_and_any_other_follows_its_formula(kind):
    prior = tiny_prior(kind)
    condition = labelled(6, prior)

    def greedy(guidance: float) -> Tensor:
        return sample_codes(prior, range(6), condition, 0, SamplingConfig(temperature=0, guidance=guidance))[0]

    def expected(guidance: float) -> Tensor:
        """Greedy codes by whole passes, one for each code."""
        codes = torch.zeros(6, HEIGHT * WIDTH, dtype=torch.int64)
        unconditional = Condition(torch.full((6,), CLASSES))
        for position in range(HEIGHT * WIDTH):
            grid = (codes.view(6, HEIGHT, WIDTH),)
            with torch.no_grad():
                label, null = (prior.logits(grid, c)[:, position] for c in (condition, unconditional))
            codes[:, position] = (null + guidance * (label - null)).argmax(-1)
        return codes.view(6, HEIGHT, WIDTH)

    assert torch.equal(greedy(1.0), expected(1.0))
    assert torch.equal(greedy(3.0), expected(3.0))
    assert not torch.equal(greedy(1.0), greedy(3.0))


@EVERY_PRIOR
def test_without_guidance_the_batch_is_not_doubled(kind, monkeypatch):
    prior, batches = tiny_prior(kind), []
    make = prior.stepper
    monkeypatch.setattr(prior, "stepper", lambda batch, condition: batches.append(batch) or make(batch, condition))
    for guidance in (1.0, 2.0):
        sample_codes(prior, range(3), labelled(3, prior), 0, SamplingConfig(guidance=guidance))
    assert batches == [3, 6]


@EVERY_PRIOR
def test_learns_eight_grids_by_heart_and_samples_them(kind):
    """Two grids for each of four labels: what cannot be known is the choice between the two, ln 2 per grid."""
    torch.manual_seed(0)
    prior = PRIORS[kind](TINY[kind], tiny_spec(), CLASSES)
    codes, condition = random_codes(8, prior), Condition(torch.arange(8) % CLASSES)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        prior(codes, condition).loss.mean().backward()
        optimizer.step()
    nll = prior.eval().nll(codes, condition).sum(dim=1)  # of whole grids
    assert nll.mean() < torch.tensor(2.0).log() + 0.05
    samples = sample_codes(prior, range(8), condition, 0, SamplingConfig())[0]
    own = (samples[:, None] == codes[0]).flatten(2).all(-1)  # sample, grid
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


@EVERY_PRIOR
def test_codes_of_another_grid_are_refused(kind):
    prior = tiny_prior(kind)
    codes = (torch.zeros(2, 5, 3, dtype=torch.int64),)
    with pytest.raises(UserError, match=r"got codes of 5x3, expected 3x5 codes of 11"):
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
