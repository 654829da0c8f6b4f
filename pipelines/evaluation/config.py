"""What `zellige evaluate` can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from common.errors import UserError
from pipelines.evaluation.images import EvaluateDataConfig
from pipelines.sampling_options import SamplingOptions
from stage1_vae.binarise import Binarisation
from stage2_prior.sampling_config import SamplingConfig

OF_DECODERS = ("precision", "decoder_precision")  # of samples, and of reconstructions by a model of codes
OF_TEST_IMAGES = ("codes", "draws", "lpips", "unrounded", "pictures")  # options


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SamplingOptions):
    """Figures of a model on test images, and of samples against a reference, with the protocol they are part of."""

    model: str | None = None  # assembled model, stage one alone, a VAE, or a hub id; left out: --made alone is judged
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    against: str | None = None  # evaluation.json of an earlier run: its protocol is repeated, its figures are compared
    codes: str | None = None  # code shards that the prior was trained on: what their frequencies alone would need
    given: str | None = None  # of a model of given codes: code shards of the test images' other pictures
    given_split: Literal["train", "validation"] = "validation"  # which images of that folder
    num: int | None = None  # so many of the test images, evenly spread; left out: all
    features: str | None = None  # whose distances are taken: inception, timm:MODEL, or MODULE:FUNCTION; else none
    features_weights: str | None = None  # file with the weights of these; left out: those that are on this machine
    download: bool = False  # fetch weights that are not on this machine, once
    unrounded: bool = False  # the same distance of reconstructions that are not rounded to 8 bits, as files are
    lpips: bool = False  # perceptual distance of reconstructions, by VGG16
    lpips_weights: str | None = None  # torchvision's file of VGG16; left out: the one that is on this machine
    samples: int | None = None  # so many images that the model draws are held against a reference
    made: str | None = None  # instead of samples: folder, .npz file, tars or address of images that are made
    reference: str | None = None  # its images, or an .npz file with their mu and sigma; left out: the test images
    reference_split: Literal["train", "test"] = "train"  # of an .npz file or a named set
    reference_cache: str | None = None  # folder where features of references are kept; left out: in ~/.cache/zellige
    pixels: Literal["mean", "mode", "sample"] | None = None  # of a VAE's samples: what is shown; left out: the mean
    judge: str | None = None  # timm:MODEL or MODULE:FUNCTION: a classifier that says whether samples have their class
    judge_weights: str | None = None  # file with the weights of timm's model; left out: timm downloads them
    batch_size: int = 64  # images at a time
    out: str | None = None  # JSON file for figures and protocol; left out: they are only printed
    draws: int | None = None  # of a VAE: of the latents of each image, for its log p; left out: 100
    seed: int = 0  # of samples, and of a VAE's draws
    binarised: Binarisation | None = None  # of a VAE: how images are made black and white; left out: as in its training
    pictures: str | None = None  # of a VAE: folder for samples, reconstructions, latent walks; left out: none are made
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        for name in ("num", "batch_size", "draws"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value}, expected at least 1")
        if self.samples is not None and self.samples < 2:
            raise UserError(f"samples={self.samples}, expected at least 2; 10000 or more to compare models")
        if self.samples is not None and self.made is not None:
            raise UserError(
                f"samples={self.samples} and made={self.made}, expected one of them: which are to be judged?"
            )
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed={self.seed}, expected 0 to {2**64 - 1}")

    @property
    def judges_made_images(self) -> bool:
        return self.samples is not None or self.made is not None

    def check_needed(self) -> None:
        """Raises UserError for options that are missing, and for those that change nothing beside the others."""
        tests = self.model is not None and self.data.path is not None
        needs = [
            *(
                (name, tests, "a model and test images")
                for name in ("codes", "draws", "lpips", "unrounded", "pictures")
            ),
            ("features_weights", self.features is not None, "features, whose weights they are"),
            ("unrounded", self.features is not None, "features, whose distances are taken"),
            ("lpips_weights", self.lpips, "lpips=true"),
            ("judge_weights", self.judge is not None, "a judge, whose weights they are"),
            ("judge", self.judges_made_images, "samples or made, which it judges"),
            ("reference", self.judges_made_images, "samples or made, which are held against it"),
            ("reference_split", self.reference is not None, "reference, whose part it is"),
            ("reference_cache", self.judges_made_images, "samples or made, which are held against a reference"),
            ("pixels", self.samples is not None, "samples of a VAE"),
            ("download", self.features is not None or self.lpips, "features or lpips, whose weights are fetched"),
            *(
                (field.name, self.samples is not None, "samples, which it is about")
                for field in fields(SamplingConfig)
                if field.name not in OF_DECODERS
            ),
            *(
                (name, self.samples is not None or tests, "samples or test images, which are decoded")
                for name in OF_DECODERS
            ),
        ]
        for name, there, what in needs:
            if not there and (value := getattr(self, name)) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"{name}={value} without {what}; give both, or leave {name} out")
        if self.model is None and self.made is None:
            raise UserError(
                "model is left out, expected one, or images by --made: name a model, a run, or a model folder"
            )
        if self.data.path is None and not (self.judges_made_images and self.reference is not None):
            raise UserError("data.path is left out, expected images: a folder, an .npz file, or a name such as cifar10")
        if self.judges_made_images and self.features is None:
            raise UserError(
                "made images are judged by their features, and none are named: give --features inception, or "
                "timm:MODEL or MODULE:FUNCTION where its weights cannot be had"
            )

    def check_not_asked(self, names: Sequence[str], what: str) -> None:
        """Raises UserError for options that a model of this kind does not know."""
        for known in fields(self):
            value = getattr(self, known.name)
            if known.name in names and value != known.default:
                whose = what if self.model is None else f"{self.model}, {what}"
                raise UserError(f"{known.name}={value}, expected it left out for {whose}")
