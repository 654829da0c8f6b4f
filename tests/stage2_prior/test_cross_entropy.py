"""The loss of the codes against PyTorch's own, in values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stage2_prior import cross_entropy
from stage2_prior.cross_entropy import nll_of, smoothed_nll_of


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits 3 5 7, codes 3 5 and a gradient of each code's nll."""
    torch.manual_seed(0)
    logits = (4 * torch.randn(3, 5, 7)).to(dtype).requires_grad_()
    return logits, torch.randint(7, (3, 5)), torch.randn(3, 5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("at_once", [1, 21, 1000])  # a row, three rows, all of them
def test_values_and_gradients_are_those_of_the_plain_computation(dtype, tolerance, at_once, monkeypatch):
    monkeypatch.setattr(cross_entropy, "AT_ONCE", at_once)
    logits, codes, gradient = example(dtype)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact.transpose(1, 2), codes, reduction="none")
    expected.backward(gradient)
    nll = nll_of(logits * 1, codes)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), expected, rtol=0, atol=2e-6)
    nll.backward(gradient)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=0, atol=tolerance)


def test_codes_without_a_chance_have_no_gradient():
    logits = torch.tensor([[1.0, -1e4, 2.0]], requires_grad=True)
    nll_of(logits * 1, torch.tensor([0])).sum().backward()
    expected = torch.tensor([1.0, 2.0]).softmax(0) - torch.tensor([1.0, 0.0])
    torch.testing.assert_close(logits.grad, torch.tensor([[expected[0], 0.0, expected[1]]]))


def test_logits_in_another_order_are_read_as_they_are():
    """As a convolution has them, b k n."""
    logits, codes, gradient = example()
    nll_of((logits * 1).transpose(1, 2).contiguous().transpose(1, 2), codes).backward(gradient)
    found, logits.grad = logits.grad, None
    nll_of(logits * 1, codes).backward(gradient)
    assert torch.equal(found, logits.grad)


def test_a_second_backward_pass_is_refused():
    logits, codes, gradient = example()
    nll = nll_of(logits * 1, codes)
    nll.backward(gradient, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nll.backward(gradient)


def test_without_gradients_the_logits_stay():
    logits, codes, _ = example()
    before = logits.detach().clone()
    with torch.no_grad():
        nll_of(logits, codes)
    assert torch.equal(logits, before)


def test_a_compiled_model_takes_the_plain_way(monkeypatch):
    logits, codes, gradient = example()
    nll_of(logits * 1, codes).backward(gradient)
    found, logits.grad = logits.grad, None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    nll_of(logits, codes).backward(gradient)
    torch.testing.assert_close(found, logits.grad, rtol=0, atol=5e-6)


def test_smoothing_is_that_of_pytorch():
    logits, codes, gradient = example()
    expected = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none", label_smoothing=0.1)
    expected.backward(gradient)
    slope, logits.grad = logits.grad, None
    nll = smoothed_nll_of(logits, codes, 0.1)
    nll.backward(gradient)
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(logits.grad, slope)
