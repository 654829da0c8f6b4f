"""How to train: one config for both stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.errors import UserError
from common.short_repr import changes

MOST_MINUTES = 7 * 24 * 60


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: the same for both stages."""

    steps: int = 10_000  # optimiser steps of the whole run
    batch_size: int = 64  # samples per optimiser step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches per optimiser step: the same result in less memory
    learning_rate: float = 3e-4  # peak, after the warm-up
    optimizer: Literal["adam", "adamax", "rmsprop"] = "adam"  # rmsprop: centred (Graves 2013), its decay 0.99
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's and Adamax'
    weight_decay: float = 0.0  # AdamW's, on weights of two and more axes; 0 is plain Adam
    warmup_steps: int = 0  # over which the learning rate rises from 0
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    final_learning_rate: float = 0.0  # where the cosine ends, as a factor of the peak
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 is off
    skip_grad_norm: float = 0.0  # steps whose gradient has a larger norm, before that, change no weights; 0 is off
    # Autocast type; weights stay float32. tf32: float32 whose products and convolutions take 11 bits of their factors.
    precision: Literal["no", "bf16", "fp16", "tf32"] = "no"  # what is computed in
    compile: bool = False  # torch.compile the model
    channels_last: bool = False  # images lie place after place in memory: for bf16, fp16 or tf32 on GPUs
    checkpoint_activations: bool = False  # blocks are computed again in the backward pass: less memory, more time
    ema_decay: float = 0.0  # moving average of the weights, validated and saved in their place; 0 is off
    log_every: int = 50  # steps
    validate_every: int = 500  # steps, and after the last one; 0 is off
    evaluate_every: int = 0  # steps, and after the last one; 0 is off: Frechet distance of reconstructions or samples
    evaluate_images: int = 1000  # held-out images that are evaluated, at most, and as many samples
    evaluate_features: str = "inception"  # whose features: inception, timm:MODEL, or MODULE:FUNCTION
    evaluate_weights: str | None = None  # file with the weights of these; left out: those that are on this machine
    preview_every: int = 500  # steps, and after the last one; 0 is off; stage two needs --decoder for them
    save_every: int = 500  # steps, after the last one, and after each validation that is the best so far
    save_minutes: float = 0.0  # saves, too, when so many have gone by since the last time; 0 is off
    keep_newest: int = 3  # checkpoints, besides that of the best validation
    keep_every: int = 0  # steps: checkpoints of their multiples are kept for ever, too; 0 is off
    save_in_background: bool = False  # write checkpoints while steps go on, from a copy in main memory
    patience: int = 0  # stop after so many validations without a new best; 0 is off
    max_nonfinite_steps: int = 20  # stop after so many skipped steps in a row
    timeout_minutes: float = 60.0  # of several processes, how long each waits for the others before it gives up
    seed: int = 0
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    workers: int = 2  # data loader processes per training process; 0 loads in the training process
    prefetch: int = 4  # batches that each worker prepares ahead

    __repr__ = changes

    def __post_init__(self) -> None:
        positive = "steps batch_size accumulate log_every save_every keep_newest max_nonfinite_steps prefetch"
        not_negative = (
            "weight_decay warmup_steps final_learning_rate max_grad_norm skip_grad_norm ema_decay "
            "validate_every evaluate_every preview_every save_minutes keep_every patience seed workers"
        )
        for names, minimum in ((positive, 1), (not_negative, 0)):
            for name in names.split():
                if not getattr(self, name) >= minimum:
                    raise UserError(f"train.{name}={getattr(self, name)}, expected at least {minimum}")
        if not 0 < self.timeout_minutes <= MOST_MINUTES:
            raise UserError(
                f"train.timeout_minutes={self.timeout_minutes}, expected above 0 and at most {MOST_MINUTES}, a week: "
                "60 is usual, and more where the first process has hours of work to do before the first step"
            )
        if self.precision not in ("no", "bf16", "fp16", "tf32"):
            raise UserError(f"train.precision={self.precision}, expected no, bf16, fp16 or tf32")
        if not self.learning_rate > 0:
            raise UserError(f"train.learning_rate={self.learning_rate}, expected above 0; 3e-4 is a common start")
        for name, decays in (("betas", self.betas), ("ema_decay", (self.ema_decay,))):
            if not all(0 <= decay < 1 for decay in decays):
                raise UserError(f"train.{name}={getattr(self, name)}, expected from 0 to below 1")
        if self.optimizer != "adam" and self.weight_decay:
            raise UserError(
                f"train.weight_decay={self.weight_decay} with train.optimizer={self.optimizer}, expected 0: only adam "
                "decays weights apart from its gradients; leave one of the two out"
            )
        if self.evaluate_images < 2:
            raise UserError(f"train.evaluate_images={self.evaluate_images}, expected 2 or more; 1000 is usual")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"train.batch_size={self.batch_size} cannot be split into train.accumulate={self.accumulate} "
                "equal micro-batches: choose a multiple"
            )
