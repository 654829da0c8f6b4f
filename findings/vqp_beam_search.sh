#!/usr/bin/env bash
# vector-quantize-pytorch: with beam_size, ResidualVQ trains its first codebook alone, and chooses codes by the sum of the errors of
# all layers, not by the one that is left.
#
# Guess: beam search takes the nearest of the sums that it has seen, and in training every layer's codebook follows its residuals
# by EMA, as without a beam. Seen: (1) after 20 training steps the first codebook has moved, all others are bit for bit what they
# were. (2) A path's score is the sum over its layers of what each left: with two layers of 16 codes and a beam of 16, which sees
# all 256 sums, another one is nearer for every fifth latent or so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 vector-quantize-pytorch==1.32.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from vector_quantize_pytorch import ResidualVQ

torch.set_num_threads(1)
torch.manual_seed(0)
print(f"torch {torch.__version__}, vector-quantize-pytorch {version('vector-quantize-pytorch')}")
moved = {}
for beam in (None, 4):
    vq = ResidualVQ(dim=8, num_quantizers=4, codebook_size=32, beam_size=beam).train()
    before = [layer._codebook.embed.clone() for layer in vq.layers]
    for _ in range(20):
        vq(torch.randn(4, 64, 8))
    moved[beam] = [not torch.equal(old, layer._codebook.embed) for old, layer in zip(before, vq.layers)]
    print(f"beam_size={beam}: codebooks that moved in 20 steps: {moved[beam]}")

vq = ResidualVQ(dim=8, num_quantizers=2, codebook_size=16, beam_size=16).eval()
for number, layer in enumerate(vq.layers):  # the second layer's vectors half as long as the first one's
    layer._codebook.embed.copy_(torch.randn_like(layer._codebook.embed) / 2**number)
x = torch.randn(4096, 1, 8)
with torch.no_grad():
    found = (vq(x)[0] - x).square().sum(2).squeeze(1)
    first, second = (layer._codebook.embed[0] for layer in vq.layers)
    sums = (first.unsqueeze(1) + second).flatten(0, 1)
    nearest = (x - sums).square().sum(2).amin(1)
missed = (found > 1.0001 * nearest).float().mean().item()
print(f"of 4,096 latents {missed:.0%} get another than the nearest of the 256 sums; error {found.mean():.3f}, of the nearest {nearest.mean():.3f}")
assert all(moved[None]), "this has changed"
assert moved[4] == [True, False, False, False], "this has changed"
assert missed > 0.1, "this has changed"
PYTHON
