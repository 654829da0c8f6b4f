"""M1+M2 of Kingma et al. 2014, "Semi-supervised Learning with Deep Generative Models" (arXiv:1406.5298, section 3.1):
M2 over the latents of a VAE, M1, that was trained before, without labels.

    p(x, z1, y, z2) = p(y) N(z2; 0, I) N(z1; mean(y, z2), scale(y, z2)^2) p(x | z1)
    q(z1, y, z2 | x) = q(z1 | x) q(y | z1) q(z2 | z1, y)

p(x|z1) and q(z1|x) are M1's and stay as they are; a step draws z1 anew. To M2 a vector z1 is an image of one row,
2 z1 - 1, of which dense networks read (2 z1 - 1 + 1) / 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from common.errors import UserError, check_fields
from common.model_io import load_pretrained
from stage1_vae.binarise import Binarised
from stage1_vae.hierarchies.base import StandardNormalNoise
from stage1_vae.labels.base import LabelledVAE
from stage1_vae.labels.m2 import M2, M2Config
from stage1_vae.likelihoods import LIKELIHOODS, BernoulliConfig, GaussianConfig, LikelihoodConfig
from stage1_vae.model import Move, NoiseSource, Pixels
from stage1_vae.networks import DenseConfig
from stage1_vae.objectives.terms import Terms
from stage1_vae.vae import VAE


@dataclass(frozen=True, kw_only=True)
class M1M2Config:
    """M1, and an M2 of dense networks over its latents."""

    kind: Literal["m1m2"] = "m1m2"
    m1: str = ""  # run or model folder of a VAE with a diagonal posterior over a vector; the model holds its weights
    channels: int = 1  # c of the images of M1
    classes: int = 10  # K
    latents: int = 50  # numbers of z2, an image's style
    classifier: DenseConfig = field(default_factory=DenseConfig)  # q(y|z1)
    encoder: DenseConfig = field(default_factory=DenseConfig)  # q(z2|z1,y)
    decoder: DenseConfig = field(default_factory=DenseConfig)  # p(z1|y,z2)
    likelihood: LikelihoodConfig = field(default_factory=BernoulliConfig)  # p(x|z1): that of M1

    def __post_init__(self) -> None:
        check_fields(self, [("channels", self.channels >= 1, "at least 1")])
        self.m2()

    def m2(self) -> M2Config:
        names = ("classes", "latents", "classifier", "encoder", "decoder")
        return M2Config(**{name: getattr(self, name) for name in names}, likelihood=OF_LATENTS)


OF_LATENTS = GaussianConfig(variance="per_pixel")  # p(z1|y,z2): a mean and a scale of each number


class M1M2(LabelledVAE):
    """Images, b c H W in [-1, 1] and of one size, <-> latents, b K + d + d1: the class as a unit vector, the style z2,
    and z1, of which alone the image is decoded."""

    kind = "m1m2"
    config_class = M1M2Config

    def __init__(
        self,
        config: M1M2Config,
        image_size: tuple[int, int],
        binarised: Binarised | None = None,
        class_names: Sequence[str] | None = None,
        m1: VAE | None = None,
    ) -> None:
        """m1: None loads `config.m1`. Raises UserError for one that does not fit."""
        super().__init__()
        self.config, self.image_size, self.binarised = config, image_size, binarised
        self.name_classes(class_names)
        self.m1 = opened(config.m1) if m1 is None else m1
        check_m1(self.m1, config, image_size, binarised)
        self.m1.eval().requires_grad_(False)
        self.m2 = M2(config.m2(), (1, self.m1.shape[0]))
        self.parts = [config.classes, config.latents, self.m1.shape[0]]  # of y, z2 and z1
        self.shape = (sum(self.parts),)
        self.discrete, self.mean_is_drawn = self.m1.discrete, self.m1.mean_is_drawn

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.m1.eval()
        return self

    def arguments(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "image_size": list(self.image_size),
            "binarised": None if self.binarised is None else asdict(self.binarised),
            "class_names": None if self.class_names is None else list(self.class_names),
            "m1": self.m1.arguments(),
        }

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        config, (height, width) = dict(arguments["config"]), arguments["image_size"]
        for name in ("classifier", "encoder", "decoder"):
            config[name] = DenseConfig(**config[name])
        config["likelihood"] = LIKELIHOODS[config["likelihood"]["kind"]][1](**config["likelihood"])
        binarised = None if arguments["binarised"] is None else Binarised(**arguments["binarised"])
        m1 = VAE.from_arguments(**arguments["m1"])
        return cls(M1M2Config(**config), (height, width), binarised, arguments["class_names"], m1)

    def family(self) -> str:
        return f"m1m2, {self.num_classes} classes, over the latents of a VAE: {self.m1.family()}"

    def traits(self) -> list[str]:
        (height, width), config = self.image_size, self.config
        numbers = f"{config.classes} classes, {config.latents} latents over {self.parts[2]}"
        return [f"{numbers} ({height}x{width}x{config.channels} images)"]

    @property
    def log_volume(self) -> float:
        """Of the density of rows as one of vectors, by which they are twice as wide in each number."""
        return self.parts[2] * math.log(2)

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """n *shape -> class and style, n K + d, and z1, n d1."""
        first, second = flat.split([sum(self.parts[:2]), self.parts[2]], dim=-1)
        return first, second

    def terms(
        self,
        images: Tensor,
        draws: int = 1,
        noise: Tensor | None = None,
        move: Move | None = None,
        labels: Tensor | None = None,
    ) -> Terms:
        assert move is None, "objectives that move latents are refused before"
        if noise is None and draws > 0:
            noise = torch.randn(draws, len(images), sum(self.parts[1:]), device=images.device)
        with torch.no_grad():
            posterior = self.m1.posterior(images)
            if noise is None:
                z1 = posterior.mean.unsqueeze(0)  # k b d1
                log_q = posterior.log_density(z1)
            else:
                z1, log_q = posterior.draw(noise[..., self.parts[1] :])
            log_likelihood = self.m1.decoder.log_likelihood(z1, images)
        count = len(z1)
        inner = self.m2.terms(
            as_rows(z1.flatten(0, 1)),
            draws=0,
            noise=None if noise is None else noise[..., : self.parts[1]].flatten(0, 1).unsqueeze(0),
            labels=None if labels is None else labels.repeat(count),
        )

        def by_draw(tensor: Tensor) -> Tensor:
            """Of k b vectors, k b ... -> k, b ..."""
            return tensor.unflatten(0, (count, len(images)))

        return Terms(
            latents=(*(by_draw(part[0]) for part in inner.latents), z1),
            log_likelihood=log_likelihood,
            log_prior=(
                *(by_draw(part[0]) for part in inner.log_prior),
                by_draw(inner.log_likelihood[0]).unsqueeze(-1) + self.log_volume,
            ),
            log_posterior=(*(by_draw(part[0]) for part in inner.log_posterior), log_q),
            exact_kl=(*(None if part is None else by_draw(part) for part in inner.exact_kl), None),
            summed=log_likelihood - log_q.sum(-1) + by_draw(inner.log_weights[0]) + self.log_volume,
        )

    def noise_source(self, image: Tensor) -> NoiseSource:
        """Of z2, then of z1."""
        return StandardNormalNoise(sum(self.parts[1:]), image.device)

    def generator_parameters(self) -> list[nn.Parameter]:
        return self.m2.generator_parameters()

    def class_log_probabilities(self, images: Tensor) -> Tensor:
        """By the mean of q(z1|x)."""
        return self.m2.class_log_probabilities(as_rows(self.m1.encode(images)))

    def encode(self, images: Tensor) -> Tensor:
        return torch.cat(self.group_means(images), dim=1)

    def group_means(self, images: Tensor) -> tuple[Tensor, ...]:
        z1 = self.m1.encode(images)
        return (*self.m2.group_means(as_rows(z1)), z1)

    def pixels(self, latents: Tensor, shown: Pixels, generator: torch.Generator | None = None) -> Tensor:
        return self.m1.pixels(self.split(latents)[1], shown, generator)

    def draw_latents(
        self, count: int, generator: torch.Generator | None = None, *, labels: Tensor | None = None
    ) -> Tensor:
        first = self.m2.draw_latents(count, generator, labels=labels)
        return torch.cat([first, as_vectors(self.m2.decoder.sample(first, generator))], dim=1)

    def in_class(self, latents: Tensor, labels: Tensor) -> Tensor:
        """z1 is then what the class and the style say on average."""
        first = self.m2.in_class(self.split(latents)[0], labels)
        return torch.cat([first, as_vectors(self.m2.decoder.mean(first))], dim=1)


def as_rows(vectors: Tensor) -> Tensor:
    """n d1 -> n 1 1 d1: what M2 takes for images."""
    return 2 * vectors[:, None, None] - 1


def as_vectors(rows: Tensor) -> Tensor:
    """Back again."""
    return (rows.flatten(1) + 1) / 2


def opened(name: str) -> VAE:
    if not name:
        raise UserError(
            "model.m1 is not given, expected the run or model folder of a VAE; `zellige train-vae` makes one"
        )
    return load_pretrained(name, {VAE.kind: VAE})


def check_m1(m1: VAE, config: M1M2Config, image_size: tuple[int, int], binarised: Binarised | None) -> None:
    """Raises UserError for a VAE over whose latents M2 cannot be, and one of other images."""
    if len(m1.shape) > 1 or m1.config.posterior.kind != "diagonal":
        raise UserError(
            f"model.m1={config.m1} has a {m1.config.posterior.kind} posterior over {'x'.join(map(str, m1.shape))} "
            "latents, expected a diagonal one over a vector; train another VAE"
        )
    rules = [
        ("model.channels", config.channels, m1.config.channels),
        ("model.likelihood", config.likelihood, m1.config.likelihood),
        ("data.image_size", image_size, tuple(m1.image_size)),
    ]
    for name, given, expected in rules:
        if given != expected:
            raise UserError(f"{name}={given}, expected {expected}, as model.m1={config.m1} was trained; give that")
    now, before = (one or Binarised("none") for one in (binarised, m1.binarised))
    if str(now) != str(before):  # which tells the seed where it counts
        raise UserError(
            f"{now}, expected {before}, as model.m1={config.m1} was trained; give --binarised {before.how} "
            f"--binarised_seed {before.seed}"
        )
