"""Training steps of NVAE against the published order of operations, by turns in one process.

    python -m benchmarks.nvae_step --config nvae_cifar10 --batch 32

The other side has the same weights and computes what NVlabs/NVAE does, as it does: rows of channels in memory (NCHW),
and in cells that double the resolution the upsampling first. CPU time, of whole steps with Adamax and regularisation;
each turn takes a step of one and of the other, and the figure is the median of their ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.memory import keep_freed_memory
from pipelines.options import read_recipe
from stage1_vae.hierarchies.nvae import NVAE
from stage1_vae.hierarchies.nvae_cells import Convolution, DoublingSkip, MobileConv
from stage1_vae.models import build_model
from stage1_vae.objectives import TrainingFacts, build_objective
from stage1_vae.train import Stage1VAEConfig


def plain_convolution(layer: Convolution, x: Tensor) -> Tensor:
    return layer._conv_forward(x, layer.applied_weight(), layer.bias)


def plain_doubling(skip: DoublingSkip, x: Tensor) -> Tensor:
    result: Tensor = skip[1](F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
    return result


def plain_mobile(branch: MobileConv, x: Tensor) -> Tensor:
    for layer in branch.conv:
        x = F.interpolate(x, scale_factor=2, mode="nearest") if isinstance(layer, nn.Identity) else layer(x)
    return x


def published(model: NVAE) -> None:
    """Makes it compute in the published order."""
    plain: dict[type, Callable[..., Tensor]] = {DoublingSkip: plain_doubling, MobileConv: plain_mobile}
    for module in model.modules():
        forward = plain_convolution if isinstance(module, Convolution) else plain.get(type(module))
        if forward is not None:
            module.forward = partial(forward, module)  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="nvae_cifar10")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as commands do
    torch.manual_seed(0)
    config, _ = read_recipe("train-vae", Stage1VAEConfig, "vae", ["--config", options.config])
    size = (config.data.height, config.data.width)
    ours, theirs = (build_model(config.model, size, None).train() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(theirs, NVAE)
    published(theirs)
    images = torch.randint(0, 256, (options.batch, config.data.channels, *size)) / 127.5 - 1
    if config.model.likelihood.kind == "bernoulli":
        images = images.sign()

    def stepper(model: Any) -> Callable[[int], tuple[float, float]]:
        torch.manual_seed(0)
        facts = TrainingFacts(1, 10**6, model.shape, tuple(model.generator_parameters()), regularised=model.regularised)
        objective = build_objective(config.objective, facts)
        optimizer = torch.optim.Adamax(model.parameters(), lr=1e-5)

        def step(number: int) -> tuple[float, float]:
            noise = torch.randn(1, len(images), *model.shape, generator=torch.Generator().manual_seed(number))
            begin = time.process_time()
            loss = objective.loss(model, images, number, noise).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.after_step()
            return time.process_time() - begin, float(loss.detach())

        return step

    our_step, their_step = stepper(ours), stepper(theirs)
    seconds: list[tuple[float, float]] = []
    for turn in range(options.turns + 2):  # two to warm up
        if turn % 2:
            (first, loss), (second, other) = our_step(turn), their_step(turn)
        else:
            (second, other), (first, loss) = their_step(turn), our_step(turn)
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
