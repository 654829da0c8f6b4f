"""The ELBO of a deep hierarchy as NVAE trains it (Vahdat and Kautz 2020, arXiv:2007.03898, section 3.2, appendix A).

    loss = -E_q[log p(x|z)] + weight * sum_l gamma_l KL_l + coefficient * (sum of spectral norms + of batch norm scales)

While the weight rises from nearly 0 to 1, groups are balanced: gamma_l is larger the more a group tells, and the fewer
numbers it has, so that none is emptied because it came late,

    gamma_l ~ (mean over the batch of |KL_l| + 0.01) / alpha_l,   of mean 1 over groups
    alpha_l ~ how many numbers the group has / how many groups have so many

and at weight 1 every gamma is 1: the loss is that of the bound.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.distributed import mean_over_processes
from common.errors import UserError, check_fields
from stage1_vae.objectives.base import Objective, ObjectiveOutput, TrainingFacts
from stage1_vae.objectives.elbo import elbo_figures
from stage1_vae.objectives.spectral import FIRST_ITERATIONS, ITERATIONS, SpectralNorms
from stage1_vae.objectives.terms import Terms
from training.task import Companion

COMPANION = "spectral_norms"


@dataclass(frozen=True, kw_only=True)
class BalancedConfig:
    """Steps are told as shares of train.steps. Every other setting off is the ELBO with a weight that rises."""

    kind: Literal["balanced"] = "balanced"
    draws: int = 1  # of the latents of each image
    balance: bool = True  # of groups, while the weight is below 1
    warmup_share: float = 0.3  # over which the weight of the KL rises from 0 to 1; 0: it is 1
    constant_share: float = 0.0001  # before that, at smallest_weight
    smallest_weight: float = 0.0001  # below which it never is
    regularisation: float = 0.0  # coefficient of spectral norms and batch norm scales; 0 is off; the paper has 0.01
    regularisation_start: float = 0.0  # where it comes from, geometrically with the weight of the KL; 0: it is constant

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("draws", self.draws >= 1, "at least 1"),
                ("warmup_share", 0 <= self.warmup_share <= 1, "a share of train.steps from 0 to 1"),
                ("constant_share", 0 <= self.constant_share <= 1, "a share of train.steps from 0 to 1"),
                ("smallest_weight", 0 <= self.smallest_weight <= 1, "from 0 to 1"),
                ("regularisation", 0 <= self.regularisation < math.inf, "0 (off) or more"),
                ("regularisation_start", 0 <= self.regularisation_start < math.inf, "0 (constant) or more"),
                (
                    "regularisation_start",
                    not self.regularisation_start or self.regularisation > 0,
                    "0 where regularisation is 0: a geometric path never reaches that",
                ),
            ],
        )


class Balanced(Objective):
    config: BalancedConfig

    def __init__(self, config: BalancedConfig, facts: TrainingFacts) -> None:
        super().__init__(config, facts)
        if not config.regularisation:
            return
        found = facts.regularised()
        if found is None:
            raise UserError(
                f"objective.regularisation={config.regularisation}, expected 0: this kind of model does not say which "
                "weights it is of; model.kind=nvae does"
            )
        self.reads_weights = "objective.regularisation"
        self.norms = SpectralNorms(found.matrices)
        self.companions = {COMPANION: Companion(self.norms, kept=True)}
        self.iterated_in: int | None = None  # the step in which the vectors were last iterated

    def weight(self, step: int) -> float:
        """Of the KL at this step."""
        config, steps = self.config, self.facts.steps
        if not config.warmup_share:
            return 1.0
        risen = (step - config.constant_share * steps) / (config.warmup_share * steps)
        return max(min(risen, 1.0), config.smallest_weight)

    def coefficient(self, step: int) -> float:
        """Of the regularisation at this step."""
        config = self.config
        if not config.regularisation_start:
            return config.regularisation
        weight = self.weight(step)
        return config.regularisation_start ** (1 - weight) * config.regularisation**weight

    def loss(self, model: nn.Module, images: Tensor, step: int, noise: Tensor | None = None) -> ObjectiveOutput:
        terms: Terms = model(images, self.config.draws, noise)
        weight = self.weight(step)
        kl = torch.stack([group.sum(-1) for group in terms.kl])  # l b
        factors = torch.ones_like(kl[:, 0])
        if self.config.balance and weight < 1:
            factors = balance(kl, alphas([group[0, 0].numel() for group in terms.latents]).to(kl))
        loss = weight * (factors.unsqueeze(1) * kl).sum(0).mean() - terms.log_likelihood.mean()
        metrics = {**elbo_figures(terms), "weight": loss.new_tensor(weight)}
        if self.config.regularisation:
            spectral, scales = self.penalties(step)
            loss = loss + self.coefficient(step) * (spectral + scales)
            metrics |= {"spectral_norms": spectral.detach(), "batch_norm_scales": scales.detach()}
        return ObjectiveOutput(loss, metrics)

    def penalties(self, step: int) -> tuple[Tensor, Tensor]:
        """Of spectral norms and of batch norm scales, scalars. They are functions of the weights alone, the same on all
        processes and in all micro-batches of a step: the first of these iterates, the others take the same vectors."""
        found = self.facts.regularised()
        assert found is not None
        iterations = 0 if step == self.iterated_in else FIRST_ITERATIONS if step == 0 else ITERATIONS
        self.iterated_in = step
        scales = [gain.abs().max() for gain in found.gains]
        return self.norms(found.matrices, iterations), torch.stack(scales).sum()


# ---- what it is made of ---------------------------------------------------------------------------------------------


def alphas(sizes: Sequence[int]) -> Tensor:
    """How little a group's KL weighs, for groups of so many numbers: in proportion to these, over how many groups have
    as many; the smallest is 1."""
    count = Counter(sizes)
    found = torch.tensor([size / count[size] for size in sizes])
    return found / found.min()


@torch.no_grad()
def balance(kl: Tensor, alpha: Tensor) -> Tensor:
    """gamma, l, of mean 1: of the KL of each group and image, l b, and of alpha, l. The mean over the batch is one over
    all processes, but over each micro-batch by itself."""
    told = mean_over_processes(kl.abs().mean(dim=1)) + 0.01
    gamma = told / alpha
    return gamma / gamma.mean()
