#!/usr/bin/env bash
# PyTorch: the same weights saved under another name are another file, so checksums of checkpoints do not compare.
#
# Guess: torch.save is a function of what is saved. Seen in 2.15.0: the names of the records within begin with the stem of
# the file's name, so one.pt and two.pt differ, one.pt in two folders do not, and a copy of one.pt that is called two.pt
# has the bytes of the first and not of the second; into a buffer it is a third content. Way out: compare tensors, or
# keep safetensors, whose bytes do not know the name.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import hashlib
import io
from pathlib import Path

import torch


def digest(data):
    return hashlib.sha256(data).hexdigest()[:12]


print(f"torch {torch.__version__}")
weights = {"weight": torch.arange(10.0)}
seen = {}
for name in ("one.pt", "two.pt", "folder/one.pt"):
    Path(name).parent.mkdir(exist_ok=True)
    torch.save(weights, name)
    seen[name] = digest(Path(name).read_bytes())
buffer = io.BytesIO()
torch.save(weights, buffer)
seen["buffer"] = digest(buffer.getvalue())
print(seen)
assert seen["one.pt"] == seen["folder/one.pt"], "this has changed"
assert len(set(seen.values())) == 3, "this has changed"
PYTHON
