"""M2 and M1+M2 on MNIST with 100 labels, ten of each digit, beside the same classifier trained on these labels alone.

    python -m benchmarks.semi_supervised --data mnist.npz --runs RUNS [--models m1m2 m2] [--seeds 0 1 2 3 4]

A seed chooses the labels and starts the weights. Accuracy is of the 10,000 test digits, by q(y|x) of the weights whose
bound on 1,000 held-out digits is the best: no label chooses among them. Digits are black and white, white from half on.
M1, 784-500-(50, 50) and 50-500-784, sees no labels and is trained once for all seeds. "the classifier alone" is the
network of q(y|x), as the model has it and on what the model gives it (pixels for M2, draws of q(z1|x) for M1+M2),
trained by Adam, 1,000 steps, on the labelled images alone.

The paper has 88.03 (sd 1.71) for M2 and 96.67 (sd 0.14) for M1+M2 (arXiv:1406.5298, table 1); a public run of M2 has
92.85% after 3,000 epochs and 60% after 80. Runs go on where they stopped. Prints a line for each seed with the seconds
of a processor that training took, then mean and spread over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.model_io import load_pretrained
from images.datasets import DataConfig, ImageDataset, image_datasets, open_images, to_float
from stage1_vae.binarise import NumberedImages
from stage1_vae.labels.base import LabelledVAE
from stage1_vae.labels.m1m2 import M1M2, M1M2Config, as_rows
from stage1_vae.labels.m2 import M2, M2Config
from stage1_vae.models import MODEL_CLASSES
from stage1_vae.networks import DenseConfig
from stage1_vae.objectives import SemiSupervisedConfig
from stage1_vae.train import Stage1VAEConfig, train_vae
from stage1_vae.vae import VAEConfig
from training.config import TrainConfig

PER_CLASS = 10
ALONE = 1_000  # steps of the classifier alone
STEPS = {"m1": 5_000, "m1m2": 4_000, "m2": 3_000}


def training(steps: int, seed: int, batch_size: int, learning_rate: float) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_grad_norm=0.0,
        validate_every=min(1_000, steps),
        preview_every=steps,
        save_every=1_000,
        log_every=250,
        keep_newest=1,
        workers=0,
        tracker="none",
        seed=seed,
    )


def digits(data: Path, per_class: int | None = None, seed: int = 0) -> DataConfig:
    return DataConfig(
        path=str(data),
        image_size=28,
        channels=1,
        validation_count=1_000,
        labels_per_class=per_class,
        labels_seed=seed,
    )


def first_vae(data: Path, steps: int) -> Stage1VAEConfig:
    network = DenseConfig(hidden=(500,))
    model = VAEConfig(latents=50, encoder=network, decoder=network)
    return Stage1VAEConfig(model=model, data=digits(data), train=training(steps, 0, 200, 2e-3), binarised="threshold")


def config_of(name: str, data: Path, seed: int, steps: int, m1: Path) -> Stage1VAEConfig:
    model: M2Config | M1M2Config
    if name == "m2":
        network = DenseConfig(hidden=(500,))
        model = M2Config(classifier=network, encoder=network, decoder=network)
    else:
        network = DenseConfig(hidden=(200,))
        model = M1M2Config(m1=str(m1), latents=20, classifier=network, encoder=network, decoder=network)
    return Stage1VAEConfig(
        model=model,
        objective=SemiSupervisedConfig(alpha=10.0, labelled_share=1 / 3),
        data=digits(data, PER_CLASS, seed),
        train=training(steps, seed, 300, 3e-3),
        binarised="threshold",
    )


def test_digits(data: Path) -> tuple[Tensor, Tensor]:
    """Images, 10000 1 28 28 in [-1, 1], and their classes."""
    source = open_images(DataConfig(path=str(data), split="test", image_size=28, channels=1))
    images = ImageDataset(source, DataConfig(path=str(data), image_size=28, channels=1))
    batch = NumberedImages(images, "threshold", training=False).fetch(range(len(images)), range(len(images)))
    return to_float(batch["images"]), batch["labels"]


@torch.no_grad()
def accuracy(model: LabelledVAE, images: Tensor, labels: Tensor) -> float:
    told = torch.cat([model.class_log_probabilities(part).argmax(1) for part in images.split(1_000)])
    return 100 * float((told == labels).double().mean())


def classifier_alone(config: Stage1VAEConfig, model: M2 | M1M2, seed: int, test: tuple[Tensor, Tensor]) -> float:
    """Accuracy of q(y|x) of such a model, its weights made anew and trained on the labelled images alone."""
    images = NumberedImages(image_datasets(config.data, seed)[0], "threshold", training=True)
    labelled = (images.labels >= 0).nonzero()[0].tolist()
    torch.manual_seed(seed)
    network: nn.Module = (model if isinstance(model, M2) else model.m2).classifier
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(ALONE):
        batch = images.fetch(labelled, range(step * len(labelled), (step + 1) * len(labelled)))
        seen = to_float(batch["images"])
        if isinstance(model, M1M2):
            with torch.no_grad():
                posterior = model.m1.posterior(seen)
                seen = as_rows(posterior.draw(posterior.noise(1)).latents[0])
        loss = F.cross_entropy(network(seen), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return accuracy(model, *test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--models", nargs="+", default=["m1m2", "m2"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, help="of each run; left out: those of the table in docs/benchmarks.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    test = test_digits(given.data)
    m1 = given.runs / "m1"
    if "m1m2" in given.models:
        began = time.process_time()
        train_vae(first_vae(given.data, STEPS["m1"]), m1)
        print(f"m1: {STEPS['m1']} steps, {time.process_time() - began:.0f} s of a processor", flush=True)
    for name in given.models:
        found: dict[str, list[float]] = {"with unlabelled images": [], "the classifier alone": []}
        for seed in given.seeds:
            steps, run = given.steps or STEPS[name], given.runs / f"{name}_{seed}"
            config, began = config_of(name, given.data, seed, steps, m1), time.process_time()
            train_vae(config, run)
            seconds = time.process_time() - began
            model = load_pretrained(run / "model", MODEL_CLASSES)
            assert isinstance(model, M2 | M1M2)
            found["with unlabelled images"].append(accuracy(model, *test))
            found["the classifier alone"].append(classifier_alone(config, model, seed, test))
            said = ", ".join(f"{how} {values[-1]:.2f}%" for how, values in found.items())
            print(f"{name} seed {seed}: {said}; {steps} steps, {seconds:.0f} s of a processor", flush=True)
        for how, values in found.items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{name} {how}: mean {statistics.mean(values):.2f}%, spread {spread:.2f} over {len(values)} seeds")


if __name__ == "__main__":
    main()
