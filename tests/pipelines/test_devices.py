"""The device that is asked for, or one sentence."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from pipelines.devices import open_device


def test_the_cpu_can_be_asked_for():
    assert open_device("cpu")[1] == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xpu"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=rf"device '{name}' cannot be used \(.+\); leave device out"):
        open_device(name)
