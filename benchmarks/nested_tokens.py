"""One model with nested tokens beside models that were trained for each number of tokens alone.

    OMP_NUM_THREADS=1 python -m benchmarks.nested_tokens --data mnist --out runs/nested

The recipe (`mnist_titok`, or another whose codes are a row of tokens, such as `mnist_flextok`) is trained as it is, and
for each of `--alone` with so many tokens and without nested dropout, all for the same steps on the same images. Test
images are then written as files of the nested model's first tokens (`compress --tokens`, in mode `packed` and, with
tables of 5,000 training images, `table`), and decoded from them. Prints a Markdown table: PSNR, a mean over images, of
the one model beside those of the others, bits of an image in an archive of all, and with `--classifier`, weights of
`benchmarks.mnist_classifier`, how many of the images it takes for what they are. `nested_tokens.png` shows it as two
curves, PSNR over the number of tokens, and over bits beside JPEG's and WebP's files; `tokens.png` has images as their
first tokens tell them. `--guidance` decodes with so much of it (flextok). A model that is already in `--out` is not
trained again, and a training that was stopped goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.codec import read_images
from benchmarks.mnist_classifier import build_classifier, classify
from benchmarks.rate_distortion import Measure, Point, pillow_points
from common.files import atomic_file
from common.model_io import load_pretrained
from images.datasets import to_float, to_uint8
from images.sheets import contact_sheet
from images.sources import open_source
from pipelines.codec.codec import Codec
from pipelines.codec.tables import fit_tables
from pipelines.pictures import save_png, to_pil
from pipelines.trainings import read_config
from stage1_vq.autoencoders import AUTOENCODERS
from stage1_vq.autoencoders.token_row import TokenRow
from stage1_vq.train import Stage1Config, train_stage1

SHOWN = 12  # images of tokens.png
TABLE_IMAGES = 5000


class Row(NamedTuple):
    tokens: int
    nested: float  # PSNR in dB
    alone: float | None  # likewise, of the model that was trained for so many; None where there is none
    packed: float  # bits of an image in an archive of all
    table: float
    right: float | None  # share of images that the classifier takes for what they are; None without one


def train(recipe: str, data: str, steps: int | None, run: Path, tokens: int | None, **more: Any) -> TokenRow:
    """The recipe's model, or that of so many tokens which are not nested; unless that is done. more: changes to it."""
    changes = {"data.path": data, "train.tracker": "none", "train.preview_every": 0, **more}
    changes |= {} if steps is None else {"train.steps": steps}
    changes |= {} if tokens is None else {"model.tokens": tokens, "model.nested": None}
    config = read_config(Stage1Config, recipe, changes)
    if not train_stage1(config, run).finished:
        raise SystemExit(f"{run} was stopped; the same command goes on")
    model = load_pretrained(run / "model", AUTOENCODERS).eval()
    assert isinstance(model, TokenRow)
    return model


@torch.no_grad()
def of_files(codec: Codec, images: Tensor, tokens: int, measure: Measure) -> tuple[Tensor, float, float, float]:
    """What an archive of the first tokens decodes to, its PSNR, and bits of an image, packed and by tables."""
    files = [codec.compress(images, mode, tokens=tokens).data for mode in ("packed", "table")]
    sizes = [8 * len(data) / len(images) for data in files]
    decoded = torch.stack(codec.decompress(files[0]))
    decoded = to_float(torch.stack([to_uint8(image) for image in decoded]))
    return decoded, measure(decoded)["psnr"], *sizes


def shown(tokens: int) -> list[int]:
    """Powers of two, and all."""
    return [*(2**exponent for exponent in range((tokens - 1).bit_length())), tokens]


def agreement(classifier: nn.Module, decoded: Tensor, data: str) -> float:
    """Share of the first test images, b c H W in [-1, 1] as they were decoded, that are taken for what they are."""
    labels = open_source(data, "test", Path("data")).labels
    assert labels is not None
    found = classify(classifier, (decoded + 1) / 2)
    return float((found == torch.from_numpy(labels[: len(decoded)])).float().mean())


