"""Checkpoints that are whole or absent, checked when read: `checkpoints/step_00000500/`.

A checkpoint holds safetensors files and `state.json`; `manifest.json` lists the SHA-256 of each. Nothing is
pickled. Its tensors are whole, one file of them for the model, one for the optimiser, and so on; or, of a run whose
processes have shares of the model, in parts in the folder `shares` (training/sharded_checkpoint.py). Either kind
continues on any number of processes, with shares or without.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.distributed import is_share
from common.errors import UserError
from common.file_names import is_plain
from common.files import atomic_folder, read_json, sha256_of_file
from common.tensor_files import load_tensors, save_tensors

STATE_NAME = "state.json"
MANIFEST_NAME = "manifest.json"
SHARES_NAME = "shares"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    keep_newest: int
    keep_every: int = 0  # steps: checkpoints of their multiples stay for ever; 0: none does

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, good or damaged, in rising order."""
        names = (path.name.removeprefix("step_") for path in self.folder.glob("step_*"))
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Any, best_step: int | None) -> None:
        """Writes the checkpoint of `step`: one file per entry of `tensors`, and `state` as JSON. Then removes all
        checkpoints but the newest `keep_newest`, that of `best_step` and milestones. Raises UserError when the disk is
        full."""
        with atomic_folder(self.path(step)) as folder:
            for name, group in tensors.items():
                save_tensors(group, folder / f"{name}.safetensors")
            complete(folder, state)
        self.remove_others(step, best_step)

    def remove_others(self, step: int, best_step: int | None) -> None:
        """Leaves the newest `keep_newest` checkpoints up to `step`, and that of `best_step`."""
        # Steps beyond this one are damaged (or the run would have continued from them) and must not outlive it.
        here = [other for other in self.steps() if other <= step]
        keep = {*here[-self.keep_newest :], *filter(self.is_milestone, here), best_step}
        for other in self.steps():
            if other not in keep:
                shutil.rmtree(self.path(other))

    def is_milestone(self, step: int) -> bool:
        return self.keep_every > 0 and step % self.keep_every == 0

    def newest_good(self) -> tuple[int | None, list[str]]:
        """Step of the newest undamaged checkpoint, or None where there is no checkpoint; and a line on each
        damaged one that was passed over. Raises UserError when there are checkpoints and all are damaged."""
        complaints: list[str] = []
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if damage is None:
                return step, complaints
            complaints.append(f"checkpoint {self.path(step)} is damaged ({damage})")
        if complaints:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged: {'; '.join(complaints)}; "
                "delete that folder to train from the beginning, or copy a good checkpoint into it"
            )
        return None, []

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files, or None."""
        folder = self.path(step)
        try:
            files = read_json(folder / MANIFEST_NAME)["files"].items()
        except (UserError, KeyError, TypeError, AttributeError):
            return f"{MANIFEST_NAME} is missing or unreadable"
        for name, checksum in files:
            if not (isinstance(name, str) and is_plain(name.removeprefix(f"{SHARES_NAME}/"))):
                return f"{MANIFEST_NAME} names {name!r}, which is no file of it"
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256_of_file(folder / name) != checksum:
                return f"the checksum of {name} differs"
        return None

    def tensors(self, step: int, name: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What `save` was given under this name. Where `like` has a share of a tensor, under its name or what follows a
        `/` in it, they are shares too, whether they were saved as shares or whole, and else whole."""
        folder, like = self.path(step), like or {}
        if SHARES_NAME in (manifest := read_json(folder / MANIFEST_NAME)):
            from training.sharded_checkpoint import read_shares  # both take seconds to import

            if name not in manifest[SHARES_NAME]:
                raise KeyError(f"it has no {name}")
            return read_shares(folder / SHARES_NAME, name, like)
        tensors = load_tensors(folder / f"{name}.safetensors")
        if any(is_share(tensor) for tensor in like.values()):
            from training.sharding import shares_like

            return shares_like(tensors, like)
        return tensors

    def state(self, step: int) -> Any:
        return read_json(self.path(step) / STATE_NAME)


def complete(folder: Path, state: Any, shares: Iterable[str] = ()) -> None:
    """Writes the last files of a checkpoint: `state`, and checksums of all. shares: names of what is saved as such."""
    (folder / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    manifest: dict[str, Any] = {"files": {file.relative_to(folder).as_posix(): sha256_of_file(file) for file in files}}
    if shares:
        manifest[SHARES_NAME] = list(shares)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
