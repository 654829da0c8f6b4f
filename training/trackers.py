"""What a run shows to TensorBoard or Weights & Biases: curves, previews, and the settings it was made with.

Both are called without accelerate's trackers. Its TensorBoard tracker, and the `add_hparams` of PyTorch that it calls,
put settings into two new folders at every start, where they are a run of their own beside the curves; its W&B tracker
hands over tensors, which W&B stretches to their own darkest and lightest pixel.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from PIL import Image

from common.files import read_json, write_json
from training.run_folder import flat, plain

TENSORBOARD_FOLDER = "tensorboard"
WANDB_NAME = "wandb.json"  # which run of W&B a run folder is, and what was sent there


class Tracker(Protocol):
    """Where the figures and pictures of one run go, on the main process."""

    def figures(self, split: str, values: Mapping[str, float], step: int) -> None:
        """Values by their names, shown as `train/loss`; split: train, validation or another group of figures."""

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """A picture of mode "L" or "RGB"."""

    def close(self) -> None:
        """Nothing comes after it."""


def open_tracker(kind: str, run: Path, step: int, config: Mapping[str, Any]) -> Tracker | None:
    """The tracker of a run that begins after `step`: a new log at step 0, else the one that the run has. kind: a
    `TrainConfig.tracker`; config: of the whole run, nested."""
    if kind == "tensorboard":
        return TensorBoard(run, step, config)
    return WeightsAndBiases(run, step, config) if kind == "wandb" else None


class TensorBoard:
    """Event files in run/tensorboard. What an earlier session logged after `step` is taken back."""

    def __init__(self, run: Path, step: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run / TENSORBOARD_FOLDER
        before = sorted(folder.glob("events.out.tfevents.*"))
        if (
            step == 0
        ):  # of a session that was killed before its first checkpoint: readers keep the first settings they see
            for file in before:
                file.unlink()
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)
        if step == 0 or not before:
            self._settings(settings_of(config))
        # At a step that the next session takes back if it begins where this one did.
        self.writer.add_text("config", as_code(config), global_step=step + 1)
        self.writer.flush()

    def _settings(self, settings: Mapping[str, bool | float | str]) -> None:
        """To the events of the run itself. Which settings and metrics there are to compare TensorBoard finds out from
        all runs that it shows; had one of them a list of its own, it would go by that."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # `api` itself needs TensorFlow

        file: Any = self.writer.file_writer
        file.add_summary(hparams_pb(dict(settings)), global_step=0)

    def figures(self, split: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{split}/{name}", value, global_step=step)
        self.writer.flush()

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        pixels = np.asarray(picture)  # as bytes: of floats the writer cuts the fraction off
        self.writer.add_image(name, pixels, global_step=step, dataformats="HW" if pixels.ndim == 2 else "HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the project `zellige`, continued where the run folder is.

    W&B takes nothing back, and counts its own steps upwards. So the training's step is a figure of its own, over which
    the others are drawn, and run/wandb.json records up to where each was sent: what a continued run repeats after its
    checkpoint is there already.
    """

    def __init__(self, run: Path, step: int, config: Mapping[str, Any]) -> None:
        import wandb  # type: ignore[import-not-found, unused-ignore]

        self.image = wandb.Image
        self.record = run / WANDB_NAME
        # New at step 0: of a run that was there before nothing could be taken back.
        known = read_json(self.record) if step > 0 and self.record.is_file() else {}
        self.identity: str = known.get("id") or (secrets.token_hex(8) if step == 0 else identity_by_path(run))
        self.sent: dict[str, int] = known.get("sent", {})
        self.run: Any = wandb.init(project="zellige", name=run.name, dir=str(run), id=self.identity, resume="allow")
        self.run.define_metric("*", step_metric="step")
        self.run.config.update(settings_of(config), allow_val_change=True)

    def figures(self, split: str, values: Mapping[str, float], step: int) -> None:
        self._log(split, {f"{split}/{name}": value for name, value in values.items()}, step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._log(name, {name: self.image(picture)}, step)

    def _log(self, what: str, values: Mapping[str, Any], step: int) -> None:
        if step > self.sent.get(what, 0):
            self.run.log({**values, "step": step})
            self.sent[what] = step
            write_json(self.record, {"id": self.identity, "sent": self.sent})

    def close(self) -> None:
        self.run.finish()


def identity_by_path(run: Path) -> str:
    """What builds that kept no record called a run."""
    return hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]


def settings_of(config: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """A nested config as `train.learning_rate: 0.001`; what is neither a number nor text as JSON."""
    leaves = flat(plain(config)) if config else {}
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in leaves.items()
    }


def as_code(config: Mapping[str, Any]) -> str:
    """A config as YAML, set as code in Markdown."""
    text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
    return "".join(f"    {line}\n" for line in text.splitlines())
