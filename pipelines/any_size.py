"""Images of any size through an autoencoder, whose sides are multiples of its stride."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from codes.spec import Codes, CodeSpec
from common.computing import computing_in
from common.errors import UserError
from common.precision import Precision
from stage1_vq.autoencoders import Autoencoder


@torch.no_grad()
def reconstruct(
    autoencoder: Autoencoder,
    images: Tensor,
    precision: Precision | None = None,
    tokens: int | None = None,
    grids: int | None = None,
    text: Tensor | None = None,
) -> Tensor:
    """Images as their codes tell them: b c H W in [-1, 1], any size -> the same shape, float32. precision, text: as for
    `decoded`; tokens: as many of the first codes of a model with nested tokens, None: all; grids: as many of the first
    grids of a model of layers or scales. Raises UserError."""
    height, width = images.shape[-2:]
    codes = encode_any_size(autoencoder, images)
    if grids is not None:
        return decoded_first(autoencoder, codes[:grids], (height, width), precision)[..., :height, :width]
    if tokens is not None:
        autoencoder.prefix_spec(tokens)
        codes = tuple(grid[..., :tokens] for grid in codes)
    return decoded(autoencoder, codes, precision, text)[..., :height, :width]


@torch.no_grad()
def decoded(
    autoencoder: Autoencoder, codes: Codes, precision: Precision | None = None, text: Tensor | None = None
) -> Tensor:
    """Images of codes, one b h w per grid on any device -> b c H W, float32. precision: what the decoder computes in;
    None: as its weights are. text: b t d, vectors of captions, for a decoder that reads them. Images larger than the
    training size go through it so many at a time that they have the pixels of a batch of that size. Raises UserError
    where images do not fit into the range of float16."""
    device = next(autoencoder.parameters()).device
    whole = tuple(grid.to(device) for grid in codes)
    with computing_in(precision, device):
        if text is None:
            images = torch.cat([autoencoder.decode(part).float() for part in in_parts(whole, autoencoder.code_spec())])
        else:  # such images are all of one size
            images = autoencoder.decode_with_text(whole, text.to(device)).float()
    if precision == "fp16":
        check_range(images)
    return images


@torch.no_grad()
def decoded_first(
    autoencoder: Autoencoder, codes: Codes, size: tuple[int, int], precision: Precision | None = None
) -> Tensor:
    """Images of the first grids of their codes, b h w each (`Autoencoder.decode_first`) -> b c H W, float32. size: H W
    of the images, padded here to the stride; precision: as for `decoded`. Raises UserError."""
    device = next(autoencoder.parameters()).device
    padded = [side + -side % autoencoder.stride for side in size]
    with computing_in(precision, device):
        images = autoencoder.decode_first(tuple(grid.to(device) for grid in codes), *padded).float()
    if precision == "fp16":
        check_range(images)
    return images


def check_range(images: Tensor) -> None:
    """Raises UserError for images, of any shape, that a decoder in float16 has no numbers for."""
    if not bool(images.isfinite().all()):
        raise UserError(
            "the decoder's images are not finite in float16, whose range its activations exceed; take bf16 for the "
            "decoder, or leave its precision out"
        )


def in_parts(codes: Codes, spec: CodeSpec) -> list[Codes]:
    """Codes of images, one b h w per grid, so many at a time that no part has more codes than b images of `spec`; all
    at once where they are no larger than that. How many depends on nothing else: a device's free memory changes no
    pixel."""
    own, each = sum(grid.size for grid in spec.grids), sum(grid.shape[1:].numel() for grid in codes)
    if each <= own:
        return [codes]
    return list(zip(*(grid.split(max(1, len(grid) * own // each)) for grid in codes), strict=True))


@torch.no_grad()
def encode_any_size(autoencoder: Autoencoder, images: Tensor) -> Codes:
    """Codes of b c H W in [-1, 1], its last column and row repeated up to a multiple of the stride."""
    height, width = images.shape[-2:]
    device = next(autoencoder.parameters()).device
    padding = (0, -width % autoencoder.stride, 0, -height % autoencoder.stride)
    padded = F.pad(images.to(device), padding, mode="replicate")
    return autoencoder.encode(in_one_layout(padded))


def in_one_layout(images: Tensor) -> Tensor:
    """The images, always in the same layout: a convolution rounds otherwise when channels lie innermost, and one vector
    in 100,000 or so, between two codes, would fall to the other."""
    return images.clone(memory_format=torch.contiguous_format)
