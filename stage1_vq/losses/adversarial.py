"""The adversarial loss of a guided phase, and the discriminator that learns beside the autoencoder.

VQ-GAN (Esser et al. 2021, arXiv:2012.09841, section 3.1) adds a discriminator's judgement of the reconstructions to the
loss, balanced by gradients at the decoder's last layer. Reconstructions often get worse when such a loss sets in at
full weight with a discriminator that knows nothing. So the phase has four parts, given as shares of the training:

    start            warmup                     ramp
    no discriminator | the discriminator alone  | the loss, its weight rising from 0 | the loss at its weight

and each validation after the warm-up is compared with the best one so far: reconstructions that get worse are told, and
the run can go back to the last good ones, with half the weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.distributed import mean_over_processes
from common.errors import UserError
from stage1_vq.losses.discriminators import (
    DiscriminatorConfig,
    FeatureDiscriminatorConfig,
    PatchGANConfig,
    build_discriminator,
)
from stage1_vq.losses.monitor import QualityMonitor
from training.optimizers import OptimizerSettings
from training.schedules import learning_rate
from training.task import Verdict

AdversarialLoss = Literal["hinge", "vanilla", "non-saturating"]
LARGEST_ADAPTIVE_WEIGHT = 1e4
LOSS_SCALE = 2.0**12  # a power of two, so that it changes no bit in float32, and float16 gradients do not vanish
WEIGHT_AFTER_ROLLBACK = 0.5  # of that before it
COMPANION = "discriminator"  # its name in checkpoints and in the log


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """A second network tells reconstructions from images, and the autoencoder learns to deceive it.

    Shares are of train.steps.
    """

    weight: float = 0.0  # of the loss; 0 builds and computes nothing; VQ-GAN has 0.8, ViT-VQGAN 0.1, not adaptive
    adaptive: bool = True  # times |gradient of the other losses| / |gradient of this one|, at the decoder's last layer
    discriminator_factor: float = 1.0  # of the discriminator's loss and, besides weight, of what is heard of it
    loss: AdversarialLoss = "hinge"
    start: float = 0.3  # share of the training before the discriminator begins to learn
    warmup: float = 0.02  # share of the training, from then on, in which it learns alone
    ramp: float = 0.1  # share of the training, from then on, over which the weight rises from 0
    discriminator: DiscriminatorConfig = field(default_factory=PatchGANConfig)
    learning_rate: float = 1e-4  # of the discriminator; its peak
    learning_rate_warmup: float = 0.0  # share of the training, from start on, over which it rises from 0
    schedule: Literal["cosine", "constant"] = "constant"  # after that, until the training ends
    final_learning_rate: float = 0.0  # where the cosine ends, as a factor of the peak
    betas: tuple[float, float] = (0.5, 0.9)  # of its Adam
    weight_decay: float = 0.0  # AdamW's, on weights of two and more axes; 0 is plain Adam
    max_grad_norm: float = 0.0  # its gradients are scaled down to this norm; 0 is off
    lecam_weight: float = 0.0  # LeCam regularisation, for few images: 0.001 to 0.1; 0 is off
    lecam_decay: float = 0.99  # of its moving averages
    r1_weight: float = 0.0  # gamma of the R1 penalty, StyleGAN2 has 1 to 10; 0 is off
    r1_every: int = 16  # steps: the penalty is computed so often, with as many times the weight
    warn_ratio: float = 1.5  # of validation mse (and perceptual) to its best, above which the log warns
    rollback: bool = False  # go back to the last good weights when that goes on, with half the adversarial weight
    rollback_patience: int = 2  # bad validations in a row before a rollback

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("weight", self.weight >= 0, "0 (off) or more; VQ-GAN has 0.8"),
            ("discriminator_factor", self.discriminator_factor > 0, "above 0; weight=0 is off"),
            ("loss", self.loss in ("hinge", "vanilla", "non-saturating"), "hinge, vanilla or non-saturating"),
            ("start", 0 <= self.start < 1, "a share of the training from 0 to below 1"),
            ("warmup", 0 <= self.warmup < 1, "a share of the training from 0 to below 1"),
            ("ramp", 0 <= self.ramp <= 1, "a share of the training from 0 to 1"),
            ("learning_rate", self.learning_rate > 0, "above 0; 1e-4 is a common start"),
            ("learning_rate_warmup", 0 <= self.learning_rate_warmup <= 1, "a share of the training from 0 to 1"),
            ("schedule", self.schedule in ("cosine", "constant"), "cosine or constant"),
            ("final_learning_rate", self.final_learning_rate >= 0, "0 or more, a factor of learning_rate"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "from 0 to below 1"),
            ("weight_decay", self.weight_decay >= 0, "0 (off) or more"),
            ("max_grad_norm", self.max_grad_norm >= 0, "0 (off) or more"),
            ("lecam_weight", self.lecam_weight >= 0, "0 (off) or more"),
            ("lecam_decay", 0 <= self.lecam_decay < 1, "from 0 to below 1; 0.99 is usual"),
            ("r1_weight", self.r1_weight >= 0, "0 (off) or more"),
            ("r1_every", self.r1_every >= 1, "at least 1"),
            ("warn_ratio", self.warn_ratio > 1, "above 1: 1.5 allows half as much again"),
            ("rollback_patience", self.rollback_patience >= 1, "at least 1"),
        ):
            if not valid:
                raise UserError(f"adversarial.{name}={getattr(self, name)}, expected {expected}")
        if self.start + self.warmup >= 1:
            raise UserError(
                f"adversarial.start={self.start} and adversarial.warmup={self.warmup} leave no training for the "
                "adversarial loss: give shares that add up to less than 1, or adversarial.weight=0"
            )
        if self.r1_weight and isinstance(self.discriminator, FeatureDiscriminatorConfig):
            raise UserError(
                f"adversarial.r1_weight={self.r1_weight} does not go with a discriminator of frozen features: give 0, "
                "or a discriminator of kind patchgan or stylegan"
            )


# ---- losses ---------------------------------------------------------------------------------------------------------


def discriminator_loss(kind: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
    """real, fake: logits of images and of reconstructions. Returns a scalar, a mean over logits."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    nll = F.softplus(-real).mean() + F.softplus(fake).mean()
    return 0.5 * nll if kind == "vanilla" else nll


