"""Nothing in an exact walk uses an operation that could round otherwise elsewhere: seen on a GPU that is imagined."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from common import exact
from common.exact import SHARE_BITS, numerators_of_softmax
from stage2_prior.exact import WALKS, exact_stepper
from tests.stage2_prior.tiny import condition_for, tiny_prior

ROUNDED_ONCE = {"add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "sqrt", "sqrt_"}
EXACT = {
    "abs", "amax", "clamp", "clamp_", "copysign", "masked_fill", "masked_fill_", "maximum", "neg", "neg_", "relu",
    "relu_", "round", "sign", "where",
}  # fmt: skip
SUMS_OF_NUMBERS_ON_A_GRID = {"sum", "mm", "bmm", "matmul"}
ON_WHOLE_NUMBERS = {
    "__and__",
    "__or__",
    "__rshift__",
    "eq",
    "lt",
    "gt",
    "ge",
    "le",
    "bitwise_and",
    "bitwise_or",
    "logical_not",
}
MOVES = {
    "_to_copy", "_unsafe_view", "alias", "arange", "as_strided", "cat", "chunk", "clone", "constant_pad_nd",
    "contiguous", "copy_", "detach", "detach_", "embedding", "empty", "expand", "fill_", "flatten", "flip", "full",
    "gather", "index", "index_put_", "index_select", "lift_fresh", "mT", "movedim", "narrow", "new_empty", "new_full",
    "new_zeros", "ones", "ones_like", "pad", "permute", "repeat", "repeat_interleave", "reshape", "roll", "select",
    "slice", "split", "split_with_sizes", "squeeze", "squeeze_", "stack", "t", "to", "transpose", "tril_", "triu_",
    "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as", "zero_", "zeros", "zeros_like",
}  # fmt: skip
ADMITTED = ROUNDED_ONCE | EXACT | SUMS_OF_NUMBERS_ON_A_GRID | ON_WHOLE_NUMBERS | MOVES


class OnlyAdmitted(TorchDispatchMode):
    """Fails at an operation that is not admitted, at floats that are not float64 and at factors inside an addition."""

    def __init__(self, more: Set[str] = frozenset()) -> None:
        """more: operations that are admitted besides."""
        super().__init__()
        self.admitted = ADMITTED | more
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        result = function(*arguments, **(settings or {}))
        if function.namespace == "aten":
            name = function.overloadpacket.__name__
            self.seen.add(name)
            assert name in self.admitted, name
            dtypes = {x.dtype for x in arguments if isinstance(x, Tensor) and x.is_floating_point()}
            if name in ROUNDED_ONCE:
                assert dtypes <= {torch.float64}, (name, dtypes)
                assert not (settings or {}).get("alpha"), name
                # a / 3 is a times the inverse of 3 on a GPU
                assert name not in ("div", "div_") or (isinstance(arguments[1], Tensor) and arguments[1].ndim), name
            if name in SUMS_OF_NUMBERS_ON_A_GRID:  # factors of 8 bits: float32
                assert dtypes <= {torch.float64} or dtypes == {torch.float32}, (name, dtypes)
        return result


@pytest.mark.parametrize("kind", list(WALKS))
def test_a_walk_uses_admitted_operations_only(kind):
    prior = tiny_prior(kind)
    exact.powers_of_two.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            prior = prior.to("cuda")
            condition = condition_for(3, prior).to(torch.device("cuda"))
            with OnlyAdmitted() as admitted, torch.inference_mode():
                stepper = exact_stepper(prior, 3, condition)
                previous, done = None, 0
                while done < prior.code_spec.codes_per_image:
                    logits = stepper.next(previous)
                    assert logits.dtype == torch.float64
                    assert logits.device.type == "cuda"
                    (numerators_of_softmax(logits) * 2.0**SHARE_BITS).long()
                    done += logits.shape[1]
                    previous = torch.zeros(logits.shape[:2], dtype=torch.int64, device="cuda")
    finally:
        exact.powers_of_two.cache_clear()  # it holds fake tensors
    assert admitted.seen >= {"add", "amax", "round", "index_select"}


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.exp(),
        lambda x: x.softmax(-1),
        lambda x: x / 3,
        lambda x: torch.add(x, x, alpha=2),
        lambda x: x.float() * 2,
        lambda x: torch.addcmul(x, x, x),
    ],
)
def test_what_is_not_admitted_is_seen(step):
    with OnlyAdmitted(), pytest.raises(AssertionError):
        step(torch.ones(3, dtype=torch.float64))
