"""Each tensor finds its place, or all is refused with names that the file knows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.renaming import load_renamed, renamed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(2, 3, 1)
        self.register_buffer("steps", torch.tensor(7))


def original_name(key: str) -> str | None:
    return None if key == "steps" else key.replace("body.", "theirs.")


def weights() -> dict[str, Tensor]:
    return {"theirs.weight": torch.randn(3, 2, 1, 1), "theirs.bias": torch.randn(3), "loss.scale": torch.ones(1)}


@pytest.mark.parametrize("as_linear", [False, True])
def test_tensors_find_their_place(as_linear):
    model, given = Model(), weights()
    given["theirs.weight"] = given["theirs.weight"].double()
    sent = {**given, "theirs.weight": given["theirs.weight"].view(3, 2)} if as_linear else given
    load_renamed(model, sent, original_name, ignored=r"loss\.")
    assert torch.equal(model.body.weight, given["theirs.weight"].float())
    assert model.body.weight.dtype == torch.float32
    assert torch.equal(model.body.bias, given["theirs.bias"])
    assert model.steps == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theirs.bias": None}, r"\(missing: theirs.bias\); check --kind"),
        ({"theirs.weight": torch.zeros(3, 4, 1, 1)}, r"\(wrong shapes: theirs.weight is 3x4x1x1, not 3x2x1x1\)"),
        ({"theirs.bias": torch.zeros(())}, r"theirs.bias is a single number, not 3\)"),
        ({"more": torch.zeros(1)}, r"\(not expected: more\)"),
        ({"theirs.bias": None, "x": torch.zeros(1), "y": torch.zeros(1), "z": torch.zeros(1), "zz": torch.zeros(1)},
         r"\(missing: theirs.bias; not expected: x, y, z and 1 more\)"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_and_the_model_is_left_alone(change, message):
    model = Model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    given = {name: tensor for name, tensor in {**weights(), **change}.items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        load_renamed(model, given, original_name, ignored=r"loss\.")
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_rules_apply_in_order():
    rules = {r"^a\.": "b.", r"^b\.(\d)": r"c.\1\1", r"c\.(\d+)": lambda match: f"d.{int(match[1]) + 1}"}
    assert renamed("a.4.x", rules) == "d.45.x"
