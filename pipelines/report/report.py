"""From folders to a page: what can be made of each is made, and what cannot says why in one line."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from common.files import write_text
from common.wording import counted
from pipelines.report.code_sections import check_given_codes, of_codes
from pipelines.report.collect import Subject, subjects_of
from pipelines.report.curves import curves_of, speed_chart
from pipelines.report.facts import facts_of, training_speeds
from pipelines.report.findings import Asked, Findings
from pipelines.report.latent_sections import of_vae
from pipelines.report.latents import VAESamples
from pipelines.report.models import Models, load_models, put_together
from pipelines.report.page import render
from pipelines.report.reconstructions import error_scale
from pipelines.report.samples import Samples
from pipelines.report.settings import commands_of, settings_of


def make_report(given: Sequence[str], asked: Asked, out: Path, own_command: str, say: Callable[[str], None]) -> int:
    """Writes the page and returns its size in bytes. Raises UserError for what is no run and no model, and for test
    images or codes that cannot be opened."""
    pairs = put_together([(subject, load_models(subject, asked.device)) for subject in subjects_of(given)])
    if asked.codes is not None:
        check_given_codes(asked.codes, [models for _, models in pairs])
    found = [findings_of(subject, models, asked, say) for subject, models in pairs]
    subjects = [subject for subject, _ in pairs]
    runs = [(subject, run) for subject in subjects for run in subject.runs]
    stages = sorted({run.stage for _, run in runs})
    speeds = {stage: speed_chart([(s, run) for s, run in runs if run.stage == stage], "samples") for stage in stages}
    page, note = render(
        title=", ".join(subject.name for subject in subjects),
        found=found,
        settings=settings_of(subjects),
        curves=curves_of(subjects),
        speeds={stage: chart for stage, chart in speeds.items() if chart is not None},
        error_scale=error_scale(),
        own_command=own_command,
        made=made_with(),
        seed=asked.seed,
    )
    if note:
        say(f"{note}, to keep the page below 10 MB: name fewer runs, or fewer --num and --samples")
    write_text(out, page)
    return len(page.encode())


def made_with() -> str:
    """When and by what a page was made."""
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    return (
        f"{today}, zellige {version('zellige')}, torch {torch.__version__}, Python {platform.python_version()} on "
        f"{platform.machine()}, {counted(torch.get_num_threads(), 'thread')}"
    )


def findings_of(subject: Subject, models: Models, asked: Asked, say: Callable[[str], None]) -> Findings:
    began = time.perf_counter()
    found = Findings(subject, models)
    if models.of_latents:
        of_vae(found, asked)
    else:
        of_codes(found, asked, lambda text: say(f"{subject.name}: {text}"))
    found.facts = facts_of(found)
    found.speeds += training_speeds(subject)
    drawn = found.samples.num if isinstance(found.samples, Samples) else None
    drawn = found.samples.drawn if isinstance(found.samples, VAESamples) else drawn
    measured = None if asked.data is None else asked.data.path
    found.commands = commands_of(subject, seed=asked.seed, drawn=drawn, measured=measured)
    say(f"{subject.name}: {time.perf_counter() - began:.1f} s")
    return found
