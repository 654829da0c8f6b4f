"""What a caller asks of a pipeline, in the terms of its prior: classes, prompts, given codes, settings of sampling."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, Protocol, Self, TypeGuard, TypeVar

import numpy as np
import torch

from codes.spec import Codes
from common.errors import UserError
from common.wording import counted
from pipelines.labels import class_named
from stage2_prior.condition import Condition
from stage2_prior.priors import Prior
from stage2_prior.sampling import SamplingConfig
from stage2_prior.text_encoder import EncodedText, TextEncoder

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


def number_asked(labels: Labels, prompts: str | Sequence[str] | None) -> int:
    """How many images there are to be, where only lists of what they show tell. Raises UserError where none does."""
    for asked in (labels, prompts):
        if is_one_for_each(asked):
            return len(asked)
    raise UserError("nothing says how many images to generate; give `num`, or one label for each image")


def to_slice(asked: Asked) -> Asked:
    """As `part_of` can take it: itself, not a copy, where it is a sequence, else a list of it."""
    if not is_one_for_each(asked) or isinstance(asked, Sequence | np.ndarray | torch.Tensor):
        return asked
    return list(asked)


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
    check_one_for_each("label", len(chosen), len(indices))
    for label in chosen:
        check_class(prior, label)
    return chosen


def check_class(prior: KnowsClasses, label: int) -> None:
    if not 0 <= label < prior.num_classes:
        raise UserError(
            f"label {label} is out of range: this model knows the {prior.num_classes} classes "
            f"0 to {prior.num_classes - 1}; choose one of them"
        )


def check_one_for_each(noun: str, given: int, images: int) -> None:
    if given != images:
        raise UserError(f"got {counted(given, noun)} for {counted(images, 'image')}, expected one for each")


def check_labels(prior: KnowsClasses, indices: range, labels: Labels) -> None:
    """Raises UserError where `labels_of` does, without a list of all, which may be of a million images."""
    if prior.num_classes == 0 or not is_one_for_each(labels):
        labels_of(prior, indices[:1], labels)
        return
    check_one_for_each("label", len(labels), len(indices))
    for label in labels:
        labels_of(prior, indices[:1], label if isinstance(label, str) else int(label))


def check_prompts(prior: Prior, indices: range, prompts: str | Sequence[str] | None) -> None:
    """Raises UserError where `prompts_of` does, without a list of all."""
    prompts_of(prior, indices[:1], None if prompts is None else "")
    if is_one_for_each(prompts):
        check_one_for_each("prompt", len(prompts), len(indices))


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
    check_one_for_each("prompt", len(texts), len(indices))
    return texts


class Requested(NamedTuple):
    """What the images of a stream are asked to show, in any number: nothing of it is copied."""

    prior: Prior
    indices: range  # of samples
    labels: Labels
    prompts: str | Sequence[str] | None
    given: Codes | None  # one num h w for each grid

    @classmethod
    def of_images(
        cls,
        prior: Prior,
        first_index: int,
        num: int,
        labels: Labels,
        prompts: str | Sequence[str] | None,
        given: Codes | None,
    ) -> Self:
        """Of `num` images from sample `first_index` on. Raises UserError for labels and prompts that are not the
        prior's."""
        asked = cls(prior, range(first_index, first_index + num), to_slice(labels), to_slice(prompts), given)
        check_labels(prior, asked.indices, asked.labels)
        check_prompts(prior, asked.indices, asked.prompts)
        return asked

    def part(self, some: slice) -> tuple[range, list[int] | None, list[str] | None, Codes | None]:
        """Samples, classes, texts and given codes of some images."""
        indices = self.indices[some]
        labels = labels_of(self.prior, indices, part_of(self.labels, some))
        prompts = prompts_of(self.prior, indices, part_of(self.prompts, some))
        return indices, labels, prompts, self.given and tuple(grid[some] for grid in self.given)


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
    encode_prompts: Callable[[Sequence[str]], EncodedText],
) -> Condition:
    """What the prior goes by, on its device. labels, prompts: b; given: one b h w for each grid; encode_prompts: asked
    where the prior reads vectors of them. Raises UserError where a prior of given codes is given none."""
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
    embeddings, mask = encode_prompts(prompts)
    return replace(condition, embeddings=embeddings, embedding_mask=mask)
