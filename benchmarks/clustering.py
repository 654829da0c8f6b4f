"""How well are MNIST's digits sorted by a VAE that never sees a label?

    python -m benchmarks.clustering --data mnist.npz --runs RUNS [--seeds 0 1 2 3 4]

For each seed an autoencoder (recipe mnist_autoencoder), and from it VaDE (mnist_vade) and the clustering VAE
(mnist_clusters); beside them a mixture of ten Gaussians fitted to the same autoencoder's latents, which is where both
begin. Runs go on where they stopped. Sorted are the 10,000 test digits; accuracy is by the best one-to-one matching of
clusters and classes. Mean and standard deviation over seeds, never the best.

Public figures: VaDE 0.716 over 20 seeds, and DEC 87.5% by an independent implementation.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.expectation_maximisation import fit_mixture
from pipelines.options import read_recipe
from stage1_vae.clustering import Agreement, agreement, cluster_probabilities
from stage1_vae.train import Stage1VAEConfig, train_vae
from stage1_vae.vae import VAE

CLUSTERS, FITTED, TRIES = 10, 10_000, 3


def trained(recipe: str, run: Path, data: Path, seed: int, *more: str) -> VAE:
    given = ["--config", recipe, "--data.path", str(data), "--train.seed", str(seed), "--run", str(run), *more]
    config, run = read_recipe("train-vae", Stage1VAEConfig, "vae", given)
    train_vae(config, run)
    return VAE.from_pretrained(run / "model")


@torch.inference_mode()
def means(model: VAE, images: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(images).unsqueeze(1).float() / 127.5 - 1
    return torch.cat([model.encode(part) for part in pixels.split(1000)])


def of_mixture(model: VAE, train: np.ndarray, test: np.ndarray, labels: np.ndarray, seed: int) -> Agreement:
    torch.manual_seed(seed)
    fitted = means(model, train[:: len(train) // FITTED][:FITTED])
    fits = [fit_mixture(fitted, CLUSTERS, "diagonal", 50, 0.01, 10) for _ in range(TRIES)]
    mixture = max(fits, key=lambda fit: fit[1][-1])[0]
    return agreement(mixture.log_densities(means(model, test).double()).argmax(1).numpy(), labels, CLUSTERS)


@torch.inference_mode()
def of_clusters(model: VAE, test: np.ndarray, labels: np.ndarray) -> Agreement:
    pixels = torch.from_numpy(test).unsqueeze(1).float() / 127.5 - 1
    told = torch.cat([cluster_probabilities(model, part) for part in pixels.split(1000)])
    return agreement(told.argmax(1).numpy(), labels, CLUSTERS)


def row(name: str, found: Sequence[Agreement]) -> str:
    def spread(values: Sequence[float]) -> str:
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"

    each = " ".join(f"{100 * one.accuracy:.1f}" for one in found)
    return f"| {name} | {spread([one.accuracy for one in found])} | {spread([one.purity for one in found])} | {each} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    digits = np.load(options.data)
    train, test, labels = digits["train_images"], digits["test_images"], digits["test_labels"]
    found: dict[str, list[Agreement]] = {"mixture of the autoencoder's latents": [], "clusters": [], "VaDE": []}
    for seed in options.seeds:
        first = options.runs / f"autoencoder{seed}"
        autoencoder = trained("mnist_autoencoder", first, options.data, seed)
        start = ("--start_from", str(first))
        found["mixture of the autoencoder's latents"].append(of_mixture(autoencoder, train, test, labels, seed))
        for name, recipe in (("VaDE", "mnist_vade"), ("clusters", "mnist_clusters")):
            model = trained(recipe, options.runs / f"{recipe}{seed}", options.data, seed, *start)
            found[name].append(of_clusters(model, test, labels))
        print(f"\nafter {len(found['VaDE'])} seeds")
        print("| model | accuracy, % | purity, % | accuracy of each seed |\n|---|---|---|---|")
        for name, agreements in found.items():
            print(row(name, agreements), flush=True)


if __name__ == "__main__":
    main()
