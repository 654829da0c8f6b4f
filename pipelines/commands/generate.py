"""`zellige generate`: as many image files as asked for, resumable, on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from common.computing import check_device
from common.errors import UserError
from common.files import sha256_of_file
from common.owned_folder import SHEET_NAME
from common.progress import progress_bar
from pipelines.devices import open_device
from pipelines.given_codes import given_codes
from pipelines.judge import load_judge, sample_best
from pipelines.labels import class_number
from pipelines.latents.generating import LatentSettings, generate_from_latents
from pipelines.latents.models import is_vae
from pipelines.one_by_one import Use, decode_each
from pipelines.pictures import is_complete_png, save_png
from pipelines.prior_requests import labels_of, prompts_of
from pipelines.sample_folders import names, recorded_samples, sheet, summary, write_npz, write_samples
from pipelines.sampling_options import DrawingOptions, check_temperatures, chosen_precision
from pipelines.settings import recorded_settings, results_folder
from pipelines.two_stage import TwoStagePipeline
from stage2_prior.sampling_config import SamplingConfig

BATCH_SIZE = 64  # when nothing else is said

# What a record from before there were these settings was made with; those of sampling have their own.
DEFAULTS = {"given": None, "size": None, "prompt": None, "candidates": 1, "judge": None, "judge_weights": None}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(DrawingOptions):
    """New images from an assembled model, one PNG file each."""

    model: str  # pipeline folder that `zellige assemble` or `zellige quickstart` wrote, or a hub id
    out: str  # folder for the images, sheet.png and samples.jsonl
    format: Literal["png", "npz"] = "png"  # npz: all in samples.npz too, as ADM's evaluator reads it
    num: int = 64  # images; a later run with a larger number adds those that are missing
    label: int | str | None = None  # class, by number or name; left out: that of the given codes, or all in turn
    given: str | None = None  # folder of code shards, for a model that goes by other codes: sample i by image i of it
    given_split: Literal["train", "validation"] = "validation"  # which images of that folder
    size: tuple[int, int] | None = None  # height and width in pixels, larger than the training size; left out: that
    seed: int = 0  # sample i of a seed has the same codes whatever the batch size and the number of processes
    batch_size: int | None = None  # images at a time (up to 64): the same one gives the same files byte for byte
    candidates: int = 1  # draw so many for each image and keep the one that `judge` finds most probable
    judge: str | None = None  # timm:MODEL, or MODULE:FUNCTION that returns a classifier of b c H W in [-1, 1]
    judge_weights: str | None = None  # file with the weights of timm's model; left out: timm downloads them
    pixels: Literal["mean", "mode", "sample"] | None = None  # of a VAE: what is shown of a latent; left out: the mean
    temperatures: tuple[float, ...] | None = None  # of a hierarchy of latents, one a group, the top one first
    cuda_graph: bool = False  # all steps of a batch as one graph: the same codes, sooner; not for maskgit, diffusion

    def __post_init__(self) -> None:
        if self.num < 1:
            raise UserError(f"num={self.num}, expected at least 1 image")
        super().__post_init__()
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}, expected at least 1 image")
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


def generate_files(config: GenerateConfig) -> str:
    """Writes the images that `config.out` lacks; returns one line that says what was made and where.

    Sample i is the file `{i:06d}.png`. Samples are made in full batches, batch j from j * batch_size on, and
    what lies beyond `num` is dropped: so a file depends on the model, the settings and i alone, not on `num`,
    on interruptions or on the process that made it. Where no batch size is asked for, fewer images than 64 are one
    smaller batch, which is made anew when more are asked for. Raises UserError for a folder begun with other settings
    or by another command.
    """
    if is_vae(config.model):
        asked_for_vae = asked_of_vae(config)
        as_npz = config.format == "npz"
        return generate_from_latents(config.model, Path(config.out), config.num, asked_for_vae, config.device, as_npz)
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
    out, num = Path(config.out), config.num
    asked_size = config.batch_size or recorded_batch_size(out)
    sampling = config.sampling(pipeline.sampling, recorded_settings(out))
    check_device(device, sampling.precision, sampling.decoding)
    sampling.check_fits(pipeline.prior)
    label = class_number(pipeline.class_names, config.label)
    prompts_of(pipeline.prior, range(num), config.prompt)
    others = None if config.given is None else given_codes(pipeline.prior, config.given, config.given_split)
    if others is not None and others.note is not None and state.is_main_process:
        print(f"note: {others.note}")
    as_given = others is not None and label is None and others.has_classes_of(pipeline)

    def classes_of(samples: range) -> list[int] | None:
        if others is not None and as_given:
            return others.labels_of(samples)
        return labels_of(pipeline.prior, samples, label)

    classes_of(range(num))  # refuses a label that the model does not have
    judge = None
    if config.judge is not None:
        judge = load_judge(config.judge, config.judge_weights, pipeline.num_classes).to(device)
    model = {"model": pipeline.fingerprint(), "seed": config.seed, "batch_size": asked_size}
    weights = None if config.judge_weights is None else sha256_of_file(Path(config.judge_weights))
    chosen = {"candidates": config.candidates, "judge": config.judge, "judge_weights": weights}
    asked_for = {
        "label": "as given" if as_given else label,
        "prompt": config.prompt,
        "given": None if others is None else others.fingerprint,
    }
    settings = {**model, **asked_for, "size": config.size, **asdict(sampling), **chosen}
    # Builds before always recorded a size; of one that nobody asked for the record is no promise.
    may_change = {"batch_size": lambda: asked_size is None}
    defaults = {**asdict(SamplingConfig()), **DEFAULTS}
    with results_folder(out, "generate", settings, state, defaults=defaults, may_change=may_change):
        batch_size = asked_size or min(BATCH_SIZE, num)
        batches = [range(start, start + batch_size) for start in range(0, num, batch_size)]
        missing = [batch for batch in batches if not all(is_complete_png(out / name) for name in names(batch, num))]
        state.wait_for_everyone()  # all have looked before one writes
        mine = missing[state.process_index :: state.num_processes]
        total = sum(len(names(batch, num)) for batch in mine)
        with progress_bar(total, "images", shown=state.is_main_process) as progress:
            for batch in mine:
                asked = classes_of(batch)
                if judge is None:
                    texts = prompts_of(pipeline.prior, batch, config.prompt)
                    given = None if others is None else others.of(batch)
                    codes = pipeline.sample(
                        batch, asked, config.seed, sampling, prompts=texts, given=given, size=config.size
                    )
                else:
                    codes = sample_best(pipeline, batch, asked, config.seed, config.candidates, judge, sampling)
                files = names(batch, num)
                decode_each(pipeline, codes, len(files), to_files([out / name for name in files]), sampling.decoding)
                progress.update(len(files))
        state.wait_for_everyone()
        if state.is_main_process:
            there = max(num, recorded_samples(out))  # an earlier run may have made more
            labels = classes_of(range(there))
            made_with = {**settings, "batch_size": asked_size or min(BATCH_SIZE, there)}
            write_samples(out, made_with, labels, there, pipeline.class_names)
            turns = None if label is not None or as_given else labels
            save_png(sheet(out, there, turns, pipeline.class_names), out / SHEET_NAME)
            if config.format == "npz":
                known = labels is not None and max(labels[:num]) < pipeline.num_classes  # no null label among them
                write_npz(out, num, labels if known else None)
    made = sum(len(names(batch, num)) for batch in missing)
    return summary(out, num, made, as_npz=config.format == "npz")


def asked_of_vae(config: GenerateConfig) -> LatentSettings:
    """Raises UserError for what priors over codes are asked, and a VAE's latents are not."""
    asked = {"num", "out", "format", "model", "label", "seed", "pixels", "temperature", "temperatures", "device"}
    asked |= {"precision"}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in asked and value != field.default:
            raise UserError(
                f"{field.name}={value}, expected it left out: {config.model} is a VAE, which draws without it"
            )
    temperature = 1.0 if config.temperature is None else config.temperature
    pixels, precision = config.pixels or "mean", chosen_precision(config.precision)
    return LatentSettings(config.seed, pixels, config.label, config.temperatures or temperature, precision)


def recorded_batch_size(out: Path) -> int | None:
    """The batch size that a folder was begun with; None if nobody asked for one. Builds that recorded no command always
    recorded a size: where it is the number of images, it was taken from that."""
    recorded = recorded_settings(out)
    size = recorded.get("batch_size")
    if recorded and "command" not in recorded and size == min(BATCH_SIZE, recorded_samples(out)):
        return None
    return size


def check_larger(pipeline: TwoStagePipeline, size: tuple[int, int]) -> None:
    """Raises UserError for a size that the autoencoder cannot decode."""
    stride = pipeline.autoencoder.stride
    if any(side < 1 or side % stride for side in size):
        raise UserError(f"size={size}, expected two multiples of {stride}, the pixels to a code of this model, (H, W)")


def to_files(paths: Sequence[Path]) -> Use[None]:
    return lambda i, picture: save_png(picture, paths[i])
