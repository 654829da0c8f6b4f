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
    from codes.shards import CodeDataset as CodeDataset
    from codes.spec import Codes as Codes
    from codes.spec import CodeSpec as CodeSpec
    from common.errors import UserError as UserError
    from pipelines.codec.codec import Codec as Codec
    from pipelines.codec.lossless import LosslessCodec as LosslessCodec
    from pipelines.generated import Generated as Generated
    from pipelines.image_input import load_images as load_images
    from pipelines.stages import load_autoencoder as load_autoencoder
    from pipelines.stages import load_prior as load_prior
    from pipelines.two_stage import TwoStagePipeline as TwoStagePipeline
    from stage2_prior.sampling import SamplingConfig as SamplingConfig

MODULES = {
    "TwoStagePipeline": "pipelines.two_stage",
    "Generated": "pipelines.generated",
    "SamplingConfig": "stage2_prior.sampling",
    "Codec": "pipelines.codec.codec",
    "LosslessCodec": "pipelines.codec.lossless",
    "load_images": "pipelines.image_input",
    "load_autoencoder": "pipelines.stages",
    "load_prior": "pipelines.stages",
    "CodeDataset": "codes.shards",
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
