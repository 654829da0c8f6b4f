"""The command line, and the lines of Python, that make again what a demo has made."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.demo.drawing import Asked, changed_settings
from pipelines.two_stage import TwoStagePipeline


def command_line(command: str, options: Mapping[str, Any]) -> str:
    """Options that are None are left out."""
    words = ["zellige", command]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def options_of_drawing(pipeline: TwoStagePipeline, asked: Asked) -> dict[str, Any]:
    """What the commands that draw are told besides the model and their images."""
    named = {"label": asked.label, "prompt": asked.prompt, "seed": asked.seed}
    return {**named, **changed_settings(pipeline, asked.sampling)}


def generate_command(model: str, pipeline: TwoStagePipeline, asked: Asked, count: int) -> str:
    """Files equal to the images byte for byte, on the same device."""
    options = {"model": model, "num": count, **options_of_drawing(pipeline, asked), "out": "new"}
    return command_line("generate", options)


def generate_python(model: str, pipeline: TwoStagePipeline, asked: Asked, count: int) -> str:
    """The same codes, and pixels up to rounding."""
    settings = {"labels": asked.label, "prompts": asked.prompt, "seed": asked.seed}
    given = {name: value for name, value in settings.items() if value is not None}
    given |= changed_settings(pipeline, asked.sampling)
    arguments = ", ".join([str(count), *(f"{name}={value!r}" for name, value in given.items())])
    return (
        "from zellige import TwoStagePipeline\n\n"
        f"pipeline = TwoStagePipeline.from_pretrained({model!r})\n"
        f'pipeline.generate({arguments}).save("new")'
    )


def edit_command(
    command: str, model: str, pipeline: TwoStagePipeline, asked: Asked, file: str, options: Mapping[str, Any]
) -> str:
    """Of inpaint and vary. file: the uploaded image, of which a visitor knows the name alone."""
    own = {"model": model, "images": Path(file).name, **options, **options_of_drawing(pipeline, asked), "out": "new"}
    return command_line(command, own)


def walk_command(
    model: str, pipeline: TwoStagePipeline, asked: Asked, files: tuple[str, str], steps: int, redrawn: float
) -> str:
    first, second = (Path(file).name for file in files)
    ends = {"model": model, "first": first, "second": second, "num": steps, "redrawn": redrawn}
    return command_line("interpolate", {**ends, **options_of_drawing(pipeline, asked), "out": "new"})


def latent_command(model: str, seed: int, count: int, pixels: str) -> str:
    shown = None if pixels == "mean" else pixels
    return command_line("generate", {"model": model, "num": count, "seed": seed, "pixels": shown, "out": "new"})


def latent_python(model: str, seed: int, count: int, pixels: str) -> str:
    """The same latents, and pixels up to rounding."""
    shown = "" if pixels == "mean" else f", pixels={pixels!r}"
    return (
        "from zellige import LatentPipeline\n\n"
        f"pipeline = LatentPipeline.from_pretrained({model!r})\n"
        f'pipeline.generate({count}, seed={seed}{shown}).save("new")'
    )
