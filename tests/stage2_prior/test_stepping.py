"""The loop over steps, and guidance as one doubled batch."""

from __future__ import annotations

import torch
from torch import Tensor

from stage2_prior.stepping import GuidedStepper, step_dtype, walk


class Counting:
    """Logits that say what was given: the step, and the last of the previous codes. Step i answers `sizes[i]` codes."""

    def __init__(self, batch: int, sizes: tuple[int, ...]):
        self.batch, self.sizes, self.step = batch, sizes, 0

    def next(self, previous: Tensor | None) -> Tensor:
        known = torch.full((self.batch,), -1) if previous is None else previous[:, -1]
        logits = torch.stack([torch.full((self.batch,), self.step), known], dim=1).float()
        self.step += 1
        return logits[:, None].expand(-1, self.sizes[self.step - 1], -1)


def test_walk_hands_each_choice_to_the_next_step():
    seen = []

    def choose(position: int, logits: Tensor) -> Tensor:
        seen.append((position, *logits[0, 0].tolist()))
        return torch.tensor([[10 * position], [10 * position + 1]])

    codes = walk(Counting(2, (1, 1, 1)), 3, choose)
    assert codes.tolist() == [[0, 10, 20], [1, 11, 21]]
    assert seen == [(0, 0.0, -1.0), (1, 1.0, 0.0), (2, 2.0, 10.0)]


def test_walk_takes_steps_of_many_codes():
    seen = []

    def choose(position: int, logits: Tensor) -> Tensor:
        seen.append((position, logits.shape[1], *logits[0, 0].tolist()))
        return torch.arange(position, position + logits.shape[1]).expand(2, -1)

    codes = walk(Counting(2, (1, 2, 3)), 6, choose)
    assert codes.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert seen == [(0, 1, 0.0, -1.0), (1, 2, 1.0, 0.0), (3, 3, 2.0, 2.0)]


def test_guided_stepper_gives_both_halves_the_same_codes_and_moves_beyond_the_label():
    class Doubled:
        def next(self, previous: Tensor | None) -> Tensor:
            self.previous = previous
            return torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]], [[0.0, 1.0]], [[1.0, 1.0]]])

    doubled = Doubled()
    guided = GuidedStepper(doubled, [3.0, 0.0, 1.0])  # another weight at each step
    assert guided.next(None).tolist() == [[[3.0, 4.0]], [[7.0, 13.0]]]
    assert doubled.previous is None
    assert guided.next(torch.tensor([[7], [8]])).tolist() == [[[0.0, 1.0]], [[1.0, 1.0]]]
    assert doubled.previous.tolist() == [[7], [8], [7], [8]]
    assert guided.next(torch.tensor([[7], [8]])).tolist() == [[[1.0, 2.0]], [[3.0, 5.0]]]


def test_a_stepper_computes_in_the_type_of_autocast_or_of_the_weights():
    weight = torch.zeros(1)
    assert step_dtype(weight) == torch.float32
    assert step_dtype(weight.bfloat16()) == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert step_dtype(weight) == torch.bfloat16
