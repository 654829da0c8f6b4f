"""Two folders of codes of the same images, of which one tells what is in the other."""

from __future__ import annotations

from pathlib import Path

import torch

from codes.shards import CodeShardWriter
from codes.spec import CodeSpec, Grid
from tests.stage2_prior.tiny import tiny_spec

COLOURS = ("red", "green", "blue", "grey")
MAP = CodeSpec((Grid("map", 2, 2, 4),), 12, 20, 3)


def write_pair(folder: Path, names: list[str] | None = None) -> tuple[Path, Path]:
    """Codes of 48 and 16 images, all of one number each: their colour. A map tells it in its first place; the name
    tells it in a word. names: of the validation images of the map."""
    for part, spec in (("codes", tiny_spec()), ("map", MAP)):
        writer = CodeShardWriter(folder / part, spec, ["train", "validation"], stage1_fingerprint=part)
        for number, count in enumerate((48, 16)):
            colour = torch.randint(4, (count,), generator=torch.Generator().manual_seed(number))
            files = [f"{i:03d}_{COLOURS[c]}.png" for i, c in enumerate(colour.tolist())]
            if part == "map":
                codes = torch.randint(4, (count, 2, 2))
                codes[:, 0, 0] = colour
                files = names if names is not None and number else files
            else:
                codes = colour.view(-1, 1, 1).expand(count, 3, 5)
            writer.write(number, (codes,), torch.full((count,), -1), files)
        writer.finish()
    return folder / "codes", folder / "map"
