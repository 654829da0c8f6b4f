"""Which codes an image of a size has, and whether a prior can code them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from codes.spec import CodeSpec
from common.errors import UserError
from pipelines.codec.archive import Mode, Shape
from pipelines.codec.prior_coding import walks_in_raster
from stage1_vq.autoencoders import Autoencoder
from stage2_prior.priors import AutoregressivePrior

OF_OTHER_SIZE, SEVERAL_ROWS, OTHER_ORDER = "other size", "several rows", "other order"
"""Why images are not in mode prior, as was asked for."""


def padded(autoencoder: Autoencoder, height: int, width: int) -> tuple[int, int]:
    """The size to which images of this size are padded: multiples of the stride."""
    stride = autoencoder.stride
    return height + -height % stride, width + -width % stride


def spec_of(autoencoder: Autoencoder, height: int, width: int, tokens: int | None = None) -> CodeSpec:
    """The codes of an image of this size, padded to the stride; tokens: of each grid, None for all. Raises UserError
    for a number of tokens of which the autoencoder decodes none."""
    spec = autoencoder.code_spec(*padded(autoencoder, height, width))
    return spec if tokens is None else autoencoder.prefix_spec(tokens)


def spec_of_shape(autoencoder: Autoencoder, shape: Shape, title: str) -> CodeSpec:
    """The codes of an image of a file: all, or the first tokens, if so many are there. Raises UserError where this
    model makes no such codes."""
    spec = spec_of(autoencoder, shape.height, shape.width)
    if shape.grids != grids_of(spec) and not autoencoder.codes_have_places:
        with suppress(UserError):  # for a model without nested tokens, or a number that it has not
            spec = autoencoder.prefix_spec(shape.grids[0][1])
    if shape.grids != grids_of(spec):
        raise UserError(
            f"{title} was edited: a {shape.height}x{shape.width} image of this model has other grids of codes; "
            "compress the image anew"
        )
    return spec


def grids_of(spec: CodeSpec) -> tuple[tuple[int, int, int], ...]:
    """h, w and k of each, as files have them."""
    return tuple((grid.height, grid.width, grid.vocabulary) for grid in spec.grids)


def why_not_with_prior(prior: AutoregressivePrior, spec: CodeSpec, whole: CodeSpec) -> str | None:
    """Why the prior cannot code these codes, of an image whose codes are all of `whole`; None where it can."""
    if whole.grids != prior.code_spec.grids:
        return OF_OTHER_SIZE
    if spec.grids == whole.grids:
        return None
    if len(spec.grids) > 1:
        return SEVERAL_ROWS
    return None if walks_in_raster(prior) else OTHER_ORDER


def sentences(fallbacks: Mapping[str, int], own: CodeSpec, has_tables: bool) -> list[str]:
    """What a person is told of images that are not in mode prior, by the reason: a sentence for each. own: the codes of
    images of the model's size."""
    mode = Mode.table if has_tables else Mode.packed
    why = {
        OF_OTHER_SIZE: f"the prior knows only codes of {own.image_height}x{own.image_width} images",
        SEVERAL_ROWS: "the prior walks one row of tokens after the other, and cannot stop in each",
        OTHER_ORDER: "the prior walks the tokens in an order of its own, and not the first ones first",
    }
    return [
        f"{count} {'image is' if count == 1 else 'images are'} in mode {mode.name}: {why[reason]}"
        for reason, count in fallbacks.items()
    ]
