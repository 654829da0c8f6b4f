"""The task of likelihood VAEs of tables: one step and one validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.model_io import PretrainedModel
from common.runs import TABLE as STAGE
from common.short_repr import changes
from stage1_vae.objectives import ELBOConfig, ImportanceConfig, build_objective
from stage1_vae.objectives.base import Objective, TrainingFacts
from stage1_vae.objectives.importance import importance_bound
from stage1_vae.objectives.terms import total_kl
from stage1_vae.tables.counts import CountsConfig
from stage1_vae.tables.data import Rows, TableConfig, read_table, split_table
from stage1_vae.tables.model import TableVAE
from stage1_vae.tables.models import TableModelConfig, build_model
from training.loop import FitResult, TrainConfig, fit
from training.run_folder import RunFacts, check_stage, defaults_of
from training.schedules import step_seed
from training.task import Batch, Companion, Guard, StepOutput

VALIDATION_SEED = 0x5EED  # of the noise by which held-out rows are judged


@dataclass(frozen=True, kw_only=True)
class Stage1TableConfig:
    """One complete run of a likelihood VAE of a table: a model, an objective, rows, and how to train."""

    model: TableModelConfig
    table: TableConfig
    train: TrainConfig
    objective: ELBOConfig | ImportanceConfig = field(default_factory=ImportanceConfig)

    __repr__ = changes

    def __post_init__(self) -> None:
        if self.train.evaluate_every:
            raise UserError(
                f"train.evaluate_every={self.train.evaluate_every}, expected 0: of a table there are no images to judge"
            )
        objective = self.objective
        if isinstance(self.model, CountsConfig) and isinstance(objective, ImportanceConfig) and not objective.is_plain:
            raise UserError(
                f"objective.gradient={objective.gradient} and objective.generator_over_all="
                f"{objective.generator_over_all} with model.kind=counts, expected reparameterised and false: the "
                "others part the gradient at the one posterior of all latents, and a cell's state and its size have "
                "one each"
            )


class TableTask:
    """training.task.Task of likelihood VAEs of tables. Batches are those of `Rows`.

    Validation, on rows that are never trained on, in nats per row: `negative_bound`, the importance-weighted bound of
    as many draws of each row's latents as a step has, whose noise is a function of the row's number, and
    `log_likelihood` and `kl`, the parts of the bound of one draw.
    """

    best_metric = "negative_bound"
    guard: Guard | None = None

    def __init__(self, model: TableVAE, objective: Objective, *, batch_size: int, seed: int = 0) -> None:
        """batch_size: of a step, over all processes and micro-batches; seed: of the noise of its draws."""
        self.model: PretrainedModel = model
        self.vae, self.objective = model, objective
        self.companions: dict[str, Companion] = objective.companions
        self.reads_weights = objective.reads_weights
        self.batch_size, self.seed = batch_size, seed

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        pass

    def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
        rows = batch["rows"]
        output = self.objective.loss(model, rows, step, self.noise_of_step(rows, batch["draws"], step))
        return StepOutput(output.loss, output.metrics, output.companion_losses, output.resting)

    @torch.no_grad()
    def noise_of_step(self, rows: Tensor, draws: Tensor, step: int) -> Tensor:
        """k b noise_size: as much as the whole step takes, of which these rows have their part. So it is the same on
        however many processes and micro-batches."""
        generator = torch.Generator(rows.device).manual_seed(step_seed(self.seed, step, "latents"))
        shape = (self.objective.draws, self.batch_size, self.vae.noise_size)
        noise = torch.randn(shape, device=rows.device, generator=generator)
        return noise if len(rows) == self.batch_size else noise[:, draws % self.batch_size]

    def after_step(self, step: int) -> None:
        self.vae.after_step()

    def health(self) -> dict[str, Tensor]:
        return {}

    def discard_step(self) -> None:
        self.vae.discard_step()

    def validate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(model, TableVAE)
        rows = batch["rows"]
        terms = model(rows, noise=noise_of(model, rows, batch["numbers"].tolist(), self.objective.draws))
        return {
            "negative_bound": -importance_bound(terms.log_weights),
            "log_likelihood": terms.log_likelihood.mean(0),
            "kl": total_kl(terms),
        }

    def preview(self, model: nn.Module) -> Tensor | None:
        return None

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        return []


def noise_of(model: TableVAE, rows: Tensor, numbers: Sequence[int], draws: int, seed: int = VALIDATION_SEED) -> Tensor:
    """Of `draws` draws of each row, k b noise_size, which depends on the row's number and the seed alone."""
    generator = torch.Generator(rows.device)
    parts = [
        torch.randn(
            draws,
            model.noise_size,
            device=rows.device,
            generator=generator.manual_seed(seed * 2**31 + number),
        )
        for number in numbers
    ]
    return torch.stack(parts, dim=1)


def train_table(config: Stage1TableConfig, run: Path) -> FitResult:
    """Trains a likelihood VAE of a table in the folder `run`, or continues there; best weights in `run/model`. Raises
    UserError."""
    check_stage(run, STAGE)
    table = read_table(config.table.path)
    training, held_out = split_table(table, config.table)
    seed = config.train.seed
    torch.manual_seed(seed)
    model = build_model(config.model, table, training, config.table)
    rows = Rows(model.rows(training))
    generator = tuple(model.generator_parameters())
    facts = TrainingFacts(len(rows), config.train.steps, (config.model.latents,), generator)
    objective = build_objective(config.objective, facts)
    task = TableTask(model, objective, batch_size=config.train.batch_size, seed=seed)

    def fingerprints() -> dict[str, str]:
        found = {"table.path": table.fingerprint()}
        if config.table.validation_path is not None:
            found["table.validation_path"] = held_out.fingerprint()
        return found

    about = RunFacts(stage=STAGE, samples="rows", defaults=defaults_of(config), data=fingerprints)
    held = Rows(model.rows(held_out))
    return fit(task, rows, held, config.train, run, asdict(config), about)
