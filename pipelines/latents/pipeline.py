"""A likelihood VAE as a generator: a prior draws latents, the decoder turns them into images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Self, Unpack, get_args

import torch
from PIL import Image
from torch import Tensor

from common.computing import check_device, computing_in
from common.errors import UserError
from common.files import atomic_folder, check_replaceable
from common.model_io import PretrainedModel, check_type, weight_types
from common.precision import Precision
from common.processes import usable_device
from common.short_repr import weights_of
from common.wording import an, either
from pipelines.any_size import check_range
from pipelines.generated import images_in_words, save_numbered, sheet_png
from pipelines.image_input import Picture, Pictures, as_images, stacked
from pipelines.latents.models import KIND, check_fit, load_latent_prior, load_vae
from pipelines.model_card import SAMPLES, CardTraits, PushOptions, push
from pipelines.model_folders import INDEX_NAME, any_model_folder
from pipelines.pictures import to_pil
from pipelines.prior_requests import Labels, check_labels, labels_of, part_of, to_slice
from pipelines.stages import note_cast
from pipelines.streaming import gathered, made_in_batches
from stage1_vae.decoders import FactorisedDecoder
from stage1_vae.decoders.base import Decoder
from stage1_vae.evaluation import mixed
from stage1_vae.hierarchies.base import HierarchicalVAE
from stage1_vae.labels.base import LabelledVAE
from stage1_vae.model import LikelihoodVAE, Pixels
from stage1_vae.pictures import analogies
from stage1_vae.vae import VAE
from stage2_prior.latents import LatentPriorModel


class Drawn(NamedTuple):
    images: Tensor  # n c H W, float32 in [-1, 1]
    latents: Tensor  # n *shape

    def __repr__(self) -> str:
        return f"Drawn({images_in_words(self.images)}, {'x'.join(map(str, self.latents.shape[1:]))} latents)"

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the first images."""
        return sheet_png(self.images)

    def pil(self) -> list[Image.Image]:
        """The images as PIL pictures, of mode "L" or "RGB"."""
        return [to_pil(image) for image in self.images]

    def save(self, folder: str | Path, *, first_index: int = 0) -> list[Path]:
        """Writes PNG files as `pipelines.generated.Generated.save` does. Raises UserError."""
        return save_numbered(self.pil(), folder, first_index)


