"""Images of a VAE by the file, resumable, on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from common.errors import UserError
from common.precision import Precision
from pipelines.devices import open_device
from pipelines.generation.plan import Amount, Plan
from pipelines.generation.results import Output, generate_results
from pipelines.generation.work import Use
from pipelines.labels import class_number
from pipelines.latents.pipeline import LatentPipeline
from pipelines.one_by_one import sample_each
from pipelines.prior_requests import labels_of
from stage1_vae.model import Pixels

BEFORE = {"label": None, "temperature": 1.0, "precision": None}  # what builds did that recorded none of these


class LatentSettings(NamedTuple):
    """What samples of a VAE depend on besides the model."""

    seed: int
    pixels: Pixels
    label: int | str | None = None  # of a VAE that knows classes; None: all in turn
    temperature: float | tuple[float, ...] = 1.0  # of a hierarchy: of all groups, or of each
    precision: Precision | None = None  # what the networks compute in; None: as their weights are


def generate_from_latents(
    model: str, output: Output, amount: Amount, asked: LatentSettings, device_name: str | None
) -> str:
    """Writes the images that the place lacks; returns one line that says what was made and where.

    Sample i is a function of the model, the settings and i alone. Raises UserError for a place begun with other
    settings or by another command, and for a plan with prompts.
    """
    state, device = open_device(device_name)
    pipeline = LatentPipeline.from_pretrained(model).to(device)
    label = class_number(pipeline.class_names, asked.label)
    rows = amount.rows(pipeline.class_names)
    if rows is not None and rows.texts is not None:
        raise UserError(f"plan={amount.plan} has prompts, and the model is a VAE, which reads none; leave them out")
    num = amount.number(rows, pipeline.num_classes)

    def classes_of(samples: Sequence[int]) -> list[int] | None:
        return labels_of(pipeline, samples, label if rows is None or rows.labels is None else rows.labels_of(samples))

    plan = Plan(num, asked.seed, classes_of, rows=rows, class_names=pipeline.class_names)
    plan.check(pipeline)
    pipeline.check_temperature(asked.temperature)
    pipeline.check_precision(asked.precision)

    def draw(batch: range, wanted: Sequence[int], use: Use) -> None:
        drawn = plan.of(batch)
        sample_each(
            pipeline,
            drawn.numbers,
            drawn.seeds,
            asked.pixels,
            lambda place, picture: use(batch[place], picture),
            drawn.labels,
            asked.temperature,
            asked.precision,
            [i - batch.start for i in wanted],
        )

    return generate_results(
        output,
        plan,
        {"model": pipeline.fingerprint(), **asked._asdict(), "label": label},
        draw,
        state,
        turns=pipeline.num_classes if label is None and rows is None else 0,
        defaults=BEFORE,
        labels_of_npz=lambda count: classes_of(range(count)),
    )
