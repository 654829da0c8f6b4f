"""VAEs of two modalities, any of which may be missing: MVAE (Wu and Goodman 2018, "Multimodal Generative Models for
Scalable Weakly-Supervised Learning", arXiv:1802.05335), whose joint posterior is a product of experts, and MMVAE (Shi
et al. 2019, "Variational Mixture-of-Experts Autoencoders", arXiv:1911.03393), whose joint posterior is a mixture.

    p(x_1, x_2, z) = N(z; 0, I) p(x_1|z) p(x_2|z)

The pair of modalities is one of those that a folder of images has by itself: the image and its class, its two halves,
itself and a copy of half the size, the image and a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from common.errors import UserError, check_fields
from stage1_vae.binarise import Binarised
from stage1_vae.hierarchies.base import Normal, StandardNormalNoise, normal_kl
from stage1_vae.likelihoods import LIKELIHOODS, BernoulliConfig, LikelihoodConfig
from stage1_vae.modalities.experts import joint_normal, log_mixture
from stage1_vae.modalities.views import BYTES, PARTS, ImageView, Seen, SymbolView, View, joined, part_size
from stage1_vae.model import LikelihoodVAE, Move, NoiseSource, Pixels
from stage1_vae.networks import DenseConfig, NetworkConfig, network_config
from stage1_vae.objectives.terms import Terms

Pair = Literal["image_label", "image_tokens", "left_right", "top_bottom", "sizes"]
PAIRS: dict[str, tuple[str, str]] = {  # views by their names
    "image_label": ("image", "label"),
    "image_tokens": ("image", "tokens"),
    "left_right": ("left", "right"),
    "top_bottom": ("top", "bottom"),
    "sizes": ("image", "half_size"),
}


@dataclass(frozen=True, kw_only=True)
class MultimodalConfig:
    """p(z), an encoder and a decoder of each of two modalities, and how their posteriors become one."""

    kind: Literal["multimodal"] = "multimodal"
    channels: int = 1  # c of the images: 3 for colour, 1 for grey
    latents: int = 20  # d: numbers of an image's latent vector
    pair: Pair = "image_label"  # modalities: image and class, image and text, two halves, two sizes
    experts: Literal["product", "mixture"] = "product"
    encoder: NetworkConfig = field(default_factory=DenseConfig)  # of images and their parts
    decoder: NetworkConfig = field(default_factory=DenseConfig)  # likewise
    likelihood: LikelihoodConfig = field(default_factory=BernoulliConfig)  # likewise
    hidden: tuple[int, ...] = (256,)  # units of the networks of classes and texts
    classes: int = 10  # K of pair=image_label
    length: int = 16  # bytes of a text, of pair=image_tokens; longer ones are cut
    second_weight: float = 1.0  # of the second modality's log-likelihood in the training; a class is one number only

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        flat = not (getattr(self.encoder, "map", False) or getattr(self.decoder, "map", False))
        check_fields(
            self,
            [
                ("channels", self.channels >= 1, "at least 1"),
                ("latents", self.latents >= 1, "at least 1"),
                ("pair", self.pair in PAIRS, ", ".join(PAIRS)),
                ("experts", self.experts in ("product", "mixture"), "product or mixture"),
                ("encoder", flat, "networks without a map: latents are one vector"),
                ("encoder.skip", not self.encoder.skip, "False: skip connections are of decoders"),
                ("hidden", all(units >= 1 for units in self.hidden), "units of each layer, or none"),
                ("classes", self.classes >= 2, "at least 2"),
                ("length", self.length >= 1, "at least 1"),
                ("second_weight", self.second_weight > 0, "above 0"),
            ],
        )


class Multimodal(LikelihoodVAE):
    """Images, b c H W in [-1, 1] and of one size, and what else there is of them, <-> latents, b d.

    What is asked of every likelihood VAE is answered by images alone, which are both modalities of some pairs.
    """

    kind = "multimodal"
    config_class = MultimodalConfig

    def __init__(
        self,
        config: MultimodalConfig,
        image_size: tuple[int, int],
        binarised: Binarised | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """image_size: (H, W) of all images. Raises UserError for a size that cannot be parted."""
        super().__init__()
        self.config, self.image_size, self.binarised = config, image_size, binarised
        self.class_names = None if class_names is None else tuple(class_names)
        self.shape = (config.latents,)
        image = (config.channels, *image_size)
        if config.pair in ("left_right", "top_bottom", "sizes") and (image[1] % 2 or image[2] % 2):
            raise UserError(
                f"model.pair={config.pair} with images of {image[1]}x{image[2]} pixels, expected even numbers: they "
                "are parted in two; give another data.image_size"
            )
        self.views = nn.ModuleList(self.build_view(name, image) for name in PAIRS[config.pair])
        self.discrete = self.first.decoder.discrete

    def build_view(self, name: str, image: tuple[int, int, int]) -> View:
        config = self.config
        if name == "label":
            return SymbolView(name, 1, config.classes, config.latents, config.hidden)
        if name == "tokens":
            return SymbolView(name, config.length, BYTES, config.latents, config.hidden)
        networks = (config.encoder, config.decoder)
        return ImageView(name, PARTS[name], part_size(name, image), config.latents, networks, config.likelihood)

    @property
    def first(self) -> ImageView:
        view = self.views[0]
        assert isinstance(view, ImageView)
        return view

    @property
    def second(self) -> View:
        view = self.views[1]
        assert isinstance(view, ImageView | SymbolView)
        return view

    def arguments(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "image_size": list(self.image_size),
            "binarised": None if self.binarised is None else asdict(self.binarised),
            "class_names": None if self.class_names is None else list(self.class_names),
        }

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        (height, width), binarised, fields = arguments["image_size"], arguments["binarised"], arguments["config"]
        networks = {name: network_config(fields[name]) for name in ("encoder", "decoder")}
        likelihood = LIKELIHOODS[fields["likelihood"]["kind"]][1](**fields["likelihood"])
        config = MultimodalConfig(**{**fields, **networks, "likelihood": likelihood})
        known = None if binarised is None else Binarised(**binarised)
        return cls(config, (height, width), known, arguments["class_names"])

    def family(self) -> str:
        config = self.config
        return f"{config.pair}, {config.experts} of experts, {config.likelihood.kind} likelihood"

    # ---- what is seen ----

    def seen(self, images: Tensor, symbols: Tensor | None = None) -> tuple[Seen, Seen]:
        """Both modalities of images, b c H W. symbols: of a pair with a class or a text, b L, below 0 where an image
        has none; None: nowhere."""
        self.check_images(images)
        there = torch.ones(len(images), dtype=torch.bool, device=images.device)
        first = Seen(self.first.part(images), there)
        if isinstance(self.second, ImageView):
            return first, Seen(self.second.part(images), there)
        if symbols is None:
            symbols = torch.full((len(images), self.second.positions), -1, device=images.device)
        return first, Seen(symbols, symbols[:, 0] >= 0)

    def experts(self, seen: Sequence[Seen]) -> list[Normal]:
        """q(z|x_m) of each modality."""
        return [view.posterior(one.target) for view, one in zip((self.first, self.second), seen, strict=True)]

    def log_likelihood(self, latents: Tensor, seen: Sequence[Seen], weights: Sequence[float] = (1.0, 1.0)) -> Tensor:
        """Of all that is there, weighted: k b d -> k b. What has the weight 0 is not looked at."""
        found = [
            weight * view.log_likelihood(latents, one.target).where(one.present, 0.0)
            for view, one, weight in zip((self.first, self.second), seen, weights, strict=True)
            if weight
        ]
        return torch.stack(found).sum(0)

    # ---- terms ----

    def normal_terms(
        self, posterior: Normal, seen: Sequence[Seen], noise: Tensor | None, weights: Sequence[float] = (1.0, 1.0)
    ) -> Terms:
        """Of a Gaussian posterior. noise: k b d; None: its mean is the one draw."""
        prior = standard(posterior)
        latents = posterior.mean.unsqueeze(0) if noise is None else posterior.draw(noise)
        return Terms(
            latents=(latents,),
            log_likelihood=self.log_likelihood(latents, seen, weights),
            log_prior=(by_draw(prior, latents),),
            log_posterior=(by_draw(posterior, latents),),
            exact_kl=(normal_kl(posterior, prior),),
        )

    def mixture_terms(
        self, latents: Tensor, experts: Sequence[Normal], seen: Sequence[Seen], weights: Sequence[float] = (1.0, 1.0)
    ) -> Terms:
        """Of draws, k b d, under the mixture of the experts that are there."""
        log_mixed = log_mixture(experts, [one.present for one in seen], latents)
        return Terms(
            latents=(latents,),
            log_likelihood=self.log_likelihood(latents, seen, weights),
            log_prior=(by_draw(standard(experts[0]), latents),),
            log_posterior=(log_mixed.unsqueeze(-1),),
            exact_kl=(None,),
        )

    def terms(self, images: Tensor, draws: int = 1, noise: Tensor | None = None, move: Move | None = None) -> Terms:
        assert move is None, "objectives that move latents are refused before"
        seen = self.seen(images)
        if noise is None and draws > 0:
            noise = torch.randn(draws, len(images), self.noise_numbers, device=images.device)
        if isinstance(self.second, SymbolView):  # which images alone do not have
            expert = self.first.posterior(seen[0].target)
            alone = joint_normal([expert], [seen[0].present]) if self.is_product else expert
            return self.normal_terms(alone, seen, noise, (1.0, 0.0))
        experts = self.experts(seen)
        if self.is_product:
            return self.normal_terms(joint_normal(experts, [one.present for one in seen]), seen, noise)
        if noise is None:
            return self.mixture_terms(self.encode(images).unsqueeze(0), experts, seen)
        # Each draw chooses its expert by itself: it is one of the mixture, however few there are and in whatever parts.
        noise, choice = noise.split([self.config.latents, 1], dim=-1)
        latents = torch.where(choice < 0, experts[0].draw(noise), experts[1].draw(noise))
        return self.mixture_terms(latents, experts, seen)

    @property
    def is_product(self) -> bool:
        return self.config.experts == "product"

    @property
    def noise_numbers(self) -> int:
        """Of a draw: those of the latents and, of a mixture of two images, one whose sign says which expert draws."""
        return self.config.latents + (not self.is_product and isinstance(self.second, ImageView))

    def training_terms(
        self,
        images: Tensor,
        symbols: Tensor | None,
        noise: Tensor,
        *,
        tells_other: tuple[bool, bool] = (False, False),
        fixed_posterior: bool = False,
    ) -> tuple[Terms, ...]:
        """What objectives of several modalities are made of. noise: m k b d, of m posteriors. Of a product of experts
        m = 3: the posterior of both modalities, which tells both, and of either alone, which tells that one, and, where
        tells_other says so, the other as well. Of a mixture m = 2: draws of either expert, which tell both;
        fixed_posterior: whether its log q is a function of the draws alone, without a gradient at its parameters."""
        noise = noise[..., : self.config.latents]  # experts are not chosen: each is drawn from
        seen, second = self.seen(images, symbols), self.config.second_weight
        experts, present = self.experts(seen), [one.present for one in seen]
        if not self.is_product:
            told = [Normal(*(part.detach() for part in one)) for one in experts] if fixed_posterior else experts
            return tuple(self.mixture_terms(experts[m].draw(noise[m]), told, seen, (1.0, second)) for m in range(2))
        return (
            self.normal_terms(joint_normal(experts, present), seen, noise[0], (1.0, second)),
            self.normal_terms(joint_normal(experts[:1], present[:1]), seen, noise[1], (1.0, second * tells_other[0])),
            self.normal_terms(joint_normal(experts[1:], present[1:]), seen, noise[2], (1.0 * tells_other[1], second)),
        )

    def forward(
        self,
        images: Tensor,
        draws: int = 1,
        noise: Tensor | None = None,
        move: Move | None = None,
        symbols: Tensor | None = None,
        training: bool = False,
        tells_other: tuple[bool, bool] = (False, False),
        fixed_posterior: bool = False,
    ) -> Any:
        """`terms`, or `training_terms`, by the name under which a wrapped model is called."""
        if training:
            assert noise is not None
            return self.training_terms(images, symbols, noise, tells_other=tells_other, fixed_posterior=fixed_posterior)
        return self.terms(images, draws, noise, move)

    def noise_source(self, image: Tensor) -> NoiseSource:
        return StandardNormalNoise(self.noise_numbers, image.device)

    def generator_parameters(self) -> list[nn.Parameter]:
        return [weight for view in (self.first, self.second) for weight in view.decoder.parameters()]

    # ---- from latents, and from one modality to the other ----

    @torch.no_grad()
    def posterior_of(self, seen: Sequence[Seen]) -> Normal:
        """q(z|what is there) of any subset of modalities, also of none; of a mixture, which then is of one expert,
        that one. Raises UserError for a mixture of both, which is no Gaussian."""
        experts, present = self.experts(seen), [one.present for one in seen]
        if self.is_product:
            return joint_normal(experts, present)
        if bool((present[0] & present[1]).any()):
            raise UserError("experts=mixture with both modalities given, expected one: the posterior is no Gaussian")
        mean = torch.where(present[0][:, None], experts[0].mean, experts[1].mean)
        log_scale = torch.where(present[0][:, None], experts[0].log_scale, experts[1].log_scale)
        nothing = ~(present[0] | present[1])[:, None]
        return Normal(mean.masked_fill(nothing, 0.0), log_scale.masked_fill(nothing, 0.0))

    def encode(self, images: Tensor) -> Tensor:
        seen = self.seen(images)
        experts = self.experts(seen)
        if self.is_product:
            return joint_normal(experts, [one.present for one in seen]).mean
        if not bool(seen[1].present.all()):
            return experts[0].mean
        return 0.5 * (experts[0].mean + experts[1].mean)  # of the mixture

    def pixels(self, latents: Tensor, shown: Pixels, generator: torch.Generator | None = None) -> Tensor:
        pair = self.config.pair
        images = [pixels_of(self.first, latents, shown, generator)]
        if pair in ("left_right", "top_bottom"):
            assert isinstance(self.second, ImageView)
            return joined(pair, images[0], pixels_of(self.second, latents, shown, generator))
        return images[0]

    def symbol_log_probabilities(self, latents: Tensor) -> Tensor:
        """log p of the class or the bytes of the text: n d -> n L V. Raises UserError for a pair of images."""
        if not isinstance(self.second, SymbolView):
            raise UserError(f"model.pair={self.config.pair} tells no class and no text, only images")
        return self.second.log_probabilities(latents)

    def draw_latents(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        device = next(self.parameters()).device
        return torch.randn(count, self.config.latents, device=device, generator=generator)


def standard(like: Normal) -> Normal:
    """N(0, I) of the same shape."""
    return Normal(torch.zeros_like(like.mean), torch.zeros_like(like.log_scale))


def by_draw(law: Normal, latents: Tensor) -> Tensor:
    """The log density of each number of draws: k b d -> k b d."""
    return torch.stack([law.log_density(draw) for draw in latents])


def pixels_of(view: ImageView, latents: Tensor, shown: Pixels, generator: torch.Generator | None) -> Tensor:
    decoder = view.decoder
    if shown == "sample":
        return decoder.sample(latents, generator).clamp(-1, 1)
    return (decoder.mean(latents) if shown == "mean" else decoder.mode(latents)).clamp(-1, 1)
