#!/usr/bin/env bash
# safetensors: what is saved twice is not the same file twice, if its metadata has more than one entry.
#
# Guess: a format of a sorted header and raw numbers has one file for one content, so that checksums tell whether two
# checkpoints are equal. Seen in 0.8.0: tensors are written in an order of their own, the same each time, but entries
# of `metadata` in one that is drawn anew at each save, in one process too. Of 20 files with 4 entries (24 orders),
# saved from the same arrays, 14 were different ones, though all load as the same. With one entry, or none, all 20 are
# the same bytes. torch's HuggingFaceStorageWriter (torch.distributed.checkpoint, 2.15.0) always writes three entries.
# Way out: to put all of them into one entry, as JSON with sorted keys, or to compare tensors in place of files.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json

import numpy as np
import safetensors
from safetensors.numpy import load, save

print(f"safetensors {safetensors.__version__}")
tensors = {name: np.full(3, value, dtype=np.float32) for value, name in enumerate("wxyz")}
entries = {"format": "np", "model": "vae", "step": "100", "seed": "0"}
metadata = {
    "none": None,
    "one entry": {"format": "np"},
    "four entries": entries,
    "four in one": {"all": json.dumps(entries, sort_keys=True)},
}
different = {}
for name, given in metadata.items():
    files = [save(tensors, metadata=given) for _ in range(20)]
    different[name] = len(set(files))
    loaded = [load(file) for file in files]
    assert all(np.array_equal(tensors[key], again[key]) for again in loaded for key in tensors)
    headers = [json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")]) for file in files]
    equal = all(header == headers[0] for header in headers)
    print(f"{name}: {different[name]} different files of 20 saves; equal but for the order of the header: {equal}")
    assert equal, "this has changed"
assert different.pop("four entries") > 1, "this has changed"
assert set(different.values()) == {1}, "this has changed"
PYTHON
