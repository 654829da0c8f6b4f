"""Self-correction: mistakes in the codes that a training step gives a prior, and what it is then asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codes.spec import Codes
from common.errors import UserError
from stage2_prior.mistakes import flipped
from stage2_prior.priors import PRIORS, VAR, AutoregressivePrior
from stage2_prior.priors.scale_latents import ScaleLatents
from stage2_prior.train import Stage2Config, Stage2Task, train_stage2
from tests.stage2_prior.test_train import make_config, write_codes
from tests.stage2_prior.tiny import CLASSES, SPECS, TINY, random_codes, tiny_prior

ORDERED = [kind for kind in TINY if issubclass(PRIORS[kind], AutoregressivePrior)]


def scale_latents(d: int = 6) -> ScaleLatents:
    torch.manual_seed(1)
    latents = ScaleLatents(SPECS["var"], d)
    latents.fill(
        {
            "codebook": torch.randn(11, d),
            "phi_weight": latents.phi_weight + 0.1 * torch.randn_like(latents.phi_weight),
            "phi_bias": 0.1 * torch.randn_like(latents.phi_bias),
        }
    )
    return latents


def scales(batch: int = 8) -> Codes:
    return random_codes(batch, tiny_prior("var"))


# Of scales, whose codes are told otherwise: below, and priors/test_infinity.py.
@pytest.mark.parametrize("kind", sorted({*ORDERED} - {"var", "infinity"}))
def test_a_step_gives_mistakes_and_asks_for_the_codes_themselves(kind):
    prior, seen = tiny_prior(kind), []
    batch = {"codes": random_codes(200, prior), "labels": torch.arange(200) % CLASSES}

    def model(codes, condition, given=None):
        seen.append((codes, condition, given))
        return prior(codes, condition, given)

    loss = Stage2Task(prior, 0.0, flipped_codes=0.4).step(model, batch, 0).loss
    codes, condition, given = seen.pop()
    assert all(map(torch.equal, codes, batch["codes"]))
    differ = torch.cat([(a != b).flatten(1) for a, b in zip(codes, given, strict=True)], dim=1).float()
    # Half of 0.4 on average, of which a code of chance is the same now and then.
    assert 0.12 < float(differ.mean()) < 0.2
    assert float(differ.mean(dim=1).std()) > 0.08  # another share of each image
    prior.code_spec.check(given)
    logits = prior.logits(given, condition)
    expected = F.cross_entropy(logits.flatten(0, 1), prior.sequence(codes, condition).flatten())
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    Stage2Task(prior, 0.0).step(model, batch, 0)
    assert seen[0][2] is None


def test_validation_sees_no_mistakes():
    prior = tiny_prior("transformer")
    batch = {"codes": random_codes(20, prior), "labels": torch.arange(20) % CLASSES}
    nll = [Stage2Task(prior, 0.0, flipped_codes=share).validate(prior, batch)["nll"] for share in (0.0, 0.5)]
    assert torch.equal(*nll)


def test_the_share_of_mistakes_is_drawn_evenly_for_each_image_and_grid():
    codes = (torch.zeros(400, 30, 30, dtype=torch.int64), torch.zeros(400, 20, 20, dtype=torch.int64))
    shares = [which.float().mean(dim=(1, 2)) for which in flipped(codes, 0.3)]
    for share in shares:
        assert float(share.mean()) == pytest.approx(0.15, abs=0.02)
        assert float(share.std()) == pytest.approx(0.3 / 12**0.5, abs=0.01)
    assert abs(float(torch.corrcoef(torch.stack(shares))[0, 1])) < 0.2


# ---- scales: what is asked for mends what was given -----------------------------------------------------------------


def plain_sum(latents: ScaleLatents, codes: Codes, count: int) -> Tensor:
    total = None
    for number in range(count):
        total = latents.add(total, codes[number], number)
    assert total is not None
    return total


def slowly_corrected(latents: ScaleLatents, codes: Codes, flips: list[Tensor], by: list[Tensor]) -> list[Tensor]:
    """What is to be told, place by place, each nearest code found by looking at all."""
    told, given = [codes[0]], [torch.where(flips[0], by[0], codes[0])]
    for number in range(1, len(codes)):
        missing = plain_sum(latents, codes, number) - plain_sum(latents, tuple(given), number)
        own = F.adaptive_avg_pool2d(missing, codes[number].shape[1:])
        grid = codes[number].clone()
        for b, y, x in torch.cartesian_prod(*(torch.arange(side) for side in grid.shape)).tolist():
            wanted = latents.codebook[codes[number][b, y, x]] + own[b, :, y, x]
            grid[b, y, x] = (latents.codebook - wanted).square().sum(1).argmin()
        told.append(grid)
        given.append(torch.where(flips[number], by[number], grid))
    return told


def test_without_mistakes_nothing_changes():
    latents, codes = scale_latents(), scales()
    none = [torch.zeros_like(grid, dtype=torch.bool) for grid in codes]
    told, given = latents.corrected(codes, none, [torch.zeros_like(grid) for grid in codes])
    assert all(map(torch.equal, told, codes))
    assert all(map(torch.equal, given, codes))


def test_scales_after_a_mistake_are_those_that_are_nearest_to_what_is_missing():
    latents, codes = scale_latents(), scales()
    by = [(grid + 1) % 11 for grid in codes]
    flips = [torch.rand(grid.shape, generator=torch.Generator().manual_seed(0)) < 0.4 for grid in codes]
    flips[0][:4] = True
    flips[0][4] = False
    told, given = latents.corrected(codes, flips, by)
    assert torch.equal(told[0], codes[0])
    assert all(map(torch.equal, told, slowly_corrected(latents, codes, flips, by)))
    for wanted, shown, flip, other in zip(told, given, flips, by, strict=True):
        assert torch.equal(shown, torch.where(flip, other, wanted))
    assert torch.equal(told[1][4], codes[1][4])  # which no mistake came before
    assert not torch.equal(told[1][:4], codes[1][:4])


def test_what_is_told_brings_the_sum_back_and_the_codes_as_they_were_do_not():
    latents, codes = scale_latents(), scales(64)
    by = [(grid + 5) % 11 for grid in codes]
    flips = [torch.full_like(grid, number == 0, dtype=torch.bool) for number, grid in enumerate(codes)]
    _, given = latents.corrected(codes, flips, by)
    true, mended = plain_sum(latents, codes, 2), plain_sum(latents, given, 2)
    left_alone = plain_sum(latents, (by[0], codes[1]), 2)
    error, error_alone = ((total - true).square().mean() for total in (mended, left_alone))
    assert error < 0.8 * error_alone


def test_a_step_of_var_tells_the_scales_that_mend_and_learns_from_it():
    spec = SPECS["var"]
    prior = PRIORS["var"](replace(TINY["var"]), spec, CLASSES, latent_width=6)
    assert isinstance(prior, VAR)
    prior.latents.fill(scale_latents().state_dict())
    codes, seen = scales(64), []

    def model(told, condition, given):
        seen.append((told, given))
        return prior(told, condition, given)

    batch = {"codes": codes, "labels": torch.arange(64) % CLASSES}
    Stage2Task(prior, 0.0, flipped_codes=0.9).step(model, batch, 0).loss.backward()
    ((told, given),) = seen
    assert torch.equal(told[0], codes[0])
    assert not torch.equal(told[1], codes[1])
    assert prior.word.weight.grad.abs().sum() > 0
    spec.check(given)


# ---- mistakes of a person -------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"flipped_codes=1.0, expected a share from 0 to below 1; 0.3 is the paper's"):
        make_config(flipped_codes=1.0)
    with pytest.raises(UserError, match=r"flipped_codes=0.2 for a maskgit prior, expected 0: self-correction is for"):
        make_config("maskgit", flipped_codes=0.2)
    codes = write_codes(tmp_path / "codes", spec=SPECS["var"])
    with pytest.raises(UserError, match="has no code vectors beside its codes, with which later scales could mend"):
        train_stage2(make_config("var", flipped_codes=0.2), codes, tmp_path / "run")


def test_a_run_with_mistakes_learns(tmp_path):
    config = make_config("transformer", flipped_codes=0.3)
    assert isinstance(config, Stage2Config)
    result = train_stage2(config, write_codes(tmp_path / "codes"), tmp_path / "run")
    assert result.metrics["bits_per_code"] < 0.6  # of 3.5 at first
