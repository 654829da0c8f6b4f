#!/usr/bin/env bash
# PyTorch: Categorical and Bernoulli of probabilities let none be below the precision of its type: bits are wrong.
#
# Guess: log_prob of a class of probability p is log p, and of one that cannot be -inf. Seen in 2.15.0: probabilities are
# held between eps and 1 - eps of their type, before the logarithm. What cannot be costs 23 bits in float32 and 52 in
# float64; a class of 1e-8 among 16,384 costs 23.0 bits for 26.6; and a uniform choice of 16,384 codes costs 7.0 bits in
# bfloat16 and 10.0 in float16, for 14. With `logits=` all of these are right (in bfloat16 to rounding).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import math

import torch
from torch.distributions import Bernoulli, Categorical


def bits(distribution, value):
    return -float(distribution.log_prob(value)) / math.log(2)


print(f"torch {torch.__version__}")
seen = {}
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    zero, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    never = bits(Bernoulli(probs=one), zero)
    uniform = bits(Categorical(probs=torch.full((16384,), 1 / 16384, dtype=dtype)), torch.tensor(5))
    by_logits = bits(Categorical(logits=torch.zeros(16384, dtype=dtype)), torch.tensor(5))
    seen[dtype] = round(uniform, 1)
    print(f"{dtype}: what cannot be {never:.1f} bits; one of 16,384 equal classes {uniform:.2f} bits, by logits {by_logits:.2f}")
    assert abs(never + math.log2(torch.finfo(dtype).eps)) < 0.02 and abs(by_logits - 14) < 0.1, "this has changed"
rare = torch.full((16384,), 1e-8)
rare[0] = 1 - rare[1:].sum()
by_probs, by_logits = bits(Categorical(probs=rare), torch.tensor(5)), bits(Categorical(logits=rare.log()), torch.tensor(5))
print(f"a class of 1e-8: {by_probs:.1f} bits, by logits {by_logits:.1f}")
assert list(seen.values()) == [14.0, 14.0, 10.0, 7.0], "this has changed"
assert abs(by_probs - 23) < 0.01 and abs(by_logits - 26.575) < 0.01, "this has changed"
PYTHON
