"""Single-step distillation of a flow decoder: one step of the student is to lead where many of the teacher lead, from
the same noise and the same codes (Vallaeys et al. 2025, SSDD, arXiv:2510.04961, section 3.4; Luhman & Luhman 2021,
arXiv:2101.02388).

The teacher is the model that the training starts from, and the student begins as the same: its first image is the
teacher's after one step of Euler's method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.draws import normal_like
from common.errors import UserError
from common.model_io import load_pretrained
from stage1_vq.autoencoders.flow_decoder import FlowDecoder

COMPANION = "teacher"  # its name beside the model


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """One step of a flow decoder as many of the model of `start_from`."""

    teacher_steps: int = 0  # of the teacher, to each image that the student is to make; 0: no distillation, 8 is common

    def __post_init__(self) -> None:
        if self.teacher_steps < 0 or self.teacher_steps == 1:
            raise UserError(
                f"distillation.teacher_steps={self.teacher_steps}, expected 0 (off) or at least 2: of one step there "
                "is nothing to learn"
            )


class Lesson(NamedTuple):
    noise: Tensor  # b c H W, float32
    target: Tensor  # b c H W, float32, not clamped: what the teacher makes of this noise


class Teacher(nn.Module):
    """A companion of the autoencoder (training.task.Companion) that does not learn."""

    def __init__(self, config: DistillationConfig, folder: str) -> None:
        """folder: of a trained flow decoder. Raises UserError."""
        super().__init__()
        self.steps = config.teacher_steps
        self.model: FlowDecoder = load_pretrained(folder, {FlowDecoder.kind: FlowDecoder}).requires_grad_(False)

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Lesson:
        """images: b c H W in [-1, 1]. The noise is that of the step (common/draws.py)."""
        z_q = self.model.quantizer.codes_to_latents(self.model.encode(images))
        noise = normal_like(images.float())
        return Lesson(noise, self.model.walk(noise, z_q, self.steps))
