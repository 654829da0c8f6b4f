"""A VAE of sequences: one vector of latents for a line of text (Bowman et al. 2016, "Generating Sentences from a
Continuous Space", arXiv:1511.06349) or for a drawing (sketch-rnn: Ha and Eck 2018, "A Neural Representation of Sketch
Drawings", arXiv:1704.03477).

    p(x, z) = p(z) prod_l p(x_l | x_1 ... x_{l-1}, z)
    q(z|x)   of what a bidirectional LSTM has found at both ends

A decoder that is told the steps before can do without z, and then does: `word_dropout` hides a share of these steps in
training, and every objective, posterior and prior against collapse of images is there for sequences too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from common.draws import uniform
from common.errors import UserError, check_fields
from common.model_io import PretrainedModel
from stage1_vae.model import Move, NoiseSource, terms_of_one_group
from stage1_vae.objectives.terms import Terms
from stage1_vae.posteriors import POSTERIORS, DiagonalGaussianConfig, Posterior, PosteriorConfig, build_posterior
from stage1_vae.posteriors.base import LatentShape
from stage1_vae.priors import PRIORS, StandardNormalConfig, UniformSphereConfig
from stage1_vae.sequences.data import FIRST, PAD
from stage1_vae.sequences.decoders import DECODERS, RecurrentConfig, SequenceDecoderConfig
from stage1_vae.sequences.outputs import StrokeOutput, TokenOutput


@dataclass(frozen=True, kw_only=True)
class SequenceVAEConfig:
    """p(z), p(x|z) and q(z|x) of sequences; of tokens or strokes as the data are."""

    kind: Literal["sequence"] = "sequence"
    latents: int = 32  # d
    encoder_hidden: int = 128  # numbers of the state of the encoder's LSTM, in each direction
    posterior: PosteriorConfig = field(default_factory=DiagonalGaussianConfig)
    prior: StandardNormalConfig | UniformSphereConfig = field(default_factory=StandardNormalConfig)
    decoder: SequenceDecoderConfig = field(default_factory=RecurrentConfig)
    mixtures: int = 20  # M: Gaussians for a move of the pen; of strokes
    word_dropout: float = 0.0  # share of the steps that the decoder does not get to read, in training

    def __post_init__(self) -> None:
        sphere = self.posterior.kind == "von_mises_fisher"
        check_fields(
            self,
            [
                ("latents", self.latents >= 1, "at least 1"),
                ("encoder_hidden", self.encoder_hidden >= 1, "at least 1"),
                ("posterior.kind", self.posterior.kind != "matrix_normal", "one of vectors"),
                ("prior.kind", sphere == (self.prior.kind == "uniform_sphere"), "uniform_sphere for von_mises_fisher"),
                ("mixtures", self.mixtures >= 1, "at least 1"),
                ("word_dropout", 0 <= self.word_dropout <= 1, "a share from 0 to 1"),
            ],
        )


class SequenceVAE(PretrainedModel):
    """Sequences, b L int64 tokens or b L 5 strokes (stage1_vae/sequences/data.py), <-> latents, b d."""

    kind = "sequence"
    config_class = SequenceVAEConfig

    def __init__(
        self, config: SequenceVAEConfig, longest: int, vocabulary: Sequence[str] | None, joint: str = ""
    ) -> None:
        """longest: steps of a sequence, the end included. vocabulary: of tokens; None: strokes. joint: what stands
        between two tokens of a text."""
        super().__init__()
        self.config, self.longest, self.joint = config, longest, joint
        self.vocabulary = None if vocabulary is None else list(vocabulary)
        self.shape: LatentShape = (config.latents,)
        width = config.decoder.hidden
        self.output: TokenOutput | StrokeOutput = (
            StrokeOutput(width, config.mixtures)
            if self.vocabulary is None
            else TokenOutput(width, FIRST + len(self.vocabulary))
        )
        self.first = nn.Parameter(torch.zeros(width))  # what the decoder reads before the first step
        self.posterior_layer = build_posterior(config.posterior, self.shape)
        self.encoder = nn.LSTM(width, config.encoder_hidden, batch_first=True, bidirectional=True)
        self.encoder_inputs: nn.Module = (
            nn.Linear(5, width) if self.vocabulary is None else nn.Embedding(FIRST + len(self.vocabulary), width)
        )
        self.encoder_output = nn.Linear(2 * config.encoder_hidden, self.posterior_layer.features)
        self.prior = PRIORS[config.prior.kind][0](config.prior, self.shape)
        self.decoder = DECODERS[config.decoder.kind][0](config.decoder, config.latents, longest)

    def arguments(self) -> dict[str, Any]:
        facts = {"longest": self.longest, "vocabulary": self.vocabulary, "joint": self.joint}
        return {"config": asdict(self.config), **facts}

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        config = dict(arguments["config"])
        for name, kinds in (("posterior", POSTERIORS), ("prior", PRIORS), ("decoder", DECODERS)):
            config[name] = kinds[config[name]["kind"]][1](**config[name])
        return cls(SequenceVAEConfig(**config), arguments["longest"], arguments["vocabulary"], arguments["joint"])

    def traits(self) -> list[str]:
        of = "strokes" if self.vocabulary is None else f"{len(self.vocabulary)} tokens"
        return [
            f"{self.config.latents} latents of up to {self.longest} steps of {of}, {self.config.decoder.kind} decoder"
        ]

    # ---- terms ----

    def posterior(self, sequences: Tensor) -> Posterior:
        """q(z|x)."""
        lengths = self.lengths(sequences)
        packed = pack_padded_sequence(
            self.encoder_inputs(sequences), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, (hidden, _) = self.encoder(packed)  # 2 b h
        found: Posterior = self.posterior_layer(self.encoder_output(torch.cat([hidden[0], hidden[1]], dim=-1)))
        return found

    def lengths(self, sequences: Tensor) -> Tensor:
        """Steps of each, the end included, b."""
        if self.vocabulary is not None:
            return (sequences != PAD).sum(1)
        return (sequences[..., 4] < 0.5).sum(1) + 1

    def log_likelihood(self, latents: Tensor, sequences: Tensor) -> Tensor:
        """log p(x|z), k b d -> k b, in nats."""
        draws, batch = latents.shape[:2]
        inputs = self.output.embedded(sequences)[:, :-1]
        if self.training and self.config.word_dropout:
            # As many as the longest sequence could have: how many these have depends on which share a micro-batch.
            drawn = uniform(batch, self.longest, device=inputs.device)[:, : inputs.shape[1]]
            inputs = inputs * (drawn >= self.config.word_dropout).unsqueeze(-1)
        inputs = torch.cat([self.first.expand(batch, 1, -1), inputs], dim=1)
        many = inputs.expand(draws, *inputs.shape).flatten(0, 1)
        hidden = self.decoder(many, latents.flatten(0, 1))
        told = self.output.log_prob(hidden, sequences.expand(draws, *sequences.shape).flatten(0, 1))
        return told.unflatten(0, (draws, batch))

    def forward(
        self, sequences: Tensor, draws: int = 1, noise: Tensor | None = None, move: Move | None = None
    ) -> Terms:
        """What objectives are made of, as `LikelihoodVAE.terms`."""
        if sequences.shape[1] > self.longest:
            raise UserError(f"got sequences of {sequences.shape[1]} steps, expected at most {self.longest}")
        return terms_of_one_group(
            self.posterior(sequences),
            self.prior,
            lambda latents: self.log_likelihood(latents, sequences),
            draws,
            noise,
            move,
        )

    def noise_source(self, sequence: Tensor) -> NoiseSource:
        return self.posterior(sequence)

    def generator_parameters(self) -> list[nn.Parameter]:
        """The weights of p(z) and p(x|z): all but those of q(z|x)."""
        inference = {
            id(w) for part in (self.encoder, self.encoder_inputs, self.encoder_output) for w in part.parameters()
        }
        inference |= {id(weight) for weight in self.posterior_layer.parameters()}
        return [weight for weight in self.parameters() if id(weight) not in inference]

    # ---- sequences ----

    def encode(self, sequences: Tensor) -> Tensor:
        """The means of their posteriors, b d."""
        return self.posterior(sequences).mean

    @torch.no_grad()
    def draw(
        self, latents: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> list[np.ndarray]:
        """Sequences of latents, n d: of tokens, int64, or of strokes, float32 n 5, each up to its end, which is left
        out. temperature: 0 takes the most probable step each time. Raises UserError for one below 0."""
        if temperature < 0:
            raise UserError(f"temperature={temperature}, expected 0 or more; 1 draws from the model as it is")
        inputs, state = self.first.expand(len(latents), 1, -1), None
        ended = torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
        steps = []
        for _ in range(self.longest):
            hidden, state = self.decoder.step(inputs, latents, state)
            step = self.output.draw(hidden[:, 0], temperature, generator)
            steps.append(step)
            ended = ended | self.output.ended(step)
            if bool(ended.all()):
                break
            inputs = self.output.embedded(step[:, None])
        whole = torch.stack(steps, dim=1).cpu()
        found = []
        for row in whole:
            over = self.output.ended(row).nonzero()
            found.append(row[: int(over[0]) if len(over) else len(row)].numpy())
        return found

    def text(self, tokens: np.ndarray) -> str:
        """Raises UserError for a model of strokes."""
        if self.vocabulary is None:
            raise UserError("this model draws strokes, which are no text")
        return self.joint.join(
            self.vocabulary[t - FIRST] if t >= FIRST else "\N{REPLACEMENT CHARACTER}" for t in tokens
        )
