"""A script as somebody would write it who checks it by `mypy --strict`, as `make types` does; a test runs it too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import torch
from PIL import Image

import zellige
from zellige import Codes, FitResult, Generated, LatentPipeline, SamplingConfig, TwoStagePipeline


def first_pictures(model: Path, count: int) -> list[Image.Image]:
    """Of any kind of model."""
    pipeline = zellige.from_pretrained(model, device="cpu", revision=None)
    assert_type(pipeline, TwoStagePipeline | LatentPipeline)
    return [picture for batch in pipeline.stream(count, batch_size=2, progress=False) for picture in batch.pil()]


def round_trip(model: Path) -> torch.Tensor:
    """Images that a model has made, through their codes, 4 c H W."""
    pipeline = TwoStagePipeline.from_pretrained(model, dtype=torch.float32)
    assert_type(pipeline, TwoStagePipeline)
    made = pipeline.generate(4, labels=[0, 1, 2, 0], sampling=SamplingConfig(temperature=0.9), progress=False)
    assert_type(made, Generated)
    assert_type(pipeline.stream(2), Iterator[Generated])
    assert_type(made.codes, Codes)
    codes = pipeline.encode(made.images)
    assert_type(pipeline.compress(made.images), bytes)
    return pipeline.decode(codes)


def share(pipeline: TwoStagePipeline | LatentPipeline, hub_id: str) -> str:
    return pipeline.push_to_hub(hub_id, private=True, license="mit", datasets=["ylecun/mnist"])


def train(run: Path) -> FitResult:
    config = zellige.read_config(zellige.Stage1Config, "mnist_quickstart", {"train.steps": 2})
    assert_type(config, zellige.Stage1Config)
    try:
        return zellige.train_stage1(config, run, device="cpu")
    except zellige.UserError as error:
        raise SystemExit(str(error)) from error
