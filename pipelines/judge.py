"""Rejection sampling: of several candidates the one that a classifier finds most probable, as VQ-VAE-2 (Razavi et al.
2019, arXiv:1906.00446, section 3.4) and VQ-GAN (Esser et al. 2021, arXiv:2012.09841) did for their headline figures.

It trades variety for likeness: what the classifier is unsure of is lost, rare but good images too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codes.spec import Codes
from common.errors import UserError
from metrics.features import open_module
from pipelines.two_stage import TwoStagePipeline
from stage2_prior.drawing import Seed
from stage2_prior.sampling import SamplingConfig


class Judge(Protocol):
    """A classifier of images."""

    def __call__(self, images: Tensor) -> Tensor:
        """images: b c H W in [-1, 1] -> logits `b classes`."""
        ...


def scores(judge: Judge, images: Tensor, labels: Tensor | None) -> Tensor:
    """How probable each image is, `b`: the probability of its label `b`, or, without labels, that of the class that the
    judge finds most probable. Raises UserError when the judge knows too few classes."""
    with torch.no_grad():
        probabilities = judge(images).float().softmax(dim=-1).nan_to_num(-1.0)  # b classes; never prefers what is none
    if labels is None:
        return probabilities.amax(dim=-1)
    if int(labels.max()) >= probabilities.shape[-1]:
        raise UserError(
            f"the judge tells {probabilities.shape[-1]} classes apart, but class {int(labels.max())} was asked for; "
            "name a judge of the classes that the prior was trained with"
        )
    return probabilities.gather(-1, labels.to(probabilities.device)[:, None])[:, 0]


def sample_best(
    pipeline: TwoStagePipeline,
    indices: Sequence[int],
    labels: Sequence[int] | None,
    seed: Seed,
    candidates: int,
    judge: Judge,
    sampling: SamplingConfig,
) -> Codes:
    """Codes of samples `indices`, one b h w per grid: for sample i the one of the samples i * candidates,
    i * candidates + 1, ... of `seed` that the judge prefers."""
    asked = None if labels is None else torch.tensor(labels)
    best: Codes | None = None
    highest = torch.empty(0)
    for number in range(candidates):
        codes = pipeline.sample([index * candidates + number for index in indices], labels, seed, sampling)
        score = scores(judge, pipeline.decode(codes, precision=sampling.decoding), asked).to(codes[0].device)
        if best is None:
            best, highest = codes, score
            continue
        better = score > highest
        highest = torch.where(better, score, highest)
        best = tuple(torch.where(better[:, None, None], new, old) for new, old in zip(codes, best, strict=True))
    assert best is not None
    return best


def load_judge(name: str, weights: str | None, num_classes: int) -> nn.Module:
    """`timm:MODEL`, a classifier of timm, or `MODULE:FUNCTION`, a function of a Python module that can be imported from
    here and returns a network, b c H W in [-1, 1] -> logits.

    weights: a file with a timm model's weights, safetensors or a state dict; without it timm downloads them. Raises
    UserError.
    """
    where, _, what = name.partition(":")
    if not what:
        raise UserError(f"judge={name}, expected timm:MODEL, such as timm:resnet50, or MODULE:FUNCTION")
    if where == "timm":
        return TimmJudge(what, weights, num_classes)
    if weights is not None:
        raise UserError(f"judge_weights is for judge=timm:MODEL; let {name} load its own weights")
    judge, _ = open_module(name, "judge")
    return judge


class TimmJudge(nn.Module):
    """A classifier of timm, with the size, mean and standard deviation that it was trained with."""

    def __init__(self, model: str, weights: str | None, num_classes: int) -> None:
        """num_classes: of a local file of weights; 0 for as many as the published model has. Raises UserError."""
        super().__init__()
        import timm

        if not timm.is_model(model):
            raise UserError(f"judge=timm:{model} is not a model of timm; see timm.list_models()")
        if weights is not None and not Path(weights).is_file():
            raise UserError(f"judge_weights={weights}: there is no such file; give the weights of timm's {model}")
        try:
            if weights is None:
                self.network = timm.create_model(model, pretrained=True)
            else:
                classes: dict[str, Any] = {"num_classes": num_classes} if num_classes else {}
                self.network = timm.create_model(model, checkpoint_path=weights, **classes)
        except Exception as error:  # whatever timm, the hub's client, the network or a wrong file raise
            raise UserError(
                f"the weights of judge=timm:{model} could not be had ({' '.join(str(error).split())[:200]}); put the "
                "file that timm publishes on this machine and name it by --judge_weights"
            ) from error
        settings = timm.data.resolve_model_data_config(self.network)
        self.channels, *self.size = settings["input_size"]
        self.register_buffer("mean", torch.tensor(settings["mean"]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings["std"]).view(1, -1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """images: b c H W in [-1, 1] -> logits `b classes`."""
        if images.shape[1] != self.channels:
            images = images.mean(dim=1, keepdim=True).expand(-1, self.channels, -1, -1)
        pixels = (images + 1) / 2
        pixels = F.interpolate(pixels, tuple(self.size), mode="bicubic", antialias=True, align_corners=False)
        return self.network((pixels - self.mean) / self.std)
