"""MIWAE against the public implementation, not-MIWAE against plain Python and differences, and imputation against
models whose missing numbers have a distribution in closed form, or one that a grid gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_vae.completing import chosen_draws
from stage1_vae.objectives.importance import importance_bound
from stage1_vae.tables.data import read_table, rows_of
from stage1_vae.tables.masks import LinearMaskConfig, SelfMaskingConfig
from stage1_vae.tables.miwae import MIWAE, Column, MIWAEConfig, columns_of, impute
from tests.golden import golden_vae

NAN = math.nan


def miwae(numbers: int = 3, **given: Any) -> MIWAE:
    torch.manual_seed(0)
    config = MIWAEConfig(**{"latents": 2, "hidden": (6,), **given})
    return MIWAE(config, [Column(f"c{i}", 0.0, 1.0) for i in range(numbers)])


@pytest.mark.parametrize("mask", [{}, {"mask": LinearMaskConfig()}, {"mask": SelfMaskingConfig()}], ids=str)
def test_the_generator_is_all_but_the_encoder(mask: dict[str, Any]):
    model = miwae(**mask)
    encoder = {id(weight) for weight in model.encoder.parameters()}
    generator = {id(weight) for weight in model.generator_parameters()}
    assert generator == {id(weight) for weight in model.parameters()} - encoder
    assert encoder
    assert generator


def as_ours(name: str) -> str:
    """The public name of a weight, `encoder.2.bias`, as here."""
    part, place, what = name.split(".")
    return f"{part}.layers.{int(place) // 2}.{what}"


def test_bound_weights_and_gradients_are_the_published_ones():
    reference = golden_vae("miwae")
    model = miwae(5, hidden=(14, 14))
    model.load_state_dict({as_ours(name): value for name, value in reference.weights.items()})
    rows = reference.inputs["x_full"].masked_fill(reference.inputs["mask"] == 0, NAN)
    terms = model(rows, noise=reference.inputs["loss/eps0"])
    (latents,), posterior = terms.latents, model.posterior(rows)
    density = model.density(latents)
    bounds = importance_bound(terms.log_weights)
    for name, value in {
        "q_mean": posterior.mean,
        "q_scale": posterior.scale,
        "z": latents,
        "px_mean": density.mean,
        "px_scale": density.scale,
        "px_df": density.freedom,
        "log_p_obs": terms.log_likelihood,
        "log_w": terms.log_weights,
        "log_bound_per_row": bounds,
        "bound_as_printed": bounds.mean(),
        "imputation_weights": terms.log_weights.softmax(0),
    }.items():
        reference.check(name, value)
    (-bounds.mean()).backward()
    names = {name.removeprefix("grad/") for name in reference.outputs if name.startswith("grad/")}
    weights = dict(model.named_parameters())
    assert len(names) == len(weights)
    for name in names:
        gradient = weights[as_ours(name)].grad
        assert gradient is not None
        reference.check(f"grad/{name}", gradient)


def test_imputed_numbers_are_means_with_the_published_weights(monkeypatch: pytest.MonkeyPatch):
    reference = golden_vae("miwae")
    model = miwae(5, hidden=(14, 14))
    model.load_state_dict({as_ours(name): value for name, value in reference.weights.items()})
    seen = reference.inputs["mask"] == 1
    rows = reference.inputs["x_full"].masked_fill(~seen, NAN)

    def of_the_file(*arguments: Any) -> Any:
        return noise_of_rows(*arguments)._replace(of_latents=reference.inputs["loss/eps0"])

    from stage1_vae.tables import miwae as module

    noise_of_rows = module.noise_of_rows
    monkeypatch.setattr(module, "noise_of_rows", of_the_file)
    found = impute(model, rows, draws=6).single
    torch.testing.assert_close(found[~seen], reference.outputs["imputed_mean"][~seen], rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(found[seen], reference.inputs["x_full"][seen])


# ---- not missing at random ------------------------------------------------------------------------------------------


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def plain_log_weight(model: MIWAE, row: list[float], noise: list[float]) -> float:
    """log w of one row and draw of a Gaussian model, number by number."""
    latents = model.config.latents
    inputs = [0.0 if math.isnan(x) else x for x in row] + [0.0 if math.isnan(x) else 1.0 for x in row]
    said = model.encoder(torch.tensor([inputs], dtype=torch.float64))[0].tolist()
    total, z = 0.0, []
    for d in range(latents):
        mean, scale = said[d], math.log1p(math.exp(said[latents + d]))
        z.append(mean + scale * noise[d])
        total += -0.5 * z[d] ** 2 + 0.5 * noise[d] ** 2 + math.log(scale)  # log p(z) - log q(z|x)
    outputs = model.decoder(torch.tensor([z], dtype=torch.float64))[0].tolist()
    completed = []
    for j, x in enumerate(row):
        mean, scale = outputs[j], math.log1p(math.exp(outputs[len(row) + j])) + 0.001
        if math.isnan(x):
            completed.append(mean + scale * noise[latents + j])
        else:
            completed.append(x)
            total += -0.5 * ((x - mean) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)
    assert model.mask is not None
    if model.config.mask.kind == "linear":
        weight, bias = model.mask.layer.weight.tolist(), model.mask.layer.bias.tolist()
        logits = [
            sum(w * x for w, x in zip(ws, completed, strict=True)) + b for ws, b in zip(weight, bias, strict=True)
        ]
    else:
        slopes, centres = model.mask.slope.tolist(), model.mask.centre.tolist()
        signs = {"unknown": None, "high": 1, "low": -1}
        sign = signs[model.config.mask.missing]
        slopes = slopes if sign is None else [sign * math.log1p(math.exp(slope)) for slope in slopes]
        logits = [-w * (x - c) for w, x, c in zip(slopes, completed, centres, strict=True)]
    for x, logit in zip(row, logits, strict=True):
        total += log_sigmoid(-logit if math.isnan(x) else logit)
    return total


MASKS = [SelfMaskingConfig(), SelfMaskingConfig(missing="high"), SelfMaskingConfig(missing="low"), LinearMaskConfig()]
ROWS = [[0.5, NAN, -1.0], [NAN, NAN, 2.0], [0.1, 0.2, 0.3]]


def mnar(mask: Any) -> tuple[MIWAE, Tensor, Tensor]:
    model = miwae(likelihood="gaussian", indicators=True, activation="tanh", mask=mask).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    noise = torch.randn(4, 3, model.noise_size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return model, torch.tensor(ROWS, dtype=torch.float64), noise


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"{mask.kind}-{getattr(mask, 'missing', '')}")
def test_weights_with_a_mask_model_are_those_of_plain_python_and_their_gradient_that_of_differences(mask: Any):
    model, rows, noise = mnar(mask)
    weights = model(rows, noise=noise).log_weights
    plain = [
        [plain_log_weight(model, row, draw) for row, draw in zip(ROWS, draws, strict=True)] for draws in noise.tolist()
    ]
    torch.testing.assert_close(weights, torch.tensor(plain, dtype=torch.float64))

    def bound() -> Tensor:
        return importance_bound(model(rows, noise=noise).log_weights).mean()

    bound().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        with torch.no_grad():
            place, step = (0,) * weight.ndim, 1e-5
            weight[place] += step
            above = bound()
            weight[place] -= 2 * step
            below = bound()
            weight[place] += step
        assert float(weight.grad[place]) == pytest.approx(float(above - below) / (2 * step), rel=1e-4, abs=1e-8), name


def test_what_is_missing_moves_nothing_but_through_the_mask():
    """Values in the place of missing numbers cannot leak: rows hold nan there. The noise of missing numbers matters
    where the mask is modelled, and that of seen ones never."""
    model, rows, noise = mnar(SelfMaskingConfig())
    changed = noise.clone()
    changed[:, :, 2] += 1  # of the first number, which the second row misses alone
    before, after = (model(rows, noise=each).log_weights for each in (noise, changed))
    assert (before != after).any(0).tolist() == [False, True, False]


# ---- imputation -----------------------------------------------------------------------------------------------------


def linear(numbers: int, mask: Any = None) -> tuple[MIWAE, Tensor, Tensor]:
    """p(x|z) = N(W z + c, 0.5^2): a model, and mean and covariance of x."""
    given = {} if mask is None else {"mask": mask}
    model = miwae(numbers, hidden=(), likelihood="gaussian", **given)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        (layer,) = model.decoder.layers
        layer.weight.zero_()
        layer.weight[:numbers] = torch.randn(numbers, 2, generator=generator)
        layer.bias[:numbers] = torch.randn(numbers, generator=generator)
        layer.bias[numbers:] = math.log(math.expm1(0.5 - 0.001))
        (proposal,) = model.encoder.layers  # q(z|x) is the prior
        proposal.weight.zero_()
        proposal.bias.copy_(torch.tensor([0, 0, *2 * [math.log(math.expm1(1.0))]]))
    loadings = layer.weight[:numbers].detach()
    return model, layer.bias[:numbers].detach(), loadings @ loadings.T + 0.25 * torch.eye(numbers)


def conditional(row: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the missing numbers given the seen."""
    seen = ~row.isnan()
    gain = covariance[~seen][:, seen] @ covariance[seen][:, seen].inverse()
    return mean[~seen] + gain @ (row[seen] - mean[seen]), (
        covariance[~seen][:, ~seen] - gain @ covariance[seen][:, ~seen]
    )


