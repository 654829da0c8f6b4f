#!/usr/bin/env bash
# torch: square roots of float64 are not rounded to the nearest number, on x86 with MKL.
#
# Guess (and what our exact arithmetic took for granted): sqrt is one of the operations that IEEE 754 rounds in one way only,
# so torch.sqrt gives what math.sqrt, numpy and every processor's own instruction give: 0 of the integers from 1 to 100,000
# differ. Seen (on an AMD EPYC): torch calls MKL's vmdSqrt, in its most exact mode, which keeps to one unit in the last place,
# and 1,131 of them differ by one unit (the first is 51), whole vectors or one number at a time; of float32 17,161 do. Neither
# ATEN_CPU_CAPABILITY=default nor MKL_CBWR=COMPATIBLE changes it; numpy on the same machine has no such number. Way out: to add
# (x - root**2) / (2 root), with root**2 computed without rounding, which rounds once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import math
import platform

import numpy as np
import torch

torch.set_num_threads(1)
print(f"torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}, MKL: {torch.backends.mkl.is_available()}")
integers = range(1, 100_001)
nearest = [math.sqrt(number) for number in integers]
x = torch.arange(1, 100_001, dtype=torch.float64)
found = {
    "torch": x.sqrt().tolist(),
    "torch, one by one": [one.clone().sqrt().item() for one in x],
    "numpy": np.sqrt(x.numpy()).tolist(),
}
different = {}
for name, roots in found.items():
    others = [number for number, root, right in zip(integers, roots, nearest) if root != right]
    units = max(abs(root - right) / math.ulp(right) for root, right in zip(roots, nearest))
    different[name] = len(others)
    print(f"float64, {name}: {len(others)} of 100,000 differ from math.sqrt, by up to {units:g} units; first: {others[:5]}")
singles = np.sqrt(x.float().numpy())
print(f"float32, torch: {int((x.float().sqrt().numpy() != singles).sum())} of 100,000 differ from numpy")
assert different == {"torch": 1131, "torch, one by one": 1131, "numpy": 0}, "this has changed"
PYTHON
