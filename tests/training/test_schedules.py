from __future__ import annotations

from itertools import pairwise

import pytest

from training.schedules import learning_rate, step_seed


def rates(steps: int = 100, warmup_steps: int = 10, schedule: str = "cosine", final_factor: float = 0.1) -> list[float]:
    return [
        learning_rate(
            step,
            peak=2.0,
            warmup_steps=warmup_steps,
            steps=steps,
            schedule=schedule,
            final_factor=final_factor,
        )
        for step in range(steps)
    ]


def test_warm_up_is_linear_and_no_step_is_wasted_at_zero():
    assert rates()[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert min(rates(final_factor=0.0)) > 0


def test_cosine_falls_from_the_peak_to_the_final_factor():
    after = rates()[10:]
    assert after[0] == 2.0
    assert all(late < early for early, late in pairwise(after))
    assert after[45] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half-way
    assert 0.2 < after[-1] < 0.21


def test_constant_stays_at_the_peak():
    assert set(rates(schedule="constant")[10:]) == {2.0}


def test_a_run_that_is_all_warm_up_is_defined():
    assert rates(steps=5, warmup_steps=5)[-1] == 2.0
    assert rates(steps=5, warmup_steps=50)[-1] == pytest.approx(0.2)


def test_seeds_differ_between_neighbours_and_fit_torch():
    seeds = {step_seed(seed, step, who) for seed in range(4) for step in range(20) for who in (0, 1, "all processes")}
    assert len(seeds) == 4 * 20 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)
