"""The models that `.zlg` files need, found by their fingerprints."""

from __future__ import annotations

from pathlib import Path

import torch

from common.errors import UserError
from common.model_io import CONFIG_NAME
from pipelines.codec.archive import Archive
from pipelines.codec.codec import Codec
from pipelines.codec.lossless import LosslessCodec
from pipelines.codec.lossless_archive import LosslessFile
from pipelines.latents.models import is_vae
from pipelines.model_folders import INDEX_NAME


class Models:
    """The models that files need: the one that was named, or those of a folder, found by their fingerprints."""

    def __init__(self, model: str | None, models: str | None, device: torch.device):
        if models is not None and not Path(models).is_dir():
            raise UserError(f"there is no folder {models}; name one that holds models")
        self.folder = models
        self.device = device
        self.known: list[Codec] = []
        self.known_vaes: list[LosslessCodec] = []
        if model is not None and is_vae(model):
            self.known_vaes.append(LosslessCodec.from_pretrained(model).to(device))
        elif model is not None:
            self.known.append(Codec.from_pretrained(model).to(device))

    def for_archive(self, archive: Archive, title: str) -> Codec:
        """Raises UserError where there is none."""
        for codec in self.known:
            if codec.wrote(archive):
                return codec
        if self.folder is None and not self.known:
            raise UserError(f"{title} holds codes, and the model is a VAE; name the model that it was compressed with")
        if self.folder is None:
            self.known[0].check_archive(archive, title)
        else:
            for folder in model_folders(Path(self.folder)):
                try:
                    codec = Codec.from_pretrained(folder)
                except UserError:  # a prior alone, or of another version: it is not this one
                    continue
                if codec.wrote(archive):
                    self.known.append(codec.to(self.device))
                    return codec
        raise UserError(
            f"{title} was compressed by a model that is not in {self.folder}: its autoencoder is {archive.stage1.hex()}"
            + (f", its prior {archive.prior.hex()}" if archive.prior else "")
            + (f", its tables {archive.tables.hex()}" if archive.tables else "")
            + "; put the model there"
        )

    def for_lossless(self, file: LosslessFile) -> LosslessCodec:
        """Raises UserError where there is none."""
        for codec in self.known_vaes:
            if codec.model == file.model:
                return codec
        if self.folder is None:
            if not self.known_vaes:
                raise UserError(f"{file.title} is of mode lossless, which a VAE decodes; name the one that wrote it")
            self.known_vaes[0].check_file(file)
        else:
            for folder in model_folders(Path(self.folder)):
                try:
                    codec = LosslessCodec.from_pretrained(folder)
                except UserError:  # no VAE, or of another version
                    continue
                if codec.model == file.model:
                    self.known_vaes.append(codec.to(self.device))
                    return codec
        raise UserError(
            f"{file.title} was compressed by a VAE that is not in {self.folder}: {file.model.hex()}; put it there"
        )


def model_folders(root: Path) -> list[Path]:
    """Assembled models and single ones below a folder."""
    assembled = [path.parent for path in sorted(root.rglob(INDEX_NAME))]
    single = [path.parent for path in sorted(root.rglob(CONFIG_NAME))]
    return assembled + [folder for folder in single if folder.parent not in assembled]
