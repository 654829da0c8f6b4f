#!/usr/bin/env bash
# PyTorch: on the CPU, the noise of the first image depends on how many images follow, and on the memory's layout.
#
# Guess: one seed is one stream of numbers, and more of them go on where fewer ended: randn(2, ...)[0] is randn(1, ...)[0].
# Seen in 2.15.0: so it is for uniform, exponential and log-normal numbers, but normal ones of 16 and more are made in
# blocks of 16, and where the count is no multiple of 16 the last 16 are drawn anew. A grey image of 7x7 shares 33 of 49
# numbers with itself in a batch of two, and counts below 16 share none with counts above. In a channels_last tensor
# normal_ gives other numbers altogether, so randn_like follows its example's layout. Way out: a generator for each sample.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def made(draw, *shape):
    torch.manual_seed(0)
    return draw(torch.empty(shape))


print(f"torch {torch.__version__}")
names = {"normal": torch.Tensor.normal_, "uniform": torch.Tensor.uniform_, "exponential": torch.Tensor.exponential_,
         "log-normal": torch.Tensor.log_normal_}
for shape, expected in {(1, 7, 7): 16, (3, 5, 5): 16, (3, 8, 8): 0, (1, 3, 3): 9}.items():
    other = {name: int((made(draw, 1, *shape)[0] != made(draw, 2, *shape)[0]).sum()) for name, draw in names.items()}
    print(f"sample 0 of 1 and of 2, {shape}: numbers that differ {other}")
    assert other == {"normal": expected, "uniform": 0, "exponential": 0, "log-normal": 0}, "this has changed"
example = torch.ones(2, 8, 8, 8)
torch.manual_seed(0)
plain = torch.randn_like(example)
torch.manual_seed(0)
last = torch.randn_like(example.to(memory_format=torch.channels_last))
print(f"randn_like of channels_last: {len(set(last.flatten().tolist()) & set(plain.flatten().tolist()))} of its {last.numel()} numbers are among those of the plain one")
assert set(last.flatten().tolist()) != set(plain.flatten().tolist()), "this has changed"
PYTHON
