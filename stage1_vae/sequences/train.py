"""The task of likelihood VAEs of sequences: one step, one validation, one preview."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.model_io import PretrainedModel
from common.runs import SEQUENCE as STAGE
from common.short_repr import changes
from images.sheets import contact_sheet, to_tensor
from stage1_vae.objectives import AggressiveConfig, ELBOConfig, ImportanceConfig, InfoVAEConfig, build_objective
from stage1_vae.objectives.base import Objective, TrainingFacts
from stage1_vae.objectives.terms import elbo, total_kl
from stage1_vae.sequences.data import SequenceDataConfig, Sequences, open_sequences
from stage1_vae.sequences.pictures import pictures
from stage1_vae.sequences.sequence_vae import SequenceVAE, SequenceVAEConfig
from training.loop import FitResult, TrainConfig, fit
from training.run_folder import RunFacts, check_stage, defaults_of
from training.schedules import step_seed
from training.task import Batch, Companion, StepOutput

VALIDATION_SEED = 0x5EED  # of the noise by which held-out sequences are judged
SHOWN, TEMPERATURES, DECODED = 10, (1.0, 0.5, 0.2), 0.1  # of a preview


@dataclass(frozen=True, kw_only=True)
class Stage1SequenceConfig:
    """One complete run of a likelihood VAE of sequences: a model, an objective, sequences, and how to train."""

    model: SequenceVAEConfig
    sequences: SequenceDataConfig
    train: TrainConfig
    objective: ELBOConfig | ImportanceConfig | InfoVAEConfig | AggressiveConfig = field(default_factory=ELBOConfig)

    __repr__ = changes

    def __post_init__(self) -> None:
        if self.train.evaluate_every:
            raise UserError(
                f"train.evaluate_every={self.train.evaluate_every}, expected 0: of sequences there are no images to "
                "judge"
            )


class SequenceTask:
    """training.task.Task of `SequenceVAE`. Batches are those of `Sequences`.

    Validation, on sequences that are never trained on, in nats per sequence: `negative_elbo`, of one draw of each one's
    latents, whose noise is a function of its number, and its parts, `log_likelihood` and `kl`.
    """

    def __init__(
        self, model: SequenceVAE, objective: Objective, held_out: Sequences, *, batch_size: int, seed: int = 0
    ) -> None:
        """batch_size: of a step, over all processes and micro-batches; seed: of the noise of its draws."""
        self.model: PretrainedModel = model
        self.vae, self.objective, self.held_out = model, objective, held_out
        self.best_metric, self.guard = objective.best_metric, objective.guard
        self.companions: dict[str, Companion] = objective.companions
        self.reads_weights = objective.reads_weights
        self.batch_size, self.seed = batch_size, seed

    def start(self, model: nn.Module, batches: object) -> None:
        pass

    def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
        sequences = batch["sequences"]
        output = self.objective.loss(model, sequences, step, self.noise_of_step(sequences, batch["draws"], step))
        return StepOutput(output.loss, output.metrics, output.companion_losses, output.resting)

    @torch.no_grad()
    def noise_of_step(self, sequences: Tensor, draws: Tensor, step: int) -> Tensor:
        """k b d: as much as the whole step takes, of which these sequences have their part. So it is the same on
        however many processes and micro-batches."""
        generator = torch.Generator(sequences.device).manual_seed(step_seed(self.seed, step, "latents"))
        noise = self.vae.posterior(sequences[:1]).noise(self.objective.draws * self.batch_size, generator)
        noise = noise.view(self.objective.draws, self.batch_size, *noise.shape[2:])
        return noise if len(sequences) == self.batch_size else noise[:, draws % self.batch_size]

    def after_step(self, step: int) -> None:
        pass

    def health(self) -> dict[str, Tensor]:
        return {}

    def discard_step(self) -> None:
        pass

    def validate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(model, SequenceVAE)
        sequences = batch["sequences"]
        alone, generator = model.posterior(sequences[:1]), torch.Generator(sequences.device)
        seeds = [VALIDATION_SEED * 2**31 + number for number in batch["numbers"].tolist()]
        noise = torch.cat([alone.noise(1, generator.manual_seed(seed)) for seed in seeds], dim=1)
        terms = model(sequences, noise=noise)
        told = {"log_likelihood": terms.log_likelihood.mean(0), "kl": total_kl(terms)}
        return {"negative_elbo": -elbo(terms), **told, **self.objective.validation_figures(terms)}

    @torch.no_grad()
    def preview(self, model: nn.Module) -> Tensor | None:
        """Of strokes: held-out drawings, what is drawn of the means of their posteriors, and samples at several
        temperatures. Of tokens there is none."""
        assert isinstance(model, SequenceVAE)
        if model.vocabulary is not None or not len(self.held_out):
            return None
        device = next(model.parameters()).device
        some = list(range(min(SHOWN, len(self.held_out))))
        sequences = self.held_out.fetch(some, some)["sequences"].to(device)
        generator = torch.Generator(device).manual_seed(0)
        rows = [self.held_out.items, model.draw(model.encode(sequences), DECODED, generator)]
        latents = model.prior.sample(len(some), generator)
        rows += [model.draw(latents, temperature, generator) for temperature in TEMPERATURES]
        names = ["real", "decoded", *(f"sampled, {temperature:g}" for temperature in TEMPERATURES)]
        return to_tensor(contact_sheet([pictures(drawings[: len(some)]) for drawings in rows], names))

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        return []


def train_sequence(config: Stage1SequenceConfig, run: Path) -> FitResult:
    """Trains a likelihood VAE of sequences in the folder `run`, or continues there; best weights in `run/model`. Raises
    UserError."""
    check_stage(run, STAGE)
    seed = config.train.seed
    training, held_out, vocabulary = open_sequences(config.sequences, seed)
    torch.manual_seed(seed)
    joint = " " if config.sequences.unit == "word" else ""
    model = SequenceVAE(config.model, config.sequences.longest, vocabulary, joint)
    weights, batch_size = tuple(model.generator_parameters()), config.train.batch_size
    facts = TrainingFacts(len(training), config.train.steps, model.shape, weights, batch_size=batch_size)
    objective = build_objective(config.objective, facts)
    task = SequenceTask(model, objective, held_out, batch_size=batch_size, seed=seed)

    def fingerprints() -> dict[str, str]:
        return {"sequences.path": training.fingerprint()}

    about = RunFacts(stage=STAGE, samples="sequences", defaults=defaults_of(config), data=fingerprints)
    return fit(task, training, held_out, config.train, run, asdict(config), about)
