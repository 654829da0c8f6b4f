"""`zellige quickstart`: both stages on bundled MNIST digits, from nothing to new digits, in minutes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from codes.shards import CodeDataset
from common.errors import Stopped
from common.model_io import load_pretrained
from common.owned_folder import check_owner
from common.processes import process_state
from images.datasets import DataConfig, image_datasets, to_float
from images.encoding import EncodeConfig
from pipelines.options import read_recipe
from pipelines.pictures import Curve, contact_sheet, draw_curves, in_columns, save_png, to_pil
from pipelines.report.findings import Asked
from pipelines.report.report import make_report
from pipelines.report.settings import command
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import AUTOENCODERS
from stage1_vq.encode import encode
from stage1_vq.train import Stage1Config, train_stage1
from stage2_prior.priors import PRIORS
from stage2_prior.sampling import SamplingConfig
from stage2_prior.train import Stage2Config, train_stage2
from training.metrics_log import METRICS_NAME

RECIPE = "mnist_quickstart"
AUGMENT_COPIES = 4  # codes per training digit, shifted by a pixel or so: 4,500 digits are few for a prior
GUIDANCE = 2.0  # towards the class that is asked for
COLUMNS = 10
BATCH_SIZE = 64  # images at a time, for the page
REPORT_IMAGES, REPORT_SAMPLES = 200, 80  # measured, and drawn at each setting, for the page
STOPPED = "stopped; the same command continues"


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Trains both stages on 5,000 bundled MNIST digits and draws new ones: minutes on two CPU cores."""

    run: str = "runs/quickstart"  # folder for everything; what is finished there is not done again


def quickstart(config: QuickstartConfig) -> str:
    """Makes stage1/, codes/, stage2/, model/, three pictures and a page on all of it in `config.run`; returns one line
    of figures.

    Each part is what the command of its name makes, so any can be repeated by hand with another recipe.
    """
    began = time.perf_counter()
    run, state = Path(config.run), process_state()
    check_owner(run, "quickstart", "--run")

    def say(text: str) -> None:
        if state.is_main_process:
            print(text, flush=True)

    stage1, stage1_run = read_recipe("train-stage1", Stage1Config, "stage1", recipe_arguments(run / "stage1"))
    say(f"1/4  zellige train-stage1 --config {RECIPE} --run {stage1_run}: an autoencoder learns its tiles")
    first = train_stage1(stage1, stage1_run)
    if not first.finished:
        raise Stopped(STOPPED)
    codes = run / "codes"
    say(f"2/4  zellige encode --model {stage1_run} --out {codes}: each digit becomes a grid of codes")
    encode(EncodeConfig(model=str(stage1_run), out=str(codes), augment_copies=AUGMENT_COPIES, workers=0))

    stage2, stage2_run = read_recipe("train-stage2", Stage2Config, "stage2", recipe_arguments(run / "stage2"))
    say(
        f"3/4  zellige train-stage2 --config {RECIPE} --codes {codes} --run {stage2_run}: "
        "a prior learns which codes follow which"
    )
    second = train_stage2(stage2, codes, stage2_run)
    if not second.finished:
        raise Stopped(STOPPED)
    model = run / "model"
    say(f"4/4  zellige assemble --stage1 {stage1_run} --stage2 {stage2_run} --out {model}: both become one model")
    if state.is_main_process:
        autoencoder = load_pretrained(stage1_run, AUTOENCODERS)
        prior = load_pretrained(stage2_run, PRIORS)
        TwoStagePipeline(autoencoder, prior, SamplingConfig(guidance=GUIDANCE)).save_pretrained(model)
        pipeline = TwoStagePipeline.from_pretrained(model).to(state.device)
        draw_samples(pipeline, run / "samples.png")
        draw_reconstructions(pipeline, stage1.data, run / "reconstructions.png")
        draw_curves(
            [
                Curve("reconstruction, PSNR in dB", stage1_run / METRICS_NAME, "psnr"),
                Curve("perplexity of the codes", stage1_run / METRICS_NAME, "perplexity"),
                Curve("prior, bits per code", stage2_run / METRICS_NAME, "bits_per_code"),
            ],
            run / "curves.png",
        )
        say("the page: what was learned, in curves and pictures")
        page = run / "report.html"
        asked = Asked(None, None, 0, REPORT_IMAGES, REPORT_SAMPLES, BATCH_SIZE, state.device)
        make_report([str(run)], asked, page, command("report", str(run), out=page), say=lambda text: None)
    state.wait_for_everyone()
    used, vocabulary = codes_in_use(codes)
    minutes = (time.perf_counter() - began) / 60
    return (
        f"PSNR {first.metrics['psnr']:.1f} dB, {used} of {vocabulary} codes in use, "
        f"{second.metrics['bits_per_code']:.2f} bits per code, {minutes:.1f} minutes; "
        f"new digits: {run / 'samples.png'}, "
        f"real ones and their reconstructions: {run / 'reconstructions.png'}; all of it on one page: "
        f"{run / 'report.html'}; more digits: "
        f"zellige generate --model {model} --num 1000 --out {run / 'samples'}"
    )


def recipe_arguments(run: Path) -> list[str]:
    return ["--config", RECIPE, "--run", str(run)]


def draw_samples(pipeline: TwoStagePipeline, path: Path) -> None:
    """New images, a row for each class."""
    names = pipeline.class_names or ()
    labels = [label for label in range(len(names)) for _ in range(COLUMNS)]
    images = pipeline.generate(labels=labels).images
    save_png(contact_sheet(in_columns([to_pil(image) for image in images], COLUMNS), names), path)


def draw_reconstructions(pipeline: TwoStagePipeline, data: DataConfig, path: Path) -> None:
    """Held-out images, each row above the row of their reconstructions."""
    held_out = image_datasets(data, seed=0)[1]
    indices = torch.linspace(0, len(held_out) - 1, 4 * COLUMNS).long().tolist()
    images = to_float(held_out.fetch(indices, indices)["images"])
    pictures = [[to_pil(image) for image in batch] for batch in (images, pipeline.reconstruct(images))]
    rows = [row for pair in zip(*(in_columns(part, COLUMNS) for part in pictures), strict=True) for row in pair]
    save_png(contact_sheet(rows, ["real", "decoded"] * (len(rows) // 2)), path)


def codes_in_use(codes: Path) -> tuple[int, int]:
    """How many different codes the training images were encoded with, and how many there are."""
    dataset = CodeDataset(codes)
    batch = dataset.fetch(range(len(dataset)), range(len(dataset)))
    return len(batch["codes"][0].unique()), dataset.code_spec.grids[0].vocabulary
