"""What is asked of likelihood VAEs whose images have classes: generating by class, telling the class, another class in
the same style."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import UserError
from stage1_vae.model import LikelihoodVAE, Move
from stage1_vae.objectives.terms import Terms


class LabelledVAE(LikelihoodVAE):
    """Images <-> latents of two groups or more, the first of which is the class as one of K unit vectors.

    config: has `classes` besides.
    """

    class_names: tuple[str, ...] | None = None  # None: classes have numbers only

    @property
    def num_classes(self) -> int:
        return int(self.config.classes)

    def name_classes(self, names: Sequence[str] | None) -> None:
        """Raises UserError for another number of names than there are classes."""
        if names is not None and len(names) != self.num_classes:
            raise UserError(
                f"model.classes={self.num_classes}, but the images have {len(names)} classes, {', '.join(names[:12])}: "
                f"give model.classes={len(names)}"
            )
        self.class_names = None if names is None else tuple(names)

    def terms(
        self,
        images: Tensor,
        draws: int = 1,
        noise: Tensor | None = None,
        move: Move | None = None,
        labels: Tensor | None = None,
    ) -> Terms:
        """`LikelihoodVAE.terms`. labels: b, int64, -1 where the class of an image is not known; None: nowhere.

        Of an image without a label the terms are expectations under q(y|x), a sum over all classes, so that the ELBO is
        -U(x); of one with a label they are those of its class, so that the ELBO is -L(x, y), and `log_posterior` of the
        first group is log q(y|x). The first group's `latents` are the most probable class, the others' are those given
        that class."""
        raise NotImplementedError

    def forward(
        self,
        images: Tensor,
        draws: int = 1,
        noise: Tensor | None = None,
        move: Move | None = None,
        labels: Tensor | None = None,
    ) -> Terms:
        return self.terms(images, draws, noise, move, labels)

    def class_log_probabilities(self, images: Tensor) -> Tensor:
        """log q(y|x) of images, b c H W in [-1, 1]: b K, in nats. Raises UserError for images of another shape."""
        raise NotImplementedError

    def draw_latents(
        self, count: int, generator: torch.Generator | None = None, *, labels: Tensor | None = None
    ) -> Tensor:
        """count *shape, drawn from p(y, z), or, given labels, count, from p(z|y)."""
        raise NotImplementedError

    def in_class(self, latents: Tensor, labels: Tensor) -> Tensor:
        """n *shape, as they are but for the class: the style of each in the class of its label, n."""
        raise NotImplementedError

    def unit_vectors(self, labels: Tensor) -> Tensor:
        """`...` in [0, K) -> `... K`, float32."""
        return torch.nn.functional.one_hot(labels, self.num_classes).float()
