"""What a decoder of sequences says of each step: which token, or where the pen goes and whether it is lifted.

Both read what a network found of the steps before, `n L w`, and give log p of the sequence, n, up to its end, the end
included.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vae.sequences.data import END, ENDED, PAD

LOG_TWO_PI = math.log(2 * math.pi)


class TokenOutput(nn.Module):
    """Categorical: one of V tokens."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.inputs = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary)

    def embedded(self, sequences: Tensor) -> Tensor:
        """n L -> n L w"""
        return self.inputs(sequences)

    def log_prob(self, hidden: Tensor, sequences: Tensor) -> Tensor:
        """hidden: n L w of the steps before; sequences: n L."""
        log_p = F.log_softmax(self.logits(hidden), dim=-1)
        there = sequences != PAD
        told = log_p.gather(-1, sequences.where(there, END).unsqueeze(-1)).squeeze(-1)
        return told.where(there, 0.0).sum(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """... w -> ... V: nothing is ever said to be what only fills up."""
        found = self.head(hidden).float()
        nothing = torch.arange(self.vocabulary, device=found.device) == PAD
        return found.masked_fill(nothing, -math.inf)

    def draw(self, hidden: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
        """hidden: n w -> n tokens; temperature 0: the most probable ones."""
        logits = self.logits(hidden)
        if temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]

    @staticmethod
    def ended(step: Tensor) -> Tensor:
        return step == END


class StrokeOutput(nn.Module):
    """A mixture of M bivariate Gaussians for the pen's move, and the state that it is in after it (sketch-rnn, Ha and
    Eck 2018, arXiv:1704.03477, equations 3 to 8). A temperature t in (0, 1] takes logits of components and states over
    t, and variances times t."""

    ended_row: Tensor

    def __init__(self, width: int, mixtures: int) -> None:
        super().__init__()
        self.mixtures = mixtures
        self.inputs = nn.Linear(5, width)
        self.head = nn.Linear(width, 6 * mixtures + 3)
        self.register_buffer("ended_row", torch.tensor(ENDED), persistent=False)

    def embedded(self, sequences: Tensor) -> Tensor:
        """n L 5 -> n L w"""
        return self.inputs(sequences)

    def parted(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """... w -> logits of components ... M, means ... M 2, log-scales ... M 2, correlations ... M, logits of the
        pen's states ... 3"""
        told = self.head(hidden).float()
        pen, rest = told[..., -3:], told[..., :-3].unflatten(-1, (6, self.mixtures))
        logits, x, y, sx, sy, raw = rest.unbind(-2)
        return logits, torch.stack([x, y], -1), torch.stack([sx, sy], -1).clamp(-7, 7), 0.99 * raw.tanh(), pen

    def log_prob(self, hidden: Tensor, sequences: Tensor) -> Tensor:
        """hidden: n L w; sequences: n L 5. The move is told of all rows but the one that ends."""
        logits, means, log_scales, correlation, pen = self.parted(hidden)
        apart = (sequences[..., None, :2] - means) * (-log_scales).exp()  # n L M 2
        x, y = apart.unbind(-1)
        remaining = 1 - correlation.square()
        squared = (x.square() + y.square() - 2 * correlation * x * y) / remaining
        log_density = -0.5 * squared - LOG_TWO_PI - log_scales.sum(-1) - 0.5 * remaining.log()
        move = (logits.log_softmax(-1) + log_density).logsumexp(-1)  # n L
        state = (pen.log_softmax(-1) * sequences[..., 2:]).sum(-1)
        ended = sequences[..., 4] > 0.5
        before = ended.cumsum(-1) - ended.long() > 0  # behind the row that ends
        return (move.where(~ended, 0.0) + state).where(~before, 0.0).sum(-1)

    def draw(self, hidden: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
        """hidden: n w -> n 5; temperature 0: the most probable component's mean, and the most probable state."""
        logits, means, log_scales, correlation, pen = self.parted(hidden)
        rows = torch.arange(len(hidden), device=hidden.device)
        if temperature == 0:
            chosen, state = logits.argmax(-1), pen.argmax(-1)
        else:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            state = torch.multinomial((pen / temperature).softmax(-1), 1, generator=generator)[:, 0]
        noise = torch.randn(len(hidden), 2, device=hidden.device, generator=generator)
        r, scale = correlation[rows, chosen], log_scales[rows, chosen].exp() * math.sqrt(temperature)
        second = r * noise[:, 0] + (1 - r.square()).sqrt() * noise[:, 1]
        move = means[rows, chosen] + scale * torch.stack([noise[:, 0], second], -1)
        drawn = torch.cat([move, F.one_hot(state, 3).float()], dim=-1)
        return torch.where((state == 2)[:, None], self.ended_row, drawn)

    @staticmethod
    def ended(step: Tensor) -> Tensor:
        return step[:, 4] > 0.5
