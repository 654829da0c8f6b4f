"""The page, and what is said of priors with a known fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from codes.shards import CodeShardWriter
from codes.spec import CodeSpec, Grid
from common.errors import UserError
from pipelines import TwoStagePipeline
from pipelines.commands.diagnose import DiagnoseConfig, GridFigures, diagnose, evenly, findings, grid_figures
from pipelines.figures import training_shares
from stage2_prior.sampling import SamplingConfig
from tests.pipelines.conftest import make_autoencoder, make_pipeline, make_prior
from tests.pipelines.test_prompts_and_sizes import text_pipeline


def write_codes(
    folder: Path, spec: CodeSpec, splits: tuple[str, ...] = ("train", "validation"), fingerprint: str = ""
) -> Path:
    names = ("class 0", "class 1", "class 2")
    writer = CodeShardWriter(folder, spec, splits, class_names=names, stage1_fingerprint=fingerprint)
    for number in range(len(splits)):
        generator = torch.Generator().manual_seed(number)
        codes = tuple(torch.randint(g.vocabulary, (24, g.height, g.width), generator=generator) for g in spec.grids)
        writer.write(number, codes, torch.arange(24) % 3, [f"{i}.png" for i in range(24)])
    writer.finish()
    return folder


GOOD = GridFigures(
    name="codes", vocabulary=64, frequencies=5.5, train=3.0, validation=3.1, samples=3.0, real_used=0.9,
    sampled_used=0.85, never_sampled=0.06, never_trained=0.05, error=0.01,
)  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({}, "the prior fits its codes"),
        ({"train": 1.5}, "the prior knows its training images by heart: 1.50 bits per code there and 3.10"),
        (
            {"train": 5.2, "validation": 5.3, "samples": 5.3},
            "5.30 bits per code, and their frequencies in training alone need 5.50; train longer",
        ),
        ({"samples": 2.0}, "samples are more predictable than real images, 2.00 bits per code against 3.10"),
        ({"samples": 4.5}, "samples drift into what the prior itself finds improbable, 4.50 bits per code"),
        (
            {"sampled_used": 0.3, "never_sampled": 0.7},
            "70% of the codes that real images use are never sampled, where as many training images lack 5%",
        ),
    ],
)
def test_each_fault_is_found_alone(fault, said):
    (answer,) = findings([GOOD._replace(**fault)], SamplingConfig(), 500)
    assert said in answer


def test_of_few_images_it_says_how_little_they_tell():
    caution, answer = findings([GOOD._replace(error=0.31)], SamplingConfig(), 24)
    assert caution.startswith("take all this with caution: it comes from 24 images of a part, and bits per code of")
    assert "would differ by some 0.31 (standard error)" in caution
    assert answer.startswith("the prior fits its codes")
    assert "caution" not in findings([GOOD], SamplingConfig(), 100)[0]


def test_a_prior_is_held_against_the_frequencies_of_training_not_of_a_few_held_out_codes():
    """384 codes of 256 fit their own frequencies in 6.9 bits a code, and those of training in 7.3."""
    shares = 1 / (torch.arange(256, dtype=torch.float64) + 10)
    generator = torch.Generator().manual_seed(0)
    training, held_out, sampled = (
        torch.multinomial(shares, count, replacement=True, generator=generator).view(-1, 4, 4)
        for count in (64_000, 384, 384)
    )
    counts = training.flatten().bincount(minlength=256)
    bits = {"train": torch.full((24,), 6.4), "validation": torch.full((24,), 6.5), "samples": torch.full((24,), 6.5)}
    figures = grid_figures(
        Grid("codes", 4, 4, 256), bits, counts, trained=training[:24], real=held_out, sampled=sampled
    )
    assert figures.frequencies == pytest.approx(float(-training_shares(counts)[held_out.flatten()].log2().mean()))
    assert figures.frequencies > 7.2
    assert (figures.train, figures.validation, figures.error) == (pytest.approx(6.4), 6.5, 0)
    missing = len(set(held_out.flatten().tolist()) - set(training[:24].flatten().tolist()))
    assert figures.never_trained == pytest.approx(missing / len(held_out.unique()))
    # It saves 0.8 bits a code; held against the entropy of these few codes it would have learned next to nothing.
    said = findings([figures], SamplingConfig(), 24)
    assert not any("little more than how frequent" in answer for answer in said)


def test_settings_that_narrow_the_choice_are_named():
    fault = GOOD._replace(samples=2.0)
    assert (
        "the model samples with temperature=0.5, top_k=3;"
        in findings([fault], SamplingConfig(temperature=0.5, top_k=3), 500)[0]
    )
    assert "its sampling settings are those of training" in findings([fault], SamplingConfig(), 500)[0]


def test_of_several_grids_each_is_named_and_the_least_predictable_too():
    grids = [GOOD._replace(name="top", train=1.0), GOOD._replace(name="bottom", validation=4.9, train=4.9, samples=4.9)]
    overfit, worst = findings(grids, SamplingConfig(), 500)
    assert overfit.startswith("grid 'top': the prior knows its training images by heart")
    assert worst.startswith("grid 'bottom' is the least predictable, 89% of its frequencies' bits")


def test_images_are_taken_from_all_over_a_part():
    assert evenly(3, 10) == [0, 3, 6]
    assert evenly(5, 2) == [0, 1]


def test_the_page_holds_figures_findings_and_pictures(model: Path, tmp_path: Path, capsys):
    codes = write_codes(tmp_path / "codes", make_pipeline().prior.code_spec)
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "split": "train", "bits_per_code": 4.0}\n')
    out = tmp_path / "page.html"
    config = DiagnoseConfig(model=str(model), codes=str(codes), out=str(out), run=str(run), num=20, batch_size=7)
    line = diagnose(config)
    printed = capsys.readouterr().out.splitlines()
    found = "1 finding" if len(printed) == 1 else f"{len(printed)} findings"
    assert line == f"{found} from 20 held-out images and as many samples; the page is {out}"
    assert any("little more than how frequent" in answer for answer in printed)  # random codes, untrained prior
    page = out.read_text()
    assert page.count("data:image/png;base64,") == 3  # real, samples, half real
    assert page.count('data-chart="') == 1  # the curve of the run
    for part in ("Upper half real, lower half sampled", "Training", "<td>codes</td>", "transformer"):
        assert part in page
    assert "src=" not in page.replace('src="data:', "")  # self-contained
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes", "page.html", "run"]


def test_of_several_grids_the_coarse_ones_are_shown_real(tmp_path: Path):
    from stage1_vq.autoencoders import VQVAE2, VQVAE2Config
    from stage1_vq.quantizers import NearestQuantizerConfig

    torch.manual_seed(0)
    quantizer = NearestQuantizerConfig(codebook_size=8, dim=4)
    config = VQVAE2Config(channels=1, width=8, residual_width=8, residual_blocks=1, quantizer=quantizer)
    autoencoder = VQVAE2(config, (16, 16)).eval()
    pipeline = TwoStagePipeline(autoencoder, make_prior(autoencoder, 3))
    folder = pipeline.save_pretrained(tmp_path / "model")
    codes = write_codes(tmp_path / "codes", pipeline.prior.code_spec)
    diagnose(DiagnoseConfig(model=str(folder), codes=str(codes), out=str(tmp_path / "page.html"), num=12))
    top = pipeline.prior.code_spec.grids[0].name
    assert f"Codes of {top} real, the rest sampled" in (tmp_path / "page.html").read_text()


def test_a_model_of_captions_is_diagnosed_without_any(tmp_path: Path):
    pipeline = text_pipeline()
    folder, spec = pipeline.save_pretrained(tmp_path / "model"), pipeline.prior.code_spec
    codes = write_codes(tmp_path / "codes", spec)
    line = diagnose(DiagnoseConfig(model=str(folder), codes=str(codes), out=str(tmp_path / "page.html"), num=6))
    assert "from 6 held-out images and as many samples" in line


def test_codes_of_another_model_are_refused(model: Path, tmp_path: Path):
    other = write_codes(tmp_path / "codes", CodeSpec((Grid("codes", 2, 2, 16),), 16, 16, 1))
    with pytest.raises(UserError, match=r"holds 2x2 codes of 16 .*, and the prior of .* models 4x4 codes of 16"):
        diagnose(DiagnoseConfig(model=str(model), codes=str(other), out=str(tmp_path / "page.html")))


def test_codes_of_another_model_of_the_same_shape_are_refused(model: Path, tmp_path: Path):
    codes = write_codes(tmp_path / "codes", make_pipeline().prior.code_spec, fingerprint="another")
    with pytest.raises(UserError, match=r"codes holds codes of autoencoder another, .*; encode images with this model"):
        diagnose(DiagnoseConfig(model=str(model), codes=str(codes), out=str(tmp_path / "page.html")))
    assert not (tmp_path / "page.html").exists()


def test_codes_without_held_out_images_are_refused(model: Path, tmp_path: Path):
    codes = write_codes(tmp_path / "codes", make_autoencoder().code_spec(), ("train",))
    with pytest.raises(UserError, match="holds no validation images, which the diagnosis compares"):
        diagnose(DiagnoseConfig(model=str(model), codes=str(codes), out=str(tmp_path / "page.html"), num=4))


def test_a_run_without_curves_is_refused(model: Path, tmp_path: Path):
    codes = write_codes(tmp_path / "codes", make_autoencoder().code_spec())
    config = DiagnoseConfig(model=str(model), codes=str(codes), out=str(tmp_path / "p.html"), run=str(tmp_path), num=4)
    with pytest.raises(UserError, match=r"holds no metrics.jsonl of bits per code: name the run folder"):
        diagnose(config)
