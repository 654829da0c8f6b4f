"""Estimators of gradients through draws, all on the same problem: bias, variance and time of each.

`python -m benchmarks.gradient_estimators` prints a Markdown table, and fails when an estimator that should be unbiased
lies more than four standard errors from the exact derivative at any of its numbers. There are four contexts, each with
a distribution of its own, as images have. Gaussian: two latents of each, and f(z) = sum_j (z_j^2 - t_j)^2. Categorical:
one of five, one-hot, and f(y) = |y W - t|^2. Bound: log 1/3 sum_k exp(f(y_k)) of three categorical draws, the same f
with its sign turned. Bias is the distance of the mean estimate from the exact derivative, as a share of its length; the
largest error is that of one number, in standard errors; variance is that of one draw's estimate, all numbers added:
of an estimate of K draws it is K times as much as found.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from stage1_vae.gradients import (
    LearnedBaseline,
    RunningMean,
    baseline_loss,
    categorical_draws,
    gumbel_noise,
    gumbel_softmax,
    leave_one_out,
    score_function,
    straight_through,
    vimco,
)

CONTEXTS, LATENTS, CATEGORIES, BLOCK, ERRORS = 4, 2, 5, 500, 4.0
OTHERS = "leave one out"  # a kind of baseline


def constants(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGETS, TABLE, POINTS = constants(4, LATENTS, seed=1), constants(CATEGORIES, 3, seed=2), constants(4, 3, seed=3)
GAUSSIAN = torch.stack([constants(4, LATENTS, seed=4), 0.3 * constants(4, LATENTS, seed=5) - 0.3])  # mean, log scale
LOGITS = constants(4, CATEGORIES, seed=6)


def of_latents(z: Tensor) -> Tensor:
    return (z.square() - TARGETS).square().sum(-1)


def of_choices(y: Tensor) -> Tensor:
    return (y @ TABLE - POINTS).square().sum(-1)


# ---- exact derivatives ----------------------------------------------------------------------------------------------


def exact_gaussian(parameters: Tensor) -> Tensor:
    mean, variance = parameters[0], (2 * parameters[1]).exp()
    second, fourth = mean**2 + variance, mean**4 + 6 * mean**2 * variance + 3 * variance**2
    return (fourth - 2 * TARGETS * second + TARGETS**2).sum()


def exact_categorical(logits: Tensor) -> Tensor:
    choices = torch.eye(CATEGORIES, dtype=torch.float64).unsqueeze(1).expand(-1, CONTEXTS, -1)
    return (logits.softmax(-1).T * of_choices(choices)).sum()


def exact_bound(logits: Tensor) -> Tensor:
    log_probabilities = logits.log_softmax(-1)  # b c
    values = -of_choices(torch.eye(CATEGORIES, dtype=torch.float64).unsqueeze(1).expand(-1, CONTEXTS, -1)).T  # b c
    total = torch.zeros(())
    for choice in itertools.product(range(CATEGORIES), repeat=3):
        bound = values[:, choice].logsumexp(-1) - math.log(3)
        total = total + (log_probabilities[:, choice].sum(-1).exp() * bound).sum()
    return total


# ---- estimators: parameters of n estimates, each with its own copy -> a sum whose gradient is all estimates ----------


@dataclass
class Baselines:
    """What an estimator remembers from block to block."""

    running: RunningMean = field(default_factory=RunningMean)
    learned: LearnedBaseline = field(default_factory=partial(LearnedBaseline, CONTEXTS))

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.learned.parameters(), lr=0.02)

    def of(self, kind: str, values: Tensor) -> Tensor | float:
        if kind == "running mean":
            return self.running(values)
        if kind == "learned":
            baseline = self.learned(torch.eye(CONTEXTS))
            self.optimizer.zero_grad()
            baseline_loss(baseline, values.float()).backward()
            self.optimizer.step()
            return baseline.detach().double()  # from before this block's values
        return leave_one_out(values) if kind == OTHERS else 0.0


def gaussian_draws(parameters: Tensor, draws: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Draws with a graph, k n b d, and log q of given ones: parameters 2 n b d."""
    mean, log_scale = parameters
    noise = torch.randn(draws, *mean.shape, dtype=torch.float64)
    z = mean + log_scale.exp() * noise

    def log_density(given: Tensor) -> Tensor:
        return (-0.5 * ((given - mean) / log_scale.exp()).square() - log_scale).sum(-1)

    return z, log_density


def reparameterised(parameters: Tensor, memory: Baselines) -> Tensor:
    return of_latents(gaussian_draws(parameters, 1)[0]).sum()


def gaussian_score(parameters: Tensor, memory: Baselines, kind: str = "none", draws: int = 1) -> Tensor:
    z, log_density = gaussian_draws(parameters, draws)
    values = of_latents(z.detach())
    return score_function(log_density(z.detach()), values, memory.of(kind, values)).mean(0).sum()


