"""Hierarchical prior of VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446, section 3.2): a prior for each level of codes.

The top level is modelled by itself, every other one given all levels above it:

    p(codes) = p(top) p(middle | top) p(bottom | top, middle)

The levels share nothing but the condition. So they can be trained as one model, or each as a model of its own and be
joined afterwards (`train-stage2 --level`, `from_levels`): the same, weight for weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from common.model_io import take_types
from common.wording import an
from stage2_prior.condition import Condition
from stage2_prior.priors.base import NO_CODE, AutoregressivePrior, Places, Prior
from stage2_prior.priors.pixelcnn import PixelCNN, PixelCNNConfig
from stage2_prior.priors.pixelsnail import PixelSNAIL, PixelSNAILConfig
from stage2_prior.priors.transformer import Transformer
from stage2_prior.priors.transformer_layers import TransformerConfig
from stage2_prior.stepping import Stepper

LEVEL_PRIORS: dict[str, type[AutoregressivePrior]] = {
    "pixelsnail": PixelSNAIL,
    "pixelcnn": PixelCNN,
    "transformer": Transformer,
}
LevelConfig = PixelSNAILConfig | PixelCNNConfig | TransformerConfig


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig:
    """A prior for each level, each of any kind that can be given codes."""

    kind: Literal["hierarchical"] = "hierarchical"
    top: LevelConfig = field(default_factory=PixelSNAILConfig)  # of the coarsest level
    middle: LevelConfig = field(default_factory=PixelSNAILConfig)  # of every level between; of two levels there is none
    bottom: LevelConfig = field(default_factory=PixelSNAILConfig)  # of the finest level

    def level(self, number: int, levels: int) -> LevelConfig:
        """Of level `number` of so many, 0 the top."""
        return self.top if number == 0 else self.bottom if number == levels - 1 else self.middle


def prior_of_level(
    config: HierarchicalConfig, code_spec: CodeSpec, level: int, num_classes: int, **facts: Any
) -> AutoregressivePrior:
    """A prior of one level, 0 the top, of codes `code_spec`: it models one grid and is given those above it. facts: as
    for `Prior`. Raises UserError where there is no such level."""
    grids = code_spec.grids
    if len(grids) < 2:
        raise UserError(
            f"got codes of one grid ({code_spec.describe()}), expected several levels, as a vqvae2 autoencoder makes "
            "them; for one grid take a pixelsnail, pixelcnn or transformer prior by itself"
        )
    if not 0 <= level < len(grids):
        raise UserError(f"level={level}, expected 0 to {len(grids) - 1}: the codes are {code_spec.describe()}")
    own = config.level(level, len(grids))
    given = (*facts.pop("given", ()), *grids[:level])
    spec = replace(code_spec, grids=(grids[level],))
    return LEVEL_PRIORS[own.kind](own, spec, num_classes, given=given, **facts)


class Hierarchical(AutoregressivePrior):
    """Codes of several levels, coarse to fine, a grid each. Raises UserError when there is but one."""

    kind = "hierarchical"
    config_class = HierarchicalConfig
    config: HierarchicalConfig

    def __init__(self, config: HierarchicalConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        self.levels = nn.ModuleList(
            prior_of_level(config, code_spec, level, num_classes, given=self.given)
            for level in range(len(code_spec.grids))
        )

    def place_tables(self) -> dict[str, Places]:
        levels: Any = self.levels
        return {
            f"levels.{number}.{name}": places
            for number, level in enumerate(levels)
            for name, places in level.place_tables().items()
        }

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        config = arguments.pop("config")
        levels = {name: config[name] for name in ("top", "middle", "bottom")}
        built = {name: LEVEL_PRIORS[values["kind"]].config_class(**values) for name, values in levels.items()}
        return super().from_arguments(config={**config, **built}, **arguments)

    @classmethod
    def from_levels(cls, priors: Sequence[Prior]) -> Self:
        """One prior of those of all levels, in any order, with their weights. Raises UserError unless they are the
        levels of one hierarchy: each given the grids of all others above it, trained on codes of one autoencoder, with
        the same classes."""
        levels = sorted(priors, key=lambda prior: len(prior.given))
        check_levels(levels)
        top, middle, bottom = levels[0], levels[len(levels) // 2], levels[-1]
        joined = cls(
            HierarchicalConfig(top=top.config, middle=middle.config, bottom=bottom.config),
            replace(top.code_spec, grids=tuple(grid for level in levels for grid in level.code_spec.grids)),
            top.num_classes,
            given=top.given,
            text=top.text,
            embeddings=top.embeddings,
            class_names=top.class_names,
            stage1_fingerprint=top.stage1_fingerprint,
            given_fingerprint=top.given_fingerprint,
            knows_null_label=all(level.knows_null_label for level in levels),
        )
        for own, level in zip(joined.levels, levels, strict=True):
            take_types(own, level.state_dict())
            own.load_state_dict(level.state_dict())
        joined.training_images = top.training_images
        return joined.eval()

    # ---- the levels, each with what it is given ---------------------------------------------------------------------

    def level(self, number: int) -> AutoregressivePrior:
        return cast(AutoregressivePrior, self.levels[number])

    def each(self, codes: Codes, condition: Condition) -> list[tuple[AutoregressivePrior, Codes, Condition]]:
        """Each level's prior, codes and condition. Raises UserError as `sequence` does."""
        super().sequence(codes, condition)
        known = (*(condition.codes or ()), *codes)
        first = len(self.given)
        return [
            (self.level(number), codes[number : number + 1], below(condition, known[: first + number]))
            for number in range(len(codes))
        ]

    def sequence(self, codes: Codes, condition: Condition) -> Tensor:
        """`b n`: level after level, each in its own order."""
        return torch.cat([prior.sequence(own, given) for prior, own, given in self.each(codes, condition)], dim=1)

    def grids_of(self, sequence: Tensor) -> tuple[Tensor, ...]:
        parts = sequence.split([grid.size for grid in self.code_spec.grids], dim=1)
        return tuple(self.level(number).grids_of(part)[0] for number, part in enumerate(parts))

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        logits = [prior.logits(own, given) for prior, own, given in self.each(codes, condition)]
        largest = max(part.shape[-1] for part in logits)
        return torch.cat([F.pad(part, (0, largest - part.shape[-1]), value=NO_CODE) for part in logits], dim=1)

    def nll(self, codes: Codes, condition: Condition) -> Tensor:
        return torch.cat([prior.nll(own, given) for prior, own, given in self.each(codes, condition)], dim=1)

    @property
    def numbers_kept(self) -> int:
        return max(self.level(number).numbers_kept for number in range(len(self.levels)))

    @property
    def steps(self) -> int:
        return sum(self.level(number).steps for number in range(len(self.levels)))

    def stepper(self, batch: int, condition: Condition) -> HierarchicalStepper:
        return HierarchicalStepper(self, batch, condition)