def draw(rows: list[Row], others: list[Point], pixels: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([row.tokens for row in rows], [row.nested for row in rows], "o-", ms=4, label="one model, first tokens")
    if alone := [(row.tokens, row.alone) for row in rows if row.alone is not None]:
        left.plot(*zip(*alone, strict=True), "s", ms=6, color="#d1495b", label="a model for each number")
    left.set(xlabel="tokens", ylabel="PSNR, dB", xscale="log")
    left.set_xticks(shown(rows[-1].tokens))
    left.xaxis.set_major_formatter("{x:g}")
    left.minorticks_off()
    for mode, mark in (("packed", "o-"), ("table", "s-")):
        right.plot([getattr(r, mode) for r in rows], [r.nested for r in rows], mark, ms=4, label=f"tokens, {mode}")
    for codec in dict.fromkeys(point.codec for point in others):
        own = [point for point in others if point.codec == codec]
        right.plot(
            [point.bits_per_pixel * pixels for point in own],
            [point.figures["psnr"] for point in own],
            "--",
            lw=1,
            label=codec,
        )
    right.set(xlabel="bits of an image, in its file", ylabel="PSNR, dB", xscale="log")
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="a set, or an .npz file, that has test images")
    parser.add_argument("--recipe", default="mnist_titok")
    parser.add_argument("--steps", type=int, help="of each training; left out: the recipe's")
    parser.add_argument("--nested_steps", type=int, help="of the nested model; left out: --steps")
    parser.add_argument("--nested_share", type=float, help="of the loss, for the first tokens; left out: the recipe's")
    parser.add_argument("--alone", type=int, nargs="+", default=[16, 1, 4, 8, 2], help="numbers of tokens")
    parser.add_argument("--tokens", type=int, nargs="+", help="numbers of first tokens; left out: each there is")
    parser.add_argument("--only_nested", action="store_true", help="train none of those for a number of tokens alone")
    parser.add_argument("--classifier", type=Path, help="weights of benchmarks.mnist_classifier")
    parser.add_argument("--guidance", type=float, help="of the decoder; left out: the recipe's")
    parser.add_argument("--num", type=int, default=1000, help="test images")
    parser.add_argument("--out", type=Path, default=Path("runs/nested"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    share = {} if given.nested_share is None else {"model.nested_share": given.nested_share}
    nested = train(given.recipe, given.data, given.nested_steps or given.steps, given.out / "nested", None, **share)
    counts = [] if given.only_nested else given.alone
    alone = {n: train(given.recipe, given.data, given.steps, given.out / f"alone_{n}", n) for n in counts}
    if given.guidance is not None:
        for model in (nested, *alone.values()):
            model.decode_guided(given.guidance)
    classifier: nn.Module | None = None
    if given.classifier is not None:
        classifier = build_classifier().eval()
        classifier.load_state_dict(load_file(given.classifier))

    codec = Codec(nested)
    with torch.no_grad():
        known = read_images(codec, given.data, "train", TABLE_IMAGES)
        codec = Codec(nested, None, fit_tables(nested.code_spec(), [nested.encode(part) for part in known.split(500)]))
    images = read_images(codec, given.data, "test", given.num)
    measure, rows = Measure(images, None), []
    sheet, names = [[to_pil(image) for image in images[:SHOWN]]], ["image"]
    for tokens in given.tokens or range(1, nested.config.tokens + 1):
        decoded, quality, packed, table = of_files(codec, images, tokens, measure)
        other = None
        if tokens in alone:
            model = alone[tokens]
            with torch.no_grad():
                made = torch.cat([model.decode(model.encode(part)) for part in images.split(100)])
            other = measure(to_float(torch.stack([to_uint8(image) for image in made])))["psnr"]
        right = None if classifier is None else agreement(classifier, decoded, given.data)
        rows.append(Row(tokens, quality, other, packed, table, right))
        print(f"# {rows[-1]}", flush=True)
        if tokens in shown(nested.config.tokens):
            sheet.append([to_pil(image) for image in decoded[:SHOWN]])
            names.append(f"{tokens}")

    columns = ("tokens", "nested, dB", "alone, dB", "nested - alone", "bits, packed", "bits, table", "as labelled")
    print(f"\n| {' | '.join(columns)} |\n|{'---:|' * len(columns)}")
    for row in rows:
        beside = ("", "") if row.alone is None else (f"{row.alone:.2f}", f"{row.nested - row.alone:+.2f}")
        right = "" if row.right is None else f"{row.right:.1%}"
        cells = (f"{row.tokens}", f"{row.nested:.2f}", *beside, f"{row.packed:.0f}", f"{row.table:.0f}", right)
        print(f"| {' | '.join(cells)} |")
    pictures = [to_pil(image) for image in images]
    others = [point for kind in ("JPEG", "WEBP") for point in pillow_points(kind, pictures, measure)]
    draw(rows, others, images[0, 0].numel(), given.out / "nested_tokens.png")
    save_png(contact_sheet(sheet, names), given.out / "tokens.png")


if __name__ == "__main__":
    main()
