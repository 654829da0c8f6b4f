"""The curves of runs: one chart a metric, the runs in one plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipelines.report.charts import Chart, Series, line_chart
from pipelines.report.collect import Run, Subject, is_number

NAMES = {  # what a metric is called on the page, and its unit; the order is that of the charts
    "psnr": ("Reconstruction, PSNR", "dB"),
    "bits_per_code": ("Prior", "bits per code"),
    "negative_elbo": ("Negative ELBO", "nats"),
    "loss": ("Loss", ""),
    "nll": ("Negative log-likelihood", "nats per code"),
    "mse": ("Squared error of pixels", ""),
    "reconstruction_loss": ("Reconstruction loss", ""),
    "perceptual": ("Perceptual distance", ""),
    "elbo": ("ELBO", "nats"),
    "log_likelihood": ("log p(x|z)", "nats"),
    "kl": ("KL to the prior", "nats"),
    "perplexity": ("Perplexity of the codes", "codes"),
    "codes_used_share": ("Codes in use", "share"),
    "bits_per_dimension": ("Bits per dimension", "bits"),
    "fid": ("FID", ""),
    "rfid": ("Reconstruction FID", ""),
}
FIRST = ("psnr", "bits_per_code", "negative_elbo", "loss", "perplexity", "kl", "perceptual", "fid", "rfid")
SPLITS = ("train", "validation")


class StageCurves(NamedTuple):
    stage: str
    charts: list[Chart]  # of what is looked at first
    more: list[Chart]  # of all else that was logged


def curves_of(subjects: Sequence[Subject]) -> list[StageCurves]:
    """The charts of each stage that any of the runs has logged. Runs of one stage share each plot."""
    stages = sorted({run.stage for subject in subjects for run in subject.runs})
    found = []
    for stage in stages:
        runs = [(subject, run) for subject in subjects for run in subject.runs if run.stage == stage]
        charts = {name: chart for name in metrics_of([run for _, run in runs]) if (chart := chart_of(name, runs))}
        first = [charts[name] for name in charts if name in FIRST]
        more = [charts[name] for name in charts if name not in FIRST]
        if charts:
            found.append(StageCurves(stage, first or more, more if first else []))
    return found


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """Names of all metrics of runs, known ones first."""
    names = {name for run in runs for line in run.metrics for name, value in line.items() if is_number(value)}
    names -= {"step"}
    return [name for name in NAMES if name in names] + sorted(names - NAMES.keys())


def chart_of(name: str, runs: Sequence[tuple[Subject, Run]]) -> Chart | None:
    """The chart of one metric; None where no run has a number of it."""
    series = []
    for subject, run in runs:
        for split in sorted({line["split"] for line in run.metrics}, key=lambda split: (split not in SPLITS, split)):
            lines = [line for line in run.metrics if line["split"] == split and is_number(line.get(name))]
            label = split if len(runs) == 1 else f"{subject.name}, {split}"
            steps, values = [line["step"] for line in lines], [float(line[name]) for line in lines]
            series.append(Series(label, subject.number, split != "train", steps, values))
    title, unit = NAMES.get(name, (name.replace("_", " ").capitalize(), ""))
    return line_chart(title, series, unit)


def speed_chart(runs: Sequence[tuple[Subject, Run]], samples: str = "images") -> Chart | None:
    """Training samples a second over the steps."""
    series = [
        Series(
            subject.name,
            subject.number,
            False,
            [line["step"] for line in run.timing if is_number(line.get("images_per_second"))],
            [float(line["images_per_second"]) for line in run.timing if is_number(line.get("images_per_second"))],
        )
        for subject, run in runs
    ]
    return line_chart("Training speed", series, f"{samples} per second")
