"""The stage-two task by itself, and whole small runs of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from codes.shards import CodeDataset, CodeShardWriter
from codes.spec import CodeSpec, Grid
from codes.training_images import hashes_of
from common.errors import UserError
from common.model_io import load_pretrained
from stage2_prior.companions import CodesInCompany
from stage2_prior.condition import Condition
from stage2_prior.priors import PRIORS, MaskedPrior, Transformer, TransformerConfig
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.train import SamplePreview, Stage2Config, Stage2Task, notes_on_size, train_stage2
from tests.stage2_prior.tiny import CLASSES, TINY, condition_for, random_codes, spec_of, tiny_prior, tiny_spec
from training.loop import TrainConfig
from training.previews import preview_rows

NAMES = ("ash", "birch", "cedar", "dogwood")


def write_codes(
    folder: Path,
    spec: CodeSpec | None = None,
    names: tuple[str, ...] | None = NAMES,
    fingerprint: str = "f00d",
    **told: Any,
) -> Path:
    """48 training and 16 validation images: every code is that of the first, which is the label's or the next one."""
    spec = spec or tiny_spec()
    writer = CodeShardWriter(
        folder, spec, ["train", "validation"], class_names=names, stage1_fingerprint=fingerprint, **told
    )
    for number, count in enumerate((48, 16)):
        labels = torch.arange(count) % CLASSES
        first = labels + torch.randint(2, (count,), generator=torch.Generator().manual_seed(number))
        codes = tuple(first.view(-1, 1, 1).expand(count, g.height, g.width) for g in spec.grids)
        writer.write(number, codes, labels if names else -torch.ones_like(labels), [f"{i}.png" for i in range(count)])
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codes(tmp_path_factory.mktemp("codes") / "codes")


def make_config(kind: str = "transformer", train: dict[str, Any] | None = None, **changes: Any) -> Stage2Config:
    settings: dict[str, Any] = {
        "steps": 60, "batch_size": 16, "learning_rate": 1e-2, "log_every": 10, "validate_every": 20,
        "preview_every": 0, "save_every": 20, "tracker": "none", "workers": 0,
    }  # fmt: skip
    return Stage2Config(model=TINY[kind], train=TrainConfig(**{**settings, **(train or {})}), **changes)


def lines(run: Path, split: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["split"] == split]


# ---- the task -------------------------------------------------------------------------------------------------------


def batch_for(prior: Any, count: int = 6) -> dict[str, Any]:
    return {"codes": random_codes(count, prior), "labels": torch.arange(count) % CLASSES}


def test_the_loss_is_the_mean_nll_and_metrics_are_its_units():
    prior = tiny_prior("transformer")
    batch = batch_for(prior)
    loss, metrics, *_ = Stage2Task(prior, label_dropout=0.0).step(prior, batch, 0)
    expected = prior.nll(batch["codes"], Condition(batch["labels"])).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["bits_per_code"], expected.detach() / math.log(2))
    per_dimension = expected.detach() / math.log(2) * 15 / (12 * 20 * 3)  # 3x5 codes of a 12x20x3 image
    torch.testing.assert_close(metrics["bits_per_dimension"], per_dimension)
    assert loss.requires_grad
    assert not any(value.requires_grad for value in metrics.values())


def test_a_prior_that_knows_nothing_needs_log2_k_bits_per_code():
    prior = tiny_prior("transformer")
    torch.nn.init.zeros_(prior.output.weight)
    metrics = Stage2Task(prior, label_dropout=0.1).validate(prior, batch_for(prior))
    torch.testing.assert_close(metrics["bits_per_code"], torch.full((6,), math.log2(11)))


def test_validation_is_per_sample_and_keeps_every_label():
    prior = tiny_prior("pixelcnn")
    batch = batch_for(prior)
    metrics = Stage2Task(prior, label_dropout=0.9).validate(prior, batch)
    torch.testing.assert_close(metrics["nll"], prior.nll(batch["codes"], Condition(batch["labels"])).mean(1))
    assert {name: value.shape for name, value in metrics.items()} == dict.fromkeys(metrics, torch.Size([6]))
    assert Stage2Task.best_metric in metrics


def test_a_prior_too_large_for_its_codes_is_said_so():
    prior = tiny_prior("transformer")
    weights, codes = sum(weight.numel() for weight in prior.parameters()), prior.code_spec.codes_per_image
    enough = weights // (50 * codes) + 1
    assert notes_on_size(prior, enough) == ()
    (note,) = notes_on_size(prior, 1)
    assert "codes of 1 image: such a prior learns them by heart" in note
    assert note.endswith("MB and more; give a smaller --model.width and --model.layers")


