#!/usr/bin/env bash
# PyTorch: to look at the weight of a layer with spectral norm changes the training.
#
# Guess: `layer.weight` is a value, which a log line may read. Seen in 2.15.0 with nn.utils.parametrizations.spectral_norm:
# in training mode each access is a step of the power iteration, under no_grad too, so two accesses give two tensors, the
# buffers have moved, and a discriminator whose weights' norms are logged ends with other weights than the same one with
# the same seed that is left alone. Way out: eval() around it, or the unnormalised `parametrizations.weight.original`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


def trained(logged):
    torch.manual_seed(0)
    model = nn.Sequential(spectral_norm(nn.Linear(16, 16)), nn.ReLU(), spectral_norm(nn.Linear(16, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = torch.randn(64, 16)
    for _ in range(20):
        if logged:
            with torch.no_grad():
                model[0].weight.norm()
        loss = (model(data) - data.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model[0].parametrizations.weight.original.detach()


print(f"torch {torch.__version__}")
layer = spectral_norm(nn.Linear(16, 16), n_power_iterations=1)
nn.init.normal_(layer.parametrizations.weight.original)
before = layer.parametrizations.weight[0]._u.clone()
first, second = layer.weight.detach(), layer.weight.detach()
apart, moved = float((first - second).abs().max()), float((layer.parametrizations.weight[0]._u - before).abs().max())
with_log, without, again = trained(True), trained(False), trained(False)
print(f"two accesses are {apart:.4f} apart, the buffer moved by {moved:.4f}; weights after 20 steps, "
      f"logged and not: {float((with_log - without).abs().max()):.1e} apart")
assert apart > 1e-3 and moved > 1e-3, "this has changed"
assert torch.equal(without, again) and not torch.equal(with_log, without), "this has changed"
PYTHON
