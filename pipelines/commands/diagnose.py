"""`zellige diagnose`: why samples look bad although reconstructions are good. One page of answers.

Stage one is not asked here: the page shows what it makes of real codes, and everything else compares the prior with
these codes: does it fit them, does it fit those it was not trained on, does it use all of them, which level goes wrong.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from PIL import Image
from torch import Tensor

from codes.shard_folder import Split
from codes.shards import CodeDataset
from codes.spec import Codes, Grid
from common.errors import UserError
from common.files import write_text
from common.wording import counted
from pipelines.devices import open_device
from pipelines.figures import FEW, bits_of_codes, frequency_bits, standard_error
from pipelines.pictures import contact_sheet, in_columns, to_pil
from pipelines.prior_requests import prompts_of
from pipelines.report.charts import Chart
from pipelines.report.collect import Subject, read_run
from pipelines.report.curves import chart_of
from pipelines.report.page import page
from pipelines.report.pictures import Picture
from pipelines.stages import check_made_by
from pipelines.two_stage import TwoStagePipeline
from stage2_prior.sampling import SamplingConfig
from training.metrics_log import METRICS_NAME

SHOWN, COLUMNS = 20, 10
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Tells why samples look bad although reconstructions are good: one page of figures, pictures and remedies."""

    model: str  # assembled model, or a hub id
    codes: str  # folder of code shards that the prior was trained on
    out: str = "diagnosis.html"  # the page, with all pictures inside
    run: str | None = None  # run folder of the prior: its curves come onto the page
    num: int = 500  # real images of each part, and samples
    batch_size: int = 64  # images at a time
    seed: int = 0  # of the samples
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        for name in ("num", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected at least 1")


class GridFigures(NamedTuple):
    """Of one grid; all bits are per code."""

    name: str
    vocabulary: int
    frequencies: float  # bits of held-out images under a prior that knows only how frequent codes are in training
    train: float  # bits of training images
    validation: float  # bits of held-out images
    samples: float  # bits of the prior's own samples
    error: float  # standard error of the bits of held-out images
    real_used: float  # share of the vocabulary that so many real images use
    sampled_used: float  # share of the vocabulary that as many samples use
    never_sampled: float  # share of the codes of these real images that no sample has
    never_trained: float  # share of them that as many training images do not have


def diagnose(config: DiagnoseConfig) -> str:
    """Writes the page `config.out`, prints the findings, returns one line. Raises UserError."""
    _, device = open_device(config.device)
    pipeline = TwoStagePipeline.from_pretrained(config.model).to(device)
    datasets = {split: matching_codes(config, split, pipeline) for split in SPLITS}
    parts = {split: real_codes(dataset, config.num, pipeline.device) for split, dataset in datasets.items()}
    codes, labels = parts["validation"]
    count = len(labels)
    sampled, asked = sample_like(pipeline, labels, config)
    bits = {
        "train": bits_of_images(pipeline, *parts["train"], config.batch_size),
        "validation": bits_of_images(pipeline, codes, labels, config.batch_size),
        "samples": bits_of_images(pipeline, sampled, asked, config.batch_size),
    }
    frequent = datasets["train"].counts()
    grids = [
        grid_figures(
            pipeline.prior.code_spec.grids[number],
            {name: of_grids[number] for name, of_grids in bits.items()},
            frequent[number],
            trained=parts["train"][0][number][evenly(count, len(parts["train"][1]))],
            real=codes[number],
            sampled=sampled[number],
        )
        for number in range(len(codes))
    ]
    answers = findings(grids, pipeline.sampling, min(count, len(parts["train"][1])))
    pictures = {
        "Real codes, decoded: what stage one can show": sheet(pipeline, codes),
        "Samples": sheet(pipeline, sampled),
        **partly_real(pipeline, codes, labels, config),
    }
    write_text(Path(config.out), render(config, pipeline, grids, answers, pictures, count))
    for answer in answers:
        print(f"* {answer}")
    return (
        f"{counted(len(answers), 'finding')} from {count} held-out images and as many samples; the page is {config.out}"
    )


def matching_codes(config: DiagnoseConfig, split: Split, pipeline: TwoStagePipeline) -> CodeDataset:
    """One part of the code shards. Raises UserError for codes of something else."""
    dataset = CodeDataset(config.codes, split)
    if dataset.code_spec != pipeline.prior.code_spec:
        raise UserError(
            f"{config.codes} holds {dataset.code_spec.describe()}, and the prior of {config.model} models "
            f"{pipeline.prior.code_spec.describe()}; name the codes that it was trained on"
        )
    check_made_by(dataset, pipeline.autoencoder)
    if not len(dataset):
        raise UserError(f"{config.codes} holds no {split} images, which the diagnosis compares; encode with both parts")
    return dataset


def real_codes(dataset: CodeDataset, num: int, device: torch.device) -> tuple[Codes, Tensor]:
    """Codes and labels of up to `num` real images, evenly spread."""
    chosen = evenly(num, len(dataset))
    batch = dataset.fetch(chosen, chosen)
    return tuple(grid.to(device) for grid in batch["codes"]), batch["labels"].to(device)


def evenly(count: int, among: int) -> list[int]:
    """Up to `count` of the positions 0 to `among` - 1, evenly spread."""
    count = min(count, among)
    return [i * among // count for i in range(count)]


def sample_like(pipeline: TwoStagePipeline, labels: Tensor, config: DiagnoseConfig) -> tuple[Codes, Tensor]:
    """As many samples as there are real images, of the same classes, with the model's own settings."""
    asked = asked_like(pipeline, labels)
    parts = []
    for start in range(0, len(labels), config.batch_size):
        indices = range(start, min(start + config.batch_size, len(labels)))
        classes = None if asked is None else asked[start : indices.stop].tolist()
        parts.append(pipeline.sample(indices, classes, config.seed, prompts=prompts_of(pipeline.prior, indices)))
    sampled = tuple(torch.cat(grids) for grids in zip(*parts, strict=True))
    return sampled, torch.full_like(labels, -1) if asked is None else asked


def asked_like(pipeline: TwoStagePipeline, labels: Tensor) -> Tensor | None:
    """The classes of images, `b`; those without one take turns. None for a prior without classes."""
    if not pipeline.num_classes:
        return None
    turns = torch.arange(len(labels), device=labels.device) % pipeline.num_classes
    return torch.where(labels < 0, turns, labels)


@torch.no_grad()
def bits_of_images(pipeline: TwoStagePipeline, codes: Codes, labels: Tensor, batch_size: int) -> list[Tensor]:
    """Bits per code of each image, `b` for each grid."""
    parts = [
        [
            part.mean(dim=(1, 2))
            for part in bits_of_codes(pipeline.prior, tuple(g[i : i + batch_size] for g in codes), ls)
        ]
        for i, ls in zip(range(0, len(labels), batch_size), labels.split(batch_size), strict=True)
    ]
    return [torch.cat(grid) for grid in zip(*parts, strict=True)]


def grid_figures(
    grid: Grid, bits: dict[str, Tensor], frequent: Tensor, *, trained: Tensor, real: Tensor, sampled: Tensor
) -> GridFigures:
    """bits: of each image, by part; frequent: how often each code occurs in all training images, `k`; then the codes of
    training images, of held-out images and of samples, as many of each if there are."""
    of_trained, of_real, of_sampled = (
        codes.flatten().cpu().bincount(minlength=grid.vocabulary) for codes in (trained, real, sampled)
    )
    used = int((of_real > 0).sum())
    return GridFigures(
        name=grid.name,
        vocabulary=grid.vocabulary,
        frequencies=frequency_bits(of_real, frequent),
        **{name: float(of_images.mean()) for name, of_images in bits.items()},
        error=standard_error(bits["validation"]),
        real_used=used / grid.vocabulary,
        sampled_used=float((of_sampled > 0).double().mean()),
        never_sampled=int(((of_real > 0) & (of_sampled == 0)).sum()) / used,
        never_trained=int(((of_real > 0) & (of_trained == 0)).sum()) / used,
    )


def findings(grids: Sequence[GridFigures], sampling: SamplingConfig, images: int) -> list[str]:
    """What the figures say, each with its remedy. images: how many of each part they come from."""
    found = []
    if images < FEW:
        error = max(grid.error for grid in grids)
        found.append(
            f"take all this with caution: it comes from {images} images of a part, and bits per code of others would "
            f"differ by some {error:.2f} (standard error); a hundred and more tell, if need be by holding out more: "
            "zellige encode --data.validation_share 0.2"
        )
    for grid in grids:
        of = f"grid {grid.name!r}: " if len(grids) > 1 else ""
        if grid.validation - grid.train > 0.05 * grid.frequencies:
            found.append(
                f"{of}the prior knows its training images by heart: {grid.train:.2f} bits per code there and "
                f"{grid.validation:.2f} on held-out ones; stop earlier (train.patience), raise dropout, encode with "
                "--augment_copies, or take a smaller model"
            )
        if grid.validation > 0.9 * grid.frequencies:
            found.append(
                f"{of}the prior has learned little more than how frequent the codes are: {grid.validation:.2f} bits "
                f"per code, and their frequencies in training alone need {grid.frequencies:.2f}; train longer, with a "
                "larger model or another learning rate"
            )
        if grid.samples < 0.8 * grid.validation:
            found.append(
                f"{of}samples are more predictable than real images, {grid.samples:.2f} bits per code against "
                f"{grid.validation:.2f}: {settings_that_narrow(sampling)}; loosen them where samples look flat or alike"
            )
        if grid.samples > 1.15 * grid.validation:
            found.append(
                f"{of}samples drift into what the prior itself finds improbable, {grid.samples:.2f} bits per code "
                f"against {grid.validation:.2f} of real images; lower the temperature, or set top_k or top_p, and "
                "train longer"
            )
        if grid.sampled_used < 0.8 * grid.real_used:
            found.append(
                f"{of}{grid.never_sampled:.0%} of the codes that real images use are never sampled, where as many "
                f"training images lack {grid.never_trained:.0%} of them: "
                f"{settings_that_narrow(sampling)}; if nothing narrows the choice, the prior is trained too little"
            )
    if len(found) == (images < FEW):
        found.append(
            "the prior fits its codes, also those it was not trained on, and samples as it was trained: where samples "
            "still look bad, the whole is too large a task for it; train longer or larger, or take fewer, coarser codes"
        )
    if len(grids) > 1:
        share, name = max((grid.validation / max(grid.frequencies, 1e-9), grid.name) for grid in grids)
        found.append(
            f"grid {name!r} is the least predictable, {share:.0%} of its frequencies' bits: compare the samples whose "
            "coarser codes are real with the plain ones; where they are good the coarse levels are at fault, where "
            "not, this one"
        )
    return found


def settings_that_narrow(sampling: SamplingConfig) -> str:
    """The model's settings that make the choice of codes narrower than it was trained."""
    plain = SamplingConfig()
    names = ("temperature", "top_k", "top_p", "min_p", "guidance")
    changed = [f"{name}={getattr(sampling, name)}" for name in names if getattr(sampling, name) != getattr(plain, name)]
    return f"the model samples with {', '.join(changed)}" if changed else "its sampling settings are those of training"


def partly_real(
    pipeline: TwoStagePipeline, codes: Codes, labels: Tensor, config: DiagnoseConfig
) -> dict[str, Image.Image]:
    """Samples with the coarsest grids real, one more at a time; with the first half real where there is one grid."""
    some = tuple(grid[:SHOWN] for grid in codes)
    asked = asked_like(pipeline, labels)
    chosen = None if asked is None else asked[:SHOWN].tolist()
    shown = {}
    if len(codes) == 1:
        half = some[0].clone()
        half[:, half.shape[1] // 2 :] = -1
        drawn = pipeline.redraw((half,), labels=chosen, seed=config.seed)
        return {"Upper half real, lower half sampled": sheet(pipeline, drawn.codes)}
    for level in range(1, len(codes)):
        known = tuple(grid if i < level else torch.full_like(grid, -1) for i, grid in enumerate(some))
        drawn = pipeline.redraw(known, labels=chosen, seed=config.seed)
        names = ", ".join(grid.name for grid in pipeline.prior.code_spec.grids[:level])
        shown[f"Codes of {names} real, the rest sampled"] = sheet(pipeline, drawn.codes)
    return shown


def sheet(pipeline: TwoStagePipeline, codes: Codes) -> Image.Image:
    images = pipeline.decode(tuple(grid[:SHOWN] for grid in codes), precision=pipeline.sampling.decoding)
    return contact_sheet(in_columns([to_pil(image) for image in images], COLUMNS))


def render(
    config: DiagnoseConfig,
    pipeline: TwoStagePipeline,
    grids: Sequence[GridFigures],
    answers: Sequence[str],
    pictures: dict[str, Image.Image],
    count: int,
) -> str:
    """The page, self-contained."""
    shown = [Picture(picture, title) for title, picture in pictures.items()]
    settings = asdict(pipeline.sampling)
    return page(
        "diagnosis.html",
        ("base.css", "diagnosis.css"),
        ("theme.js", "charts.js"),
        {picture: data_uri(png(picture.image)) for picture in shown},
        model=config.model,
        count=count,
        kind=pipeline.prior.kind,
        codes=pipeline.prior.code_spec.describe(),
        sampling=", ".join(f"{name} {value}" for name, value in settings.items() if value is not None),
        answers=answers,
        grids=[{**grid._asdict(), "uniform": math.log2(grid.vocabulary)} for grid in grids],
        pictures=shown,
        curve=None if config.run is None else curve(Path(config.run)),
    )


def curve(run: Path) -> Chart:
    """The bits per code of the prior's run. Raises UserError where there are none."""
    subject = Subject(str(run), run.name, "a run", (read_run(run),))
    chart = chart_of("bits_per_code", [(subject, subject.runs[0])])
    if chart is None:
        raise UserError(
            f"{run} holds no {METRICS_NAME} of bits per code: name the run folder of `zellige train-stage2`, or leave "
            "run out"
        )
    return chart


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
