"""What every autoencoder is: images in, codes out, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from stage1_vq.codes import Codes, CodeSpec
from training.errors import UserError
from training.model_io import PretrainedModel


class Stage1Output(NamedTuple):
    reconstruction: Tensor  # b c H W; may leave [-1, 1] a little: `decode` clamps
    codes: Codes  # one b h w per grid, int64
    losses: dict[str, Tensor]  # scalars, means per element, already weighted: the loss is their sum
    statistics: dict[str, Tensor]  # scalars, detached, for the log line


class AutoencoderSettings(Protocol):
    """What the config of every autoencoder tells."""

    @property
    def kind(self) -> str: ...
    @property
    def channels(self) -> int: ...  # c of the images
    @property
    def stride(self) -> int: ...  # pixels, along each side, that a code of the finest grid stands for


class Autoencoder(PretrainedModel):
    """Images (b c H W, float in [-1, 1]) <-> codes.

    `image_size` (H, W) is that of training: it tells which CodeSpec belongs to the model. Any other size that the
    stride divides works as well.
    """

    def __init__(self, config: AutoencoderSettings, image_size: tuple[int, int]) -> None:
        """Raises UserError unless the stride divides both sides of image_size (H, W)."""
        super().__init__()
        self.config = config
        self.channels = config.channels
        self.stride = config.stride
        self.image_size = image_size
        self.check_image_size(*image_size)

    def code_spec(self, height: int | None = None, width: int | None = None) -> CodeSpec:
        """The codes of a `height` x `width` image; default: the training size. Raises UserError."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Codes:
        """images: b c H W in [-1, 1]; returns one b h w per grid. Raises UserError for an impossible shape."""
        raise NotImplementedError

    def decode(self, codes: Codes) -> Tensor:
        """codes: one b h w per grid; returns images, b c H W, clamped to [-1, 1]. Raises UserError for wrong codes."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Stage1Output:
        """One training or validation pass. images: b c H W in [-1, 1]."""
        raise NotImplementedError

    def initialise(self, batches: Sequence[Tensor]) -> None:
        """Called once, before the first step, with the images, b c H W, of each of its micro-batches."""

    def update(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """Called after each optimiser step: codebooks move; returns their health, scalars for the log line."""
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
                f"got images of type {images.dtype}, expected floats in [-1, 1]: stage1_vq.images.to_float makes them"
            )
        self.check_image_size(images.shape[2], images.shape[3])
