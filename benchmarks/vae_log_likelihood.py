"""log p(x) of images by importance sampling: ours and pythae's `get_nll`, of the same weights and images, by turns.

    pip install --no-deps pythae pydantic
    OMP_NUM_THREADS=1 python -m benchmarks.vae_log_likelihood --data mnist

A VAE of pythae's default layers (784-512-(20,20), 20-512-784) is trained shortly by a plain loop, and its weights are
copied into pythae's. Test digits, white by chance as their grey values say, are judged a part at a time by the one and
then by the other, both without gradients, in one process; the ratio of all seconds is printed, and whether both mean
log p agree within their standard errors of the draws.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from common.memory import keep_freed_memory
from images.datasets import DataConfig, ImageDataset, open_images, to_float
from stage1_vae.binarise import NumberedImages
from stage1_vae.evaluation import judge, mean_of
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives.terms import elbo
from stage1_vae.vae import VAE, VAEConfig


def binary_images(path: str, split: Any, count: int) -> Tensor:
    """count 1 28 28 in [-1, 1]: the first images of a set."""
    config = DataConfig(path=path, split=split, image_size=28, channels=1)
    data = NumberedImages(ImageDataset(open_images(config), config), "once", training=False)
    indices = range(min(count, len(data)))
    return to_float(data.fetch(indices, indices)["images"])


def trained(images: Tensor, steps: int) -> VAE:
    torch.manual_seed(0)
    config = VAEConfig(latents=20, encoder=DenseConfig(hidden=(512,)), decoder=DenseConfig(hidden=(512,)))
    model = VAE(config, (28, 28))
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(steps):
        batch = images[torch.arange(step * 128, (step + 1) * 128) % len(images)]
        loss = -elbo(model(batch)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def peer_of(model: VAE) -> Any:
    """pythae's VAE of the same weights."""
    import pythae.models as pythae

    peer = pythae.VAE(pythae.VAEConfig(input_dim=(1, 28, 28), latent_dim=20, reconstruction_loss="bce")).eval()
    weights = dict(model.named_parameters())
    weight, bias = (weights[f"encoder.layers.layers.1.{kind}"].chunk(2) for kind in ("weight", "bias"))
    names = {"encoder.layers.0.0": "encoder.layers.layers.0", "decoder.layers.0.0": "decoder.network.layers.layers.0"}
    names["decoder.layers.1.0"] = "decoder.network.layers.layers.1"
    state = {
        f"{theirs}.{kind}": weights[f"{ours}.{kind}"] for theirs, ours in names.items() for kind in ("weight", "bias")
    }
    for place, name in enumerate(("encoder.embedding", "encoder.log_var")):
        state |= {f"{name}.weight": weight[place], f"{name}.bias": bias[place]}
    peer.load_state_dict(state)
    return peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="a set of 28x28 images that has test images")
    parser.add_argument("--num", type=int, default=1000, help="test images")
    parser.add_argument("--draws", type=int, default=5000, help="of the latents of each image, a multiple of 100")
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--part", type=int, default=50, help="images of a turn")
    args = parser.parse_args()
    if args.draws % 100:
        parser.error(f"--draws {args.draws}: pythae takes whole batches of 100")
    warnings.filterwarnings("ignore")
    keep_freed_memory()  # as commands do
    model = trained(binary_images(args.data, "train", 60_000), args.steps)
    peer = peer_of(model)
    images = binary_images(args.data, "test", args.num)
    seconds = {"ours": 0.0, "pythae": 0.0}
    log_p, errors, theirs = [], [], []
    for start in range(0, len(images), args.part):
        part = images[start : start + args.part]
        begin = time.perf_counter()
        figures = judge(model, part, range(start, start + len(part)), args.draws)
        seconds["ours"] += time.perf_counter() - begin
        log_p.append(figures.log_p)
        errors.append(figures.log_p_error)
        begin = time.perf_counter()
        with torch.no_grad():
            value = peer.get_nll((part + 1) / 2, n_samples=args.draws, batch_size=100)
        seconds["pythae"] += time.perf_counter() - begin
        theirs.append(float(value) * len(part))
    ours = mean_of(torch.cat(log_p), torch.cat(errors))
    other = sum(theirs) / len(images)
    print(f"{len(images)} binary test images (drawn once), K={args.draws}, {torch.get_num_threads()} threads")
    print("|        | seconds | log p, nats          |")
    print("|--------|--------:|----------------------|")
    print(f"| ours   | {seconds['ours']:7.1f} | {ours.value:.4f} ± {ours.draws_error:.4f} |")
    print(f"| pythae | {seconds['pythae']:7.1f} | {other:.4f}           |")
    print(f"pythae's seconds over ours: {seconds['pythae'] / seconds['ours']:.2f}")
    apart = abs(ours.value - other) / (math.sqrt(2) * ours.draws_error)
    print(f"both log p lie {apart:.1f} standard errors of their difference apart")


if __name__ == "__main__":
    main()
