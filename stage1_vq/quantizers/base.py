"""What every quantizer is: latents in, code vectors and codes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from codes.spec import Codes, Grid
from common.errors import UserError
from common.wording import counted


class Quantized(NamedTuple):
    z_q: Tensor  # b d h w, the code vectors; gradients reach z through them
    codes: Codes  # one b h w per grid, int64
    losses: dict[str, Tensor]  # scalars, means per element, already weighted: their sum is what training adds
    statistics: dict[str, Tensor]  # scalars, detached, for the log line


class Quantizer(nn.Module):
    """A quantizer with nothing to learn but by gradients needs `grids`, `forward` and `codes_to_latents` only.

    `forward` in training mode may note what the batch showed, but never changes the codebook: that is for `update`,
    once per optimiser step, so that gradient accumulation equals one large batch and a skipped step leaves no trace.

    Its weights stay what they are, float32, when the model around it is cast to bfloat16: 8 bits do not tell code
    vectors apart. So it makes float32 latents of codes, and takes z of any type.
    """

    config_class: ClassVar[type]  # a frozen dataclass with `kind` and `dim`
    recompute: ClassVar = "never"  # `forward` notes what it sees, and would twice (common/recompute.py)
    dim: int  # d, width of z
    dim_out: int  # width of z_q; that of z for all but a few
    stays_whole = True  # on each process (training/sharding.py): what moves code vectors reads all of them
    codes_are_bits: ClassVar[bool] = False  # each bit of a code's number says something by itself
    path: str = "model.quantizer"  # where its config stands in a recipe: what messages call its fields by

    def __init__(self, dim: int, dim_out: int | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.dim_out = dim if dim_out is None else dim_out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half`, `cuda` and their like do to each weight: here to its device, never to its type."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    @classmethod
    def config_from(cls, values: Mapping[str, Any]) -> Any:
        """The config that `dataclasses.asdict` made `values` of; JSON has turned its tuples to lists."""
        return cls.config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        """The grids of codes that latents of `height` x `width` become."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w."""
        raise NotImplementedError

    def draw_kept(self, b: int, device: torch.device) -> Tensor | None:
        """Of how many of its layers or scales the decoder sees the sum of each of b images, b int64, drawn anew; None
        where of all. A quantizer that draws so takes them as a second argument of `forward`, by which several of them
        drop alike."""
        return None

    def codes(self, z: Tensor) -> Codes:
        """The codes of `forward`, where nothing else is wanted."""
        return self.forward(z).codes

    def codes_after(self, z: Tensor, chosen: Codes) -> Codes:
        """The codes of z whose first grids somebody else has chosen, b h w each: these, and those of the other grids as
        `codes` finds them after such a beginning. Here grids do not depend on each other."""
        return (*chosen, *self.codes(z)[len(chosen) :])

    def codes_to_latents(self, codes: Codes) -> Tensor:
        """The z_q of these codes: b d h w."""
        raise NotImplementedError

    def latents_of_first(self, codes: Codes, height: int, width: int) -> Tensor:
        """The z_q, b d `height` `width`, of the first grids alone, as many as there are codes, where the others add to
        them. Raises UserError where they do not, or not from that grid on."""
        raise UserError(
            f"got codes of {counted(len(codes), 'grid')}, expected those of all "
            f"{len(self.grids(height, width))}: of this quantizer no first ones tell of the whole image"
        )

    def scale_latents(self) -> dict[str, Tensor] | None:
        """What a next-scale prior needs to sum the scales itself; None where codes are no scales of one sum."""
        return None

    def initialise(self, batches: Sequence[Tensor]) -> None:
        """Fits the codebook to the first step's latents: z, b d h w, of each micro-batch, here and on all other
        processes."""

    def begin_step(self, step: int) -> None:
        """Called before the forward passes of a training step with its number, counted from 0, which is the run's: it
        counts skipped steps and no rollback takes it back. What has a schedule notes it."""

    def update(self) -> None:
        """Applies what the forward passes since the last call noted, on all processes alike."""

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """How its codes did in the step that the last `update` ended, and over the last epoch: scalars, the same on all
        processes. Asked for at log lines alone."""
        return {}

    def discard(self) -> None:
        """Forgets what the forward passes since the last `update` noted."""

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        """What a person should know about these health figures, each with its remedy."""
        return []

    def check_latents(self, z: Tensor) -> None:
        """Raises UserError unless z is b d h w."""
        if z.ndim != 4 or z.shape[1] != self.dim:
            raise UserError(
                f"got latents of shape {tuple(z.shape)}, expected (batch, {self.dim}, height, width): "
                f"{self.path}.dim must be the width of the encoder's output"
            )
