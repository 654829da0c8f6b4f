"""Saved models keep their names: the state dict of each quantizer, and what a fingerprint takes of its config, are
those of the build of 2026-11-28. A prior knows its autoencoder by the fingerprint alone.

`fingerprints.json` was written by that build: `python -m tests.stage1_vq.test_fingerprints`, for rows that it lacks.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stage1_vq.autoencoders import VQVAE, VQVAEConfig
from tests.stage1_vq.tiny import QUANTIZER_ROWS

FROZEN = Path(__file__).with_name("fingerprints.json")


def fingerprint_of(row: str) -> str:
    """Of a model whose weights follow from their names."""
    config = VQVAEConfig(width=8, residual_width=4, residual_blocks=1, quantizer=QUANTIZER_ROWS[row])
    model = VQVAE(config, (16, 16))
    for number, (_, tensor) in enumerate(sorted(model.state_dict().items())):
        tensor.copy_((torch.arange(tensor.numel()) % 97 + number).view(tensor.shape).to(tensor.dtype) / 8)
    return model.fingerprint()


def frozen() -> dict[str, str]:
    return json.loads(FROZEN.read_text())


def test_every_quantizer_has_its_row():
    assert frozen().keys() == QUANTIZER_ROWS.keys()


@pytest.mark.parametrize("row", sorted(QUANTIZER_ROWS))
def test_a_model_is_known_by_the_fingerprint_that_it_had(row):
    assert fingerprint_of(row) == frozen()[row]


if __name__ == "__main__":
    known = frozen() if FROZEN.exists() else {}
    FROZEN.write_text(json.dumps({**{row: fingerprint_of(row) for row in QUANTIZER_ROWS}, **known}, indent=1) + "\n")
