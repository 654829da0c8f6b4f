"""`zellige report`: one page on runs and models that opens from a file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from images.datasets import DataConfig
from images.sources import has_parts
from pipelines.devices import open_device
from pipelines.report.report import Asked, make_report
from pipelines.report.settings import command


@dataclass(frozen=True, kw_only=True)
class ReportDataConfig:
    """Which test images; left out: those that each run held out, where they are at hand."""

    path: str | None = None  # a folder of images, an .npz file or a name such as cifar10
    split: Literal["train", "test"] = "test"  # of an .npz file or a named set; a folder has no such parts


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One self-contained page on runs and models: curves, reconstructions, codebook, samples, what repeats them."""

    runs: tuple[str, ...]  # run folders, models, assembled models or folders of quickstart: side by side
    out: str = "report.html"  # the page, with all pictures inside
    data: ReportDataConfig = field(default_factory=ReportDataConfig)
    codes: str | None = None  # folder of code shards that the prior was trained on; left out: those of the run
    num: int = 200  # test images that are measured, evenly spread
    samples: int = 80  # that are drawn at each setting of the slider; 0: none
    batch_size: int = 64  # images at a time
    seed: int = 0  # of the samples
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("report needs a run or a model, got none; name one or several: zellige report runs/photos")
        for name, least in (("num", 1), ("samples", 0), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}, expected at least {least}")


def report(config: ReportConfig) -> str:
    """Writes the page `config.out` and returns one line. Raises UserError."""
    out = Path(config.out)
    if out.is_dir():
        raise UserError(f"out={out} is a folder, expected a file: give {out / 'report.html'}")
    _, device = open_device(config.device)
    data = None
    if config.data.path is not None:
        split = config.data.split if has_parts(config.data.path) else "train"
        data = DataConfig(path=config.data.path, split=split)
    asked = Asked(data, config.codes, config.seed, config.num, config.samples, config.batch_size, device)
    size = make_report(config.runs, asked, out, own_command(config), print)
    return f"{out}: {size / 1e6:.1f} MB on {', '.join(config.runs)}; open it in a browser"


def own_command(config: ReportConfig) -> str:
    """The command that this config is of."""
    given: dict[str, Any] = {"data.path": config.data.path}
    if config.data.path is not None and config.data.split != "test":
        given["data.split"] = config.data.split
    for one in fields(config):
        if one.name not in ("runs", "data", "device") and getattr(config, one.name) != one.default:
            given[one.name] = getattr(config, one.name)
    return command("report", *config.runs, **given)
