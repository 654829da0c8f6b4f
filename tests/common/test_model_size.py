"""No network is built that is larger than the weights it is to have."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from common import model_size
from common.errors import UserError
from common.files import read_json, write_json
from common.model_size import no_larger_than, of_known_size
from tests.training.toy import ToyModel


def test_a_config_that_claims_a_larger_network_than_its_weights_is_refused(tmp_path: Path, monkeypatch):
    folder = ToyModel(width=8).save_pretrained(tmp_path)
    description = read_json(folder / "config.json")
    description["arguments"]["width"] = 2000
    write_json(folder / "config.json", description)
    with pytest.raises(UserError, match="size mismatch"):  # so few more are let pass
        ToyModel.from_pretrained(folder)
    description["arguments"]["width"] = 10_000_000  # 160 MB
    write_json(folder / "config.json", description)
    written = []
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: written.append(self.weight.numel()))
    with pytest.raises(UserError, match="describes a larger network than that whose weights it has"):
        ToyModel.from_pretrained(folder)
    assert not written


def test_a_buffer_is_held_to_a_limit_and_other_threads_to_none(monkeypatch):
    monkeypatch.setattr(model_size, "LARGEST_BUFFER", 100)
    built = []
    with no_larger_than({"a": torch.zeros(10)}):
        nn.BatchNorm1d(120)
        with pytest.raises(ValueError, match="describes a larger network"):
            nn.BatchNorm1d(121)
        thread = threading.Thread(target=lambda: built.append(nn.BatchNorm1d(121)))
        thread.start()
        thread.join()
    assert len(built) == 1
    nn.BatchNorm1d(121)  # the limit ends with the block


def test_networks_that_a_library_builds_by_their_names_are_not_counted(monkeypatch):
    monkeypatch.setattr(model_size, "MORE", 100)
    with no_larger_than({}):
        with of_known_size():
            nn.Linear(200, 200)
        nn.Linear(9, 10)
        with pytest.raises(ValueError, match="describes a larger network"):
            nn.Linear(1, 1)
