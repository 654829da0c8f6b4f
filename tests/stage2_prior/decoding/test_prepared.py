"""What is made of the weights for sampling: once, and anew when a weight has changed."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from stage2_prior.decoding.prepared import KEPT, for_a_single_row, prepared
from stage2_prior.priors import Prior
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.stage2_prior.tiny import labelled, tiny_prior

PREPARING = ["transformer", "mingpt", "llamagen", "rq_transformer", "var", "infinity"]


def in_place(prior: Prior) -> None:
    with torch.no_grad():
        next(prior.parameters()).mul_(1.5)


def load(prior: Prior) -> None:
    prior.load_state_dict({name: 1.5 * tensor for name, tensor in prior.state_dict().items()})


def train(prior: Prior) -> None:
    optimizer = torch.optim.AdamW(prior.parameters(), lr=0.1, fused=True)
    sum(parameter.sum() for parameter in prior.parameters()).backward()
    optimizer.step()


def there_and_back(prior: Prior) -> None:
    """The memory of the weights is free in between, and may be had again."""
    prior.bfloat16()
    gc.collect()
    prior.float()


def replace(prior: Prior) -> None:
    name = next(name for name, _ in prior.named_parameters())
    module, _, leaf = name.rpartition(".")
    setattr(prior.get_submodule(module), leaf, nn.Parameter(1.5 * prior.get_parameter(name).detach()))


@pytest.mark.parametrize("change", [in_place, load, train, there_and_back, replace])
def test_it_is_made_anew_when_a_weight_has_changed(change: Callable[[Prior], None]):
    prior, made = tiny_prior("transformer"), list[float]()

    def make() -> float:
        made.append(float(sum(parameter.double().abs().sum() for parameter in prior.parameters())))
        return made[-1]

    assert prepared(prior, "sum", make) == prepared(prior, "sum", make) == made[0]
    assert len(made) == 1
    change(prior)
    assert prepared(prior, "sum", make) == prepared(prior, "sum", make) == made[1] != made[0]
    assert len(made) == 2
    prepared(prior, "another", make)
    assert len(made) == 3


def test_what_was_made_last_for_one_row_or_for_more_is_kept_alone():
    prior, made = tiny_prior("transformer"), list[bool]()

    def make() -> int:
        made.append(for_a_single_row())
        return len(made)

    assert [prepared(prior, "kind", make, rows) for rows in (4, 8, None, 1, 1, 2)] == [1, 1, 1, 2, 2, 3]
    assert made == [False, True, False]
    assert not for_a_single_row()


@pytest.mark.parametrize("kind", PREPARING)
def test_samples_are_those_of_a_fresh_model_with_the_same_weights(kind):
    prior = tiny_prior(kind)

    def sampled(model: Prior) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
            return list(sample_codes(model, range(4), labelled(4, model), 0, SamplingConfig()))

    before = sampled(prior)
    for change in (in_place, train, load, there_and_back):
        change(prior)
        drawn = sampled(prior)
        assert all(map(torch.equal, drawn, sampled(copy.deepcopy(prior))))
    assert not all(map(torch.equal, before, drawn))
    prior.train()  # another type beside it
    assert all(map(torch.equal, sampled(prior), sampled(copy.deepcopy(prior))))
    prior.eval()
    assert all(map(torch.equal, sampled(prior), drawn))


@pytest.mark.parametrize("kind", PREPARING)
def test_batches_share_it_and_no_copy_has_it(kind):
    prior = tiny_prior(kind)
    names, size = list(prior.state_dict()), saved(prior)
    prior.stepper(3, labelled(3, prior))
    (made,) = (kept := KEPT[prior]).made.values()
    prior.stepper(5, labelled(5, prior))
    assert KEPT[prior] is kept
    assert list(kept.made.values()) == [made]
    assert list(prior.state_dict()) == names
    assert saved(prior) == size
    assert copy.deepcopy(prior) not in KEPT


def saved(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.tell()


def test_it_goes_with_the_model():
    prior = tiny_prior("transformer")
    prior.stepper(3, labelled(3, prior))
    kept = len(KEPT)
    del prior
    gc.collect()
    assert len(KEPT) == kept - 1


def test_writes_around_the_counter_are_noticed():
    """Of a weight of an odd number of halves, and one that inference mode made, which has no counter."""
    with torch.inference_mode():
        uncounted = nn.Linear(2, 2, bias=False)
    for model in (uncounted, nn.Linear(3, 1, bias=False).bfloat16()):
        first = prepared(model, "copy", lambda model=model: model.weight.clone())
        assert prepared(model, "copy", lambda: None) is first
        with torch.inference_mode():
            model.weight.data[0, 0] += 1
        assert torch.equal(prepared(model, "copy", lambda model=model: model.weight.clone()), model.weight)
