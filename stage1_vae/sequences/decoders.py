"""Networks that read the steps of a sequence before each step, and its latents: `n L w` and `n d` -> `n L w`, where
step l sees only inputs up to l.

    recurrent     an LSTM. The latents are its start state (Bowman et al. 2016, arXiv:1511.06349), or beside each step's
                  input as well, as sketch-rnn has them (Ha and Eck 2018, arXiv:1704.03477)
    transformer   causal self-attention (Vaswani et al. 2017). The latents are added to all embeddings, or are a memory
                  that every layer attends to beside the steps before, as in Optimus (Li et al. 2020,
                  arXiv:2004.04092)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import check_fields


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    kind: Literal["recurrent"] = "recurrent"
    hidden: int = 256  # numbers of the LSTM's state
    latents: Literal["start", "each_step"] = "each_step"  # where they are read: at the start, or at each step too

    def __post_init__(self) -> None:
        reads = ("latents", self.latents in ("start", "each_step"), "start or each_step")
        check_fields(self, [("hidden", self.hidden >= 1, "at least 1"), reads])


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    kind: Literal["transformer"] = "transformer"
    hidden: int = 128  # numbers of a step
    layers: int = 3
    heads: int = 4
    dropout: float = 0.0
    latents: Literal["added", "memory"] = "memory"  # how they are read: added to embeddings, or attended to

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("hidden", self.hidden >= 1, "at least 1"),
                ("layers", self.layers >= 1, "at least 1"),
                ("heads", self.heads >= 1 and self.hidden % self.heads == 0, "a divisor of hidden"),
                ("dropout", 0 <= self.dropout < 1, "a share from 0 to below 1"),
                ("latents", self.latents in ("added", "memory"), "added or memory"),
            ],
        )


SequenceDecoderConfig = RecurrentConfig | TransformerConfig


class Recurrent(nn.Module):
    def __init__(self, config: RecurrentConfig, latents: int, longest: int) -> None:
        super().__init__()
        self.reads_each_step = config.latents == "each_step"
        self.start = nn.Linear(latents, 2 * config.hidden)
        self.lstm = nn.LSTM(config.hidden + latents * self.reads_each_step, config.hidden, batch_first=True)

    def forward(self, inputs: Tensor, latents: Tensor) -> Tensor:
        return self.step(inputs, latents, None)[0]

    def step(self, inputs: Tensor, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The same for the next steps alone; state: what the last call gave, None at the start."""
        if state is None:
            hidden, cell = self.start(latents).tanh().chunk(2, dim=-1)
            state = (hidden[None].contiguous(), cell[None].contiguous())
        if self.reads_each_step:
            inputs = torch.cat([inputs, latents[:, None].expand(-1, inputs.shape[1], -1)], dim=-1)
        return self.lstm(inputs, state)


class Transformer(nn.Module):
    def __init__(self, config: TransformerConfig, latents: int, longest: int) -> None:
        super().__init__()
        self.adds = config.latents == "added"
        self.places = nn.Parameter(0.02 * torch.randn(longest, config.hidden))
        self.of_latents = nn.Linear(latents, config.hidden)
        kind = nn.TransformerEncoderLayer if self.adds else nn.TransformerDecoderLayer  # without and with a memory
        self.layers = nn.ModuleList(
            kind(config.hidden, config.heads, 4 * config.hidden, config.dropout, batch_first=True, norm_first=True)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.hidden)

    def forward(self, inputs: Tensor, latents: Tensor) -> Tensor:
        length = inputs.shape[1]
        told = self.of_latents(latents)[:, None]  # n 1 w
        x = inputs + self.places[:length]
        mask = torch.full((length, length), -torch.inf, device=x.device).triu(1)
        if self.adds:
            x = x + told
            for layer in self.layers:
                x = layer(x, src_mask=mask)
        else:
            for layer in self.layers:
                x = layer(x, told, tgt_mask=mask)
        return self.norm(x)

    def step(self, inputs: Tensor, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next step, n 1 w; state: the inputs before it."""
        whole = inputs if state is None else torch.cat([state, inputs], dim=1)
        return self(whole, latents)[:, -1:], whole


DECODERS: dict[str, Any] = {"recurrent": (Recurrent, RecurrentConfig), "transformer": (Transformer, TransformerConfig)}