def choices_of(logits: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """k n b c and k n b: logits n b c."""
    one_hot, log_density = categorical_draws(logits.flatten(0, 1), draws)
    return one_hot.unflatten(1, logits.shape[:2]), log_density.unflatten(1, logits.shape[:2])


def categorical_score(logits: Tensor, memory: Baselines, kind: str = "none", draws: int = 1) -> Tensor:
    one_hot, log_density = choices_of(logits, draws)
    values = of_choices(one_hot)
    return score_function(log_density, values, memory.of(kind, values)).mean(0).sum()


def straight(logits: Tensor, memory: Baselines) -> Tensor:
    return of_choices(straight_through(logits.flatten(0, 1), 1)[0].unflatten(0, logits.shape[:2])).sum()


def gumbel(logits: Tensor, memory: Baselines, temperature: float, hard: bool = False) -> Tensor:
    return of_choices(gumbel_softmax(logits, gumbel_noise(logits.shape, logits), temperature, hard=hard)).sum()


def bound_score(logits: Tensor, memory: Baselines) -> Tensor:
    one_hot, log_density = choices_of(logits, 3)
    bound = (-of_choices(one_hot)).logsumexp(0) - math.log(3)
    return score_function(log_density.sum(0), bound).sum()


def bound_vimco(logits: Tensor, memory: Baselines) -> Tensor:
    one_hot, log_density = choices_of(logits, 3)
    return vimco(log_density.flatten(1), -of_choices(one_hot).flatten(1)).sum()


Estimator = Callable[[Tensor, Baselines], Tensor]
ROWS: list[tuple[str, str, Estimator, int, bool]] = [  # problem, name, estimator, draws of an estimate, unbiased
    ("Gaussian", "reparameterised", reparameterised, 1, True),
    ("Gaussian", "score function", gaussian_score, 1, True),
    ("Gaussian", "score function, running mean", partial(gaussian_score, kind="running mean"), 1, True),
    ("Gaussian", "score function, learned baseline", partial(gaussian_score, kind="learned"), 1, True),
    ("Gaussian", "score function, other 4 of 5 draws", partial(gaussian_score, kind=OTHERS, draws=5), 5, True),
    ("categorical", "score function", categorical_score, 1, True),
    ("categorical", "score function, running mean", partial(categorical_score, kind="running mean"), 1, True),
    ("categorical", "score function, learned baseline", partial(categorical_score, kind="learned"), 1, True),
    (
        "categorical",
        "score function, other 4 of 5 draws",
        partial(categorical_score, kind="leave one out", draws=5),
        5,
        True,
    ),
    ("categorical", "straight-through", straight, 1, False),
    ("categorical", "Gumbel-softmax, temperature 1", partial(gumbel, temperature=1.0), 1, False),
    ("categorical", "Gumbel-softmax, temperature 0.3", partial(gumbel, temperature=0.3), 1, False),
    ("categorical", "Gumbel-softmax, temperature 0.1", partial(gumbel, temperature=0.1), 1, False),
    ("categorical", "straight-through Gumbel-softmax, 0.3", partial(gumbel, temperature=0.3, hard=True), 1, False),
    ("bound", "score function", bound_score, 3, True),
    ("bound", "VIMCO", bound_vimco, 3, True),
]
PROBLEMS = {
    "Gaussian": (GAUSSIAN, 1, exact_gaussian),
    "categorical": (LOGITS, 0, exact_categorical),
    "bound": (LOGITS, 0, exact_bound),
}


def measure(problem: str, estimator: Estimator, draws: int, total: int) -> tuple[float, float, float, float]:
    """Bias as a share, largest error in standard errors, variance of a draw, microseconds of a draw of a context."""
    torch.manual_seed(0)
    parameters, axis, exact = PROBLEMS[problem]
    derivative = torch.func.grad(exact)(parameters)
    memory, estimates, count = Baselines(), [], total // draws
    begin = time.perf_counter()
    for _ in range(count // BLOCK):
        copies = parameters.unsqueeze(axis).expand(*parameters.shape[:axis], BLOCK, *parameters.shape[axis:]).clone()
        copies.requires_grad_()
        estimates.append(torch.autograd.grad(estimator(copies, memory), copies)[0])
    seconds = time.perf_counter() - begin
    found = torch.cat(estimates, dim=axis).movedim(axis, 0)
    error = (found.mean(0) - derivative) / (found.std(0) / math.sqrt(len(found)) + 1e-15)
    bias = (found.mean(0) - derivative).norm() / derivative.norm()
    microseconds = 1e6 * seconds / (len(found) * draws * CONTEXTS)
    return bias.item(), error.abs().max().item(), draws * found.var(0).sum().item(), microseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100_000, help="of each context")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.draws:,} draws of each context, float64\n"
    )
    print("| latents | estimator | unbiased | bias | largest error, s.e. | variance | microseconds |")
    print("|---|---|---|---:|---:|---:|---:|")
    missed = []
    for problem, name, estimator, draws, unbiased in ROWS:
        bias, error, variance, microseconds = measure(problem, estimator, draws, args.draws)
        said = "yes" if unbiased else "no"
        print(
            f"| {problem} | {name} | {said} | {bias:.2%} | {error:.1f} | {variance:.3g} | {microseconds:.2f} |",
            flush=True,
        )
        if unbiased and error > ERRORS:
            missed.append(f"{problem}, {name}: {error:.1f} standard errors")
    if missed:
        raise SystemExit("not unbiased: " + "; ".join(missed))


if __name__ == "__main__":
    main()
