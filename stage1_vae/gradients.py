"""Estimators of the gradient of E_q(z)[f(z)] with respect to q, from draws, for continuous and discrete latents.

Each gives numbers whose value is what they are of, and whose gradient, by a backward pass, is the estimate. Draws lead:
k b. `log_density` is log q(z) of draws without a graph, as a function of q's parameters; `values` are f(z).

    reparameterised   d/dq f(z(noise))                         z a differentiable function of noise; needs nothing here
    score function    (f(z) - baseline) d/dq log q(z)          any z and f (Williams 1992, REINFORCE)
    VIMCO             the same for the importance-weighted bound, with baselines of the other draws
    straight-through  the gradient of probabilities for that of the choice: biased (Bengio et al. 2013)
    Gumbel-softmax    a relaxed choice: biased, less and noisier the colder (Jang et al. 2016)

A baseline that does not depend on the draw leaves the mean of a score function's estimate and lessens its variance.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vae.networks.dense import DenseConfig, DenseLayers

# ---- score function -------------------------------------------------------------------------------------------------


def score_function(log_density: Tensor, values: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """f(z), k b, whose gradient is (f(z) - baseline) d log q(z) beside that of f itself."""
    signal = values.detach() - (baseline.detach() if isinstance(baseline, Tensor) else baseline)
    return values + signal * (log_density - log_density.detach())


def leave_one_out(values: Tensor) -> Tensor:
    """A baseline for each draw, k b: the mean of the other draws' values. At least two draws."""
    return (values.sum(dim=0) - values) / (len(values) - 1)


def vimco(log_density: Tensor, log_weights: Tensor) -> Tensor:
    """L_K of each image, b: log 1/K sum_k w_k (Mnih and Rezende 2016, "Variational Inference for Monte Carlo
    Objectives", arXiv:1602.06725, equation 10). log_weights, k b, at least two, whose own gradient counts as well. The
    signal of a draw is L_K less what L_K would be with the geometric mean of the other weights in the place of its
    own."""
    count = len(log_weights)
    bound = log_weights.logsumexp(dim=0) - math.log(count)
    with torch.no_grad():
        replaced = log_weights.expand(count, *log_weights.shape).clone()  # row k: draw k replaced
        places = torch.arange(count)
        replaced[places, places] = leave_one_out(log_weights)
        signal = bound - (replaced.logsumexp(dim=1) - math.log(count))
    return bound + (signal * (log_density - log_density.detach())).sum(dim=0)


class RunningMean(nn.Module):
    """A baseline: the mean of earlier values, which decays; 0 before there are any."""

    mean: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))  # of all values so far: 1 - decay^n

    def forward(self, values: Tensor) -> Tensor:
        """The baseline of these values, a scalar: it does not depend on them. They count from the next call on."""
        baseline = self.mean / self.weight.clamp(min=1e-30)
        self.mean = torch.lerp(values.detach().float().mean(), self.mean, self.decay)
        self.weight = torch.lerp(torch.ones_like(self.weight), self.weight, self.decay)
        return baseline


class LearnedBaseline(nn.Module):
    """A baseline that a small network finds for what z is drawn given: `b inputs` -> b. It learns by `baseline_loss`
    (Mnih and Gregor 2014, arXiv:1402.0030)."""

    def __init__(self, inputs: int, hidden: int = 32) -> None:
        super().__init__()
        self.layers = DenseLayers(inputs, 1, DenseConfig(hidden=(hidden,), activation="tanh"))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs).squeeze(-1)


def baseline_loss(baseline: Tensor, values: Tensor) -> Tensor:
    """Mean squared distance of a baseline, b, to values, k b; a scalar with a gradient at the baseline alone."""
    return (baseline - values.detach()).square().mean()


# ---- discrete latents -----------------------------------------------------------------------------------------------


def categorical_draws(logits: Tensor, draws: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """One-hot draws without a graph, `k b c`, and log q of them, k b, with one: logits b c."""
    log_probabilities = logits.log_softmax(dim=-1)
    chosen = torch.multinomial(log_probabilities.detach().exp(), draws, replacement=True, generator=generator).T  # k b
    log_density = log_probabilities.expand(draws, *logits.shape).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return F.one_hot(chosen, logits.shape[-1]).to(logits.dtype), log_density


def straight_through(logits: Tensor, draws: int, generator: torch.Generator | None = None) -> Tensor:
    """One-hot draws, k b c, whose gradient is that of the probabilities: logits b c."""
    one_hot, _ = categorical_draws(logits, draws, generator)
    probabilities = logits.softmax(dim=-1)
    return one_hot + probabilities - probabilities.detach()


def gumbel_noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """-log(-log u), u uniform."""
    exponential = torch.empty(shape, dtype=like.dtype, device=like.device).exponential_(generator=generator)
    return -exponential.clamp(min=torch.finfo(like.dtype).tiny).log()


def gumbel_softmax(logits: Tensor, noise: Tensor, temperature: float, *, hard: bool = False) -> Tensor:
    """softmax((logits + Gumbel noise) / temperature): logits b c, noise k b c -> k b c. hard: one-hot, whose gradient
    is that of the relaxed (straight-through Gumbel-softmax)."""
    relaxed = ((logits + noise) / temperature).softmax(dim=-1)
    if not hard:
        return relaxed
    one_hot = F.one_hot(relaxed.argmax(dim=-1), logits.shape[-1]).to(relaxed.dtype)
    return one_hot + relaxed - relaxed.detach()
