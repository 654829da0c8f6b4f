"""The stage-two task: a prior learns which codes follow which."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from codes.shard_folder import Split
from codes.shards import CodeDataset
from codes.spec import Codes
from codes.training_images import TrainingImages
from common.draws import uniform
from common.errors import UserError
from common.files import sha256_of_file
from common.model_io import PretrainedModel, load_pretrained
from common.short_repr import changes
from common.starting import freeze, take_weights
from common.wording import an, counted
from stage2_prior.companions import CodesInCompany, Texts
from stage2_prior.condition import Condition, EmbeddingSpec, TextSpec
from stage2_prior.priors import PRIORS, VAR, AutoregressivePrior, HierarchicalConfig, Prior, PriorConfig
from stage2_prior.priors.hierarchical import prior_of_level
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.text import FILE_NAMES, captions_of, read_tokenizer, tokenize, train_tokenizer, vocabulary_of
from stage2_prior.text_encoder import TextEncoder
from training.loop import FitResult, TrainConfig, fit, in_words
from training.previews import preview_rows
from training.run_folder import RunFacts, check_stage, defaults_of, has_begun
from training.task import Batch, Companion, Evaluation, Guard, StepOutput

STAGE = "stage two"
MOST_WEIGHTS_PER_CODE = 50  # of a prior for its training codes, before a note says so
WEIGHTS_OF_FOLDER_SHORT = 1e6  # about: what is larger finds a smaller one in that recipe
PREVIEW_SEED = 0
EVALUATED_AT_ONCE = 64  # images


@dataclass(frozen=True, kw_only=True)
class Stage2Config:
    """One complete stage-two run: a prior, codes, and how to train."""

    model: PriorConfig
    train: TrainConfig
    codes: str | None = None  # folder of code shards that `zellige encode` wrote
    level: int | None = None  # of a hierarchical prior: train this level alone, 0 the coarsest; left out: all as one
    given: str | None = None  # folder of other code shards of the same images, which the prior is to go by
    captions: str | None = None  # .csv or .jsonl file (file, caption), or `file-names`: the words in the images' names
    tokenizer: str | None = None  # tokenizer.json or hub id; left out: one trained on the captions
    text_encoder: str | None = None  # folder or hub id of a text encoder whose vectors are read in place of tokens
    text_vocabulary: int = 1024  # tokens of a tokenizer that is trained here
    text_length: int = 64  # tokens of a caption; longer ones are cut
    decoder: str | None = None  # autoencoder that made the codes, run or model folder: previews show samples as images
    label_dropout: float = 0.1  # share of samples that train without label and text, as guidance needs it; 0 = none
    start_from: str | None = None  # run or model folder of a prior of this kind whose weights this one begins with
    frozen: tuple[str, ...] = ()  # parts of the model that do not learn
    flipped_codes: float = 0.0  # most of the codes given in training that are others (self-correction); 0 = none
    # The rest comes from the code shards and is recorded in the run; a value given here must agree with them.
    grids: str | None = None  # of the codes, such as `8x8 codes of 512`
    num_classes: int | None = None  # of the images; 0 = train without classes, as with captions unless given here
    stage1_fingerprint: str | None = None  # of the autoencoder that made the codes
    given_grids: str | None = None  # of the codes in `given`
    given_fingerprint: str | None = None  # of the autoencoder that made those
    tokenizer_fingerprint: str | None = None  # SHA-256 of the tokenizer.json

    __repr__ = changes

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout < 1:
            raise UserError(f"label_dropout={self.label_dropout}, expected a share from 0 to below 1; 0.1 is usual")
        if not 0 <= self.flipped_codes < 1:
            raise UserError(
                f"flipped_codes={self.flipped_codes}, expected a share from 0 to below 1; 0.3 is the paper's"
            )
        if self.flipped_codes and not issubclass(PRIORS[self.model.kind], AutoregressivePrior):
            raise UserError(
                f"flipped_codes={self.flipped_codes} for {an(self.model.kind)} prior, expected 0: self-correction is "
                "for priors that go on from the codes they drew; leave it out, or take another kind, such as "
                "transformer"
            )
        for name in ("tokenizer", "text_encoder"):
            if getattr(self, name) is not None and self.captions is None:
                raise UserError(
                    f"{name}={getattr(self, name)} without captions, expected both or none; give --captions"
                )
        if self.tokenizer is not None and self.text_encoder is not None:
            raise UserError(
                f"tokenizer={self.tokenizer} and text_encoder={self.text_encoder}, expected one of them: an encoder "
                "has a tokenizer of its own"
            )
        if self.level is not None and not isinstance(self.model, HierarchicalConfig):
            raise UserError(
                f"level={self.level} for {an(self.model.kind)} prior, expected none: only a hierarchical prior has "
                "levels"
            )
        if self.captions is not None and isinstance(self.model, HierarchicalConfig):
            raise UserError(
                f"captions={self.captions} for a hierarchical prior, whole or one level of it, expected none: it reads "
                "no text, and its levels could not be put together; leave captions out, or take a transformer prior, "
                "which models codes of several levels too"
            )

    def resolved(
        self, codes: CodeDataset, given: CodeDataset | None = None, tokenizer: str | None = None
    ) -> Stage2Config:
        """This config with the facts of the codes, of those that are given, and of the tokenizer (the content of its
        file) filled in. Raises UserError where it says otherwise."""
        found: dict[str, Any] = {
            "grids": codes.code_spec.describe(),
            "num_classes": codes.num_classes,
            "stage1_fingerprint": codes.stage1_fingerprint,
        }
        if self.num_classes == 0 or (self.num_classes is None and self.captions is not None):
            found["num_classes"] = 0
        if given is not None:
            found["given_grids"] = given.code_spec.describe()
            found["given_fingerprint"] = given.stage1_fingerprint or None
        if tokenizer is not None:
            found["tokenizer_fingerprint"] = hashlib.sha256(tokenizer.encode()).hexdigest()
        for name, value in found.items():
            expected = getattr(self, name)
            if expected is not None and expected != value:
                raise UserError(
                    f"{name} is {expected} in the config and {value} in the codes of {codes.folder}; leave {name} out "
                    "of the config, or name other codes"
                )
        return replace(self, codes=str(codes.folder), **found)


DrawCodes = Callable[[Sequence[Codes], Sequence[str], Sequence[Sequence[str]]], Tensor]
"""Makes a picture, c H W in [-1, 1], of rows of codes, each of some images with one `b h w` for each grid, with a name
for each row and, where it is not empty, one for each image: what a preview asks of whoever knows the decoder."""


JudgeCodes = Callable[[int, Callable[[int], Codes], Callable[[int], Codes]], dict[str, float]]
"""Figures of drawn codes beside real ones, for `train.evaluate_every`: how many batches there are, and what gives
the real and the drawn codes, one `b h w` for each grid, of batch number i. Whoever knows the decoder makes images."""


@dataclass(frozen=True)
class SamplePreview:
    """What previews of samples need beside the prior."""

    data: CodesInCompany  # held-out images: samples are of their classes, captions and given codes
    draw: DrawCodes

    def rows(self) -> list[list[int]]:
        return preview_rows(self.data.codes.labels)


class Stage2Task:
    """training.task.Task of stage two. Batches are {"codes": tuple of int64 b h w, "labels": int64 b}, a label below 0
    for none, with "given" and "text" where `CodesInCompany` adds them.

    Metrics, of training steps and of validation on images that neither stage has trained on: `nll`, nats per code;
    `bits_per_code`; and `bits_per_dimension`, the bits of an image's codes over its H * W * c numbers.
    """

    best_metric = "bits_per_code"

    def __init__(
        self,
        model: Prior,
        label_dropout: float,
        text_encoder: TextEncoder | None = None,
        samples: SamplePreview | None = None,
        steps: int = 1,
        flipped_codes: float = 0.0,
    ) -> None:
        """text_encoder: "text" holds its tokens, and the prior reads its vectors; samples: None for no previews; steps:
        of the run, for what changes in its course; flipped_codes: see `Stage2Config`."""
        self.model: PretrainedModel = model
        self.companions = {} if text_encoder is None else {"text_encoder": Companion(text_encoder.model)}
        self.guard: Guard | None = None
        self.prior = model
        self.label_dropout = label_dropout
        self.text_encoder = text_encoder
        self.samples = samples
        self.steps = steps
        self.flipped_codes = flipped_codes

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        pass

    def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
        codes, condition = self.split(batch)
        labels = batch["labels"]
        dropped = uniform(len(labels), device=labels.device) < self.label_dropout
        condition = self.prior.forget(condition, dropped)
        order = self.prior.training_order(len(labels), step / self.steps, labels.device)
        condition = condition if order is None else replace(condition, order=order)
        if self.flipped_codes:
            assert isinstance(self.prior, AutoregressivePrior)
            codes, given = self.prior.with_mistakes(codes, self.flipped_codes)
            loss, nll = model(codes, condition, given)  # each b
        else:
            loss, nll = model(codes, condition)
        return StepOutput(loss.mean(), {} if nll is None else self.metrics(nll.mean()))

    def after_step(self, step: int) -> None:
        pass

    def health(self) -> dict[str, Tensor]:
        return {}

    def discard_step(self) -> None:
        pass

    def validate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(model, Prior)
        codes, condition = self.split(batch)
        return self.metrics(model.nll(codes, condition).mean(dim=1))

    def preview(self, model: nn.Module) -> Tensor | None:
        """Samples, drawn with the same noise in every preview, each below the real codes whose class, caption or given
        codes it goes by. One level of a hierarchy is drawn between the real codes of the others. None without a
        decoder, which alone makes a picture of codes."""
        if self.samples is None or not len(self.samples.data):
            return None
        assert isinstance(model, Prior)
        data, drawn, names = self.samples.data, list[Codes](), list[str]()
        titles: list[list[str]] = []
        device, classes, number = next(model.parameters()).device, data.codes.class_names, 0
        for row in self.samples.rows():
            batch = send_to_device(data.fetch(row, row), device)
            indices = range(number, number + len(row))
            found = sample_codes(model, indices, self.split(batch)[1], PREVIEW_SEED, SamplingConfig())
            drawn += [batch["codes"], self.in_place(batch, found)]
            names += ["real codes", "sampled"]
            labels = batch["labels"].tolist()
            titles += [[classes[label] if label >= 0 else "" for label in labels] if classes else [], []]
            number += len(row)
        return self.samples.draw(drawn, names, titles)

    def evaluation(self, data: CodesInCompany, images: int, judge: JudgeCodes) -> Evaluation:
        """Of samples that go by the classes, captions or given codes of `images` held-out images, at most, drawn with
        the same noise at every step, beside what is decoded of their real codes."""
        count = min(images, len(data))
        chosen = [i * len(data) // count for i in range(count)]
        starts = range(0, count, EVALUATED_AT_ONCE)

        def evaluate(model: Prior) -> dict[str, float]:
            device = next(model.parameters()).device

            def batch_of(number: int) -> Batch:
                some = chosen[starts[number] : starts[number] + EVALUATED_AT_ONCE]
                return send_to_device(data.fetch(some, some), device)

            def drawn(number: int) -> Codes:
                batch, first = batch_of(number), starts[number]
                indices = range(first, first + len(batch["labels"]))
                found = sample_codes(model, indices, self.split(batch)[1], PREVIEW_SEED, SamplingConfig())
                return self.in_place(batch, found)

            return judge(len(starts), lambda number: batch_of(number)["codes"], drawn)

        return evaluate

    def in_place(self, batch: Batch, drawn: Codes) -> Codes:
        """Codes that the prior drew, among the real ones where it models some of the grids only."""
        real, first = batch["codes"], len(self.prior.given) - len(batch.get("given", ()))  # of its own grids
        return (*real[:first], *drawn, *real[first + len(drawn) :])

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        return []

    def split(self, batch: Batch) -> tuple[Codes, Condition]:
        """The codes that the prior models and its condition: one level of a hierarchy is given those before it, and
        images without a label have the null label."""
        codes: Codes = (*batch.get("given", ()), *batch["codes"])
        first = len(self.prior.given)
        own, labels = codes[first : first + len(self.prior.code_spec.grids)], None
        if self.prior.num_classes:
            labels = batch["labels"].masked_fill(batch["labels"] < 0, self.prior.num_classes)
        if self.text_encoder is None:
            return own, Condition(labels, codes[:first] or None, batch.get("text"))
        embeddings, mask = self.text_encoder.encode(batch["text"], self.prior.padded_left)
        return own, Condition(labels, codes[:first] or None, embeddings=embeddings, embedding_mask=mask)

    def metrics(self, nll: Tensor) -> dict[str, Tensor]:
        spec = self.prior.code_spec
        bits = nll / math.log(2)
        bits_per_dimension = bits * (spec.codes_per_image / spec.image_dimensions)
        return {"nll": nll, "bits_per_code": bits, "bits_per_dimension": bits_per_dimension}


def train_stage2(
    config: Stage2Config,
    codes: Path,
    run: Path,
    draw: DrawCodes | None = None,
    judge: JudgeCodes | None = None,
    notes: tuple[str, ...] = (),
) -> FitResult:
    """Trains the prior of `config` on the code shards in `codes`, in the folder `run`, or continues there; best weights
    in `run/model`. draw: makes pictures of codes, for previews of samples; judge: figures of samples, for
    `train.evaluate_every`; notes: what a person should know of these.

    Raises UserError, before the first step, when the codes are not what `config` says or not what its prior can model.
    """
    check_stage(run, STAGE)
    train_codes = CodeDataset(codes, "train")
    if not len(train_codes):
        raise UserError(f"{codes} holds no codes of training images; encode the images that stage one was trained on")
    given = None if config.given is None else CodeDataset(config.given, "train")
    captions = None if config.captions is None else captions_of(config.captions, train_codes.names())
    encoder = None if config.text_encoder is None else TextEncoder.load(config.text_encoder)
    tokenizer = None if captions is None else encoder.tokenizer if encoder else tokenizer_of(config, captions)
    config = config.resolved(train_codes, given, tokenizer)
    num_classes = config.num_classes or 0
    torch.manual_seed(config.train.seed)
    facts: dict[str, Any] = {
        "class_names": train_codes.class_names if num_classes else None,
        "stage1_fingerprint": config.stage1_fingerprint,
        "given_fingerprint": config.given_fingerprint,
        "knows_null_label": config.label_dropout > 0,
        "given": () if given is None else given.code_spec.grids,
    }
    if encoder is not None:
        facts["embeddings"] = EmbeddingSpec(config.text_length, encoder.width, config.text_encoder)
    elif tokenizer is not None:
        facts["text"] = TextSpec(config.text_length, vocabulary_of(tokenizer))
    if isinstance(config.model, HierarchicalConfig) and config.level is not None:
        prior: Prior = prior_of_level(config.model, train_codes.code_spec, config.level, num_classes, **facts)
    else:
        prior = PRIORS[config.model.kind].for_codes(config.model, train_codes, num_classes, **facts)
    if config.flipped_codes and isinstance(prior, VAR) and prior.latent_width is None:
        raise UserError(
            f"flipped_codes={config.flipped_codes}, but {codes} has no code vectors beside its codes, with which later "
            "scales could mend a mistake; leave it out, or encode with an autoencoder of quantizer.kind=multiscale"
        )
    on_bits = notes_on_bits(prior, train_codes)
    prior.tokenizer = None if encoder else tokenizer  # an encoder brings its own
    prior.training_images = TrainingImages.of(train_codes)
    training, validation = (in_company(config, codes, split, tokenizer) for split in ("train", "validation"))
    begun: tuple[str, ...] = ()
    if config.start_from is not None and not has_begun(run):
        begun = begin_from(prior, config.start_from)
    freeze(prior, config.frozen)
    samples = None if draw is None else SamplePreview(validation, draw)
    task = Stage2Task(prior, config.label_dropout, encoder, samples, config.train.steps, config.flipped_codes)
    run_facts = RunFacts(
        stage=STAGE,
        samples="encoded images",
        defaults=defaults_of(config),
        data=lambda: fingerprints(config, train_codes, given),
        notes=(*begun, *on_bits, *notes_on_size(prior, len(train_codes)), *notes),
    )
    evaluation = None if judge is None else task.evaluation(validation, config.train.evaluate_images, judge)
    return fit(task, training, validation, config.train, run, asdict(config), run_facts, evaluation)


def begin_from(prior: Prior, folder: str) -> tuple[str, ...]:
    """Gives a prior the weights of the one in `folder`; lines on what it took. Raises UserError."""
    other = load_pretrained(folder, {prior.kind: type(prior)})
    said = [take_weights(prior, other).describe(folder, other)]
    if prior.stage1_fingerprint != other.stage1_fingerprint:
        said.append(f"{folder} knows the codes of another autoencoder: what it learned of each code is of no use here")
    return tuple(said)


def notes_on_bits(prior: Prior, codes: CodeDataset) -> tuple[str, ...]:
    """A line where a prior tells codes bit by bit that may be no bits. Raises UserError where they are none: of numbers
    by chance, bits that do not know of each other make others."""
    if codes.index.codes_are_bits or not prior.tells_bits:
        return ()
    kinds, instead = "lfq or bsq", "leave bitwise out"
    if len(prior.code_spec.grids) > 1:
        kinds, instead = "multiscale_bsq or multiscale_bits", "take a var prior"
    if codes.index.codes_are_bits is None:
        return (
            f"bitwise: {codes.folder} does not say whether its codes are bits, as of quantizer.kind={kinds}; of "
            "others they cannot be told bit by bit (encode anew to have it checked)",
        )
    raise UserError(
        f"bitwise for {codes.folder}, whose codes are numbers of code vectors and no bits, expected those of "
        f"quantizer.kind={kinds}; {instead}, or take an autoencoder of these"
    )


def notes_on_size(prior: Prior, images: int) -> tuple[str, ...]:
    """A line where a prior is so large for its training codes that it will only learn them by heart."""
    weights = sum(weight.numel() for weight in prior.parameters())
    codes = images * prior.code_spec.codes_per_image
    if weights <= MOST_WEIGHTS_PER_CODE * codes:
        return ()
    recipe = "the recipe folder_short has a smaller one, or " if weights > WEIGHTS_OF_FOLDER_SHORT else ""
    return (
        f"{in_words(weights)} parameters for {in_words(codes)} codes of {counted(images, 'image')}: such a prior "
        f"learns them by heart before it learns what they have in common, and each of its checkpoints takes "
        f"{12 * weights / 1e6:,.0f} MB and more; {recipe}give a smaller --model.width and --model.layers",
    )


def fingerprints(config: Stage2Config, codes: CodeDataset, given: CodeDataset | None) -> dict[str, str]:
    """Of what the config names by its path, by the path of the field. Raises UserError for shards that are not what
    their index promises: a flipped byte would be learned as if it were a code."""
    for dataset in (codes, given):
        if dataset is not None:
            dataset.verify()
            type(dataset)(dataset.folder, "validation").verify()
    found = {"codes": codes.fingerprint()}
    if given is not None:
        found["given"] = given.fingerprint()
    if config.captions is not None and config.captions != FILE_NAMES:
        found["captions"] = sha256_of_file(Path(config.captions))
    if config.tokenizer is not None and config.tokenizer_fingerprint is not None:
        found["tokenizer"] = config.tokenizer_fingerprint
    return found


def tokenizer_of(config: Stage2Config, captions: list[list[str]]) -> str:
    """The content of the tokenizer's file: as named, or trained on the captions of the training images."""
    if config.tokenizer is not None:
        return read_tokenizer(config.tokenizer)
    return train_tokenizer([caption for of_image in captions for caption in of_image], config.text_vocabulary)


def in_company(config: Stage2Config, folder: Path, split: Split, tokenizer: str | None) -> CodesInCompany:
    """The codes of a split with what `config` puts beside them. Raises UserError where that belongs to other images."""
    codes = CodeDataset(folder, split)
    given = None if config.given is None else CodeDataset(config.given, split)
    if config.captions is None or tokenizer is None:
        return CodesInCompany(codes, given)
    captions = captions_of(config.captions, codes.names())
    every = [caption for of_image in captions for caption in of_image]
    texts = Texts(tokenize(tokenizer, every, config.text_length), [len(of_image) for of_image in captions])
    return CodesInCompany(codes, given, texts)
