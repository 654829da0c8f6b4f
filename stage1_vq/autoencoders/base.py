"""What every autoencoder is: images in, codes out, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from torch import Tensor, nn

from codes.spec import Codes, CodeSpec
from common.compatibility import never_compiled
from common.errors import UserError
from common.layout import laid_as
from common.model_io import PretrainedModel, in_type_of
from common.starting import resized_table, stands_still
from common.wording import an
from stage1_vq.quantizers import Quantizer, quantizer_config


class Stage1Output(NamedTuple):
    reconstruction: Tensor  # b c H W; may leave [-1, 1] a little: `decode` clamps
    codes: Codes  # one b h w per grid, int64
    losses: dict[str, Tensor]  # scalars, means per element, already weighted: the loss is their sum
    statistics: dict[str, Tensor]  # scalars, detached, for the log line
    # b d h w with its graph, what a further loss compares with features of another network (losses/alignment.py): code
    # vectors, of levels the coarsest; of a decoder by flow matching what lies in its middle
    aligned: Tensor | None = None


class CaptionSpec(NamedTuple):
    """The vectors of a caption that a decoder reads beside the codes."""

    length: int  # t, vectors
    width: int  # of each
    encoder: str  # CLIP whose vectors they are: a hub id, or a folder


class AutoencoderSettings(Protocol):
    """What the config of every autoencoder tells."""

    @property
    def kind(self) -> str: ...
    @property
    def channels(self) -> int: ...  # c of the images
    @property
    def stride(self) -> int: ...  # pixels: both sides of an image must be multiples of it


class Autoencoder(PretrainedModel):
    """Images (b c H W, float in [-1, 1]) <-> codes.

    `image_size` (H, W) is that of training: it tells which CodeSpec belongs to the model. Any other size that the
    stride divides works as well.
    """

    config_class: ClassVar[type]  # a frozen dataclass of AutoencoderSettings, with a field `quantizer`
    codes_maker: str | None = None  # fingerprint of the model whose encoder and code vectors this one has unchanged
    started = False  # whether the code vectors are those of another model, which `initialise` leaves as they are
    encoder_started = (
        False  # whether the encoder's weights are, in the place of ones that were published for its network
    )
    codes_have_places: ClassVar[bool] = True  # in the image; False: they tell of all of it, and of its own size alone

    def __init__(self, config: Any, image_size: tuple[int, int]) -> None:
        """Raises UserError unless the stride divides both sides of image_size (H, W)."""
        super().__init__()
        self.config = config
        self.channels = config.channels
        self.stride = config.stride
        self.image_size = image_size
        self.check_image_size(*image_size)

    def arguments(self) -> dict[str, Any]:
        said = {} if self.codes_maker is None else {"codes_maker": self.codes_maker}
        return {"config": asdict(self.config), "image_size": list(self.image_size), **said}

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        config, (height, width) = dict(arguments["config"]), arguments["image_size"]
        quantizer = quantizer_config(config.pop("quantizer"))
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in config.items()}
        model = cls(cls.config_class(**values, quantizer=quantizer), (height, width))
        model.codes_maker = arguments.get("codes_maker")
        return model

    def codes_fingerprint(self) -> str:
        """Of the model whose codes these are: this one, or that whose encoder and code vectors it has unchanged."""
        return self.codes_maker or self.fingerprint()

    def knows_codes_of(self, fingerprint: str) -> bool:
        """Whether codes that the model of this fingerprint made mean here what they mean there."""
        return fingerprint in (self.codes_maker, self.fingerprint())

    def traits(self) -> list[str]:
        return [self.code_spec().describe()]

    def sources(self) -> dict[str, type[Autoencoder]]:
        """Models that this one can begin with, by their kind."""
        return {self.kind: type(self)}

    def fitted(self, name: str, weight: Tensor, fresh: Tensor, other: Self) -> Tensor | None:
        if name.endswith("positions.table") and weight.shape != fresh.shape and len(weight) == len(fresh):
            (h, w), (H, W) = weight.shape[1:], fresh.shape[1:]  # d h w, of another image size
            return resized_table(weight.flatten(1).T, (h, w), (H, W)).T.reshape_as(fresh)
        return super().fitted(name, weight, fresh, other)

    def code_spec(self, height: int | None = None, width: int | None = None) -> CodeSpec:
        """The codes of a `height` x `width` image; default: the training size. Raises UserError."""
        raise NotImplementedError

    def prefix_spec(self, tokens: int) -> CodeSpec:
        """The codes of an image of which the first `tokens` are kept, one row in each grid, as `decode` takes them.

        Raises UserError where the first codes do not tell of the whole image, and for a number out of range."""
        raise UserError(
            f"{tokens} tokens, but the codes of {an(self.kind)} model are all of use: each tells of a place of its "
            "own; leave their number out, or name a titok or flextok model that was trained with model.nested"
        )

    def encode(self, images: Tensor) -> Codes:
        """images: b c H W in [-1, 1]; returns one b h w per grid. Raises UserError for an impossible shape."""
        raise NotImplementedError

    def completing(self, images: Tensor) -> Callable[[Codes], Codes]:
        """`encode` for images, b c H W, whose first grids of codes somebody else chooses: (those grids, b h w each) ->
        the codes of all grids, the others as `encode` finds them after such a beginning. Of no grids: `encode`."""
        raise NotImplementedError

    def decode(self, codes: Codes) -> Tensor:
        """codes: one b h w per grid; returns images, b c H W, clamped to [-1, 1]. Raises UserError for wrong codes."""
        raise NotImplementedError

    def decode_first(self, codes: Codes, height: int, width: int) -> Tensor:
        """Images, b c `height` `width`, of the first grids of their codes alone: b h w each, of layers or scales to
        which the others only add. The nearer to the images, the larger `quantizer_dropout` was in training. Raises
        UserError where the codes of this model are no such, or not of images of this size."""
        raise UserError(f"the codes of {an(self.kind)} model are all of use: no first grids tell of the whole image")

    def captions(self) -> CaptionSpec | None:
        """What `decode_with_text` takes; None for a decoder that reads codes alone."""
        return None

    def decode_with_text(self, codes: Codes, text: Tensor) -> Tensor:
        """As `decode`, which reads the empty caption; text: b t width, float, the vectors of a caption of each image.
        Raises UserError for others, and where the decoder reads none."""
        raise UserError(f"got a caption, but the decoder of {an(self.kind)} model reads codes alone: leave it out")

    def scale_latents(self) -> dict[str, Tensor] | None:
        """What a next-scale prior needs to know of the codes (`MultiscaleQuantizer.scale_latents`); None for codes of
        another kind."""
        return None

    def decode_in_steps(self, steps: int) -> None:
        """From now on `decode` takes so many steps: another model, of the same codes. Raises UserError where the
        decoder is of one pass, and for less than 1."""
        raise UserError(
            f"{steps} steps of the decoder, but {an(self.kind)} model decodes in one pass; leave them out, or name a "
            "model of kind flow_decoder or flextok"
        )

    def decode_guided(self, guidance: float) -> None:
        """From now on `decode` is guided so much by the codes, 1 for none: another model, of the same codes. Raises
        UserError where the decoder knows nothing else to be guided away from, and for less than 1."""
        raise UserError(
            f"a guidance of {guidance}, but the decoder of {an(self.kind)} model was never without codes; leave it "
            "out, or name a flextok model that was trained with model.unconditional"
        )

    def decode_otherwise(self, **settings: Any) -> None:
        """Changes settings of the config that are of decoding alone: the codes are still the same model's."""
        codes_maker = self.codes_fingerprint()
        self.config = replace(self.config, **settings)
        self.codes_maker = codes_maker

    def codes_are_bits(self) -> bool:
        """Whether each bit of a code's number says something by itself, as a prior wants it that tells bit by bit."""
        quantizers = [module for module in self.modules() if isinstance(module, Quantizer)]
        inner = [one for one in quantizers if not any(isinstance(part, Quantizer) for part in [*one.modules()][1:])]
        return bool(inner) and all(one.codes_are_bits for one in inner)

    def forward(self, images: Tensor) -> Stage1Output:
        """One training or validation pass. images: b c H W in [-1, 1]."""
        raise NotImplementedError

    def aligned_width(self) -> int:
        """d of `Stage1Output.aligned`."""
        raise NotImplementedError

    @property
    def aligned_has_places(self) -> bool:
        """Whether its h w are places in the image; else their mean tells of it."""
        return self.codes_have_places

    def decoder_bits(self, images: Tensor, codes: Codes) -> Tensor | None:
        """Bits of each 8-bit image given its codes, `b` float64, where the decoder is a likelihood; else None. With the
        bits of the codes under a prior they bound the image's own from above."""
        return None

    def last_layer(self) -> nn.Parameter:
        """The weight of the layer that the images come out of: an adversarial loss is balanced by its gradient there
        (stage1_vq/losses/adversarial.py)."""
        raise NotImplementedError

    def initialise(self, batches: Sequence[Tensor]) -> None:
        """Called once, before the first step, with the images, b c H W, of each of its micro-batches."""

    def begin_step(self, step: int) -> None:
        """Called before the forward passes of a training step with its number, counted from 0: schedules go by it."""

    def update(self) -> None:
        """Called after each optimiser step: codebooks move."""

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """Of codebooks after the last `update`: scalars for the log line, asked for where there is one."""
        return {}

    def discard(self) -> None:
        """Called in place of `update` when a step was skipped."""

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        """What a person should know about these metrics, each with its remedy."""
        return []

    def check_image_size(self, height: int, width: int) -> None:
        """Raises UserError unless the stride divides both sides."""
        if height < 1 or width < 1 or height % self.stride or width % self.stride:
            fitting = [max(1, round(side / self.stride)) * self.stride for side in (height, width)]
            raise UserError(
                f"cannot encode {height}x{width} images: both sides must be multiples of {self.stride}, the stride of "
                f"the encoder; resize or crop them, for example to {fitting[0]}x{fitting[1]}"
            )

    def check_images(self, images: Tensor) -> None:
        """Raises UserError unless `images` is float b c H W with this model's channels, on its stride."""
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise UserError(
                f"got images of shape {tuple(images.shape)}, expected (batch, {self.channels}, height, width); "
                "convert them, or train a model with their number of channels"
            )
        if not images.is_floating_point():
            raise UserError(
                f"got images of type {images.dtype}, expected floats in [-1, 1]: images.datasets.to_float makes them"
            )
        self.check_image_size(images.shape[2], images.shape[3])

    def check_codes(self, codes: Codes, stride: int) -> None:
        """Raises UserError unless `codes` are those of images of some size.

        stride: pixels, along each side, that a code of the last and finest grid stands for.
        """
        spec = self.code_spec()
        if len(codes) == len(spec.grids) and codes[-1].ndim == 3:
            h, w = codes[-1].shape[1:]
            spec = self.code_spec(h * stride, w * stride)
        spec.check(codes)


