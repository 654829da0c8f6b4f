"""Where `zellige evaluate` spends its time: in the networks, or around them.

    python -m benchmarks.evaluate_time --model runs/quickstart/stage1 --images mnist --split test

Stage one alone on test images, with the Frechet distance of reconstructions in the features of a small network of timm,
whose weights are random ones of a seed: times do not depend on them. Prints the seconds of processor time in the
encoder, the decoder and the features (with the scaling that belongs to them), and in all else: reading and hashing
images, PSNR and SSIM, gathering, covariances and the distance. Processor time, so that other work on the machine does
not count; loading torch and the models does not either.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from metrics.features import FeatureNetwork
from pipelines.commands.evaluate import EvaluateConfig, EvaluateDataConfig, evaluate
from pipelines.evaluation import of_codes
from stage1_vq.autoencoders import Autoencoder

LOCK = threading.Lock()


def timed(name: str, work: Callable[..., Any], seconds: Counter[str]) -> Callable[..., Any]:
    """The same work, its processor time added to `seconds`; what it calls of its own kind counts once."""
    inside = threading.local()

    def measured(*arguments: Any, **options: Any) -> Any:
        if getattr(inside, "yes", False):
            return work(*arguments, **options)
        inside.yes, begin = True, time.thread_time()
        try:
            return work(*arguments, **options)
        finally:
            inside.yes = False
            with LOCK:
                seconds[name] += time.thread_time() - begin

    return measured


def random_weights(model: str, folder: Path) -> str:
    torch.manual_seed(0)
    network = timm.create_model(model, pretrained=False)
    save_file(network.state_dict(), folder / f"{model}.safetensors")
    return str(folder / f"{model}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--network", default="mobilenetv3_small_050")
    arguments = parser.parse_args()
    seconds: Counter[str] = Counter()

    def timed_figures(model: of_codes.ModelOfCodes, *others: Any) -> of_codes.Figures:
        nonlocal begin
        autoencoder: Autoencoder = model.autoencoder
        for name in ("encode", "decode"):
            setattr(autoencoder, name, timed(name, getattr(autoencoder, name), seconds))
        seconds.clear()
        begin = time.process_time()
        return figures_class(model, *others)

    begin, figures_class = 0.0, of_codes.Figures
    of_codes.Figures = timed_figures  # type: ignore[assignment, misc]
    FeatureNetwork.see = timed("features", FeatureNetwork.see, seconds)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        config = EvaluateConfig(
            model=arguments.model,
            data=EvaluateDataConfig(path=arguments.images, split=arguments.split),
            num=arguments.num,
            features=f"timm:{arguments.network}",
            features_weights=random_weights(arguments.network, Path(folder)),
        )
        print(evaluate(config))
    total = time.process_time() - begin
    for name, value in seconds.items():
        print(f"{name:<12}{value:8.1f} s  {value / total:6.1%}")
    rest = total - sum(seconds.values())
    print(f"{'all else':<12}{rest:8.1f} s  {rest / total:6.1%}")
    print(f"in networks: {1 - rest / total:.1%} of {total:.1f} s of processor time, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
