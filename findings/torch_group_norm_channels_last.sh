#!/usr/bin/env bash
# torch on a CPU: a group norm of channels-last maps is as fast as of contiguous ones forward, and many times slower
# backward.
#
# Guess: channels last, which convolutions take as it is, costs a group norm little, as it costs a batch norm. Seen in
# 2.15.0, one thread, 4x32x128x128 in 32 groups: its forward pass takes the same time in both layouts, its backward pass
# about eight times as long in channels last. Way out: contiguous maps for networks with group norms on a CPU, channels
# last for those without.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cat > "$folder/look.py" <<'PYTHON'
import statistics
import time

import torch

torch.manual_seed(0)
torch.set_num_threads(1)
weight, bias = torch.ones(32), torch.zeros(32)
layouts = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
seconds = {(way, name): [] for way in ("forward", "backward") for name in layouts}
for _ in range(12):
    for name, layout in layouts.items():
        x = torch.randn(4, 32, 128, 128).contiguous(memory_format=layout)
        gradient = torch.randn(4, 32, 128, 128).contiguous(memory_format=layout)
        begin = time.perf_counter()
        _, mean, deviation = torch.native_group_norm(x, weight, bias, 4, 32, 128 * 128, 32, 1e-5)
        seconds["forward", name].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        torch.ops.aten.native_group_norm_backward(
            gradient, x, mean, deviation, weight, 4, 32, 128 * 128, 32, [True, True, True]
        )
        seconds["backward", name].append(time.perf_counter() - begin)
ratio = {
    way: statistics.median(seconds[way, "channels last"]) / statistics.median(seconds[way, "contiguous"])
    for way in ("forward", "backward")
}
print(f"torch {torch.__version__}, group norm, channels last over contiguous: {ratio}")
assert ratio["backward"] > 3 and ratio["forward"] < 2, "this has changed"
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
