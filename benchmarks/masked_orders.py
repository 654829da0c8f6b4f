"""In which order should a masked prior fill in its codes, at 8, 16 and 32 steps? The table of docs/results.md.

    python -m benchmarks.masked_orders --images mnist.npz --models maskgit=models/a diffusion=models/b --out runs/orders

The models are assembled ones (`zellige assemble`) of the same images, whose classes they know. For each model, number
of steps and way to fill in, `--count` images are drawn, of all classes in turn, all from the same seed. Two figures:

* the Frechet distance to `--real` real images, in the features (128, after the last pooling) of a small network that
  this program trains to tell the classes of the images, kept in `--out`; it is no FID of Inception's features and
  compares with figures of this program alone;
* the share of the images of which that network tells the class that was asked for.

Prints both for as many real images after coding and decoding, which no order should be better than, then a Markdown
table, and writes `samples.png`: a row of samples for each way at the least number of steps, for each model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.mnist_classifier import shifted_batches
from images.datasets import DataConfig, image_datasets, to_float
from metrics.frechet import frechet_distance
from metrics.statistics import FeatureStatistics
from pipelines.pictures import contact_sheet, save_png, to_pil
from pipelines.two_stage import TwoStagePipeline

WAYS: dict[str, dict[str, Any]] = {
    "confidence": {"order": "confidence"},
    "random": {"order": "random"},
    "Halton": {"order": "halton"},
    "entropy": {"order": "entropy"},
    "re-masking, rescale": {"remask": "rescale"},
    "re-masking, loop": {"remask": "loop"},
}
COLUMNS = 10


class Classifier(nn.Module):
    """`b c H W` in [-1, 1] -> features b 128 and logits b classes: that of mnist_classifier.py for any channels."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for wide, width in ((channels, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(wide, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        self.trunk = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(128, classes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk((images + 1) / 2)
        return features, self.head(features)


def trained(images: Tensor, labels: Tensor, classes: int, epochs: int) -> Classifier:
    """images: b c H W in [-1, 1]."""
    torch.manual_seed(0)
    model = Classifier(images.shape[1], classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = epochs * (len(images) // 128 + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for batch, targets in shifted_batches(images, labels, 128, epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(batch)[1], targets).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def seen(model: Classifier, images: Tensor) -> tuple[FeatureStatistics, Tensor]:
    """Statistics of the features, and the most probable class of each image, `b`."""
    features, logits = zip(*(model(batch) for batch in images.split(500)), strict=True)
    return FeatureStatistics.of(torch.cat(features)), torch.cat(logits).argmax(-1)


def labelled_images(path: str, size: int, channels: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` of the images spread over all, `b c H W` in [-1, 1], and their classes `b`."""
    config = DataConfig(path=path, image_size=size, channels=channels, validation_count=0)
    dataset, _ = image_datasets(config, seed=0)
    chosen = [i * len(dataset) // count for i in range(min(count, len(dataset)))]
    fetched = dataset.fetch(chosen, chosen)
    return to_float(fetched["images"]), fetched["labels"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", required=True, help="what the models learned, with classes, as --data.path takes it"
    )
    parser.add_argument("--models", nargs="+", required=True, help="NAME=FOLDER of each assembled model")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--count", type=int, default=1000, help="images of each cell of the table")
    parser.add_argument("--real", type=int, default=10000, help="real images that they are compared with")
    parser.add_argument("--epochs", type=int, default=4, help="of the network that tells features and classes")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/masked_orders"))
    args = parser.parse_args()
    models = {
        name: TwoStagePipeline.from_pretrained(path) for name, path in (pair.split("=", 1) for pair in args.models)
    }
    first = next(iter(models.values()))
    spec, classes = first.prior.code_spec, first.prior.num_classes
    images, labels = labelled_images(args.images, spec.image_height, spec.image_channels, args.real)
    weights = args.out / "classifier.safetensors"
    if weights.exists():
        network = Classifier(spec.image_channels, classes).eval()
        network.load_state_dict(load_file(weights))
    else:
        network = trained(images, labels, classes, args.epochs)
        args.out.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), weights)
    real, told = seen(network, images)
    print(f"{args.count} samples of a cell, {len(images):,} real images, torch {torch.__version__}")
    print(f"real images classified as labelled: {(told == labels).float().mean():.1%}\n")
    asked = torch.arange(args.count) % classes
    best, table, pictures, names = [], [], [], []
    for name, pipeline in models.items():
        some = images[:: max(1, len(images) // args.count)][: args.count]
        decoded = torch.cat([pipeline.decode(pipeline.encode(batch)) for batch in some.split(args.batch_size)])
        floor, told = seen(network, decoded)
        agrees = (told == labels[:: max(1, len(images) // args.count)][: args.count]).float().mean()
        best.append(f"{name}: real images, coded and decoded: {frechet_distance(floor, real):.2f}, {agrees:.1%}")
        for way, settings in WAYS.items():
            cells = []
            for steps in args.steps:
                begin = time.process_time()
                drawn = pipeline.generate(
                    args.count, batch_size=args.batch_size, progress=False, steps=steps, **settings
                ).images
                made, told = seen(network, drawn)
                agrees = (told == asked).float().mean()
                cells += [f"{frechet_distance(made, real):.2f}", f"{agrees:.1%}"]
                if steps == min(args.steps):
                    pictures.append([to_pil(image) for image in drawn[:COLUMNS]])
                    names.append(f"{name}, {way}")
                print(f"# {name}, {way}, {steps} steps: {time.process_time() - begin:.0f} s", flush=True)
            table.append(f"| {name} | {way} | {' | '.join(cells)} |")
            save_png(contact_sheet(pictures, names), args.out / "samples.png")
    print("\n" + "\n".join(best))
    print("\n| model | order | " + " | ".join(f"distance, {n} steps | class, {n} steps" for n in args.steps) + " |")
    print("|---|---|" + "---:|---:|" * len(args.steps))
    print("\n".join(table))


if __name__ == "__main__":
    main()
