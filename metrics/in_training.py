"""A Frechet distance that a training run logs: of images as its model makes them now from real ones, which stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from common.errors import UserError
from common.processes import on_main_process, process_state
from images.datasets import to_float, to_uint8
from metrics.features import FeatureNetwork, open_features
from metrics.frechet import frechet_distance
from metrics.statistics import FeatureStatistics
from training.config import TrainConfig
from training.data import batches_of
from training.task import Dataset

AT_ONCE = 64  # images


def frechet_name(network: FeatureNetwork) -> str:
    """Only a distance of Inception's features is an FID."""
    return "fid" if network.name == "inception" else "fd"


def network_of(config: TrainConfig) -> FeatureNetwork | None:
    """Whose features a run is evaluated by; None where it is not. Raises UserError."""
    if not config.evaluate_every:
        return None
    try:
        return open_features(config.evaluate_features, config.evaluate_weights)
    except UserError as error:
        raise UserError(
            f"train.evaluate_every={config.evaluate_every} cannot be: {error} (here train.evaluate_weights names "
            "the weights, and train.evaluate_features another network)"
        ) from error


def note_on(network: FeatureNetwork, images: int) -> str:
    """What a person should know before the first evaluation."""
    name = frechet_name(network)
    return (
        f"evaluations are {name.upper()}s of {images:,} held-out images, in {network.width:,} features of "
        f"{network.name}: of so few they tell the steps of this run apart, and are no figures to compare with others'"
    )


class Comparison:
    """Of batches of images, numbered alike on all processes."""

    def __init__(self, network: FeatureNetwork, batches: int) -> None:
        self.network, self.batches = network, batches
        self.real: FeatureStatistics | None = None  # on the first process, which compares for all

    def __call__(self, real: Callable[[int], Tensor], made: Callable[[int], Tensor]) -> float:
        """real, made: batch number i, b c H W, uint8, or floats in [-1, 1], which are rounded as files are. The real
        ones are looked at once. All processes call it together and get the same."""
        state = process_state()
        mine = range(state.process_index, self.batches, state.num_processes)
        self.network.to(state.device)
        if self.real is None:
            self.real = FeatureStatistics.of(in_order({i: self.features(real(i)) for i in mine}))
        features = in_order({i: self.features(made(i)) for i in mine})
        return on_main_process(state, lambda: frechet_distance(FeatureStatistics.of(features), self.real))  # type: ignore[arg-type]

    def features(self, images: Tensor) -> Tensor:
        pixels = images if images.dtype == torch.uint8 else to_uint8(images)
        with torch.autocast(pixels.device.type, enabled=False):
            return self.network(pixels).cpu()


class OfReconstructions:
    """training.task.Evaluation of models that encode and decode images: rFID of held-out ones, `rfid`, or `rfd` of
    another network's features."""

    def __init__(self, network: FeatureNetwork, data: Dataset, images: int) -> None:
        """data: held-out images; images: how many of them, at most. Raises UserError for fewer than two."""
        self.data = data
        self.batches = list(batches_of(data, evenly(images, data), AT_ONCE))
        self.comparison = Comparison(network, len(self.batches))
        self.name = f"r{frechet_name(network)}"
        self.note = note_on(network, sum(map(len, self.batches)))

    def __call__(self, model: Any) -> dict[str, float]:
        device = next(model.parameters()).device

        def images(number: int) -> Tensor:
            batch = self.batches[number]
            pixels: Tensor = self.data.fetch(batch, batch)["images"]
            return pixels

        def decoded(number: int) -> Tensor:
            reconstructed: Tensor = model.decode(model.encode(to_float(images(number)).to(device)))
            return reconstructed

        return {self.name: self.comparison(images, decoded)}


def evenly(images: int, data: Dataset) -> list[int]:
    """So many held-out samples, at most, from all over the set. Raises UserError for fewer than two."""
    count = min(images, len(data))
    if count < 2:
        raise UserError(
            f"train.evaluate_every with {len(data)} held-out images, expected 2 or more: hold out more, or leave it out"
        )
    return [i * len(data) // count for i in range(count)]


def in_order(mine: Mapping[int, Tensor]) -> Tensor:
    """Features of all processes, batch after batch: the same bits however many there are."""
    shares = gather_object([mine])
    found = {number: features for share in shares for number, features in share.items()}
    return torch.cat([found[number] for number in sorted(found)])
