"""Counts: the likelihoods and the four published variants against the public implementation, tables that are refused,
and what denoising and batches mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vae.tables.counts import (
    Category,
    Counts,
    CountsConfig,
    counts_model,
    log_negative_binomial,
    log_zero_inflated,
)
from stage1_vae.tables.data import TableConfig, read_table, rows_of
from tests.golden import golden_vae

# ---- likelihoods ----------------------------------------------------------------------------------------------------


def test_likelihoods_and_their_gradients_are_the_published_ones():
    reference = golden_vae("scvi_zinb")
    counts = reference.inputs["x"].double()
    rate, dispersion, logits = (
        reference.inputs[name].double().requires_grad_() for name in ("mu", "theta", "zi_logits")
    )
    for name, value, leaves in (
        ("nb", log_negative_binomial(counts, rate, dispersion), {"mu": rate, "theta": dispersion}),
        (
            "zinb",
            log_zero_inflated(counts, rate, dispersion, logits),
            {"mu": rate, "theta": dispersion, "zi_logits": logits},
        ),
    ):
        reference.check(f"{name}/log_prob", value)
        gradients = torch.autograd.grad(value.sum(), list(leaves.values()))
        for leaf, gradient in zip(leaves, gradients, strict=True):
            reference.check(f"{name}/grad_{leaf}", gradient)


def test_probabilities_of_all_counts_add_up_to_one():
    counts = torch.arange(4000.0, dtype=torch.float64)
    rate, dispersion, logits = (torch.tensor(value, dtype=torch.float64) for value in (12.0, 0.7, -1.0))
    for log_p in (
        log_negative_binomial(counts, rate, dispersion),
        log_zero_inflated(counts, rate, dispersion, logits),
    ):
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-6)
    assert float((counts * log_negative_binomial(counts, rate, dispersion).exp()).sum()) == pytest.approx(12, rel=1e-5)


# ---- the published model --------------------------------------------------------------------------------------------

OURS = {  # the parts by their public names
    "z_encoder.encoder.fc_layers": "encoder.layers",
    "z_encoder.mean_encoder": "encoder.mean",
    "z_encoder.var_encoder": "encoder.log_variance",
    "l_encoder.encoder.fc_layers": "library_encoder.layers",
    "l_encoder.mean_encoder": "library_encoder.mean",
    "l_encoder.var_encoder": "library_encoder.log_variance",
    "decoder.px_decoder.fc_layers": "decoder",
    "decoder.px_scale_decoder.0": "share",
    "decoder.px_r_decoder": "dispersion_layer",
    "decoder.px_dropout_decoder": "zeros",
    "library_log_means": "library_mean",
    "library_log_vars": "library_variance",
}


def as_ours(name: str) -> str:
    for public, own in OURS.items():
        if name.startswith(public):
            rest = name.removeprefix(public)
            if rest.startswith(".Layer "):  # .Layer 1.0.weight: the linear map, .1 the norm
                place, kind, what = rest.removeprefix(".Layer ").split(".")
                rest = f".{('linear', 'norm')[int(kind)]}.{place}.{what}"
            return own + rest
    return "log_dispersion" if name == "px_r" else name


def as_our_shape(name: str, value: Tensor) -> Tensor:
    if name == "px_r":
        return value[None] if value.ndim == 1 else value.T
    return value[0] if name.startswith("library_log") else value


def rebuilt(config: dict[str, Any], weights: dict[str, Tensor]) -> Counts:
    settings = CountsConfig(
        latents=config["n_latent"],
        hidden=config["n_hidden"],
        layers=config["n_layers"],
        dropout=config["dropout_rate"],
        likelihood=config.get("gene_likelihood", "zinb"),
        dispersion=config.get("dispersion", "gene").replace("-", "_"),
        library="observed" if config["use_observed_lib_size"] else "latent",
        simplex=config.get("latent_distribution") == "ln",
        encode_covariates=config.get("encode_covariates", False),
        norm="layer" if config.get("use_layer_norm") == "both" else "batch",
        log_inputs=config.get("log_variational", True),
    )
    categories = [
        Category(f"category{place}", tuple(map(str, range(size))))
        for place, size in enumerate([config["n_batch"], *config.get("n_cats_per_cov", [])])
    ]
    model = Counts(
        settings,
        [f"gene{i}" for i in range(config["n_input"])],
        [f"known{i}" for i in range(config.get("n_continuous_cov", 0))],
        categories,
        "category0",
    )
    own = {as_ours(name): as_our_shape(name, value) for name, value in weights.items()}
    names = set(model.state_dict())
    # The public model has a library encoder, and layers of dispersion and zeros, also where it does not use them.
    assert {name.split(".")[0] for name in own.keys() - names} <= {"library_encoder", "dispersion_layer", "zeros"}
    model.load_state_dict({name: value for name, value in own.items() if name in names})
    return model


@pytest.mark.parametrize("variant", ["zinb", "zinb_genebatch", "zinb_cell", "nb_observed"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_terms_and_gradients_are_the_published_ones(variant: str, mode: str):
    reference = golden_vae("scvi_vae").variant(variant)
    model = rebuilt(reference.config, reference.weights).train(mode == "train")
    parts = [reference.inputs["X"]]
    parts += [reference.inputs[name].float() for name in ("cont", "batch", "cats") if name in reference.inputs]
    rows = torch.cat(parts, dim=1)
    noise = [reference.inputs[f"{mode}.eps{i}"] for i in (0, 1) if f"{mode}.eps{i}" in reference.inputs]
    terms = model(rows, noise=torch.cat(noise, dim=-1)[None])
    (posterior, *library) = terms.posteriors
    # In training another pass would be one more for the averages of the norms: only one is taken.
    if mode == "eval":
        counts = model.parts(rows)[0]
        sizes = terms.latents[1] if library else counts.sum(-1).log()[None, :, None]
        likelihood = model.likelihood(terms.latents[0], sizes, rows)
        state = terms.latents[0][0]
        found = {
            "z": state.softmax(-1) if model.config.simplex else state,
            "library": sizes[0],
            "px_scale": likelihood.share[0],
            "px_rate": likelihood.rate[0],
            "px_r": likelihood.dispersion.expand_as(likelihood.rate[0:1])[0],
            "log_prob": likelihood.log_prob(counts)[0],
        }
        if likelihood.zero_logits is not None:
            found["px_dropout"] = likelihood.zero_logits[0]
        for name, value in found.items():
            reference.check(f"eval/{name}", value)
    reference.check(f"{mode}/qz_mean", posterior.mean)
    reference.check(f"{mode}/qz_std", posterior.scale)
    kl_z, *kl_library = (group.sum(-1) for group in terms.kl)
    kl_l = kl_library[0] if library else torch.zeros_like(kl_z)
    if library:
        reference.check(f"{mode}/ql_mean", library[0].mean)
        reference.check(f"{mode}/ql_std", library[0].scale)
    reference.check(f"{mode}/kl_z", kl_z)
    reference.check(f"{mode}/kl_l", kl_l)
    reference.check(f"{mode}/reconst_loss", -terms.log_likelihood[0])
    loss = (-terms.log_likelihood[0] + reference.config["kl_weight"] * kl_z + kl_l).mean()
    reference.check(f"{mode}/loss", loss)
    if mode == "train":
        loss.backward()
        model.after_step()
        weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        compared = 0
        for output, expected in reference.outputs.items():
            kind, _, name = output.removeprefix("train/").partition("/")
            if kind == "grad" and as_ours(name) in weights:
                gradient = weights[as_ours(name)].grad
                assert gradient is not None
                torch.testing.assert_close(gradient, as_our_shape(name, expected), rtol=1e-5, atol=reference.atol)
                compared += 1
            elif kind == "after" and as_ours(name) in buffers:
                torch.testing.assert_close(buffers[as_ours(name)], expected, rtol=1e-5, atol=reference.atol)
        assert compared >= 6


# ---- tables ---------------------------------------------------------------------------------------------------------

CELLS = "cell,batch,depth,g1,g2,g3\nc1,x,0.1,3,0,1\nc2,y,0.2,0,5,2\nc3,x,0.3,10,1,0\nc4,y,0.1,2,2,2\nc5,x,0,1,1,9\n"
NAMED = TableConfig(path="t.csv", id_column="cell", batch_column="batch", covariate_columns=("depth",))


def small(folder: Path, cells: str = CELLS, named: TableConfig = NAMED, **given: Any) -> tuple[Counts, Tensor]:
    (folder / "t.csv").write_text(cells)
    table = read_table(folder / "t.csv")
    torch.manual_seed(0)
    model = counts_model(CountsConfig(**{"latents": 2, "hidden": 5, **given}), table, table, named).eval()
    return model, model.rows(table)


def test_rows_are_counts_and_what_is_known(tmp_path: Path):
    model, rows = small(tmp_path)
    assert model.columns == ("g1", "g2", "g3")
    torch.testing.assert_close(rows[1], torch.tensor([0, 5, 2, 0.2, 1]))
    totals = torch.tensor([4.0, 11, 11]).log()
    assert float(model.library_mean[0]) == pytest.approx(float(totals.mean()))
    assert float(model.library_variance[0]) == pytest.approx(float(totals.var(unbiased=False)))
    copy = Counts.from_arguments(**model.arguments())
    copy.load_state_dict(model.state_dict())
    assert copy.fingerprint() == model.fingerprint()


def test_a_batch_without_training_rows_is_known_and_has_the_sizes_of_all(tmp_path: Path):
    (tmp_path / "t.csv").write_text(CELLS)
    table = read_table(tmp_path / "t.csv")
    training = rows_of(table, [0, 2, 4])  # of x alone
    model = counts_model(CountsConfig(latents=2, hidden=5), table, training, NAMED).eval()
    assert model.categories[0].names == ("x", "y")
    rows = model.rows(rows_of(table, [1, 3]))
    totals = torch.tensor([4.0, 11, 11]).log()
    torch.testing.assert_close(model.library_mean, totals.mean().expand(2))
    torch.testing.assert_close(model.library_variance, totals.var(unbiased=False).expand(2))
    assert bool(model(rows).log_weights.isfinite().all())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("3,0,1", "3,0.5,1", "line 2, column 'g2' holds 0.5, expected a count, a whole number from 0 on"),
        ("0,5,2", "0,-5,2", "line 3, column 'g2' holds -5, expected a count"),
        ("10,1,0", "10,,0", "line 4, column 'g2' is empty, expected a number"),
        ("2,2,2", "0,0,0", "line 5 has no counts at all"),
        ("c5,x", "c5,", "line 6, column 'batch' is empty, expected a name"),
    ],
)
def test_what_is_no_count_is_refused_with_its_place(tmp_path: Path, before: str, after: str, message: str):
    with pytest.raises(UserError) as caught:
        small(tmp_path, CELLS.replace(before, after))
    assert message in str(caught.value)


def test_batches_that_the_model_does_not_know_are_refused(tmp_path: Path):
    model, rows = small(tmp_path)
    (tmp_path / "u.csv").write_text(CELLS.replace("c2,y", "c2,q"))
    with pytest.raises(UserError, match=r"line 3, column 'batch' holds 'q', expected one of x, y"):
        model.rows(read_table(tmp_path / "u.csv"))
    with pytest.raises(UserError, match=r"batch=q, expected one of those of this model: x, y"):
        model.denoised(rows, batch="q")
    with pytest.raises(UserError, match="gene_batch needs a batch"):
        small(tmp_path, named=TableConfig(id_column="cell", category_columns=("batch",)), dispersion="gene_batch")
    with pytest.raises(UserError, match="counts have two groups of latents"):
        model(rows, move=lambda *given: given)


@pytest.mark.parametrize("library", ["latent", "observed"])
def test_denoised_rows_add_up_to_their_library_or_to_what_is_asked_for(tmp_path: Path, library: Any):
    model, rows = small(tmp_path, library=library)
    totals = model.denoised(rows).sum(-1)
    if library == "observed":
        torch.testing.assert_close(totals, rows[:, :3].sum(-1))
    else:
        posterior = model.posteriors(rows)[1]
        assert posterior is not None
        torch.testing.assert_close(totals, posterior.mean.exp()[:, 0])
    torch.testing.assert_close(model.denoised(rows, total=100).sum(-1), torch.full((5,), 100.0))
    as_x, as_y = model.denoised(rows, batch="x"), model.denoised(rows, batch="y")
    own = rows[:, -1:] == 0
    torch.testing.assert_close(torch.where(own, as_x, as_y), model.denoised(rows))
    assert not torch.allclose(as_x, as_y)


def test_latents_do_not_know_the_batch_unless_the_encoder_is_told(tmp_path: Path):
    for told in (False, True):
        model, rows = small(tmp_path, encode_covariates=told)
        other = rows.clone()
        other[:, -1] = 1 - other[:, -1]
        assert torch.equal(model.encode(rows), model.encode(other)) != told


def test_surplus_zeros_lower_the_mean():
    from stage1_vae.tables.counts import CountsLikelihood

    rate = torch.tensor([8.0])
    likelihood = CountsLikelihood(rate, torch.ones(1), torch.tensor([math.log(3)]), rate)
    assert float(likelihood.mean) == pytest.approx(2)


@pytest.mark.parametrize("dispersion", ["gene", "gene_cell"])
def test_the_generator_is_all_but_the_encoders(tmp_path: Path, dispersion: Any):
    model, rows = small(tmp_path, dispersion=dispersion)
    generator = {id(weight) for weight in model.generator_parameters()}
    terms = model(rows)  # p(x|z) with the latents given reaches the generator alone
    states, sizes = (latents.detach() for latents in terms.latents)
    model.likelihood(states, sizes, rows).log_prob(model.parts(rows)[0]).sum().backward()
    assert {id(weight) for weight in model.parameters() if weight.grad is not None} == generator