def generator_loss(kind: AdversarialLoss, fake: Tensor) -> Tensor:
    """fake: logits of reconstructions. Returns a scalar, a mean over logits."""
    return F.softplus(-fake).mean() if kind == "non-saturating" else -fake.mean()


def adaptive_weight(other_losses: Tensor, adversarial_loss: Tensor, last_layer: nn.Parameter) -> Tensor:
    """|gradient of the other losses| / (|gradient of the adversarial loss| + 1e-4), at most 1e4, with gradients at the
    weight that the images come out of (Esser et al. 2021, equation 7). Losses that do not pass through the decoder,
    such as a quantizer's, have no gradient there. Gradients are averaged over processes."""
    with torch.autocast(last_layer.device.type, enabled=False):
        parts = [
            torch.autograd.grad(LOSS_SCALE * loss, last_layer, retain_graph=True)[0]
            for loss in (other_losses, adversarial_loss)
        ]
        gradients = mean_over_processes(torch.stack(parts).float() / LOSS_SCALE)
        other, adversarial = gradients.flatten(1).norm(dim=1)
    return (other / (adversarial + 1e-4)).clamp(0, LARGEST_ADAPTIVE_WEIGHT).detach()


def passed_to(images: Tensor, loss: Tensor) -> Tensor:
    """The same loss, a scalar, with its gradient passed back as far as `images`, which it depends on: backward passes
    go on from there, and the network between the two, whose graph is free again, is not gone through a second time."""
    (gradient,) = torch.autograd.grad(LOSS_SCALE * loss, images)
    return PassedTo.apply(loss.detach(), images, gradient / LOSS_SCALE)


