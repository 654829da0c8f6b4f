"""The commands of the docs with less to do: steps and sizes that take a moment, images that are at hand.

Everything else of a command stays as it is written, and what is put in its place goes through the same parser.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.options import STAGES, default_run, find_recipe

STAGE_OF = {command: stage for stage, (command, _) in STAGES.items()}
AT_HAND = {
    "mnist": "mnist.npz",
    "bundled-mnist": "mnist.npz",
    "cifar10": "cifar10/train",
}  # for sets that are downloaded
FEWER = {
    "--num": 3,
    "--draws": 2,
    "--candidates": 2,
    "--augment_copies": 2,
    "--data.validation_count": 4,
}
LESS = {  # options of commands that are not trainings; those given before them do not count any more
    "encode": ["--workers", "0"],
    "inpaint": ["--variants", "1"],
    "vary": ["--variants", "1"],
    "diagnose": ["--num", "4"],
    "report": ["--num", "4", "--samples", "2"],
}
SMALLER: dict[str, Any] = {  # fields of recipes' models, wherever in them
    "width": 16, "residual_width": 8, "residual_blocks": 1, "blocks": 1, "layers": 1, "depth_layers": 1, "heads": 2,
    "output_blocks": 1, "output_width": 16, "codebook_size": 16, "kmeans_iterations": 1, "norm_groups": 4,
    "z_channels": 8, "given_blocks": 1, "text_vocabulary": 300, "nll_levels": 2, "hidden": [16],
    "widths": [8, 8, 8], "trunk_widths": [8], "components": 2, "iterations": 2,
    "encoder_hidden": 8, "mixtures": 2,
}  # fmt: skip
TRAINING = {
    "steps": 2, "batch_size": 4, "accumulate": 1, "warmup_steps": 0, "log_every": 1, "validate_every": 2,
    "preview_every": 0, "save_every": 2, "workers": 0, "tracker": "none",
}  # fmt: skip


def smaller(words: list[str]) -> list[str]:
    """`zellige` and its arguments with less to do."""
    words = at_hand(words)
    for option, most in FEWER.items():
        if option in words:
            place = words.index(option) + 1
            words[place] = str(min(most, int(words[place])))
    if words[1] in STAGE_OF and "--config" in words and "--help" not in words:
        return [*words, *overrides(words)]
    return [*words, *LESS.get(words[1], [])]


def at_hand(words: list[str]) -> list[str]:
    return [AT_HAND.get(word, word) if before == "--data.path" else word for before, word in pairs(words)]


def pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    return zip(["", *words], words, strict=False)


def overrides(words: list[str]) -> list[str]:
    """Options that make a training small: of its recipe those fields that `SMALLER` names, and the loop's. What is
    given on the command line stays, but for the sizes."""
    recipe = recipe_of(words)
    options: list[str] = []
    if "data" in recipe:
        data = recipe["data"]
        if "--data.path" not in words:
            options += ["--data.path", AT_HAND[data["path"]]]
        if "--data.image_size" not in words and data["image_size"] > 32:
            options += ["--data.image_size", "32"]
        if "validation_count" in data and "--data.validation_count" not in words:
            options += ["--data.validation_count", "4"]
        if "labels_per_class" in data:
            options += ["--data.labels_per_class", "1"]
    replaced = tuple(f"{word.removesuffix('.kind')}." for word in words if word.endswith(".kind"))
    for path, value in fields_of(recipe["model"], "model"):
        if not f"--{path}".startswith(replaced):  # fields of a kind that the command gives another for
            options += [f"--{path}", str(value)]
    for name, value in TRAINING.items():
        options += [f"--train.{name}", str(value)]
    return options


def fields_of(recipe: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            yield from fields_of(value, f"{path}.{name}")
        elif name in SMALLER:
            small = SMALLER[name]
            if isinstance(small, list) and not isinstance(value, list):
                small = small[0]
            yield f"{path}.{name}", small[:1] * len(value) if isinstance(value, list) else small


def recipe_of(words: list[str]) -> dict[str, Any]:
    path = find_recipe(words[words.index("--config") + 1], STAGE_OF[words[1]])
    return yaml.safe_load(Path(path).read_text())


def results_of(words: list[str]) -> list[str]:
    """What a command makes, files and folders."""
    made = [word for before, word in pairs(words) if before == "--out"]
    if words[1] in STAGE_OF and "--config" in words:
        given = [word for before, word in pairs(words) if before == "--run"]
        made += given or [str(default_run(Path(words[words.index("--config") + 1]).stem, STAGE_OF[words[1]]))]
    return made
