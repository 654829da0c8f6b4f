"""Zellige: images from learned tiles. This is the page that scripts import from.

>>> from zellige import SamplingConfig, TwoStagePipeline, load_images
>>> pipeline = TwoStagePipeline.from_pretrained("runs/quickstart/model")
>>> pipeline.generate(labels=[3, 1, 4], temperature=0.9).save("digits")
>>> codes = pipeline.encode(load_images("my_digits", size=28, channels=1))

Each name is imported with its first use: `import zellige` alone takes milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zellige.shadowing import stand_aside

if TYPE_CHECKING:
    from codes.latents import LatentDataset as LatentDataset
    from codes.shards import CodeDataset as CodeDataset
    from codes.spec import Codes as Codes
    from codes.spec import CodeSpec as CodeSpec
    from common.errors import UserError as UserError
    from images.datasets import DataConfig as DataConfig
    from images.encoding import EncodeConfig as EncodeConfig
    from pipelines.codec.codec import Codec as Codec
    from pipelines.codec.lossless import LosslessCodec as LosslessCodec
    from pipelines.commands.assemble import AssembleConfig as AssembleConfig
    from pipelines.commands.assemble import assemble as assemble
    from pipelines.commands.encode import encode_images as encode_images
    from pipelines.generated import Generated as Generated
    from pipelines.generation.stream import write_stream as write_stream
    from pipelines.generation.stream import written_samples as written_samples
    from pipelines.image_input import load_images as load_images
    from pipelines.latents.models import load_latent_prior as load_latent_prior
    from pipelines.latents.models import load_vae as load_vae
    from pipelines.latents.pipeline import Drawn as Drawn
    from pipelines.latents.pipeline import LatentPipeline as LatentPipeline
    from pipelines.opening import from_pretrained as from_pretrained
    from pipelines.opening import write_model_card as write_model_card
    from pipelines.stages import load_autoencoder as load_autoencoder
    from pipelines.stages import load_prior as load_prior
    from pipelines.trainings import read_config as read_config
    from pipelines.trainings import train_sequence as train_sequence
    from pipelines.trainings import train_stage1 as train_stage1
    from pipelines.trainings import train_stage2 as train_stage2
    from pipelines.trainings import train_table as train_table
    from pipelines.trainings import train_vae as train_vae
    from pipelines.two_stage import TwoStagePipeline as TwoStagePipeline
    from stage1_vae.sequences.sequence_vae import SequenceVAE as SequenceVAE
    from stage1_vae.sequences.train import Stage1SequenceConfig as Stage1SequenceConfig
    from stage1_vae.tables.data import read_table as read_table
    from stage1_vae.tables.miwae import impute as impute
    from stage1_vae.tables.models import load_table_model as load_table_model
    from stage1_vae.tables.train import Stage1TableConfig as Stage1TableConfig
    from stage1_vae.train import Stage1VAEConfig as Stage1VAEConfig
    from stage1_vq.train import Stage1Config as Stage1Config
    from stage2_prior.sampling import SamplingConfig as SamplingConfig
    from stage2_prior.train import Stage2Config as Stage2Config
    from stage2_prior.train_latents import Stage2LatentConfig as Stage2LatentConfig
    from training.config import TrainConfig as TrainConfig
    from training.loop import FitResult as FitResult

MODULES = {
    "TwoStagePipeline": "pipelines.two_stage",
    "LatentPipeline": "pipelines.latents.pipeline",
    "from_pretrained": "pipelines.opening",
    "Generated": "pipelines.generated",
    "Drawn": "pipelines.latents.pipeline",
    "SamplingConfig": "stage2_prior.sampling",
    "Codec": "pipelines.codec.codec",
    "LosslessCodec": "pipelines.codec.lossless",
    "write_stream": "pipelines.generation.stream",
    "written_samples": "pipelines.generation.stream",
    "load_images": "pipelines.image_input",
    "load_autoencoder": "pipelines.stages",
    "load_prior": "pipelines.stages",
    "load_vae": "pipelines.latents.models",
    "load_table_model": "stage1_vae.tables.models",
    "read_table": "stage1_vae.tables.data",
    "impute": "stage1_vae.tables.miwae",
    "load_latent_prior": "pipelines.latents.models",
    "write_model_card": "pipelines.opening",
    "read_config": "pipelines.trainings",
    "train_stage1": "pipelines.trainings",
    "train_vae": "pipelines.trainings",
    "train_table": "pipelines.trainings",
    "train_sequence": "pipelines.trainings",
    "SequenceVAE": "stage1_vae.sequences.sequence_vae",
    "Stage1SequenceConfig": "stage1_vae.sequences.train",
    "encode_images": "pipelines.commands.encode",
    "train_stage2": "pipelines.trainings",
    "assemble": "pipelines.commands.assemble",
    "Stage1Config": "stage1_vq.train",
    "Stage1VAEConfig": "stage1_vae.train",
    "Stage1TableConfig": "stage1_vae.tables.train",
    "EncodeConfig": "images.encoding",
    "Stage2Config": "stage2_prior.train",
    "Stage2LatentConfig": "stage2_prior.train_latents",
    "AssembleConfig": "pipelines.commands.assemble",
    "DataConfig": "images.datasets",
    "TrainConfig": "training.config",
    "FitResult": "training.loop",
    "CodeDataset": "codes.shards",
    "LatentDataset": "codes.latents",
    "CodeSpec": "codes.spec",
    "Codes": "codes.spec",
    "UserError": "common.errors",
}

__all__ = [*MODULES, "__version__"]

stood_aside = stand_aside()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("zellige")
    if name not in MODULES:
        raise AttributeError(f"module 'zellige' has no attribute {name!r}; it has {', '.join(__all__)}")
    module = f"zellige.{MODULES[name]}" if stood_aside else MODULES[name]
    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
