#!/usr/bin/env bash
# PyTorch: to make an optimizer imports the compiler, which takes about as long as torch itself.
#
# Guess: torch.compile imports the compiler; who never compiles never waits for it, and an optimizer of one number is there in an
# instant. Seen: `import torch` leaves torch._dynamo out, and so do a forward and a backward pass; the first torch.optim.SGD of one
# parameter imports it, torch._inductor and sympy, 823 modules in all, and takes 0.9 times as long as `import torch` itself took.
# Its add_param_group is wrapped so that the compiler leaves it alone, and the wrapper asks the compiler for that at its first call.
# A function of one's own in torch.compiler.disable does the same already when it is decorated.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > measure.py <<'PYTHON'
import sys
import time

begin = time.perf_counter()
import torch

imported = time.perf_counter() - begin
weight = torch.zeros(1, requires_grad=True)
(3 * weight).sum().backward()
assert "torch._dynamo" not in sys.modules, "this has changed"
before, begin = len(sys.modules), time.perf_counter()
if sys.argv[1] == "optimizer":
    torch.optim.SGD([weight], lr=0.1)
else:
    torch.compiler.disable(len)
seconds, more = time.perf_counter() - begin, len(sys.modules) - before
there = [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]
print(f"torch {torch.__version__}, {sys.argv[1]}: {more} more modules, {there} among them, {seconds / imported:.0%} of the time of import torch")
assert "torch._dynamo" in there and more > 500, "this has changed"
PYTHON
for what in optimizer decorator; do
  "$folder/venv/bin/python" measure.py "$what" > /dev/null  # files are in memory
  "$folder/venv/bin/python" measure.py "$what"
done
