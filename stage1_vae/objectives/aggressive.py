"""Aggressive inference of He et al. 2019, "Lagging Inference Networks and Posterior Collapse" (arXiv:1901.05534).

Before each step of the generator the inference network takes several alone, so that q(z|x) does not lag behind p(z|x)
as it does when posteriors collapse. That lasts until the mutual information of latents and images, measured at each
validation, no longer grows; from then on both learn in each step, as ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from common.errors import check_fields
from stage1_vae.objectives.base import Objective, ObjectiveOutput, TrainingFacts
from stage1_vae.objectives.elbo import ELBO, ELBOConfig
from stage1_vae.objectives.terms import Terms
from training.task import Verdict


@dataclass(frozen=True, kw_only=True)
class AggressiveConfig:
    """Ends by validations: give train.validate_every, and validation images enough."""

    kind: Literal["aggressive"] = "aggressive"
    bound: ELBOConfig = field(default_factory=ELBOConfig)
    inference_steps: int = 10  # of the inference network alone, before each of the generator alone
    patience: int = 1  # validations in a row without a greater mutual information after which both learn together

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("inference_steps", self.inference_steps >= 1, "at least 1; objective.kind=elbo has none"),
                ("patience", self.patience >= 1, "at least 1"),
            ],
        )


class Aggressive(Objective):
    """Its own guard (training.task.Guard): it keeps the weights of the best bound, as without one."""

    config: AggressiveConfig

    def __init__(self, config: AggressiveConfig, facts: TrainingFacts) -> None:
        super().__init__(config, facts)
        self.bound = ELBO(config.bound, facts)
        self.reads_weights = "objective.kind=aggressive"
        self.guard = self
        self.lasts = True
        self.most_information = -math.inf
        self.without_more = 0  # validations in a row
        self.best = math.inf

    def loss(self, model: nn.Module, images: Tensor, step: int, noise: Tensor | None = None) -> ObjectiveOutput:
        output = self.bound.loss(model, images, step, noise)
        metrics = {**output.metrics, "aggressive": output.loss.new_tensor(float(self.lasts))}
        return output._replace(metrics=metrics, resting=self.resting(model, step))

    def resting(self, model: nn.Module, step: int) -> tuple[nn.Parameter, ...]:
        if not self.lasts:
            return ()
        of_generator = step % (self.config.inference_steps + 1) == self.config.inference_steps
        generator = {id(weight) for weight in self.facts.generator}
        return tuple(weight for weight in model.parameters() if (id(weight) in generator) != of_generator)

    def validation_figures(self, terms: Terms) -> dict[str, Tensor]:
        return {"mutual_information": mutual_information(terms)}

    # ---- training.task.Guard ----------------------------------------------------------------------------------------

    def judge(self, metrics: dict[str, float], bad_before: int, step: int) -> Verdict:
        information, value = metrics["mutual_information"], metrics[self.best_metric]
        self.without_more = 0 if information > self.most_information else self.without_more + 1
        self.most_information = max(self.most_information, information)
        self.lasts = self.lasts and self.without_more < self.config.patience
        keep = value < self.best
        self.best = min(self.best, value)
        return Verdict(keep)

    def rolled_back(self, step: int, rollbacks: int) -> None:
        """It asks for none."""

    def state(self) -> dict[str, Any]:
        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "lasts": self.lasts,
            "most_information": number(self.most_information),
            "without_more": self.without_more,
            "best": number(self.best),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.lasts, self.without_more = state["lasts"], state["without_more"]
        self.most_information = -math.inf if state["most_information"] is None else state["most_information"]
        self.best = math.inf if state["best"] is None else state["best"]


def mutual_information(terms: Terms) -> Tensor:
    """log q(z|x) - log q(z) of one draw of each image, b, whose mean is the mutual information of latents and images in
    nats, q(z) being the mean of the batch's posteriors: at most the log of the batch's size (Hoffman and Johnson 2016).
    """
    latents, posterior = terms.latents[0][0], terms.posteriors[0]
    count = len(latents)
    pairs = posterior.log_density(latents.unsqueeze(1).expand(-1, count, *latents.shape[1:])).sum(-1)  # latents, images
    return pairs.diagonal() - (pairs.logsumexp(dim=1) - math.log(count))
