"""The averages of batch norms: torch's, but that they move once in a step, and not by one that is skipped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stage1_vae.hierarchies.markov import MarkovConfig, MarkovHierarchy
from stage1_vae.networks import batch_norm
from stage1_vae.networks.batch_norm import BatchNorm, batch_norms
from stage1_vae.objectives import ELBOConfig, TrainingFacts, build_objective
from stage1_vae.tables.counts import Counts, CountsConfig
from stage1_vae.tables.train import TableTask
from stage1_vae.task import VAETask

BATCH = 8


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 2, 2)], ids=["n c", "n c h w"])
@pytest.mark.parametrize("processes", [False, True], ids=["one process", "several"])
def test_a_step_of_one_batch_is_torchs(shape: tuple[int, ...], processes: bool, monkeypatch: pytest.MonkeyPatch):
    """On several processes too, of which the others have no images here."""
    monkeypatch.setattr(batch_norm, "several_processes", lambda: processes)
    ours = BatchNorm(3, step=0.2, eps=1e-2)
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(3, momentum=0.2, eps=1e-2)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = 3 + 2 * torch.randn(shape)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.take_noted()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def ladder() -> tuple[VAETask, dict[str, Tensor]]:
    config = MarkovConfig(latents=(3, 2), hidden=(4, 4), inference="top_down", batch_norm=True)
    model = MarkovHierarchy(config, (4, 4)).train()
    objective = build_objective(ELBOConfig(), TrainingFacts(BATCH, 4, ((3,), (2,)), tuple(model.parameters())))
    data = {"images": torch.randint(2, (BATCH, 1, 4, 4)).float() * 2 - 1}
    return VAETask(model, objective, None, batch_size=BATCH), data


def counts() -> tuple[TableTask, dict[str, Tensor]]:
    model = Counts(CountsConfig(hidden=5, latents=2), ["a", "b", "c"]).train()
    objective = build_objective(ELBOConfig(), TrainingFacts(BATCH, 4, (2,), tuple(model.parameters())))
    return TableTask(model, objective, batch_size=BATCH), {"rows": torch.randint(1, 20, (BATCH, 3)).float()}


def take_step(task: VAETask | TableTask, data: dict[str, Tensor], parts: int = 1) -> None:
    """The forward passes of one."""
    numbered = {**data, "draws": torch.arange(BATCH), "numbers": torch.arange(BATCH)}
    for part in range(parts):
        task.step(task.vae, {name: values.chunk(parts)[part] for name, values in numbered.items()}, 0)


def validation(task: VAETask | TableTask, data: dict[str, Tensor]) -> dict[str, Tensor]:
    task.vae.eval()
    found = task.validate(task.vae, {**data, "numbers": torch.arange(BATCH)})
    task.vae.train()
    return found


@pytest.mark.parametrize("kind", [ladder, counts])
@torch.no_grad()
def test_a_skipped_step_leaves_no_trace(kind):
    task, data = kind()
    take_step(task, data)
    task.after_step(0)
    buffers, figures = [buffer.clone() for buffer in task.vae.buffers()], validation(task, data)
    assert all(figure.isfinite().all() for figure in figures.values())
    (values,) = data.items()
    for passed in (values[1] * math.inf, values[1].flip(0) + 1):  # not finite; of a gradient that is too large
        take_step(task, {values[0]: passed})
        task.discard_step()
        task.after_step(1)  # has nothing to take
        assert all(torch.equal(*pair) for pair in zip(buffers, task.vae.buffers(), strict=True))
        assert all(torch.equal(figure, figures[name]) for name, figure in validation(task, data).items())


@pytest.mark.parametrize("kind", [ladder, counts])
@torch.no_grad()
def test_averages_move_once_a_step_however_many_micro_batches(kind):
    task, data = kind()
    norm, seen = batch_norms(task.vae)[0], []
    norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    take_step(task, data, parts=2)
    assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
    task.after_step(0)
    means = torch.stack([part.mean(0) for part in seen])
    assert [len(part) for part in seen] == [BATCH // 2] * 2
    torch.testing.assert_close(norm.running_mean, norm.step * means.mean(0))
    assert {int(one.num_batches_tracked) for one in batch_norms(task.vae)} == {1}
