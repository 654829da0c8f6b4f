"""What is recorded beside the figures, evaluations that are repeated by it, and evaluations on two processes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codes.shards import CodeShardWriter
from codes.spec import CodeSpec, Grid
from common.errors import UserError
from images.datasets import to_float
from pipelines import TwoStagePipeline
from pipelines.cli import main
from pipelines.commands.evaluate import EvaluateConfig, EvaluateDataConfig, evaluate
from pipelines.figures import bits_of_codes
from pipelines.pictures import to_pil
from tests.pipelines.conftest import make_autoencoder, make_pipeline, some_images
from tests.pipelines.latents.test_judging import small_vae
from tests.processes import Processes
from tests.stage2_prior.tiny import tiny_prior

MAP = Grid("map", 2, 2, 8)
NETWORKS = "tests.pipelines.feature_networks"
CLASSIFIER = f"{NETWORKS}:classifier"


@pytest.fixture(autouse=True)
def no_cache_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def evaluation_of(config: EvaluateConfig, folder: Path, name: str = "evaluation.json") -> dict[str, Any]:
    evaluate(replace(config, out=str(folder / name)))
    return json.loads((folder / name).read_text())


def config_of(model: Path, digits: Path, **values: Any) -> EvaluateConfig:
    return EvaluateConfig(
        **{"model": str(model), "data": EvaluateDataConfig(path=str(digits), split="train"), "batch_size": 16, **values}
    )


def test_the_protocol_names_the_images_by_their_pixels_and_the_model_by_its_weights(
    model: Path, digits: Path, tmp_path: Path, capsys
):
    found = evaluation_of(config_of(model, digits, num=20), tmp_path)["protocol"]
    pixels = np.load(digits)["images"][[i * 60 // 20 for i in range(20)]]
    head = b"(1, 16, 16) torch.uint8"
    each = b"".join(hashlib.sha256(head + image.tobytes()).digest() for image in pixels)
    expected = hashlib.sha256(each).hexdigest()
    images = found["images"]
    assert (images["sha256"], images["images"], images["of"]) == (expected, 20, 60)
    assert (images["size"], images["own_size"], images["crop"]) == ([16, 16], "16x16", "center")
    assert "bicubic" in images["filter"]
    pipeline = TwoStagePipeline.from_pretrained(model)
    assert found["model"]["stage1_fingerprint"] == pipeline.autoencoder.fingerprint()
    assert found["model"]["stage2_fingerprint"] == pipeline.prior.fingerprint()
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "8 bits" in found["rounding"]
    printed = capsys.readouterr().out
    assert f"sha256 {expected[:12]}" in printed
    assert "rounding" in printed


def test_against_repeats_every_figure_exactly(model: Path, digits: Path, tmp_path: Path, capsys):
    options: dict[str, Any] = {"samples": 20, "seed": 5, "temperature": 0.5, "top_k": 7, "reference": str(digits)}
    first = evaluation_of(config_of(model, digits, num=33, features=CLASSIFIER, **options), tmp_path)
    assert "fd" in first
    with pytest.raises(UserError, match=r"sets features to .*:classifier, which would import a Python module and run"):
        evaluate(EvaluateConfig(against=str(tmp_path / "evaluation.json")))
    capsys.readouterr()
    assert main(["evaluate", "--against", str(tmp_path / "evaluation.json"), "--features", CLASSIFIER]) == 0
    printed = capsys.readouterr().out
    assert "figures are exactly the same as in" in printed
    assert "33 images" in printed
    assert "temperature 0.5, top_k 7" in printed
    assert "differs" not in printed


def test_against_tells_what_differs_and_why(model: Path, digits: Path, tmp_path: Path, capsys):
    evaluation_of(config_of(model, digits), tmp_path)
    other = make_pipeline()
    with torch.no_grad():
        for weight in other.prior.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    other.save_pretrained(tmp_path / "other")
    against = str(tmp_path / "evaluation.json")
    capsys.readouterr()
    line = evaluate(EvaluateConfig(model=str(tmp_path / "other"), against=against))
    printed = capsys.readouterr().out
    assert line.startswith("4 of 14 ")  # bits per code, pixel and dimension, and those by tables, which it lacks
    assert "model.stage2_fingerprint: was" in printed
    assert "stage1_fingerprint: was" not in printed
    assert "images.sha256: was" not in printed
    record = json.loads((tmp_path / "evaluation.json").read_text())
    del record["protocol"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    for name, edited in (("list", []), ("data", {"data": 5}), ("words", {"model": "m", "samples": "many"})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"protocol": {"asked": edited}}))
    for name, said in (
        ("old.json", "holds no protocol"),
        ("none.json", "there is no such file"),
        ("list.json", "does not say what was asked for; it was edited"),
        ("data.json", "does not say what was asked for; it was edited"),
        ("words.json", "values that no option takes .*; it was edited"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate(EvaluateConfig(against=str(tmp_path / name)))


def test_other_images_in_the_same_place_are_told(model: Path, digits: Path, tmp_path: Path, capsys):
    with np.load(digits) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    copy = tmp_path / "digits.npz"
    np.savez(copy, images=images, labels=labels)
    evaluation_of(config_of(model, copy), tmp_path)
    images[7, 3, 3] ^= 1
    np.savez(copy, images=images, labels=labels)
    line = evaluate(EvaluateConfig(against=str(tmp_path / "evaluation.json")))
    assert "figures differ as in" in line
    assert "images.sha256: was" in capsys.readouterr().out


def test_stage_one_alone_has_figures_of_images_and_codes(digits: Path, tmp_path: Path, model: Path):
    autoencoder = make_autoencoder()
    autoencoder.save_pretrained(tmp_path / "stage1")
    alone = evaluation_of(config_of(tmp_path / "stage1", digits), tmp_path)
    whole = evaluation_of(config_of(model, digits), tmp_path)
    for name in ("psnr", "ssim", "codes_used", "codebook_perplexity", "codebook_size", "codes_counted"):
        assert alone[name] == whole[name], name
    assert "bits_per_code" not in alone
    assert alone["codes_counted"] == 60 * 16
    assert any("stage one alone" in note for note in alone["notes"])


def test_usage_says_of_how_many_codes_of_which_vocabulary_it_is(model: Path, digits: Path, tmp_path: Path):
    found = evaluation_of(config_of(model, digits, num=5), tmp_path)
    with np.load(digits) as arrays:
        images = torch.from_numpy(arrays["images"][[0, 12, 24, 36, 48]])[:, None].float() / 127.5 - 1
    codes = make_pipeline().encode(images)[0].flatten()
    counts = torch.bincount(codes, minlength=16).double()
    shares = counts[counts > 0] / counts.sum()
    assert found["codes_used"] == int((counts > 0).sum()) / 16
    assert (found["codebook_size"], found["codes_counted"]) == (16, 80)
    assert found["codebook_entropy"] == pytest.approx(-float((shares * shares.log2()).sum()))
    assert found["codebook_perplexity"] == pytest.approx(2 ** found["codebook_entropy"])
    assert any("codes_used is of 80 codes only, for a codebook of 16" in note for note in found["notes"])


def pipeline_of_given_codes() -> TwoStagePipeline:
    autoencoder = make_autoencoder()
    facts: dict[str, Any] = {"given": (MAP,), "given_fingerprint": "maps"}
    return TwoStagePipeline(autoencoder, tiny_prior("transformer", 0, autoencoder.code_spec(), **facts))


def test_a_model_of_given_codes_is_judged_with_those_of_the_same_images_by_name(pictures: Path, tmp_path: Path):
    pipeline = pipeline_of_given_codes()
    model = pipeline.save_pretrained(tmp_path / "model")
    maps = torch.randint(8, (3, 2, 2), generator=torch.Generator().manual_seed(0))
    writer = CodeShardWriter(tmp_path / "maps", CodeSpec((MAP,), 16, 16, 3), ["validation"], stage1_fingerprint="maps")
    writer.write(0, (maps,), torch.full((3,), -1), ["2.png", "0.png", "1.png"])  # in another order than the files
    writer.finish()
    config = EvaluateConfig(model=str(model), data=EvaluateDataConfig(path=str(pictures)), given=str(tmp_path / "maps"))
    found = evaluation_of(config, tmp_path)
    images = to_float(torch.stack([torch.from_numpy(np.array(to_pil(image)))[None] for image in some_images()]))
    with torch.no_grad():
        codes, given = pipeline.encode(images), maps[[1, 2, 0]]
        expected = bits_of_codes(pipeline.prior, codes, torch.full((3,), -1), (given,))[0]
    assert found["bits_per_code"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert found["protocol"]["given"]["split"] == "validation"
    with pytest.raises(UserError, match="goes by codes of other pictures, 2x2 codes of 8: give --given"):
        evaluate(replace(config, given=None))
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(pictures / "new.png")
    with pytest.raises(UserError, match=r"has no codes of the image new.png: encode exactly these"):
        evaluate(config)


def test_given_codes_of_a_model_that_goes_by_none_are_refused(model: Path, digits: Path):
    with pytest.raises(UserError, match=r"given=x, but .* goes by no other codes"):
        evaluate(config_of(model, digits, given="x"))


def test_what_is_missing_is_asked_for():
    with pytest.raises(UserError, match=r"^model is left out"):
        evaluate(EvaluateConfig())
    with pytest.raises(UserError, match=r"^data\.path is left out"):
        evaluate(EvaluateConfig(model="x"))


def repeat(*names: str) -> None:
    judge = {"codes": ["--judge", f"{NETWORKS}:corners"], "vae": []}
    for name in names:
        own = ["--features", CLASSIFIER, *judge[name]]
        assert main(["evaluate", "--against", f"{name}.json", "--out", f"{name}_two.json", *own]) == 0


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(
    processes: Processes, model: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small_vae().save_pretrained(tmp_path / "vae")
    options: dict[str, Any] = {"batch_size": 8, "features": CLASSIFIER, "seed": 5}
    of_vae = {"draws": 20, "samples": 20}
    judged = {"samples": 30, "temperature": 0.8, "unrounded": True, "judge": f"{NETWORKS}:corners"}
    one = {
        "codes": evaluation_of(config_of(model, digits, **options, **judged), tmp_path, "codes.json"),
        "vae": evaluation_of(config_of(tmp_path / "vae", digits, **options, **of_vae), tmp_path, "vae.json"),
    }
    assert {"fd", "rfd", "kd", "bits_per_code", "classifier_agreement"} <= one["codes"].keys()
    monkeypatch.chdir(tmp_path)
    said = processes.together(repeat, *one)
    assert [text.count("figures are exactly the same") for text in said] == [2, 0]
    for name, expected in one.items():
        found = json.loads((tmp_path / f"{name}_two.json").read_text())
        assert {**found, "protocol": None} == {**expected, "protocol": None}
