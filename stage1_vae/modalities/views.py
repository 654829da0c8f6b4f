"""What an image is seen as: itself, a half of it, a smaller copy; its label; tokens of a text.

A view knows its target in a batch, an encoder of it, q(z|view), and a decoder, log p(view|z).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vae.decoders import FactorisedDecoder
from stage1_vae.hierarchies.base import Normal
from stage1_vae.likelihoods import LikelihoodConfig, build_likelihood
from stage1_vae.networks import DenseConfig, NetworkConfig, build_decoder_network, build_encoder
from stage1_vae.networks.dense import DenseLayers

EMBEDDED = 32  # numbers that stand for a token
BYTES = 256  # values of a token; 0 is what texts are filled up with


class Seen(NamedTuple):
    """One view of a batch of images, of which not all need have it."""

    target: Tensor  # b ...
    present: Tensor  # b, whether it is there


class ImageView(nn.Module):
    """An image, b c H W in [-1, 1], or what `part` makes of it."""

    def __init__(
        self,
        name: str,
        part: Callable[[Tensor], Tensor],
        image: tuple[int, int, int],
        latents: int,
        networks: tuple[NetworkConfig, NetworkConfig],
        likelihood: LikelihoodConfig,
    ) -> None:
        """image: (c, H, W) of the part; networks: of the encoder and of the decoder."""
        super().__init__()
        self.name, self.part = name, part
        self.encoder = build_encoder(networks[0], image, 2 * latents)
        law = build_likelihood(likelihood, image[0])
        network = build_decoder_network(networks[1], (latents,), (law.outputs, *image[1:]))
        self.decoder = FactorisedDecoder(network, law)

    def posterior(self, target: Tensor) -> Normal:
        mean, log_variance = self.encoder(target).float().chunk(2, dim=1)
        return Normal(mean, 0.5 * log_variance)

    def log_likelihood(self, latents: Tensor, target: Tensor) -> Tensor:
        """k b d and b c H W -> k b, in nats."""
        return self.decoder.log_likelihood(latents, target)


class SymbolView(nn.Module):
    """L numbers of an image, each one of V: a label, L = 1, or the bytes of a text. int64 b L."""

    def __init__(self, name: str, positions: int, vocabulary: int, latents: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.name, self.positions, self.vocabulary = name, positions, vocabulary
        config = DenseConfig(hidden=hidden)
        width = min(EMBEDDED, vocabulary)
        self.embedding = nn.Embedding(vocabulary, width)
        self.encoder = DenseLayers(positions * width, 2 * latents, config)
        self.decoder = DenseLayers(latents, positions * vocabulary, config)

    def posterior(self, target: Tensor) -> Normal:
        """Of targets that are not there, any: they are left out by who asks."""
        told = self.encoder(self.embedding(target.clamp(min=0)).flatten(1))
        mean, log_variance = told.float().chunk(2, dim=1)
        return Normal(mean, 0.5 * log_variance)

    def log_probabilities(self, latents: Tensor) -> Tensor:
        """`... d` -> `... L V`: of each value at each position, in nats."""
        logits = self.decoder(latents).unflatten(-1, (self.positions, self.vocabulary))
        return F.log_softmax(logits.float(), dim=-1)

    def log_likelihood(self, latents: Tensor, target: Tensor) -> Tensor:
        """k b d and b L -> k b, in nats."""
        log_p = self.log_probabilities(latents)
        chosen = target.clamp(min=0).expand(len(latents), *target.shape).unsqueeze(-1)
        return log_p.gather(-1, chosen).squeeze(-1).sum(-1)


View = ImageView | SymbolView


def bytes_of(texts: Sequence[str], length: int) -> Tensor:
    """Texts as UTF-8, cut or filled up with 0: n L, int64."""
    found = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(found, texts, strict=True):
        told = text.encode()[:length]
        row[: len(told)] = torch.tensor(list(told), dtype=torch.int64)
    return found


def text_of(tokens: Tensor) -> str:
    """L -> what stands before the first 0."""
    told = bytes(tokens.tolist())
    return told.split(b"\0", 1)[0].decode(errors="replace")


def left(images: Tensor) -> Tensor:
    return images[..., : images.shape[-1] // 2]


def right(images: Tensor) -> Tensor:
    return images[..., images.shape[-1] // 2 :]


def top(images: Tensor) -> Tensor:
    return images[..., : images.shape[-2] // 2, :]


def bottom(images: Tensor) -> Tensor:
    return images[..., images.shape[-2] // 2 :, :]


def whole(images: Tensor) -> Tensor:
    return images


def half_size(images: Tensor) -> Tensor:
    """Means of 2x2 pixels: b c H W -> b c H/2 W/2."""
    return F.avg_pool2d(images, 2)


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "image": whole,
    "left": left,
    "right": right,
    "top": top,
    "bottom": bottom,
    "half_size": half_size,
}


def part_size(name: str, image: tuple[int, int, int]) -> tuple[int, int, int]:
    """(c, H, W) of a part of an image."""
    return tuple(PARTS[name](torch.empty(1, *image)).shape[1:])  # type: ignore[return-value]


def joined(name: str, first: Tensor, second: Tensor) -> Tensor:
    """Both parts of an image as one, b c H W. name: of the pair."""
    return torch.cat([first, second], dim=-1 if name == "left_right" else -2)