class LatentPipeline:
    """A VAE and what its latents are drawn from.

    >>> pipeline = LatentPipeline.from_pretrained("runs/mnist_vae")
    >>> images = pipeline.generate(16, seed=3).images  # 16 1 28 28, in [-1, 1]

    Where a method takes images it takes tensors b c H W or c H W in [-1, 1] (or uint8), PIL pictures, paths, or a
    sequence of them (pipelines/image_input.py), of the size and channels of the model.
    """

    def __init__(self, vae: LikelihoodVAE, prior: LatentPriorModel | None = None) -> None:
        """prior: learned over the latents of exactly this VAE; None: the one that it was trained with. Raises UserError
        for a prior of another one."""
        if prior is not None:
            check_fit(vae, prior.eval())
        self.vae, self.prior = vae.eval(), prior
        self.compared = vae, weight_types(vae)  # what a learned prior was found to fit
        self.source: Path | None = None  # folder that it was opened from

    def __repr__(self) -> str:
        models = (self.vae,) if self.prior is None else (self.vae, self.prior)
        kinds = " + ".join(model.kind for model in models)
        return f"LatentPipeline({', '.join([kinds, self.vae.family(), *self.vae.traits(), weights_of(*models)])})"

    @property
    def num_classes(self) -> int:
        """Which it draws as asked; 0 for a VAE that knows none, and where a learned prior draws the latents."""
        return self.vae.num_classes if isinstance(self.vae, LabelledVAE) and self.prior is None else 0

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.vae.class_names if isinstance(self.vae, LabelledVAE) else None

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return next(self.vae.parameters()).dtype

    def to(self, device: torch.device | str | torch.dtype) -> Self:
        """Moves the models to a device, or casts the networks of the VAE to a type such as torch.bfloat16: that changes
        the last bits of pixels. Images, posteriors, priors and the latents that they draw stay float32. Raises
        UserError for a type where pixels are told one after another: a last bit would change all that follow."""
        if isinstance(device, torch.dtype):
            if not isinstance(self.vae, VAE):
                raise UserError(
                    f"dtype={device} for a model of kind {self.vae.kind}, expected none: only one of kind vae can be "
                    "cast; leave it out"
                )
            if not isinstance(self.vae.decoder, FactorisedDecoder):
                raise UserError(
                    f"dtype={device} for a VAE with a decoder {self.vae.config.decoder.kind}, expected none: its "
                    "pixels go by those before them, to the last bit; leave it out"
                )
            self.vae.encoder.to(device)
            self.vae.decoder.network.to(device)
            return self
        self.vae.to(device)
        if self.prior is not None:
            self.prior.to(device)
        return self

    def generate(
        self,
        num: int,
        *,
        labels: Labels = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 64,
        pixels: Pixels = "mean",
        temperature: float | Sequence[float] = 1.0,
        precision: Precision | None = None,
        progress: bool = True,
    ) -> Drawn:
        """New images: samples first_index, first_index + 1, ... of `seed`.

        labels: of a VAE that knows classes, one by number or name for all images, or one for each; left out, all
        classes in turn. temperature: of a hierarchy, of all groups or of each, the top one first: what their standard
        deviations are multiplied by. precision: what the networks compute in that turn latents into images, None: as
        their weights are. Sample i of seed s has the same latents whatever the batch size; its pixels, and the latents
        of a hierarchy, agree to rounding. progress: whether a terminal shows a bar where it takes longer than a second.
        What is made is on the CPU, at the end of each batch. Raises UserError.
        """
        batches = self.stream(
            num,
            labels=labels,
            seed=seed,
            first_index=first_index,
            batch_size=batch_size,
            pixels=pixels,
            temperature=temperature,
            precision=precision,
            progress=progress,
        )
        return Drawn(*gathered(batches, num))

    def stream(
        self,
        num: int,
        *,
        labels: Labels = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 64,
        pixels: Pixels = "mean",
        temperature: float | Sequence[float] = 1.0,
        precision: Precision | None = None,
        progress: bool = True,
    ) -> Iterator[Drawn]:
        """The images of `generate`, batch after batch, each made when it is asked for, on the pipeline's device: any
        number of them in the memory of one batch. Arguments and errors: those of `generate`; labels are not copied, but
        read with their batch. What is not asked for any more is not made."""
        if pixels not in get_args(Pixels):
            raise UserError(f"got pixels={pixels!r}, expected {either(get_args(Pixels))}")
        indices, labels = range(first_index, first_index + num), to_slice(labels)
        check_labels(self, indices, labels)
        self.check_temperature(temperature)
        self.check_precision(precision)

        def make(some: slice) -> Drawn:
            chosen = labels_of(self, indices[some], part_of(labels, some))
            return self.sample(indices[some], seed, pixels, chosen, temperature, precision)

        return made_in_batches(num, batch_size, make, progress)

    @torch.no_grad()
    def sample(
        self,
        indices: Sequence[int],
        seed: int | Sequence[int],
        pixels: Pixels = "mean",
        labels: Sequence[int] | None = None,
        temperature: float | Sequence[float] = 1.0,
        precision: Precision | None = None,
    ) -> Drawn:
        """Samples `indices` of `seed`, one for all or one for each, as one batch. labels: of a VAE that knows
        classes, one for each; left out, all in turn."""
        self.check_precision(precision)
        chosen = labels_of(self, indices, labels)
        seeds = seed if isinstance(seed, Sequence) else [seed] * len(indices)
        generators = [self.generator(own, index) for own, index in zip(seeds, indices, strict=True)]
        if self.prior is None and isinstance(self.vae, HierarchicalVAE):
            noise = [torch.randn(1, *self.vae.shape, device=self.device, generator=one) for one in generators]
            with computing_in(precision, self.device):
                latents, outputs = self.vae.draw(torch.cat(noise), temperatures=temperature)
            if pixels != "sample":
                return Drawn(in_range(self.vae.shown(outputs, pixels).float(), precision), latents)
            streams = [self.generator(own, index, stream=1) for own, index in zip(seeds, indices, strict=True)]
            shown = [self.vae.shown(one[None], "sample", own) for one, own in zip(outputs, streams, strict=True)]
            return Drawn(in_range(torch.cat(shown), precision), latents)
        latents = torch.cat(
            [self.draw_latents(one, None if chosen is None else chosen[i]) for i, one in enumerate(generators)]
        )
        if pixels != "sample":
            return Drawn(self.decode(latents, pixels, precision), latents)
        with computing_in(precision, self.device):
            images = [
                self.vae.pixels(latents[i : i + 1], "sample", self.generator(seeds[i], index, stream=1))
                for i, index in enumerate(indices)
            ]
        return Drawn(in_range(torch.cat(images), precision), latents)

    def draw_latents(self, generator: torch.Generator, label: int | None) -> Tensor:
        """1 *shape; label: of a VAE that knows classes."""
        if self.prior is not None:
            return self.prior.sample(1, generator)
        if isinstance(self.vae, LabelledVAE):
            labels = None if label is None else torch.tensor([label], device=self.device)
            return self.vae.draw_latents(1, generator, labels=labels)
        return self.vae.draw_latents(1, generator)

    def check_temperature(self, temperature: float | Sequence[float]) -> None:
        """Raises UserError for one that the model does not draw at."""
        if self.prior is None and isinstance(self.vae, HierarchicalVAE):
            self.vae.temperatures(temperature)
        elif temperature != 1:
            raise UserError(
                f"temperature={temperature}, expected it left out: the model is a VAE without a hierarchy of latents, "
                "or with a prior learned over them, which draws without it"
            )

    def check_precision(self, precision: Precision | None) -> None:
        """Raises UserError for one that the device does not have, and for a VAE that tells pixels one after another."""
        check_device(self.device, precision)
        in_turn = [
            one for one in self.vae.modules() if isinstance(one, Decoder) and not isinstance(one, FactorisedDecoder)
        ]
        if precision is not None and in_turn:
            raise UserError(
                f"precision={precision} for a VAE with a decoder {self.vae.config.decoder.kind}, expected none: its "
                "pixels go by those before them, to the last bit; leave it out"
            )

    @torch.no_grad()
    def vary(
        self,
        image: Picture,
        groups: Collection[int],
        variants: int,
        *,
        seed: int = 0,
        first_index: int = 0,
        pixels: Pixels = "mean",
        temperature: float | Sequence[float] = 1.0,
        precision: Precision | None = None,
    ) -> Drawn:
        """An image of which a hierarchy draws `groups` anew, 0 the top one, in so many variants; the others keep what
        they have, one draw of the image's posterior for all variants. Raises UserError."""
        if variants < 1:
            raise UserError(f"got variants={variants}, expected at least 1")
        vae, asked = self.vae, f"groups={sorted(groups)}"
        if not isinstance(vae, HierarchicalVAE):
            raise UserError(f"{asked}, expected a hierarchy of latents: this VAE has one group of them")
        count = len(vae.group_shapes)
        if not groups or not all(0 <= group < count for group in groups):
            raise UserError(f"{asked}, expected at least one, from 0, the top one, to {count - 1}")
        noise = torch.randn(1, *vae.shape, device=self.device, generator=self.generator(seed, first_index, stream=2))
        kept = vae.posterior_latents(self.images([image]), noise)
        known = [None if place in groups else one.expand(variants, *one.shape[1:]) for place, one in enumerate(kept)]
        indices = range(first_index, first_index + variants)
        drawn = [
            torch.randn(1, *vae.shape, device=self.device, generator=self.generator(seed, index)) for index in indices
        ]
        with computing_in(precision, self.device):
            latents, outputs = vae.draw(torch.cat(drawn), temperatures=temperature, known=known)
        streams = [self.generator(seed, index, stream=1) for index in indices]
        shown = [vae.shown(one[None], pixels, own) for one, own in zip(outputs, streams, strict=True)]
        return Drawn(in_range(torch.cat(shown).float(), precision), latents)

    def generator(self, seed: int, index: int, stream: int = 0) -> torch.Generator:
        """Of the random numbers of one sample."""
        return torch.Generator(self.device).manual_seed(mixed(seed, index, stream))

    def images(self, pictures: Pictures) -> Tensor:
        """b c H W, float in [-1, 1], of tensors, PIL pictures or paths of one size. Raises UserError."""
        return stacked(as_images(pictures, self.vae.config.channels)).to(self.device)

    @torch.no_grad()
    def encode(self, images: Pictures) -> Tensor:
        """The means of the posteriors, b *shape."""
        return self.vae.encode(self.images(images))

    @torch.no_grad()
    def decode(self, latents: Tensor, pixels: Pixels = "mean", precision: Precision | None = None) -> Tensor:
        """n *shape -> n c H W, float32 in [-1, 1]. precision: of the decoder; None: as its weights are. Raises
        UserError for latents of another shape, and as `generate` does."""
        self.check_precision(precision)
        if latents.shape[1:] != self.vae.shape:
            raise UserError(
                f"got latents of shape {tuple(latents.shape)}, expected {('n', *self.vae.shape)}, as encode gives them"
            )
        with computing_in(precision, self.device):
            images = self.vae.pixels(latents.to(self.device), pixels).float()
        return in_range(images, precision)

    def reconstruct(self, images: Pictures, precision: Precision | None = None) -> Tensor:
        """Images as the means of their posteriors tell them, the same shape. precision: of the decoder; what finds the
        latents is as ever."""
        return self.decode(self.encode(images), precision=precision)

    @torch.no_grad()
    def interpolate(self, first: Picture, second: Picture, steps: int) -> Drawn:
        """`steps` images on the way from one image to another, both included, along a great circle between the latents
        where the prior is N(0, I), whose draws lie near a sphere (White 2016, arXiv:1609.04468). Of a hierarchy each
        group goes along an arc of its own, in the noise that its prior, given the groups above on their ways, turns
        into latents. Raises UserError."""
        if steps < 2:
            raise UserError(f"got steps={steps}, expected at least 2: the first image and the second")
        ends = self.vae.as_noise(torch.cat([self.encode([first]), self.encode([second])]))
        start, end = (noise.flatten().split(self.vae.sizes) for noise in ends)
        between = [
            torch.cat([on_the_way(*group, float(share)) for group in zip(start, end, strict=True)])
            for share in torch.linspace(0, 1, steps)
        ]
        latents = self.vae.from_noise(torch.stack(between).unflatten(1, ends.shape[1:]))
        return Drawn(self.decode(latents), latents)

    @torch.no_grad()
    def analogies(self, images: Pictures) -> Tensor:
        """The style of each image in every class: b K c H W in [-1, 1]. Raises UserError for a VAE without classes."""
        if not isinstance(self.vae, LabelledVAE):
            raise UserError(f"{an(self.vae.kind)} knows no classes, expected one that does, such as an m2")
        return analogies(self.vae, self.images(images))

    def fingerprint(self) -> str:
        """SHA-256 of the models: equal where the same settings give the same samples."""
        parts = [self.vae.fingerprint()]
        if self.prior is not None:
            parts.append(self.prior.fingerprint())
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes an assembled model (model_index.json, stage1/, and stage2/ where the prior is not the VAE's own)
        atomically and returns its path. Raises UserError rather than replace anything else."""
        folder = Path(folder)
        check_replaceable(folder, INDEX_NAME)
        if self.prior is not None:
            note_cast(self.prior, self.vae, self.compared)
            check_fit(self.vae, self.prior)
        index = {"kind": KIND, "zellige_version": version("zellige"), "fingerprint": self.fingerprint()}
        with atomic_folder(folder) as temporary:
            self.vae.save_pretrained(temporary / "stage1")
            if self.prior is not None:
                self.prior.save_pretrained(temporary / "stage2")
            (temporary / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Self:
        """The pipeline of a local folder or a Hugging Face hub id, on a device.

        dtype: a floating type that the networks are cast to (`to`); left out, that which they were saved in. revision:
        a branch, tag or commit of the hub. Raises UserError.
        """
        check_type(dtype)
        folder = any_model_folder(folder_or_hub_id, revision)
        learned = load_latent_prior(folder) if (folder / "stage2").is_dir() else None
        pipeline = cls(load_vae(folder), learned).to(usable_device(device))
        pipeline.source = folder
        return pipeline if dtype is None else pipeline.to(dtype)

    def push_to_hub(self, hub_id: str, **options: Unpack[PushOptions]) -> str:
        """Uploads the pipeline with a model card, and returns its address: as `TwoStagePipeline.push_to_hub`."""
        return push(self, hub_id, options)

    def parts(self) -> dict[str, PretrainedModel]:
        """Its models by what they are called."""
        learned: dict[str, PretrainedModel] = {} if self.prior is None else {"prior": self.prior}
        return {"VAE": self.vae, **learned}

    def card_traits(self) -> CardTraits:
        """What a model card says of it."""
        learned = "" if self.prior is None else f", and {an(self.prior.kind)} prior learned over its latents"
        return CardTraits(
            what=f"A variational autoencoder of images: {self.vae.family()}{learned}.",
            task="unconditional-image-generation",
            class_names=(self.class_names or ()) if self.num_classes else (),
            settings={},
            samples=lambda: self.generate(SAMPLES).pil(),
        )


def in_range(images: Tensor, precision: Precision | None) -> Tensor:
    """The images. Raises UserError where float16 has no numbers for them."""
    if precision == "fp16":
        check_range(images)
    return images


def on_the_way(start: Tensor, end: Tensor, share: float) -> Tensor:
    """The point at `share`, from 0 to 1, of an arc from one point to another, whose distance from the origin changes
    evenly; of points in one direction, or in opposite ones, that of a straight line."""
    size, other = start.norm(), end.norm()
    cosine = float((start * end).sum() / (size * other).clamp(min=1e-12))
    if not min(float(size), float(other)) > 0 or abs(cosine) > 0.9999:
        return start + share * (end - start)
    angle = torch.acos(torch.tensor(cosine, dtype=torch.float64))
    first, second = (torch.sin(angle * part) / torch.sin(angle) for part in (1 - share, share))
    direction = first.float() * start / size + second.float() * end / other
    return direction * (size + share * (other - size))
