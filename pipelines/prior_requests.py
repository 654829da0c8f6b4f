"""What a caller asks of a pipeline, in the terms of its prior: classes, prompts, given codes, settings of sampling."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol, TypeGuard, TypeVar

import numpy as np
import torch

from codes.spec import Codes
from common.errors import UserError
from common.wording import counted
from pipelines.labels import class_named
from stage2_prior.condition import Condition
from stage2_prior.priors import Prior
from stage2_prior.sampling import SamplingConfig
from stage2_prior.text import tokenize
from stage2_prior.text_encoder import TextEncoder

Asked = TypeVar("Asked", bound=int | str | Sequence[Any] | None)
Labels = int | str | Sequence[int | str] | None
"""A class by number or name, for all images, or one for each."""


class KnowsClasses(Protocol):
    """A prior over codes, or a pipeline of latents."""

    @property
    def num_classes(self) -> int: ...  # 0: it knows none

    @property
    def class_names(self) -> tuple[str, ...] | None: ...


# What diffusers calls it, and how the same is said here.
WORDS_OF_DIFFUSERS = {
    "guidance_scale": "guidance",
    "num_inference_steps": "steps",
    "num_images_per_prompt": "num, and one prompt for each or one for all",
    "class_labels": "labels",
    "prompt": "prompts",
    "generator": "seed, and first_index for later images of it",
    "output_type": "pil() of what is made",
    "callback_on_step_end": "stream, which brings batch after batch",
}


def is_one_for_each(asked: int | str | Sequence[Any] | None) -> TypeGuard[Sequence[Any]]:
    """Whether a label or prompt is given for each image, not one for all or none."""
    return not isinstance(asked, int | np.integer | str | None)


def part_of(asked: Asked, images: slice) -> Asked:
    """A label or prompt of some of the images."""
    return asked[images] if is_one_for_each(asked) else asked  # type: ignore[return-value]


def labels_of(prior: KnowsClasses, indices: Sequence[int], labels: Labels = None) -> list[int] | None:
    """The class of each sample, by what `TwoStagePipeline.generate` is given as `labels`; None for a prior without
    classes. Raises UserError for classes that the prior does not have."""
    if prior.num_classes == 0:
        if labels is not None:
            raise UserError("this model has no classes, so a label cannot be chosen; leave the label out")
        return None
    if labels is None:
        return [index % prior.num_classes for index in indices]
    if isinstance(labels, int | np.integer | str):
        labels = [labels] * len(indices)
    chosen = [class_named(prior.class_names, label) if isinstance(label, str) else int(label) for label in labels]
    if len(chosen) != len(indices):
        raise UserError(
            f"got {counted(len(chosen), 'label')} for {counted(len(indices), 'image')}, expected one for each"
        )
    for label in chosen:
        if not 0 <= label < prior.num_classes:
            raise UserError(
                f"label {label} is out of range: this model knows the {prior.num_classes} classes "
                f"0 to {prior.num_classes - 1}; choose one of them"
            )
    return chosen


def prompts_of(prior: Prior, indices: Sequence[int], prompts: str | Sequence[str] | None = None) -> list[str] | None:
    """The text of each sample, by what `TwoStagePipeline.generate` is given as `prompts`; None for a prior without
    text. Raises UserError for a prompt of a prior that knows none."""
    if not prior.reads_prompts:
        if prompts is not None:
            raise UserError("this model was not trained on captions and knows no prompt; leave the prompt out")
        return None
    if prompts is None:
        if not prior.knows_null_label:
            raise UserError("this prior was trained with label_dropout=0 and must be told what to draw; give a prompt")
        prompts = ""
    texts = [prompts] * len(indices) if isinstance(prompts, str) else list(prompts)
    if len(texts) != len(indices):
        raise UserError(
            f"got {counted(len(texts), 'prompt')} for {counted(len(indices), 'image')}, expected one for each"
        )
    return texts


def with_settings(sampling: SamplingConfig, settings: Mapping[str, Any]) -> SamplingConfig:
    """`sampling` with single settings replaced by name. Raises UserError for a name that there is not."""
    known = [field.name for field in fields(SamplingConfig)]
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(known)}"
            hint = f"use {WORDS_OF_DIFFUSERS[name]}" if name in WORDS_OF_DIFFUSERS else hint
            raise UserError(f"there is no setting {name!r} of sampling; {hint}")
    return replace(sampling, **settings)


def text_encoder_of(prior: Prior, source: str | None = None) -> TextEncoder:
    """The encoder whose vectors the prior reads. source: its folder or hub id; left out: as the prior records. Raises
    UserError for a prior that reads none, and for one that it cannot read."""
    spec = prior.embeddings
    if spec is None:
        raise UserError(f"text_encoder={source}, but this model reads no vectors of captions; leave it out")
    source = source or spec.encoder
    if source is None:
        raise UserError(
            "this model reads vectors of captions, but does not record whose; give text_encoder, a folder or a "
            "hub id, or sample with Condition(embeddings=...)"
        )
    encoder = TextEncoder.load(source)
    if encoder.width != spec.width:
        raise UserError(
            f"the text encoder {source} gives vectors of {encoder.width} numbers, expected {spec.width}: those "
            "that the prior was trained with"
        )
    return encoder


def condition_of(
    prior: Prior,
    labels: Sequence[int] | None,
    prompts: Sequence[str] | None,
    given: Codes | None,
    text_encoder: Callable[[], TextEncoder],
) -> Condition:
    """What the prior goes by, on its device. labels, prompts: b; given: one b h w for each grid; text_encoder: asked
    where the prior reads vectors of prompts. Raises UserError where a prior of given codes is given none."""
    if prior.given and given is None:
        grids = " + ".join(f"{grid.height}x{grid.width} codes of {grid.vocabulary}" for grid in prior.given)
        raise UserError(
            f"this model goes by codes of other pictures, {grids}, and got none; give their codes as `given`"
        )
    device = next(prior.parameters()).device
    condition = Condition(None if labels is None else torch.tensor(labels, device=device), given)
    if prompts is None:
        return condition
    if prior.text is not None:
        return replace(condition, text=prior.tokenize(prompts).to(device))
    assert prior.embeddings is not None
    encoder = text_encoder()
    tokens = tokenize(encoder.tokenizer, prompts, prior.embeddings.length)
    embeddings, mask = encoder.encode(tokens.to(device), prior.padded_left)
    return replace(condition, embeddings=embeddings, embedding_mask=mask)