@pytest.mark.parametrize(("width", "named"), [(128, False), (256, True)])
def test_a_recipe_is_named_to_a_prior_that_is_larger_than_its_own(width, named):
    values = yaml.safe_load(Path("configs/stage2/folder_short.yaml").read_text())["model"]
    config = TransformerConfig(**{**values, "kind": "transformer", "width": width})
    (note,) = notes_on_size(Transformer(config, CodeSpec((Grid("codes", 16, 16, 256),), 64, 64), 0), 1)
    assert ("the recipe folder_short has a smaller one, or give" in note) == named


def test_label_dropout_trains_the_null_label_on_its_share_of_samples():
    prior, seen = tiny_prior("transformer"), []

    def model(codes: Any, condition: Condition) -> torch.Tensor:
        seen.append(condition.labels)
        return prior(codes, condition)

    batch = batch_for(prior, 2000)
    torch.manual_seed(0)
    Stage2Task(prior, label_dropout=0.25).step(model, batch, 0)
    dropped = seen[0] == CLASSES
    assert 440 < dropped.sum() < 560
    assert torch.equal(seen[0][~dropped], batch["labels"][~dropped])
    Stage2Task(prior, label_dropout=0.0).step(model, batch, 0)
    assert torch.equal(seen[1], batch["labels"])


def test_images_without_a_class_have_the_null_label():
    prior = tiny_prior("transformer")
    batch = {"codes": random_codes(5, prior), "labels": torch.tensor([0, 1, 2, 3, -1])}
    metrics = Stage2Task(prior, label_dropout=0.0).validate(prior, batch)
    torch.testing.assert_close(metrics["nll"], prior.nll(batch["codes"], condition_for(5, prior)).mean(1))


# ---- whole runs -----------------------------------------------------------------------------------------------------


# Of several grids: priors/test_hierarchical.py, priors/test_var.py, priors/test_infinity.py.
@pytest.mark.parametrize("kind", sorted({*TINY} - {"hierarchical", "var", "infinity"}))
def test_a_run_learns_and_leaves_a_prior_that_knows_what_it_was_trained_on(kind, codes, tmp_path):
    # Which learn from one of many ways to hide codes, or orders, at a time.
    masked = issubclass(PRIORS[kind], MaskedPrior) or PRIORS[kind].draws_in_any_order
    config = make_config(kind, train={"batch_size": 48 if masked else 16})
    result = train_stage2(config, codes, tmp_path / "run")
    assert result.finished
    validation = lines(tmp_path / "run", "validation")
    assert [line["step"] for line in validation] == [20, 40, 60]
    if "maskgit" not in kind:  # whose training loss is no likelihood
        assert {"nll", "bits_per_code", "bits_per_dimension"} <= set(lines(tmp_path / "run", "train")[-1])
    # One bit per image of 15 codes is all that there is to know; an untrained prior needs log2(11) = 3.5 per code.
    assert 1 / 15 - 0.01 < result.metrics["bits_per_code"] < (0.5 if masked else 0.2)
    prior = load_pretrained(tmp_path / "run", PRIORS)
    assert prior.code_spec == tiny_spec()
    assert prior.class_names == NAMES
    assert prior.stage1_fingerprint == "f00d"
    assert prior.knows_null_label
    batch = (torch.full((1, 3, 5), 2),)
    assert prior.nll(batch, Condition(torch.tensor([2]))).sum() < prior.nll(batch, Condition(torch.tensor([0]))).sum()


def test_a_run_without_label_dropout_says_so_in_its_prior(codes, tmp_path):
    train_stage2(make_config(label_dropout=0.0, train={"steps": 1}), codes, tmp_path / "run")
    assert not load_pretrained(tmp_path / "run", PRIORS).knows_null_label


def test_classes_can_be_left_out(codes, tmp_path):
    train_stage2(make_config(num_classes=0, train={"steps": 2}), codes, tmp_path / "run")
    prior = load_pretrained(tmp_path / "run", PRIORS)
    assert (prior.num_classes, prior.class_names) == (0, None)


def test_codes_without_classes_train_a_prior_without_classes(tmp_path):
    codes = write_codes(tmp_path / "codes", names=None)
    result = train_stage2(make_config(train={"steps": 2}), codes, tmp_path / "run")
    assert load_pretrained(tmp_path / "run", PRIORS).num_classes == 0
    assert math.isfinite(result.metrics["bits_per_code"])


