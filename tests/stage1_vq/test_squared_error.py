from __future__ import annotations

import torch
import torch.nn.functional as F

from common.layout import lies_place_after_place, place_after_place
from stage1_vq.squared_error import squared_error


def test_the_squared_error_is_that_of_pytorch_and_its_gradient_lies_as_its_input():
    x, target = place_after_place(torch.randn(2, 3, 4, 5)).requires_grad_(), torch.randn(2, 3, 4, 5, requires_grad=True)
    error = squared_error(x, target)
    torch.testing.assert_close(error, F.mse_loss(x, target))
    ours = torch.autograd.grad(3 * error, (x, target))
    theirs = torch.autograd.grad(3 * F.mse_loss(x, target), (x, target))
    torch.testing.assert_close(ours, theirs)
    assert lies_place_after_place(ours[0])
