#!/usr/bin/env bash
# torch: once TF32 is allowed by the new setting, reading the old one is an error.
#
# Guess: `torch.backends.cuda.matmul.fp32_precision = "tf32"`, the setting that torch's notes recommend, and the older
# set_float32_matmul_precision are two names of one thing, so get_float32_matmul_precision() then says "high", or
# still "highest". Seen in 2.15.0, on a machine without a GPU too: it raises RuntimeError ("mix of the legacy and new
# APIs"), though only the new one was used to set anything, and so does reading
# `torch.backends.cuda.matmul.allow_tf32`; so do torch.backends.fp32_precision and mkldnn's for the first of them.
# Whoever saves the precision, to put it back later, meets an error that another part of the program has caused.
# Setting the old one works, and ends the error. Way out: to set by one of both alone in a whole program, and to read
# what was set by the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cd "$folder"
cat > ask.py <<'PYTHON'
import sys

import torch


def said(read) -> str:
    try:
        return str(read())
    except RuntimeError as error:
        return "RuntimeError" if "mix of the legacy and new APIs" in str(error) else str(error)


if len(sys.argv) > 1:
    exec(f'{sys.argv[1]} = "tf32"')
before = said(torch.get_float32_matmul_precision), said(lambda: torch.backends.cuda.matmul.allow_tf32)
torch.set_float32_matmul_precision("high")
print(*before, said(torch.get_float32_matmul_precision))
PYTHON
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import subprocess
import sys

print(f"torch {importlib.metadata.version('torch')}: precision, allow_tf32, and precision after it was set to high")
for setting, expected in (
    ("", "highest False high"),
    ("torch.backends.cuda.matmul.fp32_precision", "RuntimeError RuntimeError high"),
    ("torch.backends.fp32_precision", "RuntimeError RuntimeError high"),
    ("torch.backends.mkldnn.matmul.fp32_precision", "RuntimeError False high"),
):
    command = [sys.executable, "ask.py", *filter(None, [setting])]
    seen = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    print(f"{setting or 'nothing set'}: {seen}")
    assert seen == expected, "this has changed"
PYTHON
