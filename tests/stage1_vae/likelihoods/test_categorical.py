from __future__ import annotations

import pytest
import torch

from stage1_vae.likelihoods.categorical import Categorical, CategoricalConfig


def test_the_logits_of_one_channel_stand_together():
    """The first 256 outputs are of the first channel: level v of channel c is output 256 c + v."""
    likelihood = Categorical(CategoricalConfig(), 3)
    outputs = torch.zeros(768, 1, 1)
    for channel, level in enumerate((7, 130, 255)):
        outputs[256 * channel + level] = 30.0
    images = torch.tensor([7, 130, 255]).view(3, 1, 1) / 127.5 - 1
    assert likelihood.log_prob(outputs, images).item() == pytest.approx(0, abs=1e-6)
    for found in (likelihood.mean(outputs), likelihood.mode(outputs), likelihood.sample(outputs)):
        torch.testing.assert_close(found, images)
