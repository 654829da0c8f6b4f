"""Two real processes: how long they wait for each other, and how often they communicate."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.distributed import moments_of_all
from common.errors import UserError
from common.processes import on_main_process, process_state
from common.recompute import Recomputation, blocks_of
from stage1_vq.quantizers import NearestQuantizerConfig, build_quantizer
from tests.processes import Processes
from tests.training.test_companions import CriticTask
from tests.training.toy import toy_config, toy_fit
from training.checkpoint import Checkpoints
from training.saving import Saver
from training.setup import make_accelerator
from training.trainer import Trainer

RESULT = "it returned "


def in_two_processes(processes: Processes, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)` returns in each process, as JSON has it; None where it came to nothing."""
    both = processes.job(one_of_two, work, *arguments)
    for process in both:
        process.wait(120)
    return [json.loads(process.stdout.rpartition(RESULT)[2]) if RESULT in process.stdout else None for process in both]


def one_of_two(work: Callable[..., Any], *arguments: Any) -> None:
    print(RESULT + json.dumps(work(int(os.environ["RANK"]), *arguments)), flush=True)
    os._exit(0)  # without the interpreter's shutdown, as `leave`


# ---- how long -------------------------------------------------------------------------------------------------------

SECOND = 1 / 60


def wait(rank: int, first: float | None, then: float, seconds: float) -> str:
    """Process 0 works alone for so long; timeouts in minutes: of the group as it is made, and of the training."""
    process_state(timeout_minutes=first)
    accelerator = make_accelerator(toy_config(timeout_minutes=then))
    accelerator.wait_for_everyone()
    try:
        return on_main_process(accelerator, lambda: time.sleep(seconds) or "done")
    except UserError as error:
        return str(error)


def test_a_process_waits_as_long_as_the_training_says_and_no_longer(processes: Processes):
    second = in_two_processes(processes, wait, None, SECOND, 2.5)[1]
    assert second.startswith("process 1 has waited for the first one longer than processes wait for each other")
    assert "--train.timeout_minutes" in second


def group_timeout(rank: int) -> float:
    """Seconds, of those who write shares together."""
    process_state()
    checkpoints, accelerator = Checkpoints(Path("nowhere"), 1), make_accelerator(toy_config())
    saver = Saver(checkpoints, accelerator, shares=True, background=True, timeout_minutes=90.0)
    return saver.group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_processes_that_write_shares_wait_as_long_as_the_training_says(processes: Processes):
    assert in_two_processes(processes, group_timeout) == [5400.0, 5400.0]


def test_long_work_of_the_first_process_survives_under_a_longer_timeout_than_the_group_began_with(processes: Processes):
    assert in_two_processes(processes, wait, SECOND, 1.0, 2.5) == ["done", "done"]


# ---- how often ------------------------------------------------------------------------------------------------------


def counted(work: Callable[[], Any]) -> dict[str, int]:
    """Collectives that `work` takes part in, by their names, those of C++ included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return dict(Counter(event.name for event in profile.events() if event.name.startswith("gloo:")))


def collectives_of_steps(rank: int, folder: Path, accumulate: int) -> list[dict[str, int]]:
    """Of each step of the toy, with a companion that learns."""
    found: list[dict[str, int]] = []
    step = Trainer.step

    def counted_step(trainer: Trainer, stop: Any) -> Any:
        report: list[Any] = []
        found.append(counted(lambda: report.append(step(trainer, stop))))
        return report[0]

    Trainer.step = counted_step  # type: ignore[method-assign]
    config = toy_config(steps=3, accumulate=accumulate, validate_every=0, save_every=100)
    toy_fit(folder / str(accumulate), config, CriticTask())
    return found


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_exchanges_gradients_once_however_many_micro_batches_it_has(
    processes: Processes, tmp_path: Path, accumulate: int
):
    for steps in in_two_processes(processes, collectives_of_steps, tmp_path, accumulate):
        # Gradients of the model, gradients of the companion, figures, and what the toy's after_step averages.
        assert steps[-1] == {"gloo:all_reduce": 4}  # in the second step DDP lays out its buckets anew


def run_of_one_s_wishes(rank: int, run: Path) -> list[Any]:
    """For process 1 alone an hour goes by before step 4, and a signal comes in step 8."""
    step = Trainer.step

    def wishing_step(trainer: Trainer, stop: Any) -> Any:
        if rank == 1 and trainer.progress.step == 3:
            trainer.save_clock -= 3600
        if rank == 1 and trainer.progress.step == 7:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(trainer, stop)

    Trainer.step = wishing_step  # type: ignore[method-assign]
    result = toy_fit(run, toy_config(validate_every=0, save_every=100, save_minutes=50.0, keep_newest=9))
    return [result.steps_done, result.stopped_by]


def test_all_processes_save_and_stop_where_one_is_asked_to(processes: Processes, tmp_path: Path):
    assert in_two_processes(processes, run_of_one_s_wishes, tmp_path) == [[8, "signal"], [8, "signal"]]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000008"]


class Normed(nn.Module):
    """Batch norm by the batch of all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, _ = moments_of_all(self.linear(x))
        return ((x - mean) / (variance + 0.1).sqrt()).tanh()


def collectives_of_norms(rank: int) -> list[Any]:
    """Of a forward and backward pass, without and with recomputation, and the gradients."""
    process_state()
    torch.manual_seed(0)
    model, found = nn.Sequential(Normed(), Normed()), []
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
    for blocks in ([], blocks_of(model)):
        model.zero_grad()

        def passes(blocks: list[nn.Module] = blocks) -> None:
            with Recomputation(blocks).on():
                loss = model(x).square().sum()
            loss.backward()

        count = counted(passes)
        found.append([count, [weight.grad.tolist() for weight in model.parameters()]])
    return found


def test_recomputed_blocks_communicate_no_more_than_others(processes: Processes):
    for plain, recomputed in in_two_processes(processes, collectives_of_norms):
        assert plain[0]["gloo:all_reduce"] == 8  # two norms with two sums each, and their gradients
        assert recomputed == plain


def collectives_of_a_codebook(rank: int) -> list[dict[str, int]]:
    """Of four micro-batches, and of the codebook's move."""
    process_state()
    torch.manual_seed(0)
    settings = NearestQuantizerConfig(codebook_size=4, dim=2, revive_after=100)
    quantizer = build_quantizer(settings).train()
    micro_batches = counted(lambda: [quantizer(torch.randn(2, 2, 3, 3)) for _ in range(4)])
    return [micro_batches, counted(lambda: quantizer.update())]


def test_a_codebook_communicates_when_it_moves_and_not_in_micro_batches(processes: Processes):
    for micro_batches, move in in_two_processes(processes, collectives_of_a_codebook):
        assert micro_batches == {}
        assert move == {"gloo:all_reduce": 2}  # how often each code was used, and the sums of its latents
