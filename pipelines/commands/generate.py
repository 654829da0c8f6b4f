"""`zellige generate`: as many images as asked for, resumable, on any number of processes, jobs and machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from common.computing import check_device
from common.errors import UserError
from common.files import sha256_of_file
from pipelines.devices import open_device
from pipelines.generation.plan import Amount, Plan
from pipelines.generation.results import Output, check_place, generate_results, recorded_of
from pipelines.generation.store import open_store
from pipelines.generation.work import Use
from pipelines.given_codes import given_codes
from pipelines.judge import load_judge, sample_best
from pipelines.labels import class_number
from pipelines.latents.generating import LatentSettings, generate_from_latents
from pipelines.latents.models import is_vae
from pipelines.one_by_one import decode_each
from pipelines.prior_requests import labels_of, prompts_of
from pipelines.sampling_options import DrawingOptions, check_temperatures, chosen_precision
from pipelines.two_stage import TwoStagePipeline
from stage2_prior.priors import AutoregressivePrior
from stage2_prior.sampling_config import SamplingConfig

# What a record from before there were these settings was made with; those of sampling have their own.
DEFAULTS = {"given": None, "size": None, "prompt": None, "candidates": 1, "judge": None, "judge_weights": None}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(DrawingOptions):
    """New images from an assembled model, a file each or a thousand to a tar."""

    model: str  # pipeline folder that `zellige assemble` or `zellige quickstart` wrote, or a hub id
    out: str  # folder for the images, sheet.png and samples.jsonl, or an address such as s3://bucket/place
    format: Literal["png", "webp", "jpeg", "tar", "npz"] = "png"  # tar: for webdataset; npz: all in samples.npz too
    quality: int | None = None  # of jpeg, 1 to 100; left out: 95. webp and png lose nothing
    compression: int | None = None  # of png, 0 to 9; left out: 6. 1 takes a third of the time, and a few percent more
    num: int | None = None  # images; left out: 64, or all of a plan; a later run with a larger number adds to them
    per_class: int | None = None  # in place of num: so many of each class that the model knows
    plan: str | None = None  # .csv or .jsonl file, a row for each image: label, prompt, seed, count
    range: str | None = None  # FIRST:END, such as 0:100000: only these of them, for jobs that share a folder
    label: int | str | None = None  # class, by number or name; left out: that of the given codes, or all in turn
    given: str | None = None  # folder of code shards, for a model that goes by other codes: sample i by image i of it
    given_split: Literal["train", "validation"] = "validation"  # which images of that folder
    size: tuple[int, int] | None = None  # height and width in pixels, larger than the training size; left out: that
    seed: int = 0  # sample i of a seed has the same codes whatever the batch size and the number of processes
    batch_size: int | None = None  # images at a time (up to 64): the same one gives the same files byte for byte
    images_per_shard: int | None = None  # in one folder, or tar; left out: 1000, or as the folder was begun
    candidates: int = 1  # draw so many for each image and keep the one that `judge` finds most probable
    judge: str | None = None  # timm:MODEL, or MODULE:FUNCTION that returns a classifier of b c H W in [-1, 1]
    judge_weights: str | None = None  # file with the weights of timm's model; left out: timm downloads them
    pixels: Literal["mean", "mode", "sample"] | None = None  # of a VAE: what is shown of a latent; left out: the mean
    temperatures: tuple[float, ...] | None = None  # of a hierarchy of latents, one a group, the top one first
    cuda_graph: bool = False  # all steps of a batch as one graph: the same codes, sooner; not for maskgit, diffusion

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.output, self.amount  # which raise UserError
        if self.per_class is not None and self.label is not None:
            raise UserError("got per_class with a label, expected either: per_class asks for so many of each class")
        if self.plan is not None and not (self.label is None and self.prompt is None):
            raise UserError("got a plan with a label or a prompt, expected either: the plan's rows say them")
        if self.judge is not None and not (self.prompt is None and self.given is None and self.size is None):
            raise UserError(
                "got a judge with a prompt, given codes or a size, expected either: a judge knows classes of one size"
            )
        check_temperatures(self.temperature, self.temperatures)
        if self.candidates < 1:
            raise UserError(f"candidates={self.candidates}, expected at least 1 for each image")
        if (self.candidates > 1) != (self.judge is not None):
            raise UserError(
                f"candidates={self.candidates} and judge={self.judge}, expected both or neither: a judge chooses among "
                "two candidates or more"
            )
        if self.cuda_graph and self.size is not None:
            raise UserError(
                f"got cuda_graph with size={self.size}, expected either: larger images are drawn without one"
            )

        for name, asked in (("cuda_graph", self.cuda_graph), ("size", self.size)):
            if asked and self.lookahead not in (None, "auto", "off"):
                raise UserError(
                    f"got lookahead={self.lookahead} with {name}={asked}, expected either: that is drawn step by step"
                )

    @property
    def output(self) -> Output:
        return Output(**{field.name: getattr(self, field.name) for field in fields(Output)})

    @property
    def amount(self) -> Amount:
        return Amount(self.num, self.per_class, self.plan)


def generate_files(config: GenerateConfig) -> str:
    """Writes the images that `config.out` lacks; returns one line that says what was made and where.

    Samples are made in full batches, which begin anew at each thousand (`images_per_shard`), and what lies beyond that
    or beyond `num` is dropped: so a file depends on the model, the settings and its number alone, not on `num`, on
    interruptions or on the process that made it. Where no batch size is asked for, fewer images than 64 are one smaller
    batch, which is made anew when more are asked for. Raises UserError for a folder begun with other settings or by
    another command.
    """
    check_place(config.out)
    if is_vae(config.model):
        return generate_from_latents(config.model, config.output, config.amount, asked_of_vae(config), config.device)
    if config.pixels is not None:
        raise UserError(f"pixels={config.pixels}, expected none: {config.model} is no VAE and says one image of codes")
    if config.temperatures is not None:
        raise UserError(f"temperatures={config.temperatures}, expected none: {config.model} has no groups of latents")
    state, device = open_device(config.device)
    pipeline = TwoStagePipeline.from_pretrained(config.model).to(device)
    if config.text_encoder is not None:
        pipeline.load_text_encoder(config.text_encoder)
    if config.cuda_graph:
        pipeline.use_cuda_graph()
    if config.size is not None:
        check_larger(pipeline, config.size)
    sampling = config.sampling(pipeline.sampling, recorded_of(open_store(config.out)))
    check_device(device, sampling.precision, sampling.decoding)
    sampling.check_fits(pipeline.prior)
    label = class_number(pipeline.class_names, config.label)
    others = None if config.given is None else given_codes(pipeline.prior, config.given, config.given_split)
    if others is not None and others.note is not None and state.is_main_process:
        print(f"note: {others.note}")
    rows = config.amount.rows(pipeline.class_names)
    as_given = others is not None and label is None and others.has_classes_of(pipeline)
    if as_given and rows is not None and rows.labels is not None:
        as_given = False
    if as_given and config.per_class is not None:
        raise UserError(
            f"per_class={config.per_class}, but samples are of the classes of the given codes; give num, or a plan "
            "with labels"
        )

    def classes_of(samples: Sequence[int]) -> list[int] | None:
        if others is not None and as_given:
            return others.labels_of(samples)
        return labels_of(
            pipeline.prior, samples, label if rows is None or rows.labels is None else rows.labels_of(samples)
        )

    def texts_of(samples: Sequence[int]) -> list[str] | None:
        texts = None if rows is None else rows.prompts_of(samples)
        return prompts_of(pipeline.prior, samples, config.prompt if texts is None else texts)

    num = config.amount.number(rows, pipeline.num_classes)
    with_prompts = rows is not None and rows.texts is not None
    plan = Plan(num, config.seed, classes_of, texts_of, rows, pipeline.class_names, with_prompts)
    plan.check(pipeline.prior)
    judge = None
    if config.judge is not None:
        judge = load_judge(config.judge, config.judge_weights, pipeline.num_classes).to(device)
    weights = None if config.judge_weights is None else sha256_of_file(Path(config.judge_weights))
    settings = {
        "model": pipeline.fingerprint(),
        "seed": config.seed,
        "label": "as given" if as_given else label,
        "prompt": config.prompt,
        "given": None if others is None else others.fingerprint,
        "size": config.size,
        **sampling.record,
        "candidates": config.candidates,
        "judge": config.judge,
        "judge_weights": weights,
    }

    def draw(batch: range, wanted: Sequence[int], use: Use) -> list[int] | None:
        asked, passes = plan.of(batch), list[int]()
        if judge is None:
            given = None if others is None else others.of(batch)
            codes = pipeline.sample(
                asked.numbers,
                asked.labels,
                asked.seeds,
                sampling,
                prompts=asked.prompts,
                given=given,
                size=config.size,
                tell_passes=passes.extend,
            )
        else:
            codes = sample_best(pipeline, asked.numbers, asked.labels, asked.seeds, config.candidates, judge, sampling)
        places = [i - batch.start for i in wanted]
        decode_each(
            pipeline,
            codes,
            places,
            lambda place, picture: use(batch[place], picture),
            sampling.decoding,
            asked.prompts,
        )
        steps = pipeline.prior.steps if isinstance(pipeline.prior, AutoregressivePrior) else 0
        return passes if any(number != steps for number in passes) else None

    def labels_of_npz(count: int) -> list[int] | None:
        labels = classes_of(range(count))
        return labels if labels is not None and max(labels) < pipeline.num_classes else None  # no null label among them

    in_turn = label is None and rows is None and not as_given
    return generate_results(
        config.output,
        plan,
        settings,
        draw,
        state,
        turns=pipeline.num_classes if in_turn else 0,
        defaults={**SamplingConfig().record, **DEFAULTS},
        labels_of_npz=labels_of_npz,
    )


def asked_of_vae(config: GenerateConfig) -> LatentSettings:
    """Raises UserError for what priors over codes are asked, and a VAE's latents are not."""
    asked = {"model", "label", "seed", "pixels", "temperature", "temperatures", "device", "precision"}
    asked |= {field.name for field in (*fields(Output), *fields(Amount))}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in asked and value != field.default:
            raise UserError(
                f"{field.name}={value}, expected it left out: {config.model} is a VAE, which draws without it"
            )
    temperature = 1.0 if config.temperature is None else config.temperature
    pixels, precision = config.pixels or "mean", chosen_precision(config.precision)
    return LatentSettings(config.seed, pixels, config.label, config.temperatures or temperature, precision)


def check_larger(pipeline: TwoStagePipeline, size: tuple[int, int]) -> None:
    """Raises UserError for a size that the autoencoder cannot decode."""
    stride = pipeline.autoencoder.stride
    if any(side < 1 or side % stride for side in size):
        raise UserError(f"size={size}, expected two multiples of {stride}, the pixels to a code of this model, (H, W)")
