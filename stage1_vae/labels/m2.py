"""M2 of Kingma et al. 2014, "Semi-supervised Learning with Deep Generative Models" (arXiv:1406.5298, section 3).

    p(x, y, z) = p(y) N(z; 0, I) p(x | y, z)          y one of K classes, all as probable; z its style
    q(y, z | x) = q(y | x) N(z; mean(x, y), scale(x, y)^2)

Of an image whose class is known the bound on log p(x, y) is

    -L(x, y) = E_q(z|x,y) log p(x | y, z) + log p(y) - KL(q(z|x,y) || p(z)),

and of another that on log p(x), in which the class is summed over exactly,

    -U(x) = sum_y q(y|x) (-L(x, y)) + H(q(y|x)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import check_fields
from stage1_vae.binarise import Binarised
from stage1_vae.decoders import FactorisedDecoder
from stage1_vae.hierarchies.base import StandardNormalNoise
from stage1_vae.labels.base import LabelledVAE
from stage1_vae.likelihoods import LIKELIHOODS, BernoulliConfig, LikelihoodConfig, build_likelihood
from stage1_vae.model import Move, NoiseSource, Pixels
from stage1_vae.networks import (
    DenseConfig,
    NetworkConfig,
    build_decoder_network,
    build_encoder,
    network_config,
)
from stage1_vae.networks.dense import DenseLayers
from stage1_vae.objectives.terms import Terms
from stage1_vae.posteriors.diagonal import HALF_LOG_TWO_PI

TRUNK = 256  # numbers that a convolutional encoder says of an image before it is told the class


@dataclass(frozen=True, kw_only=True)
class M2Config:
    """p(y) p(z) p(x|y,z), q(y|x) and q(z|x,y)."""

    kind: Literal["m2"] = "m2"
    channels: int = 1  # c of the images: 3 for colour, 1 for grey
    classes: int = 10  # K
    latents: int = 50  # d: numbers of an image's style
    classifier: NetworkConfig = field(default_factory=DenseConfig)  # q(y|x)
    encoder: NetworkConfig = field(default_factory=DenseConfig)  # q(z|x,y)
    decoder: NetworkConfig = field(default_factory=DenseConfig)  # p(x|y,z)
    likelihood: LikelihoodConfig = field(default_factory=BernoulliConfig)

    def __post_init__(self) -> None:
        rules = [
            ("channels", self.channels >= 1, "at least 1"),
            ("classes", self.classes >= 2, "at least 2"),
            ("latents", self.latents >= 1, "at least 1"),
        ]
        for name in ("classifier", "encoder", "decoder"):
            network = getattr(self, name)
            flat = not getattr(network, "map", False)
            rules.append((f"{name}.map", flat, "False: the style of an image is one vector"))
            rules.append((f"{name}.skip", name == "decoder" or not network.skip, "False: skips are of decoders"))
        check_fields(self, rules)


class OfClasses(NamedTuple):
    """What k draws of the styles of b images are, given c classes of each."""

    latents: Tensor  # k c b d
    log_likelihood: Tensor  # k c b: log p(x|y,z)
    log_prior: Tensor  # k c b d: log p(z), of each number
    log_posterior: Tensor  # k c b d: log q(z|x,y), likewise
    kl: Tensor  # c b d: KL(q(z|x,y) || p(z))

    @property
    def log_weights(self) -> Tensor:
        """k c b: log of p(x|y,z) p(z) / q(z|x,y)."""
        return self.log_likelihood + (self.log_prior - self.log_posterior).sum(-1)


class M2(LabelledVAE):
    """Images, b c H W in [-1, 1] and of one size, <-> latents, b K + d: the class as a unit vector, then the style."""

    kind = "m2"
    config_class = M2Config

    def __init__(
        self,
        config: M2Config,
        image_size: tuple[int, int],
        binarised: Binarised | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """image_size: (H, W) of all images. binarised: how those that it is trained on were made black and white."""
        super().__init__()
        self.config, self.image_size, self.binarised = config, image_size, binarised
        self.name_classes(class_names)
        self.shape = (config.classes + config.latents,)
        images = (config.channels, *image_size)
        self.classifier = build_encoder(config.classifier, images, config.classes)
        facts = (images, config.classes, 2 * config.latents)
        self.encoder: nn.Module = (
            DenseClassEncoder(config.encoder, *facts)
            if isinstance(config.encoder, DenseConfig)
            else TrunkClassEncoder(config.encoder, *facts)
        )
        likelihood = build_likelihood(config.likelihood, config.channels)
        network = build_decoder_network(config.decoder, self.shape, (likelihood.outputs, *image_size))
        self.decoder = FactorisedDecoder(network, likelihood)
        self.discrete = likelihood.discrete

    def arguments(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "image_size": list(self.image_size),
            "binarised": None if self.binarised is None else asdict(self.binarised),
            "class_names": None if self.class_names is None else list(self.class_names),
        }

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        (height, width), binarised = arguments["image_size"], arguments["binarised"]
        return cls(
            m2_config(arguments["config"]),
            (height, width),
            None if binarised is None else Binarised(**binarised),
            arguments["class_names"],
        )

    def family(self) -> str:
        return f"m2, {self.num_classes} classes, {self.config.likelihood.kind} likelihood"

    def traits(self) -> list[str]:
        (height, width), config = self.image_size, self.config
        return [f"{config.classes} classes, {config.latents} latents ({height}x{width}x{config.channels} images)"]

    # ---- bounds ----

    def terms(
        self,
        images: Tensor,
        draws: int = 1,
        noise: Tensor | None = None,
        move: Move | None = None,
        labels: Tensor | None = None,
    ) -> Terms:
        assert move is None, "objectives that move latents are refused before"
        log_q = self.class_log_probabilities(images)
        if noise is None and draws > 0:
            noise = torch.randn(draws, len(images), self.config.latents, device=images.device)
        if labels is None:
            return self.unlabelled_terms(images, log_q, noise)

        def of(chosen: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            return images[chosen], log_q[chosen], None if noise is None else noise[:, chosen]

        known = labels >= 0
        if known.all():
            return self.labelled_terms(labels, *of(known))
        if not known.any():
            return self.unlabelled_terms(*of(~known))
        parts = [self.labelled_terms(labels[known], *of(known)), self.unlabelled_terms(*of(~known))]
        return of_all(parts, torch.cat([known.nonzero(), (~known).nonzero()])[:, 0].argsort())

    def labelled_terms(self, labels: Tensor, images: Tensor, log_q: Tensor, noise: Tensor | None) -> Terms:
        """labels: b in [0, K); log_q: b K, log q(y|x); noise: k b d."""
        classes = labels[None]
        return self.expected(images, classes, torch.zeros_like(log_q[:, 0])[None], log_q, noise)

    def unlabelled_terms(self, images: Tensor, log_q: Tensor, noise: Tensor | None) -> Terms:
        """Likewise."""
        classes = torch.arange(self.num_classes, device=images.device)[:, None].expand(-1, len(images))
        return self.expected(images, classes, log_q.T, log_q, noise)

    def expected(
        self, images: Tensor, classes: Tensor, log_share: Tensor, log_q: Tensor, noise: Tensor | None
    ) -> Terms:
        """Expectations over c classes of each of b images, classes, c b, of which each has the share exp(log_share)."""
        found = self.of_classes(images, classes, noise)
        share, log_classes, draws = log_share.exp(), math.log(self.num_classes), len(found.latents)
        best, places = log_share.argmax(dim=0), torch.arange(len(images), device=images.device)
        log_posterior = (share * log_q.T.gather(0, classes)).sum(0)  # b, of the class
        return Terms(
            latents=(
                self.unit_vectors(classes[best, places]).expand(draws, -1, -1),
                found.latents[:, best, places],
            ),
            log_likelihood=(share * found.log_likelihood).sum(1),
            log_prior=(
                torch.full_like(log_posterior, -log_classes).expand(draws, -1).unsqueeze(-1),
                (share.unsqueeze(-1) * found.log_prior).sum(1),
            ),
            log_posterior=(
                log_posterior.expand(draws, -1).unsqueeze(-1),
                (share.unsqueeze(-1) * found.log_posterior).sum(1),
            ),
            exact_kl=(
                (share * log_share).sum(0).unsqueeze(-1) + log_classes,
                (share.unsqueeze(-1) * found.kl).sum(0),
            ),
            summed=found.log_weights.logsumexp(dim=1) - log_classes,
        )

    def of_classes(self, images: Tensor, classes: Tensor, noise: Tensor | None) -> OfClasses:
        """Images, b c H W, in each of c classes, c b int64. noise: k b d, the same for all classes of an image; None:
        the one draw is the mean of q(z|x,y)."""
        mean, log_scale = self.style(images, classes)
        latents = mean.unsqueeze(0) if noise is None else mean + log_scale.exp() * noise.unsqueeze(1)  # k c b d
        known = self.unit_vectors(classes).expand(len(latents), -1, -1, -1)
        log_likelihood = self.decoder.log_likelihood(torch.cat([known, latents], dim=-1).flatten(0, 1), images)
        standardised = (latents - mean) * (-log_scale).exp()
        return OfClasses(
            latents=latents,
            log_likelihood=log_likelihood.unflatten(0, latents.shape[:2]),
            log_prior=-0.5 * latents.square() - HALF_LOG_TWO_PI,
            log_posterior=-0.5 * standardised.square() - HALF_LOG_TWO_PI - log_scale,
            kl=0.5 * (mean.square() + (2 * log_scale).exp() - 1) - log_scale,
        )

    def style(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log of the standard deviation of q(z|x,y), c b d each, of images, b c H W, in c classes, c b."""
        mean, log_variance = self.encoder(images, classes).float().chunk(2, dim=-1)
        return mean, 0.5 * log_variance

    def noise_source(self, image: Tensor) -> NoiseSource:
        return StandardNormalNoise(self.config.latents, image.device)

    def generator_parameters(self) -> list[nn.Parameter]:
        return list(self.decoder.parameters())

    # ---- classes and latents ----

    def class_log_probabilities(self, images: Tensor) -> Tensor:
        self.check_images(images)
        logits: Tensor = self.classifier(images)
        return logits.float().log_softmax(dim=-1)

    def encode(self, images: Tensor) -> Tensor:
        return torch.cat(self.group_means(images), dim=1)

    def group_means(self, images: Tensor) -> tuple[Tensor, ...]:
        """Of the class, the most probable one."""
        classes = self.class_log_probabilities(images).argmax(dim=-1)
        return self.unit_vectors(classes), self.style(images, classes[None])[0][0]

    def pixels(self, latents: Tensor, shown: Pixels, generator: torch.Generator | None = None) -> Tensor:
        if shown == "sample":
            return self.decoder.sample(latents, generator).clamp(-1, 1)
        return (self.decoder.mean(latents) if shown == "mean" else self.decoder.mode(latents)).clamp(-1, 1)

    def draw_latents(
        self, count: int, generator: torch.Generator | None = None, *, labels: Tensor | None = None
    ) -> Tensor:
        device = next(self.parameters()).device
        if labels is None:
            labels = torch.randint(self.num_classes, (count,), device=device, generator=generator)
        style = torch.randn(count, self.config.latents, device=device, generator=generator)
        return torch.cat([self.unit_vectors(labels.to(device)), style], dim=1)

    def in_class(self, latents: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([self.unit_vectors(labels), latents[:, self.num_classes :]], dim=1)


def m2_config(fields: dict[str, Any]) -> M2Config:
    """The config that `dataclasses.asdict` made `fields` of."""
    networks = {name: network_config(fields[name]) for name in ("classifier", "encoder", "decoder")}
    likelihood = LIKELIHOODS[fields["likelihood"]["kind"]][1](**fields["likelihood"])
    return M2Config(**{**fields, **networks, "likelihood": likelihood})


def of_all(parts: Sequence[Terms], order: Tensor) -> Terms:
    """Terms of several sets of images as those of one, whose image i is number order[i] of them, one set after the
    other."""

    def together(tensors: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(tensors), dim=axis).index_select(axis, order)

    def of_groups(field: str, axis: int) -> tuple[Tensor, ...]:
        return tuple(together(group, axis) for group in zip(*(getattr(part, field) for part in parts), strict=True))

    return Terms(
        latents=of_groups("latents", 1),
        log_likelihood=together([part.log_likelihood for part in parts], 1),
        log_prior=of_groups("log_prior", 1),
        log_posterior=of_groups("log_posterior", 1),
        exact_kl=of_groups("exact_kl", 0),
        summed=together([part.log_weights for part in parts], 1),
    )


# ---- networks of images and classes ---------------------------------------------------------------------------------


class DenseClassEncoder(nn.Module):
    """Pixels in [0, 1] and the class as a unit vector, side by side, through layers: images b c H W in [-1, 1] and
    classes c b -> c b features. What the first layer says of the pixels is computed once for all classes."""

    def __init__(self, config: DenseConfig, images: tuple[int, int, int], classes: int, features: int) -> None:
        super().__init__()
        self.pixels = math.prod(images)
        self.layers = DenseLayers(self.pixels + classes, features, config)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        first, *others = self.layers.layers
        assert isinstance(first, nn.Linear)
        of_pixels, of_classes = first.weight[:, : self.pixels], first.weight[:, self.pixels :]
        x = F.linear((images.flatten(1) + 1) / 2, of_pixels, first.bias) + F.embedding(classes, of_classes.T)
        for layer in others:
            x = layer(self.layers.activation(x))
        return x


class TrunkClassEncoder(nn.Module):
    """What a network says of an image, to which that of its class is added before an activation and a last layer:
    shapes as of `DenseClassEncoder`."""

    def __init__(self, config: NetworkConfig, images: tuple[int, int, int], classes: int, features: int) -> None:
        super().__init__()
        self.trunk = build_encoder(config, images, TRUNK)
        self.of_classes = nn.Embedding(classes, TRUNK)
        self.last = nn.Linear(TRUNK, features)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        return self.last(F.silu(self.trunk(images) + self.of_classes(classes)))