def test_imputation_comes_to_the_conditional_distribution():
    model, mean, covariance = linear(4)
    rows = torch.tensor([[0.3, NAN, 0.1, NAN], [NAN, 1.0, NAN, NAN]])
    found = impute(model, rows, draws=20_000, multiple=4000)
    for number, row in enumerate(rows):
        expected, spread = conditional(row, mean, covariance)
        missing = row.isnan()
        torch.testing.assert_close(found.single[number, missing], expected, rtol=0, atol=0.06)
        drawn = found.multiple[:, number, missing]
        torch.testing.assert_close(drawn.mean(0), expected, rtol=0, atol=0.09)
        torch.testing.assert_close(torch.cov(drawn.T).view_as(spread), spread, rtol=0.12, atol=0.08)
        assert torch.equal(found.multiple[:, number, ~missing], row[~missing].expand(4000, -1))


def test_bound_comes_to_the_likelihood_of_what_is_seen():
    model, mean, covariance = linear(4)
    row = torch.tensor([[0.3, NAN, 0.1, NAN]])
    seen = ~row[0].isnan()
    exact = torch.distributions.MultivariateNormal(mean[seen], covariance[seen][:, seen]).log_prob(row[0, seen])
    torch.manual_seed(1)
    with torch.no_grad():
        assert float(importance_bound(model(row, 400_000).log_weights)) == pytest.approx(float(exact), abs=0.03)


