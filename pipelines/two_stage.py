"""Both stages as one generator: the prior chooses the tiles, the autoencoder lays them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor

from codes.spec import Codes
from common.computing import check_device
from common.errors import UserError
from common.model_io import PretrainedModel, check_type, weight_types
from common.precision import Precision
from common.processes import usable_device
from common.short_repr import weights_of
from common.wording import an
from pipelines.any_size import decoded, encode_any_size, in_one_layout, reconstruct
from pipelines.captions import CaptionEncoder, DecoderCaptions
from pipelines.codec.codec import Codec
from pipelines.codec.tables import CodeTables
from pipelines.encoded_prompts import EncodedPrompts
from pipelines.generated import Generated, together
from pipelines.image_input import Picture, Pictures, as_images, stacked
from pipelines.known_codes import codes_but_a_share, codes_of_kept_pixels
from pipelines.masks import Mask, mask_of, pasted
from pipelines.model_card import SAMPLES, CardTraits, PushOptions, push
from pipelines.model_folders import pipeline_folder
from pipelines.prior_requests import Labels, Requested, condition_of, labels_of, number_asked, prompts_of, with_settings
from pipelines.redrawing import check_size, codes_between, labels_of_redrawn, random_order
from pipelines.stages import check_fit, note_cast
from pipelines.streaming import made_in_batches
from pipelines.two_stage_card import traits_of_stages
from pipelines.two_stage_folder import TwoStageParts, read_two_stage, write_two_stage
from stage1_vq.autoencoders import Autoencoder
from stage2_prior.condition import Condition
from stage2_prior.cuda_graph import RecordedDraw, check_recordable
from stage2_prior.drawing import Seed
from stage2_prior.priors import Prior
from stage2_prior.sampling import Complete, SamplingConfig, draw_in_order, sample_codes
from stage2_prior.sliding_window import sample_larger_codes
from stage2_prior.text_encoder import TextEncoder


class TwoStagePipeline:
    """An autoencoder and a prior over its codes, with the sampling settings that suit them.

    >>> pipeline = TwoStagePipeline.from_pretrained("runs/quickstart/model")
    >>> images = pipeline.generate(labels=[3, 1, 4]).images  # 3 1 28 28, in [-1, 1]
    >>> pipeline.generate(8, labels="7", temperature=0.9, top_k=50).save("sevens")

    Where a method takes images it takes tensors b c H W or c H W in [-1, 1] (or uint8), PIL pictures, paths, or a
    sequence of them (pipelines/image_input.py).
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        prior: Prior,
        sampling: SamplingConfig | None = None,
        tables: CodeTables | None = None,
    ) -> None:
        """tables: how often each code occurs, for `compress`. Raises UserError unless the prior models the codes of
        exactly this autoencoder, and the tables are of such codes."""
        check_fit(autoencoder, prior)
        if tables is not None:
            tables.check_fit(prior.code_spec)
        self.autoencoder = autoencoder.eval()
        self.prior = prior.eval()
        self.compared = autoencoder, weight_types(autoencoder)  # what the prior was found to fit
        self.sampling = sampling or SamplingConfig()
        self.tables = tables
        self.recorded: RecordedDraw | None = None
        self.prompts = EncodedPrompts()
        self.captions = DecoderCaptions(autoencoder)
        self.source: Path | None = None  # folder that it was opened from

    def __repr__(self) -> str:
        traits = [*self.prior.traits(), weights_of(self.autoencoder, self.prior)]
        return f"TwoStagePipeline({self.autoencoder.kind} + {self.prior.kind}, {', '.join(traits)})"

    @property
    def num_classes(self) -> int:
        """0 for a prior without classes."""
        return self.prior.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.prior.class_names

    @property
    def device(self) -> torch.device:
        return next(self.prior.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the prior computes in."""
        return next(self.prior.parameters()).dtype

    def to(self, device: torch.device | str | torch.dtype) -> Self:
        """Moves both models to a device, or casts them to a type such as torch.bfloat16, which changes some codes and
        the last bits of pixels; images stay float32, and so does what decides codes, a quantizer."""
        self.autoencoder.to(device)
        self.prior.to(device)
        if self.device.type != "cuda":
            self.recorded = None
        return self

    def use_cuda_graph(self) -> Self:
        """From now on `generate` and `sample` take all steps of a batch as one CUDA graph, recorded at the first batch
        of its kind: the same codes, without Python between the steps. Raises UserError on another device, and for a
        prior that fills in its codes in a few large steps."""
        check_recordable(self.prior, self.device)
        self.recorded = RecordedDraw(draw_in_order)
        return self

    def generate(
        self,
        num: int | None = None,
        *,
        labels: Labels = None,
        prompts: str | Sequence[str] | None = None,
        given: Codes | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 64,
        sampling: SamplingConfig | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> Generated:
        """New images: samples first_index, first_index + 1, ... of `seed`.

        Sample i of seed s has the same codes whatever the batch size; its pixels agree to rounding. `labels`
        is one class, by number or name, for all `num` images, or one for each (then `num` may be left out); without it
        the classes of a class-conditional prior take turns: sample i shows class i mod num_classes. `prompts` is one
        text for all images or one for each; without it a prior of captions draws anything. `given`: the codes that a
        prior of given codes goes by, one num h w for each of their grids. `size`, (H, W): larger than the training
        size, by a sliding window (stage2_prior/sliding_window.py). `sampling` replaces the pipeline's own settings, and
        single ones are given by their names, `temperature=0.9, top_k=50` (stage2_prior.sampling.SamplingConfig).
        progress: whether a terminal shows a bar where it takes longer than a second. What is made is on the CPU, at
        the end of each batch. Raises UserError for labels, prompts or given codes that are not the prior's.
        """
        num = number_asked(labels, prompts) if num is None else num
        batches = self.stream(
            num,
            labels=labels,
            prompts=prompts,
            given=given,
            size=size,
            seed=seed,
            first_index=first_index,
            batch_size=batch_size,
            sampling=sampling,
            progress=progress,
            **settings,
        )
        return together(batches, num)

    def stream(
        self,
        num: int,
        *,
        labels: Labels = None,
        prompts: str | Sequence[str] | None = None,
        given: Codes | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 64,
        sampling: SamplingConfig | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> Iterator[Generated]:
        """The images of `generate`, batch after batch, each made when it is asked for, on the pipeline's device: any
        number of them in the memory of one batch. Arguments and errors: those of `generate`; labels and prompts are not
        copied, but read with their batch. What is not asked for any more is not made."""
        sampling = with_settings(sampling or self.sampling, settings)
        check_device(self.device, sampling.precision, sampling.decoding)
        asked = Requested.of_images(self.prior, first_index, num, labels, prompts, given)

        def make(some: slice) -> Generated:
            indices, chosen, texts, others = asked.part(some)
            codes = self.sample(indices, chosen, seed, sampling, prompts=texts, given=others, size=size)
            images = self.decode(codes, precision=sampling.decoding, prompts=texts)
            return Generated(images, codes, None if chosen is None else torch.tensor(chosen))

        return made_in_batches(num, batch_size, make, progress)

    def sample(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None,
        seed: Seed,
        sampling: SamplingConfig | None = None,
        *,
        prompts: Sequence[str] | None = None,
        given: Codes | None = None,
        size: tuple[int, int] | None = None,
        tell_passes: Callable[[list[int]], object] | None = None,
    ) -> Codes:
        """Codes of samples `indices` of `seed`, one for all or one for each, as one batch: one b h w per grid;
        labels: b, None without classes; prompts: b, None for a prior without text; given, size: as for `generate`;
        tell_passes: as for `stage2_prior.sampling.sample_codes`."""
        condition, sampling = self.condition(labels, prompts, given), sampling or self.sampling
        if size is None:
            return sample_codes(
                self.prior, indices, condition, seed, sampling, recorded=self.recorded, tell_passes=tell_passes
            )
        spec = self.autoencoder.code_spec(*size)
        return sample_larger_codes(self.prior, spec, indices, condition, seed, sampling)

    def condition(
        self, labels: Sequence[int] | None, prompts: Sequence[str] | None = None, given: Codes | None = None
    ) -> Condition:
        """What the prior goes by, on its device. Raises UserError where a prior of given codes is given none."""
        return condition_of(self.prior, labels, prompts, given, partial(self.prompts.of, self.prior))

    def load_text_encoder(self, source: str | None = None) -> TextEncoder | CaptionEncoder:
        """The encoder whose vectors the prior reads, or, where it reads none, the decoder, loaded once. source: its
        folder or hub id; left out: as the model records. Where both read vectors, `captions.load` loads the decoder's.
        Raises UserError where neither does, and for an encoder of other vectors."""
        if self.prior.embeddings is None and self.autoencoder.captions() is not None:
            return self.captions.load(source)
        return self.prompts.load(self.prior, source)

    def images(self, pictures: Pictures) -> Tensor:
        """b c H W, float in [-1, 1], of tensors, PIL pictures or paths of one size. Raises UserError."""
        return stacked(as_images(pictures, self.autoencoder.channels))

    def encode(self, images: Pictures) -> Codes:
        """Codes of images of any one size: b c H W in [-1, 1] -> one b h w per grid, on the pipeline's device.

        Sides off the stride are padded at the right and bottom by repeating the border: crop what is decoded.
        """
        return encode_any_size(self.autoencoder, self.images(images))

    def decode(
        self,
        codes: Codes,
        size: tuple[int, int] | None = None,
        precision: Precision | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Tensor:
        """Images of codes: one b h w per grid -> b c H W, float32 in [-1, 1]; size: (H, W) to crop to. precision: what
        the decoder computes in, None: as its weights are. prompts: b texts, for a decoder that reads captions (kind
        tatitok) beside the codes; others do without. Raises UserError."""
        images = decoded(self.autoencoder, codes, precision, self.captions.of(prompts))
        return images if size is None else images[..., : size[0], : size[1]]

    def reconstruct(self, images: Pictures, *, precision: Precision | None = None) -> Tensor:
        """Images as their codes tell them: b c H W in [-1, 1], any size -> the same shape. precision: of the decoder;
        what finds the codes is as ever."""
        return reconstruct(self.autoencoder, self.images(images), precision)

    def compress(self, images: Pictures, *, labels: Labels = None, **settings: Any) -> bytes:
        """The images, of any sizes, as one `.zlg` file (docs/compress.md). labels: the class that the prior is told, of
        all or of each, by number or name; settings: the mode of `Codec.compress`. What it could not do as asked
        is a warning."""
        pictures = as_images(images, self.autoencoder.channels)
        told = None if labels is None else labels_of(self.prior, range(len(pictures)), labels)
        data, notes = self.codec().compress(pictures, labels=told, **settings)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return data

    def decompress(self, file: bytes | Path, images: Sequence[int] | None = None, **limits: Any) -> list[Tensor]:
        """The images of a `.zlg` file, or of its bytes, c H W each: those that `decode` makes of what `encode` gave,
        bit for bit. Arguments and errors: those of `Codec.decompress`."""
        return self.codec().decompress(file, images, **limits)

    def codec(self) -> Codec:
        """For many files: it computes the fingerprints of the models, which takes a while, only once."""
        return Codec(self.autoencoder, self.prior, self.tables)

    def inpaint(self, images: Pictures, keep: Mask, *, paste: bool = True, **settings: Any) -> Generated:
        """Images whose kept parts tell the prior how to go on: b c H W in [-1, 1], of the size the model makes; keep:
        `b H W` or `H W`, bool, True for a pixel that stays, or a picture that is white there. Codes of places that are
        kept whole stay, or, where they mean something only after coarser ones that were drawn, are those that an
        encoder finds after these. The others are drawn. settings: as for `redraw`.

        paste: kept pixels are those of the images, exactly, and the border fades out inside what is drawn
        (`masks.pasted`); without it every pixel is decoded from the codes. Raises UserError for a mask of another size,
        and for one that keeps nothing or everything.

        A prior that walks the codes in an order sees, at each place, only what stands before it: what is kept below
        and right of a hole does not shape what fills it. A masked prior (maskgit, diffusion) sees all of it.
        """
        if not self.autoencoder.codes_have_places:
            raise UserError(
                f"{an(self.autoencoder.kind)} model has no codes of places, so none to keep outside a hole; take an "
                "autoencoder whose codes are a grid, or `vary`, which draws some of all codes anew"
            )
        whole = self.whole_images(images)
        mask = mask_of(keep, len(whole), *whole.shape[2:])
        complete = self.completing(whole)
        made = self.redraw(codes_of_kept_pixels(complete(()), mask), complete=complete, **settings)
        if not paste:
            return made
        reach = self.autoencoder.stride
        return made._replace(images=pasted(made.images, whole.to(made.images), mask.to(self.device), reach))

    def vary(
        self, images: Pictures, share: float, *, seed: int = 0, first_index: int = 0, **settings: Any
    ) -> Generated:
        """The images, b c H W in [-1, 1], with a random `share` of their codes drawn anew; those that stay as for
        `inpaint`, settings as for `redraw`."""
        complete = self.completing(self.whole_images(images))
        codes = complete(())
        known = codes_but_a_share(codes, share, random_order(codes, seed, first_index))
        return self.redraw(known, complete=complete, seed=seed, first_index=first_index, **settings)

    def interpolate(
        self, first: Picture, second: Picture, steps: int, *, redrawn: float = 0.0, seed: int = 0, **settings: Any
    ) -> Generated:
        """`steps` images on the way from one image to another, c H W each in [-1, 1], both included: place after place,
        in random order, takes the code of the second. redrawn: share of the places of each image between them whose
        code the prior draws instead, so that both mix. settings: as for `redraw`."""
        if steps < 2:
            raise UserError(f"got steps={steps}, expected at least 2: the first image and the second")
        of_first, of_second = (
            self.completing(self.whole_images([end]).expand(steps, -1, -1, -1)) for end in (first, second)
        )
        known, complete = codes_between(of_first, of_second, steps, redrawn, seed)
        return self.redraw(known, complete=complete, seed=seed, **settings)

    def redraw(
        self,
        known: Codes,
        *,
        complete: Complete | None = None,
        labels: Labels = None,
        prompts: str | Sequence[str] | None = None,
        given: Codes | None = None,
        seed: int = 0,
        first_index: int = 0,
        sampling: SamplingConfig | None = None,
        **settings: Any,
    ) -> Generated:
        """Images of codes that are partly known, one b h w per grid, -1 where the prior draws: samples first_index,
        first_index + 1, ... of `seed`. complete: as for `stage2_prior.sampling.sample_codes`, of the images that the
        known codes are of (`completing`); without it all of them stay as they are. labels, prompts, given, sampling,
        settings: as for `generate`, but without labels a prior of classes draws for any class, without guidance. Raises
        UserError for a prior that never saw the null label."""
        sampling = with_settings(sampling or self.sampling, settings)
        indices = range(first_index, first_index + len(known[0]))
        chosen, sampling = labels_of_redrawn(self.prior, indices, labels, prompts is not None, sampling)
        texts = prompts_of(self.prior, indices, prompts)
        condition = self.condition(chosen, texts, given)
        codes = sample_codes(self.prior, indices, condition, seed, sampling, known, complete=complete)
        images = self.decode(codes, precision=sampling.decoding, prompts=texts)
        return Generated(images, codes, None if chosen is None else torch.tensor(chosen))

    def whole_images(self, pictures: Pictures) -> Tensor:
        """`images`, of exactly the size the model makes. Raises UserError for another."""
        images = self.images(pictures)
        check_size(images, self.prior.code_spec)
        return images

    @torch.no_grad()
    def completing(self, images: Tensor) -> Complete:
        """`Autoencoder.completing` of images on its stride, on the pipeline's device and without gradients."""
        complete = self.autoencoder.completing(in_one_layout(images.to(self.device)))
        return torch.no_grad()(complete)

    def fingerprint(self) -> str:
        """SHA-256 of both models: equal where the same settings give the same samples."""
        both = f"{self.autoencoder.fingerprint()} {self.prior.fingerprint()}"
        return hashlib.sha256(both.encode()).hexdigest()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the pipeline folder (model_index.json, stage1/, stage2/, and tables.safetensors if it has tables)
        atomically and returns its path.

        Where the autoencoder was cast to another type since the pipeline was made, the prior goes with what it is now,
        and records that. Raises UserError for stages that do not fit, and rather than replace anything that is not a
        pipeline folder.
        """
        folder = Path(folder)
        note_cast(self.prior, self.autoencoder, self.compared)
        check_fit(self.autoencoder, self.prior)
        parts = TwoStageParts(self.autoencoder, self.prior, self.sampling, self.tables)
        write_two_stage(folder, parts, self.fingerprint())
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
        """The pipeline of a local folder or a Hugging Face hub id, on a device: "cpu", "cuda", "mps" ...

        dtype: a floating type that both models are cast to (`to`); left out, that which they were saved in. revision: a
        branch, tag or commit of the hub. Raises UserError.
        """
        check_type(dtype)
        folder = pipeline_folder(folder_or_hub_id, revision)
        pipeline = cls(*read_two_stage(folder)).to(usable_device(device))
        pipeline.source = folder
        return pipeline if dtype is None else pipeline.to(dtype)

    def push_to_hub(self, hub_id: str, **options: Unpack[PushOptions]) -> str:
        """Uploads the pipeline with a model card to the Hugging Face hub, and returns its address there.

        hub_id: owner/name; options: how it goes there, `private=True`, and what the card says that no model knows,
        `license="mit", datasets=["ylecun/mnist"]` (`pipelines.model_card.PushOptions`). Raises UserError.
        """
        return push(self, hub_id, options)

    def parts(self) -> dict[str, PretrainedModel]:
        """Its models by what they are called."""
        return {"autoencoder": self.autoencoder, "prior": self.prior}

    def card_traits(self) -> CardTraits:
        """What a model card says of it."""
        return traits_of_stages(self.autoencoder, self.prior, self.sampling, lambda: self.generate(SAMPLES).pil())
