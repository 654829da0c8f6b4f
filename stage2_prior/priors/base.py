"""What all priors are: a distribution over the codes of an image, given a condition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor

from codes.shards import CodeDataset
from codes.spec import Codes, CodeSpec, Grid
from codes.training_images import TrainingImages
from common.errors import UserError
from common.model_io import PretrainedModel
from common.starting import resized_table
from common.tensor_files import load_tensors
from common.wording import an, counted
from stage2_prior.condition import Condition, EmbeddingSpec, TextSpec
from stage2_prior.cross_entropy import nll_of
from stage2_prior.mistakes import flipped, others, replaced
from stage2_prior.stepping import Stepper
from stage2_prior.text import TOKENIZER_NAME, tokenize

TRAINING_IMAGES_NAME = "training_images.safetensors"
NO_CODE = -1e4  # a logit of probability 0, yet finite in every type


class TrainingLoss(NamedTuple):
    loss: Tensor  # b, nats per code: what training minimises
    nll: Tensor | None  # b, nats per code, detached; None where the loss is no likelihood


class Places(NamedTuple):
    """The rows of a table of places, `n d` or `1 n d`: some before the codes, then grid after grid, then spare ones."""

    before: int
    grids: tuple[tuple[int, int], ...]  # height and width of each


def fitted_places(table: Tensor, fresh: Tensor, theirs: Places, ours: Places) -> Tensor | None:
    """A table of places for other grids, each interpolated; None where there are others before them, or not as many."""
    if table.shape == fresh.shape and theirs == ours:
        return table
    if theirs.before != ours.before or len(theirs.grids) != len(ours.grids) or table.shape[-1] != fresh.shape[-1]:
        return None
    rows, begun = table.reshape(-1, table.shape[-1]), fresh.reshape(-1, fresh.shape[-1])
    missing = theirs.before + sum(math.prod(grid) for grid in theirs.grids) - len(rows)
    rows = torch.cat([rows, rows[-1:].expand(max(missing, 0), -1)])
    parts = [rows[: theirs.before]]
    read = theirs.before
    for before, after in zip(theirs.grids, ours.grids, strict=True):
        parts.append(resized_table(rows[read : read + math.prod(before)], before, after))
        read += math.prod(before)
    found = torch.cat(parts)[: len(begun)]  # the last code of all may come before nothing, and have no row
    return torch.cat([found, begun[len(found) :]]).reshape(fresh.shape)


class Prior(PretrainedModel):
    """A distribution over the codes of an image, which tells their `nll`. One that walks the codes in an order is an
    `AutoregressivePrior`."""

    config_class: ClassVar[type]
    reads_text: ClassVar[bool] = False  # may be made with `text` and `embeddings`
    padded_left: ClassVar[bool] = False  # embeddings of a short caption stand at the end of their places
    reads_given: ClassVar[bool] = True  # may be made with `given`
    sampling_steps: ClassVar[int | None] = None  # for an image, unless one says; None: it goes by an order of its own
    fill_order: ClassVar[str | None] = None  # in which it fills in codes, unless one says; None: as it draws them
    takes_windows: ClassVar[bool] = False  # its steppers are `WindowStepper`s
    choice_temperature: ClassVar[float | None] = None  # of the chance in which codes it keeps; None: it chooses none
    takes_orders: ClassVar[bool] = False  # of one grid: goes by the order of a condition that has one
    draws_in_any_order: ClassVar[bool] = False  # samples go by an order each, and its steppers are `GroupStepper`s

    def __init__(
        self,
        config: Any,
        code_spec: CodeSpec,
        num_classes: int,
        *,
        given: Sequence[Grid] = (),
        text: TextSpec | None = None,
        embeddings: EmbeddingSpec | None = None,
        class_names: Sequence[str] | None = None,
        stage1_fingerprint: str | None = None,
        given_fingerprint: str | None = None,
        knows_null_label: bool = True,
    ):
        """num_classes: 0 for a prior without classes. given: grids of codes that are known beforehand, coarser levels
        of a hierarchy or codes of another tokenizer; they come as `Condition.codes`. text, embeddings: what it reads of
        captions, as `Condition.text` and `Condition.embeddings`. The rest are facts of its training
        that travel with it: what the classes are called, whose codes it learned (`PretrainedModel.fingerprint` of the
        autoencoder), whose codes of other pictures it goes by (None: not recorded; levels of its own hierarchy are
        those of its autoencoder), and whether it saw the null label, without which guidance means nothing."""
        super().__init__()
        if class_names is not None and len(class_names) != num_classes:
            raise UserError(f"got {len(class_names)} class names for {num_classes} classes, expected one for each")
        if given and not self.reads_given:
            raise UserError(
                f"{an(self.kind)} prior cannot be given codes, expected another kind, such as transformer; or leave "
                "them out"
            )
        if not self.reads_text and (text or embeddings):
            raise UserError(f"{an(self.kind)} prior reads no text, expected a transformer prior for captions")
        self.config = config
        self.code_spec = code_spec
        self.num_classes = num_classes
        self.given = tuple(given)
        self.text = text
        self.embeddings = embeddings
        self.training_images: TrainingImages | None = None  # None: not recorded
        self.tokenizer: str | None = None  # content of the tokenizer.json that its text is made with
        self.class_names = None if class_names is None else tuple(class_names)
        self.stage1_fingerprint = stage1_fingerprint
        self.given_fingerprint = given_fingerprint
        self.knows_null_label = knows_null_label

    def arguments(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "code_spec": self.code_spec.to_json(),
            "num_classes": self.num_classes,
            "given": [asdict(grid) for grid in self.given],
            "text": self.text and asdict(self.text),
            "embeddings": self.embeddings and asdict(self.embeddings),
            "class_names": None if self.class_names is None else list(self.class_names),
            "stage1_fingerprint": self.stage1_fingerprint,
            "given_fingerprint": self.given_fingerprint,
            "knows_null_label": self.knows_null_label,
        }

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        config = cls.config_class(**arguments.pop("config"))
        given = tuple(Grid(**grid) for grid in arguments.pop("given", ()))
        for name, spec in (("text", TextSpec), ("embeddings", EmbeddingSpec)):
            if arguments.get(name):
                arguments[name] = spec(**arguments[name])
        return cls(config, CodeSpec.from_json(arguments.pop("code_spec")), given=given, **arguments)

    def traits(self) -> list[str]:
        """Of which codes, and what it can be asked for."""
        asked = [counted(self.num_classes, "class", "classes")] if self.num_classes else []
        asked += ["captions"] if self.reads_prompts else []
        asked += [f"given {counted(len(self.given), 'grid')} of codes"] if self.given else []
        return [self.code_spec.describe(), *asked]

    def fitted(self, name: str, weight: Tensor, fresh: Tensor, other: Self) -> Tensor | None:
        if name.endswith(("classes.weight", "class_bias.weight")) and weight.shape[1:] == fresh.shape[1:]:
            return self.classes_of(weight, other)
        ours, theirs = self.place_tables().get(name), other.place_tables().get(name)
        if ours is not None and theirs is not None:
            return fitted_places(weight, fresh, theirs, ours)
        return super().fitted(name, weight, fresh, other)

    def classes_of(self, rows: Tensor, other: Self) -> Tensor:
        """A vector for each class and the null label, k+1 d, from those of `other`: by the classes' names where both
        tell them, else by their numbers. A class that `other` does not know begins as any class."""
        names, theirs = self.class_names, other.class_names
        if names == theirs and self.num_classes == other.num_classes:
            return rows
        if names is not None and theirs is not None:
            chosen = [theirs.index(name) if name in theirs else other.num_classes for name in names]
        else:
            chosen = [min(label, other.num_classes) for label in range(self.num_classes)]
        return rows[[*chosen, other.num_classes]]

    def place_tables(self) -> dict[str, Places]:
        """Of each weight with a vector for each place of the codes, by its name: which rows are which places."""
        return {}

    def documents(self) -> dict[str, str]:
        return {} if self.tokenizer is None else {TOKENIZER_NAME: self.tokenizer}

    def records(self) -> dict[str, Mapping[str, Tensor]]:
        return {} if self.training_images is None else {TRAINING_IMAGES_NAME: self.training_images.tensors()}

    def read_documents(self, folder: Path) -> None:
        if (folder / TOKENIZER_NAME).exists():
            self.tokenizer = (folder / TOKENIZER_NAME).read_text(encoding="utf-8")
        if (path := folder / TRAINING_IMAGES_NAME).exists():
            try:
                self.training_images = TrainingImages.from_tensors(load_tensors(path))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged ({error}); copy it again, or delete it: it is a record") from error

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """`Condition.text` of prompts, `b t`; of an empty one it is that of no text. Raises UserError for a prior that
        reads no text or has lost its tokenizer."""
        if self.text is None:
            raise UserError("this model was not trained on captions and knows no prompt; leave the prompt out")
        if self.tokenizer is None:
            raise UserError(f"this prior reads text, but its folder has no {TOKENIZER_NAME}; copy that from its run")
        return tokenize(self.tokenizer, prompts, self.text.length)

    @classmethod
    def for_codes(cls, config: Any, codes: CodeDataset, num_classes: int, **facts: Any) -> Self:
        """The prior that is to learn these codes, with fresh weights. A prior to which the autoencoder's code vectors
        mean something finds them there. facts: the constructor's."""
        return cls(config, codes.code_spec, num_classes, **facts)

    def nll(self, codes: Codes, condition: Condition) -> Tensor:
        """Negative log-likelihood of each code, `b n` float32, in nats, n in the order of `sequence`."""
        raise NotImplementedError

    def forward(self, codes: Codes, condition: Condition) -> TrainingLoss:
        """What training minimises, by the name under which a wrapped model (DDP, compile) is called."""
        nll = self.nll(codes, condition).mean(dim=1)
        return TrainingLoss(nll, nll.detach())

    def sequence(self, codes: Codes, condition: Condition) -> Tensor:
        """All codes in the order in which this prior walks them, `b n`: grid after grid, each in raster order, unless
        it or the condition says otherwise. Raises UserError when codes or condition have other shapes than this
        prior's."""
        if [tuple(tensor.shape[1:]) for tensor in codes] != [(g.height, g.width) for g in self.code_spec.grids]:
            shapes = " + ".join("x".join(str(side) for side in tensor.shape[1:]) for tensor in codes)
            raise UserError(f"got codes of {shapes}, expected {self.code_spec.describe()}, as the prior was made for")
        self.check(len(codes[0]), condition)
        sequence = torch.cat([rearrange(tensor, "b h w -> b (h w)") for tensor in codes], dim=1)
        return sequence if condition.order is None else sequence.gather(1, condition.order)

    def check(self, batch: int, condition: Condition) -> None:
        """Raises UserError unless the condition is one of `batch` samples of this prior."""
        condition.check(batch, self.num_classes, self.given, self.text, self.embeddings)
        if condition.order is None:
            return
        if not self.takes_orders:
            raise UserError(f"got an order for {an(self.kind)} prior, which has one of its own; leave it out")
        expected = (batch, self.code_spec.codes_per_image)
        if tuple(condition.order.shape) != expected:
            raise UserError(
                f"got an order of shape {tuple(condition.order.shape)}, expected {expected}: the places of all codes "
                "of each sample"
            )

    def training_order(self, batch: int, progress: float, device: torch.device) -> Tensor | None:
        """The order, `b n`, in which a step trains each of its samples; None for the prior's own. progress: share of
        the run's steps that is done before it, 0 to below 1."""
        return None

    def condition_of(self, labels: Tensor, given: Codes | None = None) -> Condition:
        """Of labels `b`, below 0 for any class, and of any text, where the prior knows classes and texts, and of given
        codes, one b h w for each of their grids. Raises UserError for a prior that must be told more."""
        text, embeddings = self.text, self.embeddings
        if self.given and given is None:
            raise UserError("this prior goes by codes of other pictures, which are not at hand here: take another")
        if not self.knows_null_label and (self.reads_prompts or (self.num_classes and bool((labels < 0).any()))):
            raise UserError(
                "this prior was trained with label_dropout=0 and must be told the class or the text of every image; "
                "take images with labels of its classes, or a prior trained with label_dropout=0.1"
            )
        shape = () if embeddings is None else (len(labels), embeddings.length)
        return Condition(
            labels=labels.masked_fill(labels < 0, self.num_classes) if self.num_classes else None,
            codes=given,
            text=labels.new_full((len(labels), text.length), -1) if text else None,
            embeddings=torch.zeros(*shape, embeddings.width, device=labels.device) if embeddings else None,
            embedding_mask=torch.zeros(shape, dtype=torch.bool, device=labels.device) if embeddings else None,
        )

    @property
    def tells_bits(self) -> bool:
        """Whether it tells codes bit by bit, which those of bits alone can be."""
        return False

    @property
    def reads_prompts(self) -> bool:
        return self.text is not None or self.embeddings is not None

    def forget(self, condition: Condition, which: Tensor) -> Condition:
        """Without what guidance follows, label and text, for the samples `which` (b, bool): as a part of the samples is
        trained, and half of a guided batch is drawn."""
        return condition.forget(which, self.num_classes)

    def unconditional(self, condition: Condition) -> Condition:
        """Without what guidance follows, for all samples. Raises UserError when there is nothing to follow."""
        if condition.labels is None and condition.text is None and condition.embeddings is None:
            raise UserError(
                "got guidance for a prior without classes, expected guidance=1: it has no label and no text to follow"
            )
        first = condition.tensors()[0]
        return self.forget(condition, torch.ones(len(first), dtype=torch.bool, device=first.device))

    def doubled_for_guidance(self, condition: Condition) -> Condition:
        """The condition of 2b samples: as given, then `unconditional`."""
        return condition.joined(self.unconditional(condition))

    def grids_of(self, sequence: Tensor) -> tuple[Tensor, ...]:
        """What `sequence` laid in a row, one `b h w` for each grid again: codes, or a number of each code, `b n`."""
        parts = sequence.split([grid.size for grid in self.code_spec.grids], dim=1)
        return tuple(
            rearrange(part, "b (h w) -> b h w", h=grid.height)
            for part, grid in zip(parts, self.code_spec.grids, strict=True)
        )

    def in_raster(self, sequence: Tensor, condition: Condition) -> Tensor:
        """What stands in the order of `condition`, `b n`, in raster order: for `grids_of`."""
        if condition.order is None:
            return sequence
        return torch.empty_like(sequence).scatter_(1, condition.order, sequence)

    def only_grid(self) -> Grid:
        """The grid of a prior that models one. Raises UserError when the codes have several."""
        if len(self.code_spec.grids) != 1:
            raise UserError(
                f"got codes of {len(self.code_spec.grids)} grids ({self.code_spec.describe()}), expected one grid: "
                f"{an(self.kind)} prior models one; take an autoencoder with one, or a transformer prior"
            )
        return self.code_spec.grids[0]


