"""`zellige evaluate`: how good a model is on test images, and its samples beside real ones: what stage one keeps, how
its codes are used, how many bits stage two needs, how likely images are under a VAE; with the protocol of it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState

from common.errors import UserError
from common.files import write_json
from common.processes import on_main_process
from common.wording import counted
from metrics.features import FeatureNetwork, open_features
from metrics.lpips import LPIPS, Words
from pipelines.devices import open_device
from pipelines.evaluation.against import compared, read_evaluation, repeating
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.gathering import Values
from pipelines.evaluation.images import EvaluateDataConfig as EvaluateDataConfig
from pipelines.evaluation.of_codes import StageOne, described, given_of, judge_model_of_codes, open_model_of_codes
from pipelines.evaluation.outcome import Outcome
from pipelines.evaluation.protocol import beginning, lines_of
from pipelines.evaluation.reconstruction import Reconstruction
from pipelines.evaluation.samples import judge_made
from pipelines.latents.judging import TITLE, as_record, judge_vae, print_figures
from pipelines.latents.models import is_vae
from pipelines.latents.pipeline import LatentPipeline
from stage1_vae.binarise import Binarised

OF_VAES = ("draws", "binarised", "pictures", "pixels")
OF_CODES = ("codes", "given", "given_split")


def evaluate(config: EvaluateConfig) -> str:
    """Prints a line a figure, what a person should know of them and the protocol, writes all of it to `config.out`,
    returns one line. Raises UserError."""
    before = None if config.against is None else read_evaluation(config.against)
    if before is not None:
        config = repeating(config, before)
    config.check_needed()
    state, device = open_device(config.device)
    state.device = device
    outcome = Outcome(beginning(config, state))
    network = features_of(config, outcome, state)
    if config.model is None:
        judge_files(config, network, outcome, state)
    elif is_vae(config.model):
        judge_vae_model(config, network, outcome, state)
    else:
        judge_codes_model(config, network, outcome, state)
    return on_main_process(state, lambda: told(config, outcome, before))


def features_of(config: EvaluateConfig, outcome: Outcome, state: PartialState) -> FeatureNetwork | None:
    if config.features is None:
        return None
    try:
        network = open_features(config.features, config.features_weights, config.download)
    except UserError as error:
        if config.features != "inception" and not config.features.startswith("timm:"):
            raise  # it has no weights that these options name
        hint = "on the command line these are --features_weights FILE and --download true"
        raise UserError(f"{error} ({hint})") from error
    outcome.protocol["features"] = network.describe()
    return network.to(state.device)


def judge_files(config: EvaluateConfig, network: FeatureNetwork | None, outcome: Outcome, state: PartialState) -> None:
    """Files without a model."""
    assert network is not None
    config.check_not_asked((*OF_VAES, *OF_CODES, "seed"), "files without a model")
    judge_made(config, None, network, {}, None, outcome, state)


def judge_vae_model(
    config: EvaluateConfig, network: FeatureNetwork | None, outcome: Outcome, state: PartialState
) -> None:
    config.check_not_asked((*OF_CODES, "decoder_precision"), "a VAE, which has none")
    if config.samples is None:
        config.check_not_asked(("precision",), "a VAE without samples: densities are float32")
    if config.pictures is not None and Path(config.pictures).is_file():
        raise UserError(f"pictures={config.pictures} is a file, expected a folder: name another")
    pipeline = LatentPipeline.from_pretrained(str(config.model)).to(state.device)
    outcome.protocol["model"] = {"path": config.model, "fingerprint": pipeline.fingerprint()}
    test: Values = {}
    if config.data.path is not None:
        test = judge_vae(config, pipeline.vae, reconstruction_of(config, network, outcome, state), outcome, state)
    if config.judges_made_images and network is not None:
        judge_made(config, pipeline, network, test, None, outcome, state)


def judge_codes_model(
    config: EvaluateConfig, network: FeatureNetwork | None, outcome: Outcome, state: PartialState
) -> None:
    config.check_not_asked(OF_VAES if config.samples is not None else (*OF_VAES, "seed"), "which is no VAE")
    model = open_model_of_codes(str(config.model), state.device)
    outcome.protocol["model"] = described(model, str(config.model))
    asks_codes = config.data.path is not None or config.given is not None
    given, test = given_of(config, model, outcome) if asks_codes else None, Values()
    if config.data.path is not None:
        reconstruction = reconstruction_of(config, network, outcome, state)
        test = judge_model_of_codes(config, model, reconstruction, given, outcome, state)
    if isinstance(model, StageOne):
        outcome.notes.append("note: this is stage one alone: bits per code and samples take an assembled model")
    if config.judges_made_images and network is not None:
        pipeline = None if isinstance(model, StageOne) else model
        judge_made(config, pipeline, network, test, given, outcome, state)


def reconstruction_of(
    config: EvaluateConfig, network: FeatureNetwork | None, outcome: Outcome, state: PartialState
) -> Reconstruction:
    perceptual = None
    if config.lpips:
        words = Words(weights="--lpips_weights", download="--download true", otherwise="leave --lpips out")
        perceptual = LPIPS(config.lpips_weights, config.download, words=words).to(state.device)
        outcome.protocol["lpips"] = "VGG16, linear weights of version 0.1"
    return Reconstruction(network, perceptual, unrounded=config.unrounded)


def told(config: EvaluateConfig, outcome: Outcome, before: dict[str, Any] | None) -> str:
    """Prints and writes what was found."""
    record = as_evaluation(config, outcome)
    for title, group in outcome.groups.items():
        print(f"{title}:")
        if title == TITLE:
            images = outcome.protocol["images"]
            print_figures(group, Binarised(images["binarised"], images["binarised_seed"]), outcome.labels)
            continue
        for name, value in group.items():
            label = f"  ({outcome.labels[name]})" if name in outcome.labels else ""
            print(f"{name:<34}{digits(value)}{label}" if isinstance(value, float) else f"{name:<34}{value}")
    for note in outcome.notes:
        print(note)
    print("protocol:")
    for line in lines_of(outcome.protocol):
        print(line)
    figures = outcome.figures
    summary = f"{counted(figures.get('images', figures.get('made_images', 0)), 'image')}: {', '.join(outcome.says)}"
    if config.out is not None:
        write_json(Path(config.out), record)
        summary += f", figures in {config.out}"
    if before is not None:
        lines, phrase = compared(before, record)
        for line in lines:
            print(line)
        summary = f"{phrase} as in {config.against}; {summary}"
    return summary + (f"; {outcome.unread}" if outcome.unread else "")


def digits(value: float) -> str:
    """Four places, or four digits of a number that would have none left."""
    return f"{value:.4f}" if abs(value) >= 0.01 or value == 0 else f"{value:.4g}"


def as_evaluation(config: EvaluateConfig, outcome: Outcome) -> dict[str, Any]:
    """As the JSON file has it: figures by their names, then labels of some, notes and protocol."""
    record: dict[str, Any] = {"model": config.model, "data": config.data.path}
    for title, group in outcome.groups.items():
        if title == TITLE:
            images = outcome.protocol["images"]
            record |= {name: images[name] for name in ("binarised", "binarised_seed", "draws")}
            record |= {"seed": config.seed, **as_record(group)}
        else:
            record |= group
    return {**record, "labels": outcome.labels, "notes": outcome.notes, "protocol": outcome.protocol}
