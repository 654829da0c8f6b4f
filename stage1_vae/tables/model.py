"""What training and commands ask of every likelihood VAE of tables."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from common.errors import UserError
from common.model_io import PretrainedModel
from stage1_vae.model import Move
from stage1_vae.networks.batch_norm import forget_all_noted, take_all_noted
from stage1_vae.objectives.terms import Terms
from stage1_vae.tables.data import Table


class TableVAE(PretrainedModel):
    """Rows, b r float32 as `rows` makes them of a table, <-> latents."""

    config: Any
    columns: tuple[str, ...]  # p, the names of the numbers that are modelled
    noise_size: int  # normal numbers that one draw of a row's latents takes, and of whatever else is drawn with them

    def rows(self, table: Table) -> Tensor:
        """n r of the rows of a table that has this model's columns. Raises UserError for one that has not."""
        raise NotImplementedError

    def forward(self, rows: Tensor, draws: int = 1, noise: Tensor | None = None, move: Move | None = None) -> Terms:
        """What objectives are made of: of rows b r, and of `draws` draws of the latents of each, or those of `noise`,
        k b noise_size, standard normal. `move` replaces the draws before anything is computed of them."""
        raise NotImplementedError

    def generator_parameters(self) -> list[nn.Parameter]:
        """The weights of p(z) and p(x|z), and of which numbers are missing where that is modelled: all but those of
        q(z|x)."""
        raise NotImplementedError

    def after_step(self) -> None:
        """After each optimiser step, but not after a skipped one: takes up what the step's forward passes noted."""
        take_all_noted(self)

    def discard_step(self) -> None:
        """After a skipped step, in place of `after_step`: forgets what its forward passes noted."""
        forget_all_noted(self)

    def encode(self, rows: Tensor) -> Tensor:
        """The means of their posteriors, b d."""
        raise NotImplementedError

    def check_has_columns(self, table: Table) -> None:
        """Raises UserError for a table without one of this model's columns."""
        if missing := [name for name in self.columns if name not in table.header]:
            raise UserError(
                f"{table.path} has no column {missing[0]!r}, expected all {len(self.columns)} columns that this model "
                "was trained on, in any order, others beside them"
            )