class PassedTo(torch.autograd.Function):
    """A loss whose gradients are known: `ends` are the tensors that it depends on, and then the gradient of each."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *ends: Tensor) -> Tensor:
        ctx.save_for_backward(*ends[len(ends) // 2 :])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [upstream * gradient for gradient in ctx.saved_tensors]
        return None, *gradients, *[None for _ in gradients]


def r1_penalty(real: Tensor, images: Tensor) -> Tensor:
    """Half the squared gradient of an image's logit with respect to its pixels, a mean over images (Mescheder et al.
    2018, arXiv:1801.04406). Where an image has several logits, of their mean. real: b ..., the logits of `images`."""
    score = real.flatten(1).mean(1).sum()
    (gradient,) = torch.autograd.grad(score, images, create_graph=True)
    return 0.5 * gradient.square().sum((1, 2, 3)).mean()


def lecam_penalty(real: Tensor, fake: Tensor, averages: Tensor) -> Tensor:
    """Keeps the logits of images near the average logit of reconstructions, and the reverse (Tseng et al. 2021,
    arXiv:2104.03310); on the side where they lie apart as they should, as the authors' code has it. averages: 2, of the
    logits of images and of reconstructions."""
    average_real, average_fake = averages
    return F.relu(real - average_fake).square().mean() + F.relu(average_real - fake).square().mean()


# ---- the discriminator ----------------------------------------------------------------------------------------------


class Phase(NamedTuple):
    """Steps of the run, counted from 0, from which ..."""

    learns: int  # the discriminator learns
    listens: int  # the autoencoder has its loss
    full: int  # that has its full weight


class Now(NamedTuple):
    """What the schedule says of the current step."""

    learning: bool  # whether the discriminator learns
    weight: float  # of the adversarial loss, the adaptive factor aside
    penalise: bool  # whether it is the turn of the R1 penalty


class Adversary(nn.Module):
    """A discriminator, a companion of the autoencoder (training.task.Companion), that judges validations
    (training.task.Guard).

    In each micro-batch `losses` gives what the autoencoder's loss gains, and `observe` the discriminator's own loss;
    once per optimiser step `update` (or `discard`, when the step is skipped) ends the step. Statistics are averaged
    over micro-batches and processes, as the loop does with gradients, so that N processes do what one does. k
    micro-batches do what one batch does but for what a batch as a whole decides: the adaptive weight, which each
    micro-batch takes from its own gradients, norms over the batch, and StyleGAN's standard deviations (with those N
    processes differ from one, too). What goes back in a rollback is in buffers; `phase` and `rollbacks`, which do not,
    are in the guard's state. The number of the step comes from the loop.
    """

    averages: Tensor  # 2, for LeCam: moving averages of the logits of images and of reconstructions; nan at first

    def __init__(self, config: AdversarialConfig, channels: int, image_size: tuple[int, int], steps: int) -> None:
        """channels, image_size (H, W): of the images; steps: of the whole training. Raises UserError."""
        super().__init__()
        self.config, self.steps = config, steps
        self.discriminator = build_discriminator(config.discriminator, channels, image_size)
        self.optimizer = OptimizerSettings(
            betas=config.betas, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm
        )
        self.monitor = QualityMonitor(config.warn_ratio)
        lengths = [round(share * steps) for share in (config.start, config.warmup, config.ramp)]
        self.phase = Phase(*itertools.accumulate(lengths))
        self.first, self.warmup_steps = lengths[0], round(config.learning_rate_warmup * steps)  # of the schedule
        self.rollbacks = 0
        self.register_buffer("averages", torch.full((2,), math.nan))
        self.noted: list[Tensor] = []  # 2 each: mean logits of the micro-batches since the last update
        self.heard: Tensor | None = None  # logits of the reconstructions of this micro-batch, with their graph
        self.register_load_state_dict_pre_hook(take_former_counters)
        self.register_load_state_dict_post_hook(lambda module, keys: module.discard())

    def now(self, step: int) -> Now:
        """The schedule at this step."""
        learns, listens, full = self.phase
        ramp = min(1.0, (step - listens + 1) / (full - listens + 1)) if step >= listens else 0.0
        weight = self.config.discriminator_factor * self.config.weight * WEIGHT_AFTER_ROLLBACK**self.rollbacks * ramp
        return Now(step >= learns, weight, self.config.r1_weight > 0 and step % self.config.r1_every == 0)

    def learning_rate(self, step: int) -> float:
        """Of the discriminator at this step of the run, which goes on after a rollback: a schedule from the start of
        the first phase to the end of the training."""
        config = self.config
        return learning_rate(
            max(step - self.first, 0),
            peak=config.learning_rate,
            warmup_steps=self.warmup_steps,
            steps=self.steps - self.first,
            schedule=config.schedule,
            final_factor=config.final_learning_rate,
        )

    # ---- in each micro-batch ----------------------------------------------------------------------------------------

    def losses(
        self, reconstruction: Tensor, other_losses: Tensor, last_layer: nn.Parameter, step: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the autoencoder's loss gains, weighted, and figures for the log; nothing before the autoencoder listens.

        reconstruction: b c H W, with its graph; other_losses: scalar, the sum of all other losses, with its graph;
        last_layer: Autoencoder.last_layer(). The discriminator's weights get no gradient.
        """
        weight = self.now(step).weight
        if not weight:
            return {}, {}
        loss = self.deception(reconstruction)
        factor = adaptive_weight(other_losses, loss, last_layer) if self.config.adaptive else loss.new_tensor(1.0)
        factor = factor * weight
        return {"adversarial_loss": factor * loss}, {"adversarial_weight": factor}

    def deception(self, reconstruction: Tensor) -> Tensor:
        """The generator's loss, its gradient taken once, at the reconstruction. The logits are kept for `observe`,
        whose own would be the same: the discriminator learns after the autoencoder has heard it."""
        images = reconstruction.detach().requires_grad_()
        reused = not self.is_compiled()
        self.discriminator.requires_grad_(reused)
        try:
            logits = self.logits(images)
        finally:
            self.discriminator.requires_grad_(True)
        loss = generator_loss(self.config.loss, logits)
        (gradient,) = torch.autograd.grad(loss, images, retain_graph=reused)
        self.heard = logits if reused else None
        return PassedTo.apply(loss.detach(), reconstruction, gradient)

    def is_compiled(self) -> bool:
        """A compiled part has one backward pass, of all or nothing."""
        return self._compiled_call_impl is not None

    def observe(self, reconstruction: Tensor, images: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The discriminator's loss on a micro-batch, by its name as a companion, and figures for the log; nothing
        before it learns. Both b c H W; their graphs are left alone. Comes after `losses` of the same micro-batch."""
        now, config = self.now(step), self.config
        heard, self.heard = self.heard, None
        if not now.learning:
            return {}, {}
        images = images.detach().requires_grad_(now.penalise)
        eager = now.penalise  # both: a compiled pass would move the statistics of a norm that the other's graph holds
        real = self.logits(images, eager=eager)
        fake = self.logits(reconstruction.detach(), eager=eager) if heard is None else heard.detach().requires_grad_()
        with torch.autocast(images.device.type, enabled=False):
            loss = config.discriminator_factor * discriminator_loss(config.loss, real, fake)
            figures = {"discriminator_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
            if config.lecam_weight:
                penalty = lecam_penalty(real, fake, self.averages.nan_to_num())
                figures["lecam_penalty"] = penalty * self.averages.isfinite().all()  # 0 before there are any
                loss = loss + config.lecam_weight * figures["lecam_penalty"]
            if heard is not None:
                loss = loss + self.learned_from(heard, *torch.autograd.grad(loss, fake, retain_graph=True))
            if now.penalise:
                figures["r1_penalty"] = r1_penalty(real, images)
                loss = loss + config.r1_weight * config.r1_every * figures["r1_penalty"]
        figures = {name: value.detach() for name, value in figures.items()}
        if config.lecam_weight:
            self.noted.append(torch.stack([figures["logits_real"], figures["logits_fake"]]))
        return {COMPANION: loss}, figures

    def learned_from(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """0, with the gradients that the weights have when the logits have this one. Asked for here, and for the
        weights alone: a backward pass would go on to the images."""
        weights = [weight for weight in self.discriminator.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(logits, weights, gradient)
        return PassedTo.apply(gradient.new_zeros(()), *weights, *gradients)

    def logits(self, images: Tensor, *, eager: bool = False) -> Tensor:
        """In float32 under float16 autocast, whose range activations without a norm and the gradients of a penalty
        leave. eager: not compiled, as a penalty needs the gradient of a gradient."""
        with full_precision_for_float16(images.device.type):
            return (self.forward(images) if eager else self(images)).float()

    def forward(self, images: Tensor) -> Tensor:
        return self.discriminator(images)

    # ---- once per optimiser step ------------------------------------------------------------------------------------

    def update(self) -> None:
        """Ends a step: moves the averages of logits, on all processes alike; those that are not finite move nothing."""
        if self.noted:
            logits = mean_over_processes(torch.stack(self.noted).mean(0))
            before = self.averages.where(self.averages.isfinite(), logits)
            after = before.lerp(logits, 1 - self.config.lecam_decay)
            self.averages.copy_(torch.where(logits.isfinite().all(), after, self.averages))
        self.discard()

    def discard(self) -> None:
        """Drops what belongs to an unfinished step, or to one that the autoencoder skipped."""
        self.noted.clear()
        self.heard = None

    # ---- after a validation (training.task.Guard) -------------------------------------------------------------------

    def judge(self, metrics: dict[str, float], bad_before: int, step: int) -> Verdict:
        """Keeps the weights of each validation, the last ones thus, but for those that reconstruct much worse than the
        best so far: the mean squared error alone would keep those from before the discriminator. Before the autoencoder
        has listened to the discriminator nothing is blamed on it."""
        complaint = self.monitor.complaint(metrics)
        if complaint is None or step <= self.phase.listens:
            return Verdict(keep=all(math.isfinite(value) for value in metrics.values()))
        return Verdict(
            keep=False,
            warning=f"reconstructions have got worse with the adversarial loss: {complaint}; try {self.remedies()}",
            roll_back=self.config.rollback and bad_before + 1 >= self.config.rollback_patience,
        )

    def remedies(self) -> str:
        config = self.config
        remedies = [f"a smaller adversarial.weight than {config.weight}", "a longer adversarial.warmup and ramp"]
        if not config.lecam_weight:
            remedies.append("adversarial.lecam_weight=0.01")
        if not config.r1_weight and not isinstance(config.discriminator, FeatureDiscriminatorConfig):
            remedies.append("adversarial.r1_weight=1")
        if not config.rollback:
            remedies.append("adversarial.rollback=true")
        return ", or ".join(remedies)

    def rolled_back(self, step: int, rollbacks: int) -> None:
        """The phase begins again now: warm-up, ramp, and half the weight."""
        self.phase = Phase(*(begin + step - self.phase.learns for begin in self.phase))
        self.rollbacks = rollbacks
        self.discard()

    def state(self) -> dict[str, Any]:
        begun = {"first": self.first, "warmup_steps": self.warmup_steps}
        return {"phase": list(self.phase), "rollbacks": self.rollbacks, **begun}

    def load_state(self, state: dict[str, Any]) -> None:
        self.phase, self.rollbacks = Phase(*state["phase"]), state["rollbacks"]
        self.first = state.get("first", self.first)  # a run that is given more steps keeps what it began with
        self.warmup_steps = state.get("warmup_steps", self.warmup_steps)


def take_former_counters(adversary: Adversary, tensors: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Reads a checkpoint from before the loop counted steps: it held all counters as tensors."""
    former = {name: tensors.pop(prefix + name, None) for name in ("step", "phase", "updates", "skipped", "rollbacks")}
    if former["phase"] is not None:
        adversary.load_state({"phase": former["phase"].tolist(), "rollbacks": int(former["rollbacks"])})
        if not int(former["updates"]):
            tensors[prefix + "averages"] = torch.full((2,), math.nan)


@contextmanager
def full_precision_for_float16(device: str) -> Iterator[None]:
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not half):
        yield
