"""What every test gets."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test that draws random numbers draws the same ones each time, alone or among others."""
    torch.manual_seed(0)
