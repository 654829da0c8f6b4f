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
from pipelines.devices import open_device
from pipelines.evaluation.against import compared, read_evaluation, repeating
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.images import EvaluateDataConfig as EvaluateDataConfig
from pipelines.evaluation.of_codes import StageOne, described, judge_model_of_codes, open_model_of_codes
from pipelines.evaluation.outcome import Outcome
from pipelines.evaluation.protocol import beginning, lines_of
from pipelines.evaluation.reconstruction import Reconstruction
from pipelines.latents.judging import TITLE, as_record, judge_vae, print_figures
from pipelines.latents.models import is_vae
from pipelines.latents.pipeline import LatentPipeline
from stage1_vae.binarise import Binarised

OF_VAES = ("draws", "seed", "binarised", "pictures")
OF_CODES = ("codes", "given", "given_split")


def evaluate(config: EvaluateConfig) -> str:
    """Prints a line a figure, what a person should know of them and the protocol, writes all of it to `config.out`,
    returns one line. Raises UserError."""
    before = None if config.against is None else read_evaluation(config.against)
    if before is not None:
        config = repeating(config, before)
    state, device = open_device(config.device)
    state.device = device
    outcome = Outcome(beginning(config, state))
    judge_model(config, outcome, state)
    return on_main_process(state, lambda: told(config, outcome, before))


def judge_model(config: EvaluateConfig, outcome: Outcome, state: PartialState) -> None:
    if config.model is None:
        raise UserError("model is left out, expected one: name an assembled model, a run, or a model folder")
    if config.data.path is None:
        raise UserError(
            "data.path is left out, expected test images: a folder, an .npz file, or a name such as cifar10"
        )
    if is_vae(config.model):
        config.check_not_asked(OF_CODES, "a VAE, which has none")
        if config.pictures is not None and Path(config.pictures).is_file():
            raise UserError(f"pictures={config.pictures} is a file, expected a folder: name another")
        latent = LatentPipeline.from_pretrained(config.model).to(state.device)
        outcome.protocol["model"] = {"path": config.model, "fingerprint": latent.fingerprint()}
        judge_vae(config, latent.vae, Reconstruction(), outcome, state)
        return
    config.check_not_asked(OF_VAES, "which is no VAE")
    model = open_model_of_codes(config.model, state.device)
    outcome.protocol["model"] = described(model, config.model)
    judge_model_of_codes(config, model, Reconstruction(), outcome, state)
    if isinstance(model, StageOne):
        outcome.notes.append("note: this is stage one alone: bits and samples are those of an assembled model")


def told(config: EvaluateConfig, outcome: Outcome, before: dict[str, Any] | None) -> str:
    """Prints and writes what was found."""
    record = as_evaluation(config, outcome)
    for title, group in outcome.groups.items():
        print(f"{title}:")
        if title == TITLE:
            images = outcome.protocol["images"]
            print_figures(group, Binarised(images["binarised"], images["binarised_seed"]))
            continue
        for name, value in group.items():
            print(f"{name:<34}{value:.4f}" if isinstance(value, float) else f"{name:<34}{value}")
    for note in outcome.notes:
        print(note)
    print("protocol:")
    for line in lines_of(outcome.protocol):
        print(line)
    summary = f"{counted(record.get('images', 0), 'image')}: {', '.join(outcome.says)}"
    if config.out is not None:
        write_json(Path(config.out), record)
        summary += f", figures in {config.out}"
    if before is not None:
        lines, phrase = compared(before, record)
        for line in lines:
            print(line)
        summary = f"{phrase} as in {config.against}; {summary}"
    return summary + (f"; {outcome.unread}" if outcome.unread else "")


def as_evaluation(config: EvaluateConfig, outcome: Outcome) -> dict[str, Any]:
    """As the JSON file has it: figures by their names, then notes and protocol."""
    record: dict[str, Any] = {"model": config.model, "data": config.data.path}
    for title, group in outcome.groups.items():
        if title == TITLE:
            images = outcome.protocol["images"]
            record |= {name: images[name] for name in ("binarised", "binarised_seed", "draws")}
            record |= {"seed": config.seed, **as_record(group)}
        else:
            record |= group
    return {**record, "notes": outcome.notes, "protocol": outcome.protocol}