def test_the_resolved_config_says_which_codes_and_repeats_the_run(codes, tmp_path):
    config = make_config(train={"steps": 2})
    assert config.grids is None
    first = train_stage2(config, codes, tmp_path / "run")
    resolved = config.resolved(CodeDataset(codes))
    assert (resolved.grids, resolved.num_classes) == ("3x5 codes of 11 (12x20x3 images)", CLASSES)
    assert (resolved.stage1_fingerprint, resolved.codes) == ("f00d", str(codes))
    again = train_stage2(resolved, codes, tmp_path / "again")
    assert again.metrics == first.metrics


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"grids": "3x5 codes of 512"}, r"grids is 3x5 codes of 512 in the config and 3x5 codes of 11 .* in the codes"),
        ({"num_classes": 10}, "num_classes is 10 in the config and 4 in the codes of"),
        ({"stage1_fingerprint": "beef"}, "stage1_fingerprint is beef in the config and f00d in the codes of"),
    ],
)
def test_a_config_that_says_otherwise_than_the_codes_is_refused_before_anything_is_made(
    setting, message, codes, tmp_path
):
    with pytest.raises(UserError, match=message):
        train_stage2(make_config(**setting), codes, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_continues_on_its_codes_and_not_on_those_of_another_autoencoder(tmp_path):
    config, run = make_config(train={"steps": 4, "save_every": 2}), tmp_path / "run"
    codes = write_codes(tmp_path / "a" / "codes")
    train_stage2(config, codes, run)
    longer = replace(config, train=replace(config.train, steps=8))
    assert train_stage2(longer, codes, run).steps_done == 8
    (tmp_path / "a").rename(tmp_path / "b")
    other = write_codes(codes, fingerprint="beef")  # under the same path
    with pytest.raises(UserError, match="stage1_fingerprint"):
        train_stage2(longer, other, run)


def test_codes_of_several_grids_are_refused_before_anything_is_made(tmp_path):
    spec = CodeSpec((Grid("top", 2, 2, 11), Grid("bottom", 4, 4, 11)), 16, 16)
    codes = write_codes(tmp_path / "codes", spec)
    with pytest.raises(UserError, match=r"got codes of 2 grids .*, expected one grid"):
        train_stage2(replace(make_config(), model=TINY["pixelcnn"]), codes, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_codes_without_training_images_are_refused(tmp_path):
    writer = CodeShardWriter(
        tmp_path / "codes", tiny_spec(), ["validation"], class_names=NAMES, stage1_fingerprint="f00d"
    )
    writer.write(0, (torch.zeros(1, 3, 5, dtype=torch.int64),), torch.tensor([0]), ["0.png"])
    writer.finish()
    with pytest.raises(UserError, match="holds no codes of training images"):
        train_stage2(make_config(), tmp_path / "codes", tmp_path / "run")


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_impossible_label_dropout_is_refused(share):
    with pytest.raises(UserError, match=f"label_dropout={share}, expected a share from 0 to below 1"):
        make_config(label_dropout=share)


def test_dropout_is_off_in_validation(codes, tmp_path):
    """The best weights, loaded, give the very bits that the run has reported."""
    model = replace(TINY["transformer"], dropout=0.3, residual_dropout=0.3)
    config = replace(make_config(train={"steps": 4, "validate_every": 4}), model=model)
    result = train_stage2(config, codes, tmp_path / "run")
    prior = Transformer.from_pretrained(tmp_path / "run")
    batch = CodeDataset(codes, "validation").fetch(range(16), range(16))
    bits = Stage2Task(prior, 0.1).validate(prior, batch)["bits_per_code"].mean()
    assert result.metrics["bits_per_code"] == pytest.approx(bits.item(), rel=1e-6)


def test_a_prior_remembers_its_training_images_and_is_the_same_model_without(codes: Path, tmp_path: Path):
    train_stage2(make_config(train={"steps": 1, "ema_decay": 0.9}), codes, tmp_path / "run")
    prior = load_pretrained(tmp_path / "run", PRIORS)
    seen = CodeDataset(codes, "train").fetch(range(48), range(48))["codes"]
    assert np.isin(hashes_of(seen), prior.training_images.hashes).all()
    assert not np.isin(hashes_of([grid + 5 for grid in seen]), prior.training_images.hashes).any()
    again = load_pretrained(prior.save_pretrained(tmp_path / "again"), PRIORS)
    assert np.array_equal(again.training_images.hashes, prior.training_images.hashes)
    (tmp_path / "again" / "training_images.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"training_images.safetensors is damaged: .*; copy it again .*, or delete it"):
        load_pretrained(tmp_path / "again", PRIORS)
    (tmp_path / "again" / "training_images.safetensors").unlink()
    forgetful = load_pretrained(tmp_path / "again", PRIORS)
    assert forgetful.training_images is None
    assert forgetful.fingerprint() == prior.fingerprint()


# ---- previews -------------------------------------------------------------------------------------------------------


class Drawn:
    """Stands for the decoder: keeps what it was asked to draw."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, rows, names, titles):
        self.calls.append((rows, names, titles))
        return torch.zeros(3, 4, 5)


def test_a_preview_shows_samples_of_the_classes_of_real_codes_above_them(codes: Path):
    prior, draw = tiny_prior("transformer", class_names=NAMES), Drawn()
    held_out = CodesInCompany(CodeDataset(codes, "validation"))
    task = Stage2Task(prior, 0.1, samples=SamplePreview(held_out, draw))
    state = torch.get_rng_state()
    with torch.no_grad():
        assert task.preview(prior).shape == (3, 4, 5)
        task.preview(prior)
    assert torch.equal(torch.get_rng_state(), state)  # a preview changes nothing of what is trained
    (rows, names, titles), again = draw.calls
    assert names == ["real codes", "sampled"] * 2
    assert titles == [[name for name in NAMES for _ in range(2)], []] * 2
    chosen = [i for row in preview_rows([i % 4 for i in range(16)]) for i in row]
    real = held_out.fetch(chosen, chosen)["codes"][0]
    assert torch.equal(torch.cat([rows[0][0], rows[2][0]]), real)
    labels = torch.arange(4).repeat_interleave(2).repeat(2)
    expected = sample_codes(prior, range(16), Condition(labels), 0, SamplingConfig())[0]
    assert torch.equal(torch.cat([rows[1][0], rows[3][0]]), expected)
    for row, same in zip(rows, again[0], strict=True):
        assert torch.equal(row[0], same[0])
    assert Stage2Task(prior, 0.1).preview(prior) is None


def test_a_level_is_shown_between_the_real_codes_of_the_others(tmp_path: Path):
    spec, draw = spec_of("hierarchical"), Drawn()
    folder = write_codes(tmp_path / "codes", spec)
    config = make_config("hierarchical", {"steps": 2, "preview_every": 1}, level=1)
    train_stage2(config, folder, tmp_path / "run", draw)
    assert len(list((tmp_path / "run" / "previews").glob("step_*.png"))) == 2
    assert len(draw.calls) == 2
    for rows, names, _ in draw.calls:
        real, sampled = rows[:2]
        assert names[:2] == ["real codes", "sampled"]
        spec.check(sampled)
        assert torch.equal(sampled[0], real[0])
        assert torch.equal(sampled[2], real[2])
        assert not torch.equal(sampled[1], real[1])


def test_previews_go_by_captions_and_given_codes(pair, tmp_path: Path):
    draw, (codes, maps) = Drawn(), pair
    train = {"steps": 60, "preview_every": 60}
    train_stage2(make_config(given=str(maps), train=train), codes, tmp_path / "maps", draw)
    train_stage2(
        make_config(captions="file-names", text_vocabulary=300, text_length=4, train=train),
        codes,
        tmp_path / "text",
        draw,
    )
    assert len(draw.calls) == 2
    for rows, _, titles in draw.calls:
        assert titles == [[], []] * 2
        for real, sampled in (rows[:2], rows[2:]):  # the map and the word tell the one number that all codes are
            assert (real[0] == sampled[0]).float().mean() > 0.9


def test_a_decoder_may_be_named_for_a_run_that_goes_on(codes: Path, tmp_path: Path):
    config = make_config(train={"steps": 2})
    train_stage2(config, codes, tmp_path / "run")
    longer = replace(config, decoder="runs/stage1", train=replace(config.train, steps=3, preview_every=3))
    draw = Drawn()
    assert train_stage2(longer, codes, tmp_path / "run", draw).steps_done == 3
    assert len(draw.calls) == 1


def test_codes_that_are_no_bits_are_not_told_bit_by_bit(tmp_path, capsys):
    config = replace(
        make_config(train={"steps": 1}), model=TransformerConfig(layers=1, width=16, heads=2, bitwise=True)
    )
    for told, message in (
        (False, "no bits, expected those of quantizer.kind=lfq or bsq; leave bitwise out"),
        (True, ""),
    ):
        folder = write_codes(tmp_path / str(told), tiny_spec(vocabulary=16), codes_are_bits=told)
        assert CodeDataset(folder, "train").index.codes_are_bits is told
        if message:
            with pytest.raises(UserError, match=message):
                train_stage2(config, folder, tmp_path / "refused")
        else:
            train_stage2(config, folder, tmp_path / "run")
    assert "does not say whether its codes are bits" not in capsys.readouterr().out
    folder = write_codes(tmp_path / "unknown", tiny_spec(vocabulary=16))
    train_stage2(config, folder, tmp_path / "of_unknown")
    assert "does not say whether its codes are bits" in capsys.readouterr().out
    numbers = write_codes(tmp_path / "plain", tiny_spec(vocabulary=16), codes_are_bits=False)
    train_stage2(make_config(train={"steps": 1}), numbers, tmp_path / "plain_run")  # which tells whole codes
