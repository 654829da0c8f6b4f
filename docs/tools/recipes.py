"""Writes the table of all recipes, docs/reference/recipes.md: `python docs/tools/recipes.py`. A test compares them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "recipes.md"
HEAD = """# Recipes

One YAML file is one complete run: `--config NAME`, or a file of your own. Any field can be given another value by its
path, `--train.batch_size 32`; what a run was made with stands in its `config.yaml`, which is itself a recipe. How they
are read: [command line](../command-line.md#recipes-and-options).
"""
STAGES = {
    "stage1": ("Stage one: images to codes", "train-stage1"),
    "vae": ("Likelihood VAEs: images to latents", "train-vae"),
    "tables": ("Likelihood VAEs of tables", "train-table"),
    "sequences": ("Likelihood VAEs of sequences", "train-sequence"),
    "stage2": ("Stage two: priors", "train-stage2"),
}
SENTENCE = re.compile(r"(?<!et al)\. (?=[A-Z0-9])|; |: (?=[a-z0-9])")


def row(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    recipe: dict[str, Any] = yaml.safe_load(text)
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    model, train = recipe["model"], recipe["train"]
    parts = [model, model.get("tokenizer", {})]
    kinds = [kind for part in parts for kind in (part.get("kind"), part.get("quantizer", {}).get("kind")) if kind]
    size = recipe["data"]["image_size"] if "data" in recipe else None
    cells = [
        f"[`{path.stem}`](../../{path.relative_to(ROOT).as_posix()})",
        ", ".join(f"`{kind}`" for kind in kinds),
        *([] if size is None else [f"{size}x{size}"]),
        f"{train['steps']:,} of {train['batch_size']:,}",
        SENTENCE.split(comment)[0].rstrip("."),
    ]
    return f"| {' | '.join(cells)} |"


def page() -> str:
    parts = [HEAD]
    for stage, (title, command) in STAGES.items():
        paths = sorted((ROOT / "configs" / stage).glob("*.yaml"))
        columns = [
            "recipe",
            "model",
            *(["pixels"] if stage in ("stage1", "vae") else []),
            "steps of samples",
            "what it is",
        ]
        parts.append(f"## {title}\n\n`zellige {command} --config NAME`\n")
        parts.append(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        parts.append("\n".join(map(row, paths)) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