class AutoregressivePrior(Prior):
    """A prior that predicts each code from those before it: `logits` and `stepper`, which agree."""

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        """Logits `b n k` of every code given all codes of earlier steps, in one teacher-forced pass. Where grids differ
        in their vocabulary, k is the largest, and numbers that are no codes of a grid have logits of NO_CODE."""
        raise NotImplementedError

    def stepper(self, batch: int, condition: Condition) -> Stepper:
        """The same logits one step at a time, over the codes of its own grid only, for `batch` samples, with the
        weights as they are now and without dropout."""
        raise NotImplementedError

    @property
    def numbers_kept(self) -> int:
        """That a stepper keeps of the places of one image, keys and values; 0 where it is little."""
        return 0

    @property
    def steps(self) -> int:
        """Calls of a stepper's `next` for a whole image: one for each code, unless a prior predicts many at once."""
        return self.code_spec.codes_per_image

    @property
    def guided_layers(self) -> int:
        """How many of its last layers guidance can be of (`stepper_guided_inside`); 0 where it is of logits alone."""
        return 0

    def stepper_guided_inside(self, batch: int, condition: Condition, guidance: Sequence[float], layer: int) -> Stepper:
        """As a `GuidedStepper`, but guidance, of each step, moves what a layer puts out, counted from the last as 1."""
        raise NotImplementedError

    def nll(self, codes: Codes, condition: Condition) -> Tensor:
        return nll_of(self.logits(codes, condition), self.sequence(codes, condition))

    def forward(self, codes: Codes, condition: Condition, given: Codes | None = None) -> TrainingLoss:
        """See `Prior`. given: what the prior sees in the place of the codes that it is to tell."""
        if given is None:
            return super().forward(codes, condition)
        nll = nll_of(self.logits(given, condition), self.sequence(codes, condition)).mean(dim=1)
        return TrainingLoss(nll, nll.detach())

    def with_mistakes(self, codes: Codes, share: float) -> tuple[Codes, Codes]:
        """For self-correction (Han et al. 2024, arXiv:2412.04431, section 3.4): the codes that a training step is to
        tell, and those that it is given, of which some are others, drawn from all: so a prior learns to go on from
        mistakes, as it makes them when it samples. share: of the codes of each image and grid it is drawn evenly
        between 0 and this. What is to be told stays, where later codes do not depend on what earlier ones left."""
        return codes, tuple(map(replaced, codes, flipped(codes, share), others(self.code_spec, codes)))
