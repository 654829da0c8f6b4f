"""The page of a model on the Hugging Face hub: README.md with what it is, a picture, figures, and how to use it.

Only what is known to be so stands in it: figures of an `evaluation.json` whose fingerprints are those of this model,
recipes of runs whose model this is, and a licence that somebody states.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol, TypedDict

import yaml
from PIL import Image

from common.errors import UserError
from common.files import read_json, write_text
from common.hub import upload_to_hub
from common.model_io import PretrainedModel, load_pretrained
from common.runs import RUN_CONFIG_NAME, config_of_run
from common.short_repr import weights_of
from common.wording import either, one_line
from images.files import BadImageError, open_upright
from pipelines.latents.models import VAES
from pipelines.pictures import contact_sheet, in_columns, save_png
from stage1_vq.autoencoders import AUTOENCODERS
from stage2_prior.latents import LATENT_PRIORS
from stage2_prior.priors import PRIORS

CARD_NAME, PICTURE_NAME = "README.md", "samples.png"
EVALUATION_NAME = "evaluation.json"
MARK = "<!-- This card was written by zellige. -->"
SAMPLES, COLUMNS = 16, 8
MOST_CLASSES = 20  # whose names are listed
# Files of a model in a repository: those that another model had and this one has not are deleted there.
FILES = (
    "model_index.json",
    "config.json",
    "model.safetensors",
    "tables.safetensors",
    "stage1/*",
    "stage2/*",
    CARD_NAME,
    PICTURE_NAME,
)


class CardOptions(TypedDict, total=False):
    """What a card says that no model knows."""

    license: str  # as the hub writes it: "mit", "apache-2.0", "cc-by-nc-4.0", "other"
    datasets: str | Sequence[str]  # hub ids of the training images, such as "ylecun/mnist"
    runs: Sequence[str | Path]  # run folders that it comes from, whose recipes are shown; left out: those beside it
    evaluation: str | Path  # what `zellige evaluate --out` wrote of it; left out: evaluation.json in its folder
    picture: str | Path  # a picture file to show; left out: samples are drawn


class PushOptions(CardOptions, total=False):
    """How a model goes to the hub: `common.hub.upload_to_hub`."""

    private: bool | None
    token: str | None
    commit_message: str | None
    revision: str | None


class Pipeline(Protocol):
    """What a card is written of."""

    source: Path | None  # folder that it was opened from

    def parts(self) -> dict[str, PretrainedModel]:
        """Its models by what they are called: `autoencoder`, `prior`."""

    def card_traits(self) -> CardTraits: ...

    def fingerprint(self) -> str: ...

    def save_pretrained(self, folder: str | Path) -> Path: ...


class Use(NamedTuple):
    """How images are made, in the words of the command and of Python."""

    command: str = "--num 16"
    python: str = "16, seed=0"


class CardTraits(NamedTuple):
    """What the two kinds of pipelines say of themselves each in its way."""

    what: str  # a sentence
    task: str  # the hub's name of it
    class_names: Sequence[str]
    settings: Mapping[str, Any]  # of sampling, where they are not the defaults
    samples: Callable[[], Sequence[Image.Image]] | None  # pictures to show; None: they cannot be drawn without more
    use: Use = Use()


def write_card(folder: Path, pipeline: Pipeline, hub_id: str, options: CardOptions) -> Path:
    """Writes README.md and samples.png into a folder; hub_id: what the card calls the model. Returns the card's path.
    Raises UserError for figures, recipes or a picture of something else, and rather than replace a README.md that
    somebody wrote."""
    path = folder / CARD_NAME
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        raise UserError(f"{path} was not written by zellige and is not replaced; move it away, or keep it as the card")
    traits = pipeline.card_traits()
    recipes = recipes_of(pipeline, options)
    evaluation = evaluation_of(pipeline, options)
    pictured = draw_picture(folder / PICTURE_NAME, traits, options.get("picture"))
    text = front_matter(pipeline, traits, hub_id, options, evaluation) + body(
        pipeline, traits, hub_id, options, recipes, evaluation, pictured
    )
    write_text(path, text)
    return path


def push(pipeline: Pipeline, hub_id: str, options: PushOptions) -> str:
    """Uploads a pipeline with its card, and returns the address. A card that lies in its folder, written for exactly
    this model, goes as it is unless something is said for another. Raises UserError."""
    card_options: Any = {name: value for name, value in options.items() if name in CardOptions.__annotations__}
    with TemporaryDirectory() as place:
        folder = pipeline.save_pretrained(Path(place) / "model")
        if not card_options and (card := card_beside(pipeline)) is not None:
            for name in (CARD_NAME, PICTURE_NAME):
                if (card.parent / name).is_file():
                    copyfile(card.parent / name, folder / name)
        else:
            write_card(folder, pipeline, hub_id, card_options)
        return upload_to_hub(
            folder,
            hub_id,
            private=options.get("private"),
            token=options.get("token"),
            commit_message=options.get("commit_message") or f"A model of zellige {version('zellige')}",
            revision=options.get("revision"),
            replaced=FILES,
        )


def card_beside(pipeline: Pipeline) -> Path | None:
    """The card in the folder that a pipeline was opened from, where it names its fingerprint."""
    card = None if pipeline.source is None else pipeline.source / CARD_NAME
    if card is None or not card.is_file():
        return None
    return card if pipeline.fingerprint() in card.read_text(encoding="utf-8") else None


def datasets_of(options: CardOptions) -> list[str]:
    named = options.get("datasets", ())
    return [named] if isinstance(named, str) else list(named)


def front_matter(
    pipeline: Pipeline, traits: CardTraits, hub_id: str, options: CardOptions, evaluation: dict[str, Any] | None
) -> str:
    """What the hub sorts models by, as YAML between lines of three dashes."""
    from huggingface_hub import EvalResult, ModelCardData

    kinds = [model.kind for model in pipeline.parts().values()]
    results = None
    if evaluation is not None and (figures := numbers_of(evaluation)):
        images = evaluation["protocol"].get("images", {})
        name = Path(str(images.get("path", "test images"))).name
        results = [
            EvalResult(
                task_type=traits.task,
                dataset_type=[*datasets_of(options), name][0],
                dataset_name=name,
                dataset_split=images.get("split"),
                metric_type=figure,
                metric_value=value,
            )
            for figure, value in figures.items()
        ]
    data = ModelCardData(
        library_name="zellige",
        pipeline_tag=traits.task,
        license=options.get("license"),
        datasets=datasets_of(options) or None,
        tags=["zellige", "image-generation", *kinds],
        model_name=hub_id.rpartition("/")[2],
        eval_results=results,
    )
    if results is None:
        data.model_name = None  # it has a place in a model index only
    return f"---\n{data.to_yaml()}\n---\n"


def body(
    pipeline: Pipeline,
    traits: CardTraits,
    hub_id: str,
    options: CardOptions,
    recipes: Mapping[str, str],
    evaluation: dict[str, Any] | None,
    pictured: bool,
) -> str:
    name, parts = hub_id.rpartition("/")[2], pipeline.parts()
    lines = [MARK, f"# {name}", traits.what]
    if pictured:
        lines.append(f"![Samples of {name}]({PICTURE_NAME})")
    lines += ["## Use", usage(hub_id, traits.use)]
    rows = {part: f"{model.kind}: {', '.join([*model.traits(), size_of(model)])}" for part, model in parts.items()}
    if names := traits.class_names:
        more = " ..." if len(names) > MOST_CLASSES else ""
        shown = ", ".join(as_text(name) for name in names[:MOST_CLASSES])
        rows["classes"] = f"{len(names)}: {shown}{more}"
    if traits.settings:
        rows["sampling"] = ", ".join(f"{key}={value}" for key, value in traits.settings.items())
    rows["fingerprint"] = f"`{pipeline.fingerprint()}`"
    lines += ["## Model", table(("", ""), rows)]
    if evaluation is not None:
        lines += ["## Figures", *figures(evaluation)]
    lines += ["## Training", training(options, recipes)]
    stated = options.get("license")
    lines += ["## Licence", stated if stated else "Not stated: ask who made the model before you use it."]
    return "\n\n".join(lines) + "\n"


def size_of(model: PretrainedModel) -> str:
    """`1,234 parameters, float32`, wherever it is."""
    return weights_of(model).partition(" on ")[0]


def usage(hub_id: str, use: Use) -> str:
    return (
        "With zellige installed:\n\n```sh\n"
        f"zellige generate --model {hub_id} {use.command} --out samples\n```\n\n"
        "```python\nimport zellige\n\n"
        f'pipeline = zellige.from_pretrained("{hub_id}")\n'
        f'pipeline.generate({use.python}).save("samples")\n```'
    )


def figures(evaluation: Mapping[str, Any]) -> list[str]:
    """A table, and the protocol without which its numbers mean little."""
    shown = {name.replace("_", " "): f"{value:.5g}" for name, value in numbers_of(evaluation).items()}
    found = [table(("figure", "value"), shown)]
    found += [f"* {as_text(note)}" for note in evaluation.get("notes", ())]
    protocol = {name: value for name, value in evaluation["protocol"].items() if name not in ("asked", "model")}
    text = yaml.safe_dump(without_places(protocol), sort_keys=False, allow_unicode=True, width=100)
    found.append(f"They were measured so (`zellige evaluate`):\n\n```yaml\n{text}```")
    return found


def training(options: CardOptions, recipes: Mapping[str, str]) -> str:
    named = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets_of(options))
    said = [f"Trained on {named}." if named else "The training images are not named."]
    said += [f"Recipe of the {part}:\n\n```yaml\n{recipe}```" for part, recipe in recipes.items()]
    return "\n\n".join(said)


def as_text(name: object) -> str:
    """What comes from data or another file, on one line and without markup: a card is a page."""
    return html.escape(one_line(name), quote=False)


def table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    cells = [head, ("---", "---"), *rows.items()]
    return "\n".join(f"| {one} | {str(other).replace('|', chr(92) + '|')} |" for one, other in cells)


def numbers_of(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation, those that were not measured left out."""
    return {
        name: value
        for name, value in evaluation.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def evaluation_of(pipeline: Pipeline, options: CardOptions) -> dict[str, Any] | None:
    """What was measured of this model; None where nothing is known. Raises UserError for what was named and is not of
    it; that which lies in its folder is passed over."""
    named = options.get("evaluation")
    path = Path(named) if named is not None else pipeline.source and pipeline.source / EVALUATION_NAME
    if path is None or (named is None and not path.is_file()):
        return None
    found = read_json(path)
    known = known_fingerprints(pipeline)
    model = found.get("protocol", {}).get("model", {}) if isinstance(found.get("protocol"), dict) else {}
    recorded = fingerprints_in(model)
    if recorded and recorded <= known:
        return found
    if named is None:
        return None
    what = "of another model" if recorded else "of no model that it names"
    raise UserError(f"{path} holds figures {what}; evaluate this one by `zellige evaluate --out {path}`")


def fingerprints_in(value: Any) -> set[str]:
    """Of the models in a protocol: what stands under a name that ends so."""
    if not isinstance(value, dict):
        return set()
    inner = [fingerprints_in(one) for one in value.values()]
    own = {one for name, one in value.items() if name.endswith("fingerprint") and isinstance(one, str)}
    return own.union(*inner)


def known_fingerprints(pipeline: Pipeline) -> set[str]:
    """Of the pipeline, its models, and the levels of a prior that was put together from several."""
    models = [inner for part in pipeline.parts().values() for inner in part.modules()]
    return {pipeline.fingerprint(), *(one.fingerprint() for one in models if isinstance(one, PretrainedModel))}


def recipes_of(pipeline: Pipeline, options: CardOptions) -> dict[str, str]:
    """The recipes of the runs that were named, or that lie beside the model, as YAML, by the part that came from them.
    Raises UserError for a run that was named and whose model is no part of this one."""
    parts = {
        inner.fingerprint(): part
        for part, model in pipeline.parts().items()
        for inner in reversed(list(model.modules()))
        if isinstance(inner, PretrainedModel)
    }
    named = options.get("runs")
    runs = [Path(run) for run in named] if named is not None else runs_beside(pipeline.source)
    found: dict[str, str] = {}
    for run in runs:
        config, fingerprint = config_of_run(run), fingerprint_of(run / "model")
        if config and fingerprint in parts:
            part = parts[fingerprint]
            text = yaml.safe_dump(without_places(config), sort_keys=False, allow_unicode=True, width=100)
            found[part if part not in found else f"{part} ({run.name})"] = text
        elif named is not None:
            what = f"{run} holds no {RUN_CONFIG_NAME} of a training" if not config else f"the model of {run} is another"
            raise UserError(f"{what}, expected the run of {either(list(pipeline.parts()))} of this model; leave it out")
    return found


def runs_beside(source: Path | None) -> list[Path]:
    """The run whose model a folder is, or both of a quickstart."""
    if source is None or source.name != "model":
        return []
    return [run for run in (source.parent, source.parent / "stage1", source.parent / "stage2") if config_of_run(run)]


def fingerprint_of(folder: Path) -> str | None:
    """Of the single model in a folder, of whatever kind; None where there is none."""
    if not (folder / "config.json").is_file():
        return None
    return load_pretrained(folder, {**AUTOENCODERS, **VAES, **PRIORS, **LATENT_PRIORS}).fingerprint()


def without_places(value: Any) -> Any:
    """A config without the folders of the machine that it ran on: absolute paths by their last part."""
    if isinstance(value, dict):
        return {name: without_places(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(one) for one in value]
    if isinstance(value, str) and os.path.isabs(os.path.expanduser(value)):
        return Path(value).name
    return value


def draw_picture(path: Path, traits: CardTraits, picture: str | Path | None) -> bool:
    """Whether there is something to show, which then is at `path`."""
    if picture is not None:
        try:
            save_png(open_upright(Path(picture), channels=3), path)
        except BadImageError as error:
            raise UserError(f"picture={picture} cannot be read as an image ({error}); name another") from error
        return True
    if traits.samples is None:
        return False
    save_png(contact_sheet(in_columns(traits.samples(), COLUMNS)), path)
    return True