def check_levels(levels: Sequence[Prior]) -> None:
    """Raises UserError unless the priors are levels of one hierarchy, coarse to fine."""
    top, known = levels[0], levels[0].given
    for number, level in enumerate(levels):
        if level.kind not in LEVEL_PRIORS or len(level.code_spec.grids) > 1:
            raise UserError(
                f"{an(level.kind)} prior of {level.code_spec.describe()} is no level of a hierarchy, expected one of "
                f"kind {' or '.join(LEVEL_PRIORS)} that models one grid; train it by `zellige train-stage2 --level`"
            )
        if level.given != known:
            raise UserError(
                f"the levels do not belong together: the prior of {described(level.code_spec.grids)} goes by "
                f"{described(level.given)}, the others are of {described(known)}; name one run for each level"
            )
        for fact in ("stage1_fingerprint", "given_fingerprint", "num_classes", "class_names", "text", "embeddings"):
            of_top, own = getattr(top, fact), getattr(level, fact)
            if own != of_top:
                raise UserError(
                    f"the levels do not belong together: {fact} is {of_top} of level 0 and {own} of level {number}; "
                    "train all of them on the same codes"
                )
        if 1 < number < len(levels) - 1 and level.config != levels[1].config:
            raise UserError(
                f"the levels do not belong together: level {number} has another config than level 1, expected one for "
                "all levels between top and bottom; train them with one recipe"
            )
        known = (*known, *level.code_spec.grids)


def below(condition: Condition, codes: Codes) -> Condition:
    """The condition of a level that is given `codes`."""
    return replace(condition, codes=codes or None)


def described(grids: Sequence[Grid]) -> str:
    return " + ".join(f"{grid.height}x{grid.width} codes of {grid.vocabulary}" for grid in grids) or "no codes"


class HierarchicalStepper:
    """The levels' steppers, one after the other: each is made when the levels above it are known, and dropped with its
    caches when its own codes are."""

    def __init__(
        self,
        prior: Hierarchical,
        batch: int,
        condition: Condition,
        stepper_of: Callable[[AutoregressivePrior, int, Condition], Stepper] | None = None,
    ):
        """stepper_of: makes a level's; None: its own `stepper`."""
        prior.check(batch, condition)
        self.prior = prior
        self.stepper_of = stepper_of or (lambda level, batch, condition: level.stepper(batch, condition))
        self.batch = batch
        self.device = next(prior.parameters()).device
        self.condition = condition.to(self.device)
        # All levels compute in the type that the first one does.
        kind = self.device.type
        self.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.known: Codes = self.condition.codes or ()  # of the levels above, and of what the prior itself is given
        self.level = 0
        self.chosen: list[Tensor] = []  # codes of this level, each b m
        self.stepper = self.begin()

    def begin(self) -> Stepper:
        enabled, dtype = self.autocast
        with torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
            return self.stepper_of(self.prior.level(self.level), self.batch, below(self.condition, self.known))

    def next(self, previous: Tensor | None) -> Tensor:
        if previous is not None:
            self.chosen.append(previous)
            if sum(codes.shape[1] for codes in self.chosen) == self.prior.code_spec.grids[self.level].size:
                self.known += self.prior.level(self.level).grids_of(torch.cat(self.chosen, dim=1))
                self.level, self.chosen, previous = self.level + 1, [], None
                self.stepper = self.begin()
        return self.stepper.next(previous)
