"""`zellige translate`: from one modality of a VAE to the other: images to classes and back, halves to wholes."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.files import write_text
from common.model_io import load_pretrained
from common.owned_folder import SHEET_NAME
from common.processes import process_state
from common.wording import counted, either
from images.files import BadImageError
from pipelines.devices import open_device
from pipelines.editing import View, check_variants, read_picture
from pipelines.generation.results import Output
from pipelines.image_folders import image_names, to_images
from pipelines.image_input import fit
from pipelines.labels import class_number
from pipelines.model_folders import stage_folder
from pipelines.pictures import contact_sheet, in_columns, save_png, to_pil
from pipelines.settings import check_apart, results_folder
from pipelines.variants import each_alone, write_variants
from stage1_vae.evaluation import mixed
from stage1_vae.modalities.multimodal import PAIRS, Multimodal
from stage1_vae.modalities.views import Seen, SymbolView, bytes_of, text_of

TABLE_NAME = "told.csv"
COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class TranslateConfig:
    """Tells the other modality of what is given: images, or a class, or a text."""

    model: str  # run or model folder of a VAE of two modalities, or a hub id
    out: str  # folder for the results
    images: str | None = None  # folder of images, or one image file; scaled and cropped to the model's size
    part: str | None = None  # of a pair of images: which of the two is seen of them: left, right, top, bottom ...
    label: str | None = None  # name or number of a class, of which images are drawn
    text: str | None = None  # a text, of which images are drawn
    num: int = 8  # images that are drawn of a class or a text, or of each image's other part
    seed: int = 0  # of the draws
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        check_variants(self.num)
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed={self.seed}, expected 0 to {2**64 - 1}")
        given = [name for name in ("images", "label", "text") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"got {' and '.join(given) or 'nothing'} to translate, expected one of images, label and text"
            )


def translate(config: TranslateConfig) -> str:
    """Writes `config.out`; returns one line. Raises UserError."""
    _, device = open_device(config.device)
    folder = stage_folder(config.model, "stage1")
    model = load_pretrained(folder, {Multimodal.kind: Multimodal}).to(device).eval()
    names, symbols = PAIRS[model.config.pair], isinstance(model.second, SymbolView)
    if config.images is None:
        wanted = "label" if config.label is not None else "text"
        if names[1] != {"label": "label", "text": "tokens"}[wanted]:
            raise UserError(
                f"{wanted}={getattr(config, wanted)}, but this model is of {' and '.join(names)}; leave it out"
            )
        return draw_images(model, config, device)
    if symbols:
        if config.part is not None:
            raise UserError(f"part={config.part}, but this model is of {' and '.join(names)}; leave part out")
        return tell_symbols(model, config, device)
    if config.part not in names:
        raise UserError(f"part={config.part}, expected {either(names)}: which of the two is seen of the images?")
    return complete(model, config, device)


def draws(mean: Tensor, log_scale: Tensor, count: int, seed: int, first: int) -> Tensor:
    """Draws first, first + 1, ... of a seed, of one posterior, 1 d each: count d."""
    noise = [
        torch.randn(mean.shape, generator=torch.Generator().manual_seed(mixed(seed, first + i, 0)))
        for i in range(count)
    ]
    return mean + log_scale.exp() * torch.cat(noise).to(mean.device)


@torch.no_grad()
def draw_images(model: Multimodal, config: TranslateConfig, device: torch.device) -> str:
    """Images of a class or a text, as PNG files."""
    out = Path(config.out)
    if config.text is not None:
        if (size := len(config.text.encode())) > model.config.length:
            raise UserError(
                f"text={config.text!r} has {size} bytes, expected at most {model.config.length}, of which this model "
                "is: shorten it"
            )
        symbols, said = bytes_of([config.text], model.config.length), config.text
    else:
        named = config.label in (model.class_names or ()) or not str(config.label).isdigit()
        number = class_number(model.class_names, config.label if named else int(str(config.label)))
        if number is None or not 0 <= number < model.config.classes:
            raise UserError(f"label={config.label}, expected a class from 0 to {model.config.classes - 1}, or its name")
        symbols, said = torch.tensor([[number]]), str(config.label)
    nowhere = torch.zeros(1, model.config.channels, *model.image_size, device=device)
    seen = model.seen(nowhere, symbols.to(device))
    posterior = model.posterior_of([Seen(seen[0].target, torch.zeros_like(seen[0].present)), seen[1]])
    settings = {"model": model.fingerprint(), "given": said, "seed": config.seed, "num": config.num}
    with results_folder(out, "translate", settings, process_state()):
        pictures = [
            to_pil(image)
            for image in model.decode(draws(posterior.mean, posterior.log_scale, config.num, config.seed, 0)).float()
        ]
        for number, picture in enumerate(pictures):
            save_png(picture, out / f"{number:06d}.png")
        save_png(contact_sheet(in_columns(pictures, COLUMNS)), out / SHEET_NAME)
    return f"{counted(config.num, 'image')} of {said!r} in {out}, all of them on {out / SHEET_NAME}"


@torch.no_grad()
def tell_symbols(model: Multimodal, config: TranslateConfig, device: torch.device) -> str:
    """The class or the text of each image, as a table."""
    assert config.images is not None
    source, out = Path(config.images), Path(config.out)
    check_apart(out, source)
    root, names = source if source.is_dir() else source.parent, image_names(source)
    text, unread = io.StringIO(), 0
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "text" if model.config.pair == "image_tokens" else "class", "probability"])
    for name in names:
        try:
            image = images_of(model, root / name).to(device)
        except BadImageError:
            unread += 1
            continue
        probabilities, told = model.symbol_log_probabilities(model.encode(image))[0].max(dim=-1)  # L each
        writer.writerow([name, in_words(model, told.cpu()), f"{float(probabilities.sum().exp()):.4f}"])
    if unread == len(names):
        raise UserError(f"none of the images of {source} can be read; name a folder of images or an image file")
    settings = {"model": model.fingerprint(), "images": str(source.resolve())}
    with results_folder(out, "translate", settings, process_state(), results=TABLE_NAME):
        write_text(out / TABLE_NAME, text.getvalue())
    bad = f"; {counted(unread, 'image')} could not be read" if unread else ""
    return f"{counted(len(names) - unread, 'image')} told in {out / TABLE_NAME}{bad}"


def complete(model: Multimodal, config: TranslateConfig, device: torch.device) -> str:
    """Images of which one part is seen, with the other drawn, several times."""
    number = PAIRS[model.config.pair].index(str(config.part))

    @torch.no_grad()
    def draw(view: View, image_number: int) -> Tensor:
        seen = list(model.seen(view.image[None].to(device)))
        seen[1 - number] = Seen(seen[1 - number].target, torch.zeros_like(seen[1 - number].present))
        posterior = model.posterior_of(seen)
        first = image_number * config.num
        return model.decode(draws(posterior.mean, posterior.log_scale, config.num, config.seed, first)).float()

    def read(path: Path) -> View:
        image = images_of(model, path)[0]
        return View(image, kept(str(config.part), model.image_size))

    settings = {"model": model.fingerprint(), "part": config.part, "seed": config.seed}
    assert config.images is not None
    output = Output(out=config.out)
    return write_variants("translate", config.images, output, config.num, settings, read, each_alone(draw, config.num))


def images_of(model: Multimodal, path: Path) -> Tensor:
    """1 c H W. Raises BadImageError."""
    return to_images(fit(read_picture(path, model.config.channels), *model.image_size))


def kept(part: str, size: tuple[int, int]) -> Tensor | None:
    """Which pixels of an image lie in its part, H W; None where that is another image."""
    keep = torch.zeros(size, dtype=torch.bool)
    height, width = size[0] // 2, size[1] // 2
    if part in ("left", "right"):
        keep[:, :width] = True
    elif part in ("top", "bottom"):
        keep[:height] = True
    else:
        return None
    return ~keep if part in ("right", "bottom") else keep


def in_words(model: Multimodal, told: Tensor) -> str:
    """L numbers as the text that they are, or as the class's name."""
    if model.config.pair == "image_tokens":
        return text_of(told)
    number = int(told[0])
    return str(number) if model.class_names is None else model.class_names[number]
