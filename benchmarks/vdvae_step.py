"""Training steps of VD-VAE against the published order of operations, by turns in one process.

    python -m benchmarks.vdvae_step --config vdvae_cifar10 --batch 16

The other side has the same weights and computes what openai/vdvae does, as it does: rows of channels in memory (NCHW),
stream and activation concatenated for each posterior, a GELU of each network's own input, gain and shift before the
last convolution. Its loss is that of ours, and its KL of each group alone. CPU time, of whole steps with AdamW; each
turn takes a step of one and of the other, and the figure is the median of their ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.memory import keep_freed_memory
from pipelines.options import read_recipe
from stage1_vae.hierarchies.vdvae import VDVAE
from stage1_vae.models import build_model
from stage1_vae.objectives.terms import elbo
from stage1_vae.train import Stage1VAEConfig


def published_pass(model: VDVAE, images: Tensor, noise: Sequence[Tensor]) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """What the published implementation computes, in its order: of each group z, mean and log-scale of the posterior,
    mean and log-scale of the prior; and what the likelihood is told."""

    def block(bottleneck: Any, x: Tensor) -> Tensor:
        for layer in (bottleneck.narrow, bottleneck.first, bottleneck.second, bottleneck.wide):
            x = layer(F.gelu(x))
        return x

    config = model.config
    x = model.encoder.first((images * 127.5 + 127.5 + config.pixel_shift) * config.pixel_scale)
    activations = {x.shape[2]: x}
    for layer, own in zip(model.encoder.layers, model.encoder.blocks, strict=True):
        x = x + block(own, x)
        if layer.number:
            x = F.avg_pool2d(x, layer.number)
            missing = config.width_of(x.shape[2]) - x.shape[1]
            x = torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], dim=1) if missing else x
        activations[x.shape[2]] = x
    starts = zip(model.decoder.learned, model.decoder.starts, strict=True)
    streams = {side: start.repeat(len(images), 1, 1, 1) for side, start in starts}
    found = []
    for own, drawn in zip(model.decoder.blocks, noise, strict=True):
        x = streams.get(own.side, torch.zeros_like(activations[own.side]))
        if own.added:
            x = x + F.interpolate(streams[own.added][:, : x.shape[1]], scale_factor=own.side // own.added)
        mean, log_scale = block(own.posterior, torch.cat([x, activations[own.side]], dim=1)).chunk(2, dim=1)
        told, latents = block(own.prior, x), own.latents
        z = mean + log_scale.exp() * drawn
        x = x + told[:, 2 * latents :] + own.project(z)
        streams[own.side] = x + block(own.residual, x)
        found.append((z, mean, log_scale, told[:, :latents], told[:, latents : 2 * latents]))
    return found, model.decoder.last(streams[config.image_side] * model.decoder.gain + model.decoder.shift)


def published_bound(model: VDVAE, images: Tensor, noise: Sequence[Tensor]) -> Tensor:
    groups, outputs = published_pass(model, images, noise)
    bound = model.likelihood.log_prob(outputs, images)
    for _, mean, log_scale, of_prior, log_scale_of_prior in groups:
        ratio = (log_scale.exp() ** 2 + (mean - of_prior) ** 2) / log_scale_of_prior.exp() ** 2
        bound = bound - (log_scale_of_prior - log_scale + 0.5 * ratio - 0.5).sum(dim=(1, 2, 3))
    return bound.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="vdvae_cifar10")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as commands do
    torch.manual_seed(0)
    config, _ = read_recipe("train-vae", Stage1VAEConfig, "vae", ["--config", options.config])
    size = (config.data.height, config.data.width)
    ours, theirs = (build_model(config.model, size, None) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(theirs, VDVAE)
    images = torch.randint(0, 256, (options.batch, config.data.channels, *size)) / 127.5 - 1
    if not ours.discrete or config.model.likelihood.kind == "bernoulli":
        images = images.sign()

    def step(model: Any, bound: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> tuple[float, float]:
        noise = torch.randn(len(images), *ours.shape)
        begin = time.process_time()
        loss = -bound(noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e4)
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - begin, float(loss.detach())

    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) for model in (ours, theirs)]

    def our_step() -> tuple[float, float]:
        return step(ours, lambda noise: elbo(ours(images, noise=noise[None])).mean(), optimizers[0])

    def their_step() -> tuple[float, float]:
        split = theirs.split
        return step(theirs, lambda noise: published_bound(theirs, images, split(noise)), optimizers[1])

    seconds: list[tuple[float, float]] = []
    for turn in range(options.turns + 2):  # two to warm up
        (first, loss), (second, other) = (our_step(), their_step()) if turn % 2 else (their_step(), our_step())[::-1]
        assert abs(loss - other) < 0.02 * abs(loss), (loss, other)
        seconds.append((first, second))
    ratios = [theirs / ours for ours, theirs in seconds[2:]]
    medians = [statistics.median(column) for column in zip(*seconds[2:], strict=True)]
    print(
        f"{options.config}, {options.batch} images: {1000 * medians[0]:.0f} ms a step, in the published order "
        f"{1000 * medians[1]:.0f} ms: {statistics.median(ratios):.2f} times as long ({min(ratios):.2f} to "
        f"{max(ratios):.2f} over {len(ratios)} turns)"
    )


if __name__ == "__main__":
    main()