def test_imputation_with_a_mask_model_weighs_by_the_mask_too():
    """The second number is missing because it is high: its distribution is the conditional one times 1 - p(seen)."""
    model, mean, covariance = linear(2, SelfMaskingConfig(missing="high"))
    assert model.mask is not None
    with torch.no_grad():
        model.mask.slope.fill_(4.0)
        model.mask.centre.fill_(float(mean[1]))
    row = torch.tensor([[0.2, NAN]])
    (centre,), ((variance,),) = (part.tolist() for part in conditional(row[0], mean, covariance))
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    slope = math.log1p(math.exp(4.0))
    density = (-0.5 * (grid - centre) ** 2 / variance).exp() * torch.sigmoid(slope * (grid - float(mean[1])))
    density = density / density.sum()
    expected = float((density * grid).sum())
    spread = float((density * (grid - expected) ** 2).sum().sqrt())
    assert abs(expected - centre) > 0.2  # what ignoring the mask would be wrong by
    found = impute(model, row, draws=40_000, multiple=4000)
    assert float(found.single[0, 1]) == pytest.approx(expected, abs=0.04)
    assert float(found.multiple[:, 0, 1].mean()) == pytest.approx(expected, abs=0.06)
    assert float(found.multiple[:, 0, 1].std()) == pytest.approx(spread, rel=0.08)


def test_rows_are_imputed_alike_in_whatever_company(monkeypatch: pytest.MonkeyPatch):
    model = miwae()
    rows = torch.tensor(ROWS).float()
    whole = impute(model, rows, draws=20, multiple=3, seed=4)
    monkeypatch.setattr("stage1_vae.tables.miwae.AT_ONCE", 1)
    parts = impute(model, rows, draws=20, multiple=3, seed=4)
    later = impute(model, rows[1:], draws=20, multiple=3, seed=4, first=1)
    for one, other, tail in zip(whole, parts, later, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one[:, 1:] if one.ndim == 3 else one[1:], tail)
    assert not torch.equal(whole.single, impute(model, rows, draws=20, seed=5).single)


def test_draws_are_chosen_with_the_probabilities_of_their_weights():
    weights = torch.tensor([[0.0, 1.0], [0.25, 0.0], [0.75, 0.0]])
    uniforms = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0))
    chosen = chosen_draws(weights, uniforms)
    shares = torch.bincount(chosen[:, 0], minlength=3) / 20_000
    torch.testing.assert_close(shares, weights[:, 0], rtol=0, atol=0.015)
    assert not chosen[:, 1].any()
    assert chosen_draws(weights, torch.tensor([[0.0, 0.999999]])).tolist() == [[1, 0]]


def test_columns_that_are_constant_up_to_rounding_are_not_magnified(tmp_path: Path):
    rows = ["a,b,c", *(f"0.1,{19.99 + i * 4e-15},{1.7e9 + i}" for i in range(7))]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    table = read_table(tmp_path / "t.csv")
    scales = [column.scale for column in columns_of(table, table, ("a", "b", "c"))]
    assert scales == [1.0, 1.0, pytest.approx(2.0)]


def test_a_column_whose_numbers_are_all_held_out_is_no_mistake(tmp_path: Path):
    (tmp_path / "t.csv").write_text("a,b\n1,\n3,\n5,2\n7,4\n")
    table = read_table(tmp_path / "t.csv")
    assert columns_of(table, rows_of(table, [0, 1]), ("a", "b")) == (Column("a", 2.0, 1.0), Column("b", 3.0, 1.0))
