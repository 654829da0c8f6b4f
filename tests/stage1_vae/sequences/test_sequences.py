"""VAEs of texts and drawings: likelihoods written out, decoders that see no later step, data as files have them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vae.objectives import AggressiveConfig, ELBOConfig, ImportanceConfig
from stage1_vae.objectives.terms import elbo, total_kl
from stage1_vae.posteriors import VonMisesFisherConfig
from stage1_vae.priors import UniformSphereConfig
from stage1_vae.sequences.data import (
    END,
    FIRST,
    UNKNOWN,
    SequenceDataConfig,
    Sequences,
    moves_of,
    open_sequences,
    strokes_of,
)
from stage1_vae.sequences.decoders import RecurrentConfig, TransformerConfig
from stage1_vae.sequences.outputs import StrokeOutput, TokenOutput
from stage1_vae.sequences.pictures import picture, polylines, svg
from stage1_vae.sequences.sequence_vae import SequenceVAE, SequenceVAEConfig
from stage1_vae.sequences.train import Stage1SequenceConfig, train_sequence
from training.config import TrainConfig

DECODERS = {
    "recurrent, at the start": RecurrentConfig(hidden=8, latents="start"),
    "recurrent, at each step": RecurrentConfig(hidden=8, latents="each_step"),
    "transformer, added": TransformerConfig(hidden=8, layers=2, heads=2, latents="added"),
    "transformer, as a memory": TransformerConfig(hidden=8, layers=2, heads=2, latents="memory"),
}


def model_of(decoder: Any, *, tokens: bool, **changes: Any) -> SequenceVAE:
    torch.manual_seed(0)
    config = SequenceVAEConfig(latents=3, encoder_hidden=6, decoder=decoder, mixtures=2, **changes)
    model = SequenceVAE(config, 12, list("abcd") if tokens else None).eval()
    with torch.no_grad():
        model.first.copy_(torch.randn_like(model.first))
    return model


def some(*, tokens: bool) -> Tensor:
    """Three sequences of 5, 2 and 3 steps before their ends."""
    if tokens:
        return torch.tensor([[3, 4, 5, 6, 3, END], [4, 4, END, 0, 0, 0], [6, 2, 5, END, 0, 0]])
    chance = np.random.default_rng(0)
    items = [chance.normal(size=(n, 3)).astype(np.float32) for n in (5, 2, 3)]
    for item in items:
        item[:, 2] = item[:, 2] > 0
    return torch.stack([strokes_of(item, 6) for item in items])


# ---- likelihoods ----------------------------------------------------------------------------------------------------


def test_log_p_of_strokes_is_that_of_sketch_rnn_written_out():
    torch.manual_seed(0)
    output, strokes, hidden = StrokeOutput(4, 3), some(tokens=False), torch.randn(3, 6, 4)
    found = output.log_prob(hidden, strokes)
    logits, means, log_scales, correlation, pen = output.parted(hidden)
    for n, length in enumerate((5, 2, 3)):
        total = torch.zeros(())
        for step in range(length + 1):
            total = total + pen[n, step].log_softmax(0)[strokes[n, step, 2:].argmax()]
            if step == length:
                continue
            mixed = torch.zeros(())
            for m in range(3):
                sx, sy = log_scales[n, step, m].exp()
                r = correlation[n, step, m]
                covariance = torch.stack([torch.stack([sx * sx, r * sx * sy]), torch.stack([r * sx * sy, sy * sy])])
                law = torch.distributions.MultivariateNormal(means[n, step, m], covariance)
                mixed = mixed + logits[n, step].softmax(0)[m] * law.log_prob(strokes[n, step, :2]).exp()
            total = total + mixed.log()
        torch.testing.assert_close(found[n], total, atol=1e-4, rtol=1e-4)
    ours = torch.autograd.grad(found[1], output.head.weight, retain_graph=True)[0]
    theirs = torch.autograd.grad(output.log_prob(hidden[1:2, :3], strokes[1:2, :3]).sum(), output.head.weight)[0]
    torch.testing.assert_close(ours, theirs)  # what lies behind the end changes nothing


def test_log_p_of_tokens_ends_with_the_end():
    torch.manual_seed(0)
    output, tokens, hidden = TokenOutput(4, 7), some(tokens=True), torch.randn(3, 6, 4)
    log_p = output.head(hidden)[..., 1:].log_softmax(-1)  # of all tokens but that which fills up
    expected = [
        sum(log_p[n, step, tokens[n, step] - 1] for step in range(length + 1)) for n, length in enumerate((5, 2, 3))
    ]
    torch.testing.assert_close(output.log_prob(hidden, tokens), torch.stack(expected))


def test_moves_are_drawn_from_the_mixture_and_a_temperature_narrows_them():
    torch.manual_seed(0)
    output = StrokeOutput(4, 1)
    hidden = torch.randn(1, 4).expand(60_000, 4)
    _, means, log_scales, correlation, pen = output.parted(hidden[:1])
    drawn = output.draw(hidden, 1.0, torch.Generator().manual_seed(0))
    going = drawn[:, 4] == 0
    covariance = torch.cov(drawn[going, :2].T)
    sx, sy = log_scales[0, 0].exp()
    torch.testing.assert_close(drawn[going, :2].mean(0), means[0, 0], atol=0.03, rtol=0)
    torch.testing.assert_close(covariance[0, 0], sx**2, rtol=0.03, atol=0)
    torch.testing.assert_close(covariance[0, 1], correlation[0, 0] * sx * sy, rtol=0.1, atol=0.01)
    torch.testing.assert_close(drawn[:, 2:].mean(0), pen[0].softmax(-1), atol=0.01, rtol=0)
    cold = output.draw(hidden, 0.25, torch.Generator().manual_seed(0))
    going = cold[:, 4] == 0
    torch.testing.assert_close(cold[going, 0].var(), 0.25 * sx**2, rtol=0.05, atol=0)
    first, again = (output.draw(hidden[:5], 0.0, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    torch.testing.assert_close(first, again)


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_a_step_sees_the_steps_before_it_and_the_latents_alone(name: str, tokens: bool):
    model = model_of(DECODERS[name], tokens=tokens)
    inputs, latents = torch.randn(2, 5, 8), torch.randn(2, 3)
    whole = model.decoder(inputs, latents)
    changed = inputs.clone()
    changed[:, 3:] += torch.randn(2, 2, 8)
    torch.testing.assert_close(model.decoder(changed, latents)[:, :3], whole[:, :3])
    assert (model.decoder(changed, latents)[:, 3:] - whole[:, 3:]).abs().max() > 1e-3
    assert (model.decoder(inputs, latents + 1)[:, 0] - whole[:, 0]).abs().max() > 1e-3
    state, steps = None, []
    for step in range(5):
        told, state = model.decoder.step(inputs[:, step : step + 1], latents, state)
        steps.append(told)
    torch.testing.assert_close(torch.cat(steps, 1), whole)


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_terms_of_a_sequence_do_not_depend_on_others_and_on_padding(name: str, tokens: bool):
    model, sequences = model_of(DECODERS[name], tokens=tokens), some(tokens=tokens)
    noise = torch.randn(2, 3, 3)
    together = model(sequences, noise=noise)
    alone = model(sequences[1:2, :3], noise=noise[:, 1:2])
    torch.testing.assert_close(together.log_weights[:, 1:2], alone.log_weights, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(elbo(together)[1:2], elbo(alone), atol=1e-4, rtol=1e-4)
    (-elbo(together).mean()).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_what_is_drawn_of_a_trained_step_has_the_model_s_probability():
    """Of a model of two tokens and at most two steps: how often each text is drawn, against its likelihood."""
    torch.manual_seed(0)
    model = SequenceVAE(
        SequenceVAEConfig(latents=2, encoder_hidden=4, decoder=DECODERS["recurrent, at the start"]), 3, ["a"]
    )
    model.eval()
    latents = torch.randn(1, 2)
    drawn = model.draw(latents.expand(20_000, -1), 1.0, torch.Generator().manual_seed(0))
    texts = [tuple(one.tolist()) for one in drawn]
    for tokens in ((), (FIRST,), (UNKNOWN,), (FIRST, FIRST)):
        sequence = torch.tensor([[*tokens, END]])
        expected = float(model.log_likelihood(latents[None], sequence).detach().exp())
        assert texts.count(tokens) / 20_000 == pytest.approx(expected, abs=0.01)
    assert all(0 not in text for text in texts)


def test_hidden_steps_change_training_alone():
    model, sequences = model_of(DECODERS["recurrent, at the start"], tokens=True, word_dropout=1.0), some(tokens=True)
    latents = torch.randn(1, 3, 3)
    seen = model.log_likelihood(latents, sequences)
    model.train()
    blind = model.log_likelihood(latents, sequences)
    assert (seen - blind).abs().min() > 1e-4
    other = sequences.clone()
    other[0, 1] = 6  # a step that the decoder is not told
    changed = model.log_likelihood(latents, other) - blind
    assert float(changed[0, 1:].detach().abs().max() if changed.ndim > 1 else 0) < 1e-5


def test_latents_on_a_sphere_and_models_come_back(tmp_path: Path):
    sphere = {"posterior": VonMisesFisherConfig(), "prior": UniformSphereConfig()}
    model, sequences = model_of(DECODERS["transformer, as a memory"], tokens=True, **sphere), some(tokens=True)
    assert torch.isfinite(elbo(model(sequences))).all()
    again = SequenceVAE.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert again.fingerprint() == model.fingerprint()
    assert again.text(np.array([3, 6, 2])) == "ad\N{REPLACEMENT CHARACTER}"
    with pytest.raises(UserError, match="uniform_sphere"):
        SequenceVAEConfig(posterior=VonMisesFisherConfig())
    with pytest.raises(UserError, match="at most 12"):
        model(torch.full((1, 13), 3))


# ---- data -----------------------------------------------------------------------------------------------------------


def test_moves_lead_back_to_the_lines():
    strokes = [[(0.0, 0.0), (1.0, 2.0), (3.0, 2.0)], [(5.0, 5.0), (5.0, 6.0)]]
    moves = moves_of(strokes)
    assert moves.tolist() == [[1, 2, 0], [2, 0, 1], [2, 3, 0], [0, 1, 1]]
    lines = polylines(moves)
    assert [line.tolist() for line in lines] == [[list(point) for point in stroke] for stroke in strokes]
    assert svg(moves).count("<polyline") == 2


def test_a_dot_among_lines_is_a_dot_and_one_before_them_is_left_out():
    dot, line = [(0.0, 0.0)], [(5.0, 5.0), (6.0, 6.0)]
    assert moves_of([dot, line]).tolist() == [[1, 1, 1]]
    moves = moves_of([dot, dot, line, dot, line])
    lines = polylines(moves)
    assert [one.tolist() for one in lines] == [[[0, 0], [1, 1]], [[-5, -5]], [[0, 0], [1, 1]]]
    assert svg(moves).count("<polyline") == 3
    assert np.asarray(picture(moves))[-12:, :12].min() < 50  # the dot, below on the left
    assert moves_of([dot, dot]).shape == (0, 3)


def write_text(folder: Path) -> str:
    path = folder / "lines.txt"
    path.write_text("\n".join(["a b b", "b a", "", "c a b", "a", "b b", "a a", "b"] * 4), encoding="utf-8")
    return str(path)


def test_lines_of_a_text_are_parted_and_numbered(tmp_path: Path):
    config = SequenceDataConfig(path=write_text(tmp_path), unit="word", longest=4, validation_count=8, vocabulary=2)
    training, held_out, vocabulary = open_sequences(config, 0)
    assert vocabulary == ["a", "b"] or vocabulary == ["b", "a"]
    assert (len(training), len(held_out)) == (20, 8)
    assert set(training.numbers).isdisjoint(held_out.numbers)
    batch = training.fetch([0, 1], [5, 6])
    assert batch["sequences"].shape[0] == 2
    assert (batch["sequences"] == END).sum(1).tolist() == [1, 1]
    with pytest.raises(UserError, match="give fewer to hold out"):
        open_sequences(replace(config, validation_count=28), 0)
    with pytest.raises(UserError, match="no sequences are named"):
        open_sequences(SequenceDataConfig(), 0)


def test_drawings_are_read_line_by_line_and_a_bad_line_is_named(tmp_path: Path):
    path = tmp_path / "cats.ndjson"
    drawing = {"word": "cat", "drawing": [[[0, 10, 10], [0, 0, 5]], [[3, 4], [9, 9]]]}
    path.write_text("\n".join([json.dumps(drawing)] * 6), encoding="utf-8")
    config = SequenceDataConfig(path=str(path), longest=10, validation_count=2, stretch=0.3)
    training, held_out, vocabulary = open_sequences(config, 0)
    assert vocabulary is None
    assert training.names == ["cat"] * 4
    first, second, again = (training.fetch([0], [draw])["sequences"] for draw in (1, 2, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    plain = held_out.fetch([0], [1])["sequences"][0]
    assert plain[1, 1] < 0  # y goes upwards
    assert plain[:, 4].tolist() == [0, 0, 0, 0, 1]
    path.write_text(json.dumps(drawing) + '\n{"drawing": [[1]]}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2"):
        open_sequences(config, 0)
    path.write_text(json.dumps(drawing) + '\n{"drawing": [[[1, 2], [NaN, 3]]]}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2: a place of the pen is no finite number"):
        open_sequences(config, 0)
    path.write_text('{"drawing": [[[1, 1], [2, 2]]]}\n' * 6, encoding="utf-8")
    with pytest.raises(UserError, match="the pens of 4 drawings never move"):
        open_sequences(config, 0)
    path.write_text('{"drawing": [[[1], [2]], [[3], [4]]]}\n' + (json.dumps(drawing) + "\n") * 6, encoding="utf-8")
    assert len(open_sequences(config, 0)[0]) == 4  # nothing is drawn by dots alone
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        open_sequences(config, 0)


def test_characters_of_fonts_are_drawings():
    pytest.importorskip("HersheyFonts")
    config = SequenceDataConfig(path="hershey", fonts=("futural", "rowmans"), longest=60, validation_count=10)
    training, held_out, _ = open_sequences(config, 0)
    assert len(training) > 120
    assert "A of rowmans" in training.names + held_out.names
    moves = np.concatenate([item[:, :2] for item in training.items])
    assert float(moves.std()) == pytest.approx(1, abs=0.01)
    with pytest.raises(UserError, match="expected some of"):
        open_sequences(replace(config, fonts=("none",)), 0)


# ---- runs -----------------------------------------------------------------------------------------------------------


def asked(path: str, steps: int, **changes: Any) -> Stage1SequenceConfig:
    settings = {
        "model": SequenceVAEConfig(latents=2, encoder_hidden=8, decoder=RecurrentConfig(hidden=8), mixtures=2),
        "sequences": SequenceDataConfig(path=path, longest=8, validation_count=4),
        "train": TrainConfig(
            steps=steps,
            batch_size=6,
            learning_rate=1e-2,
            workers=0,
            tracker="none",
            schedule="constant",
            warmup_steps=0,
            save_every=5,
            validate_every=5,
            preview_every=0,
        ),
    }
    return Stage1SequenceConfig(**{**settings, **changes})


@pytest.mark.parametrize(
    "objective", [ELBOConfig(free_nats=2.0), ImportanceConfig(draws=3), AggressiveConfig()], ids=lambda one: one.kind
)
def test_a_run_learns_and_goes_on_where_it_stopped(objective: Any, tmp_path: Path):
    text = write_text(tmp_path)
    whole = train_sequence(asked(text, 10, objective=objective), tmp_path / "whole")
    assert whole.metrics["negative_elbo"] < 20
    first = asked(text, 10, objective=objective)
    train_sequence(replace(first, train=replace(first.train, steps=5)), tmp_path / "parted")
    config = tmp_path / "parted" / "config.yaml"
    config.write_text(config.read_text().replace("steps: 5", "steps: 10"))
    train_sequence(first, tmp_path / "parted")
    a, b = (SequenceVAE.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "parted"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_micro_batches_are_parts_of_one_batch(tmp_path: Path):
    found = []
    for parts in (1, 2):
        config = asked(write_text(tmp_path), 3)
        config = replace(config, train=replace(config.train, accumulate=parts)) if parts > 1 else config
        train_sequence(config, tmp_path / str(parts))
        found.append(SequenceVAE.from_pretrained(tmp_path / str(parts) / "model").state_dict())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-5, rtol=1e-3)


def test_kl_is_of_the_posterior(tmp_path: Path):
    model, sequences = model_of(DECODERS["recurrent, at each step"], tokens=False), some(tokens=False)
    posterior = model.posterior(sequences)
    law = torch.distributions.Normal(posterior.mean, posterior.scale)  # type: ignore[attr-defined]
    expected = torch.distributions.kl_divergence(law, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(total_kl(model(sequences)), expected)


def test_batches_are_as_long_as_their_longest():
    data = Sequences([np.array([3, 4], dtype=np.int64), np.array([5], dtype=np.int64)], ["a", "b"], [7, 9])
    assert data.fetch([1], [0])["sequences"].tolist() == [[5, END]]
    assert data.fetch([0, 1], [0, 1])["sequences"].tolist() == [[3, 4, END], [5, END, 0]]
    assert data.fetch([0, 1], [0, 1])["numbers"].tolist() == [7, 9]
