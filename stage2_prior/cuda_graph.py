"""Sampling on a CUDA device without waiting for Python: all steps of a batch as one CUDA graph.

A step of a small prior is hundreds of short kernels, which a GPU finishes faster than Python can launch them. Recorded
once, those of all steps are launched together. Nothing is compiled or computed in another way: the codes stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from common.wording import an
from stage2_prior.condition import Condition
from stage2_prior.priors.base import AutoregressivePrior, Prior
from stage2_prior.sampling_config import SamplingConfig
from stage2_prior.stepping import step_dtype

Draw = Callable[[AutoregressivePrior, Condition, Tensor, SamplingConfig, Tensor | None], tuple[Tensor, Tensor]]
"""`draw_in_order` of sampling.py."""


class Recording(NamedTuple):
    inputs: list[Tensor]  # which the graph reads
    outputs: tuple[Tensor, Tensor]  # which it writes
    replay: Callable[[], None]


class RecordedDraw:
    """As the function it records, for many batches that are alike: of one prior, one size and the same settings. A
    batch of another kind is recorded anew, in place of the last. Between two batches the weights may change, but not
    move."""

    def __init__(self, draw: Draw):
        self.draw = draw
        self.kind: object = None  # of the recorded batches
        self.recording: Recording | None = None

    @torch.inference_mode()
    def __call__(
        self,
        prior: AutoregressivePrior,
        condition: Condition,
        uniforms: Tensor,
        sampling: SamplingConfig,
        known: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        given = tensors_of(condition, uniforms, known)
        weights = [weight.data_ptr() for weight in prior.parameters()]
        shapes = [(tensor.shape, tensor.dtype) for tensor in given]
        kind = (weights, step_dtype(next(prior.parameters())), sampling, known is None, shapes)
        if self.recording is None or kind != self.kind:
            self.recording = None  # frees its memory first
            condition, uniforms = condition.map(torch.clone), uniforms.clone()
            known = None if known is None else known.clone()
            outputs, replay = record(lambda: self.draw(prior, condition, uniforms, sampling, known))
            self.recording = Recording(tensors_of(condition, uniforms, known), outputs, replay)
            self.kind = kind
        for tensor, value in zip(self.recording.inputs, given, strict=True):
            tensor.copy_(value)
        self.recording.replay()
        codes, finite = self.recording.outputs
        return codes.clone(), finite.clone()  # the next replay writes to the same places


def check_recordable(prior: Prior, device: torch.device) -> None:
    """Raises UserError for a prior on another device, and for one that fills in its codes in a few large steps."""
    if device.type != "cuda":
        raise UserError(f"got cuda_graph on the device {device}, expected a CUDA device; leave it out")
    if not isinstance(prior, AutoregressivePrior):
        raise UserError(
            f"got cuda_graph for {an(prior.kind)} prior, expected one that draws its codes in an order: its few "
            "steps are large ones, which do not wait for Python; leave it out"
        )


def tensors_of(condition: Condition, uniforms: Tensor, known: Tensor | None) -> list[Tensor]:
    return [*condition.tensors(), uniforms, *([] if known is None else [known])]


def record(work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
    """Runs `work` once, then into a CUDA graph. Returns the tensors to which the graph writes, and what replays it."""
    first_run = torch.cuda.Stream()
    first_run.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(first_run):
        work()  # libraries allocate and choose their kernels now, which a graph cannot hold
    torch.cuda.current_stream().wait_stream(first_run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    return outputs, graph.replay
