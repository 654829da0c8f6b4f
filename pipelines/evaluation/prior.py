"""How many bits a prior needs for the codes of test images, and whether it has seen these before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codes.shards import CodeDataset
from codes.spec import Codes
from codes.training_images import TrainingImages, hashes_of
from pipelines.codec.tables import CodeTables
from pipelines.evaluation.codebook import codes_of, word
from pipelines.evaluation.gathering import Values
from pipelines.figures import bits_of_codes
from stage1_vq.autoencoders import Autoencoder
from stage2_prior.priors import Prior

SHARED = 0.02  # of the images: beyond it they are no test images; a few have the codes of another by chance


class PriorBits:
    """Figures of a prior, of its model's tables, and of both stages together where the decoder is a likelihood."""

    title = "prior"

    def __init__(
        self,
        autoencoder: Autoencoder,
        prior: Prior,
        tables: CodeTables | None = None,
        training: CodeDataset | None = None,
    ) -> None:
        """training: codes that the prior was trained on."""
        self.autoencoder, self.prior, self.tables = autoencoder, prior, tables
        self.spec = prior.code_spec
        self.known = prior.training_images if training is None else TrainingImages.of(training)

    def measure(self, images: Tensor, labels: Tensor, codes: Codes, given: Codes | None) -> dict[str, Tensor]:
        bits = bits_of_codes(self.prior, codes, labels, given)
        of_image = torch.stack([part.sum(dim=(1, 2)) for part in bits]).sum(0)  # b
        found = {"bits": of_image}
        for grid, part in zip(self.spec.grids, bits, strict=True):
            found[f"bits {grid.name}"] = part.mean(dim=(1, 2))
        if (decoder := self.autoencoder.decoder_bits(images, codes)) is not None:
            found["two_stage"] = of_image + decoder
        if self.tables is not None:
            for grid, part in zip(self.spec.grids, codes, strict=True):
                cost = self.tables.grids[grid.name].bits(part.cpu().numpy())
                found[f"tables {grid.name}"] = torch.from_numpy(cost).mean(dim=(1, 2))
        return {name: value.double() for name, value in found.items()}

    def figures(self, values: Values) -> dict[str, Any]:
        """Means over the images: bits per code, of each grid too, per pixel and per image-dimension; where the decoder
        is a likelihood, the bits per dimension of both stages together, a bound on the image's own; the bits per code
        of the model's tables; the share of images that the prior was trained on, where that can be told."""
        spec = self.spec
        mean = {name: float(values[name].mean()) for name in values if name.startswith(("bits", "two_stage", "tables"))}
        figures: dict[str, Any] = {"bits_per_code": mean["bits"] / spec.codes_per_image}
        if len(spec.grids) > 1:
            figures |= {f"bits_per_code_{word(g.name)}": mean[f"bits {g.name}"] for g in spec.grids}
        figures["bits_per_pixel"] = mean["bits"] / (spec.image_height * spec.image_width)
        figures["bits_per_pixel_packed"] = spec.bits_per_image / (spec.image_height * spec.image_width)
        figures["bits_per_dimension"] = mean["bits"] / spec.image_dimensions
        if "two_stage" in mean:
            figures["two_stage_bits_per_dimension"] = mean["two_stage"] / spec.image_dimensions
        if self.tables is not None:
            for grid in spec.grids:
                of = f"_{word(grid.name)}" if len(spec.grids) > 1 else ""
                figures[f"bits_by_tables{of}"] = mean[f"tables {grid.name}"]
        trained_on, comparable = self.trained_on(values)
        if comparable:
            figures["share_of_training_images"] = trained_on / comparable
        return figures

    def trained_on(self, values: Values) -> tuple[int, int]:
        """How many of the images the prior was trained on, of how many for which that can be told."""
        return (0, 0) if self.known is None else self.known.among(hashes_of(codes_of(values, self.spec)))

    def notes(self, values: Values) -> list[str]:
        trained_on, comparable = self.trained_on(values)
        if trained_on > SHARED * comparable:
            which = "all" if trained_on == comparable else f"{trained_on} of {comparable}"
            return [
                f"warning: {which} of these images have exactly the codes of images that the prior was trained on, so "
                "the figures flatter it; name images that it has not seen"
            ]
        if self.known is not None and comparable < SHARED * len(values["bits"]):
            return ["note: whether the prior was trained on these images cannot be told: their codes are too alike"]
        if self.known is None:
            return [
                "note: whether the model was trained on these images is not known, as it does not record its training "
                "images; --codes, the code shards of its training, would tell"
            ]
        return []