class QuantizedAutoencoder(Autoencoder):
    """An autoencoder of three parts, which its constructor makes: images -> encoder -> z (b d h w) -> quantizer -> z_q
    -> decoder -> images. Its `reconstruction_losses` say what a good reconstruction is."""

    encoder: nn.Module
    quantizer: Quantizer
    decoder: Any  # stage1_vq.networks.decoder.Decoder, an nn.Module

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        """decoded: the decoder's output, float32; images: b c H W. Returns scalars, means per element, weighted."""
        raise NotImplementedError

    def images_of(self, decoded: Tensor) -> Tensor:
        """The images, b c H W, that the decoder's output stands for."""
        return decoded

    def laid_out(self, maps: Tensor, images: Tensor | None = None) -> Tensor:
        """Images or z_q, b c h w, as they lie in memory when the networks get them: as `images` do, where they are
        given."""
        return laid_as(images, maps)

    def last_layer(self) -> nn.Parameter:
        return [weight for weight in self.decoder.parameters() if weight.ndim > 1][-1]

    def aligned_width(self) -> int:
        return self.quantizer.dim_out

    def code_spec(self, height: int | None = None, width: int | None = None) -> CodeSpec:
        height = self.image_size[0] if height is None else height
        width = self.image_size[1] if width is None else width
        self.check_image_size(height, width)
        grids = self.quantizer.grids(height // self.stride, width // self.stride)
        return CodeSpec(grids, height, width, self.channels)

    def scale_latents(self) -> dict[str, Tensor] | None:
        return self.quantizer.scale_latents()

    def latents(self, images: Tensor) -> Tensor:
        """z, b d h w."""
        self.check_images(images)
        return self.encoder(self.laid_out(in_type_of(self.encoder, images), images))

    def encode(self, images: Tensor) -> Codes:
        return self.quantizer.codes(self.latents(images))

    def completing(self, images: Tensor) -> Callable[[Codes], Codes]:
        return partial(self.quantizer.codes_after, self.latents(images))

    def decode(self, codes: Codes) -> Tensor:
        self.check_codes(codes, self.stride)
        return self.images_of(self.decoded(codes)).clamp(-1, 1)

    def decode_first(self, codes: Codes, height: int, width: int) -> Tensor:
        spec = self.code_spec(height, width)
        if not 1 <= len(codes) <= len(spec.grids):
            raise UserError(f"got codes of {len(codes)} grids, expected 1 to {len(spec.grids)}: {spec.describe()}")
        replace(spec, grids=spec.grids[: len(codes)]).check(codes)
        finest = spec.grids[-1]  # as large as the latents
        z_q = self.quantizer.latents_of_first(codes, finest.height, finest.width)
        return self.images_of(self.decoded_latents(z_q, codes)).clamp(-1, 1)

    def decoded(self, codes: Codes) -> Tensor:
        """The decoder's output, float32, of codes that are known to fit."""
        return self.decoded_latents(self.quantizer.codes_to_latents(codes), codes)

    def decoded_latents(self, z_q: Tensor, codes: Codes) -> Tensor:
        """Likewise, of code vectors, b d h w, which are those of `codes`, all or the first grids."""
        return self.decoder(self.laid_out(in_type_of(self.decoder, z_q))).float()

    def forward(self, images: Tensor) -> Stage1Output:
        z_q, codes, losses, statistics = self.quantizer(self.latents(images))
        reconstruction, reconstruction_losses = self.finish(self.decoder.trunk(self.laid_out(z_q, images)), images)
        return Stage1Output(reconstruction, codes, {**reconstruction_losses, **losses}, statistics, z_q)

    @never_compiled
    def finish(self, features: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The images, and their losses, of all but the decoder's last layer.

        Not compiled: a compiled part has one backward pass, of all or nothing, and the adaptive weight of an
        adversarial loss asks for the gradients at the last layer alone. Each would cost a backward pass of the whole.
        """
        decoded = self.decoder.last(features).float()
        return self.images_of(decoded), self.reconstruction_losses(decoded, images.float())

    def initialise(self, batches: Sequence[Tensor]) -> None:
        if not self.started:
            self.quantizer.initialise([self.latents(images) for images in batches])

    def begin_step(self, step: int) -> None:
        self.quantizer.begin_step(step)

    def update(self) -> None:
        if not stands_still(self.quantizer):
            self.quantizer.update()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        return {} if stands_still(self.quantizer) else self.quantizer.health(steps_per_epoch)

    def discard(self) -> None:
        self.quantizer.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        return self.quantizer.warnings(metrics, steps_per_epoch)
