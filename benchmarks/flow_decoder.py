"""A flow decoder beside the decoder whose codes it decodes: in many steps, in few, and in one that was distilled.

    OMP_NUM_THREADS=1 python -m benchmarks.flow_decoder --stage1 runs/quickstart/model --out runs/flow_compared

On the codes of `--stage1`, a model of a kind that flow decoders take, the recipe is trained, `--config mnist_flow
--from STAGE1`, and one step distilled from it, `mnist_flow_one_step`, with the recipes' steps or `--steps` and
`--student_steps`, and a validation at the end alone. Test images are then encoded once and decoded by the old decoder,
by the teacher in 1, 2, 4, 8 and 16 steps, and by the student. Prints a Markdown table: PSNR, a mean over images; the
Frechet distance between the decoded images and the images themselves in the 128 features of a small classifier that
this script trains on training images; the share that it takes for the same class as the image; how far images of the
same codes differ under other seeds of the noise (deviation of a pixel over five seeds, of 255 levels); and milliseconds
of processor time for an image, decoding alone. `decoded.png` shows them. A model that is already in `--out` is not
trained again, and a training that was stopped goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.codec import read_images
from benchmarks.masked_orders import Classifier, labelled_images, seen, trained
from benchmarks.rate_distortion import Measure
from images.datasets import to_float, to_uint8
from images.sheets import contact_sheet
from metrics.frechet import frechet_distance
from pipelines.codec.codec import Codec
from pipelines.model_folders import stage_folder
from pipelines.options import settings_of
from pipelines.pictures import save_png, to_pil
from pipelines.stages import load_autoencoder
from pipelines.trainings import read_config
from stage1_vq.autoencoders import FlowDecoder
from stage1_vq.autoencoders.base import Autoencoder
from stage1_vq.train import Stage1Config, train_stage1

SHOWN = 12  # images of decoded.png
CHUNK = 50  # images decoded at a time
SEEDS = 5
OF_SEEDS = 20  # images decoded under each
CLASSIFIER_IMAGES = 10_000


class Row(NamedTuple):
    name: str
    passes: int  # of a network, for an image
    psnr: float  # dB
    distance: float
    same: float  # share
    spread: float | None  # levels of 255; None for a decoder without noise
    milliseconds: float


def train(recipe: str, start: Path, data: str, steps: int | None, run: Path) -> FlowDecoder:
    """As `train-stage1 --config RECIPE --from START`; unless that is done."""
    changes: dict[str, Any] = {"data.path": data, "train.tracker": "none", "train.preview_every": 0}
    steps = read_config(Stage1Config, recipe, changes).train.steps if steps is None else steps
    changes |= {"train.steps": steps, "train.validate_every": steps}
    own: Any = read_config(Stage1Config, recipe, changes).model
    config = read_config(Stage1Config, recipe, {**changes, "from": start, "model.steps": own.steps})
    if not train_stage1(config, run).finished:
        raise SystemExit(f"{run} was stopped; the same command goes on")
    model = load_autoencoder(run).eval()
    assert isinstance(model, FlowDecoder)
    return model


def ways(old: Autoencoder, teacher: FlowDecoder, student: FlowDecoder) -> Iterator[tuple[str, int, Autoencoder]]:
    yield "old decoder", 1, old
    for steps in (1, 2, 4, 8, 16):
        teacher.decode_in_steps(steps)
        yield f"flow decoder, {steps} step{'s' if steps > 1 else ''}", steps, teacher
    yield "distilled, 1 step", 1, student


@torch.no_grad()
def decoded(model: Autoencoder, codes: tuple[Tensor, ...]) -> Tensor:
    """As files hold it, in 256 levels: b c H W in [-1, 1]."""
    parts = zip(*(grid.split(CHUNK) for grid in codes), strict=True)
    return to_float(to_uint8(torch.cat([model.decode(tuple(part)) for part in parts])))


def spread_over_seeds(model: FlowDecoder, codes: tuple[Tensor, ...]) -> float:
    some, config = tuple(grid[:OF_SEEDS] for grid in codes), model.config
    made = []
    for seed in range(SEEDS):
        model.config = replace(config, noise_seed=seed)
        made.append(decoded(model, some))
    model.config = config
    return float(torch.stack(made).var(0).mean().sqrt() * 127.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage1", type=Path, required=True, help="model or run whose codes are decoded")
    parser.add_argument("--data", default="mnist", help="a set with classes, or an .npz file, that has test images")
    parser.add_argument("--recipe", default="mnist_flow", help="and RECIPE_one_step beside it")
    parser.add_argument("--steps", type=int, help="of the training; left out: the recipe's")
    parser.add_argument("--student_steps", type=int, help="of the distillation; left out: the recipe's")
    parser.add_argument("--num", type=int, default=1000, help="test images")
    parser.add_argument("--out", type=Path, default=Path("runs/flow_compared"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = stage_folder(given.stage1, "stage1")
    print(f"# codes of a {settings_of(folder)['kind']}", flush=True)
    old = load_autoencoder(folder).eval()
    teacher = train(given.recipe, folder, given.data, given.steps, given.out / "teacher")
    student = train(
        f"{given.recipe}_one_step", given.out / "teacher", given.data, given.student_steps, given.out / "student"
    )

    classifier = Classifier(old.channels, 10)
    weights = given.out / "classifier.safetensors"
    if weights.exists():
        classifier.load_state_dict(load_file(weights))
    else:
        learned = labelled_images(given.data, old.image_size[0], old.channels, CLASSIFIER_IMAGES)
        classifier = trained(*learned, 10, 4)
        save_file(classifier.state_dict(), weights)
    classifier.eval()
    images = read_images(Codec(old), given.data, "test", given.num)
    real, classes = seen(classifier, images)
    measure, rows = Measure(images, None), []
    sheet, names = [[to_pil(image) for image in images[:SHOWN]]], ["image"]
    with torch.no_grad():
        codes = tuple(map(torch.cat, zip(*(old.encode(part) for part in images.split(CHUNK)), strict=True)))
        again = teacher.encode(images[:CHUNK])
    assert all(torch.equal(grid, whole[:CHUNK]) for grid, whole in zip(again, codes, strict=True))
    for name, passes, model in ways(old, teacher, student):
        begin = time.process_time()
        made = decoded(model, codes)
        milliseconds = 1000 * (time.process_time() - begin) / len(images)
        statistics, found = seen(classifier, made)
        rows.append(
            Row(
                name,
                passes,
                measure(made)["psnr"],
                frechet_distance(statistics, real),
                float((found == classes).float().mean()),
                spread_over_seeds(model, codes) if isinstance(model, FlowDecoder) else None,
                milliseconds,
            )
        )
        print(f"# {rows[-1]}", flush=True)
        sheet.append([to_pil(image) for image in made[:SHOWN]])
        names.append(name)
        save_png(contact_sheet(sheet, names, legible=56), given.out / "decoded.png")

    print("\n| decoder | passes | PSNR, dB | Frechet distance | same class | spread over seeds | ms an image |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        spread = "–" if row.spread is None else f"{row.spread:.1f}"
        print(
            f"| {row.name} | {row.passes} | {row.psnr:.2f} | {row.distance:.2f} | {row.same:.1%} | {spread} | "
            f"{row.milliseconds:.1f} |"
        )


if __name__ == "__main__":
    main()
