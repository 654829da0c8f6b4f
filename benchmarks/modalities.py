"""Do the two modalities of an MVAE or an MMVAE tell the same?

    python -m benchmarks.modalities --mnist mnist.npz --model runs/mvae [--weights mnist_classifier.safetensors]

Image to class: of 10,000 test digits, how often the class that the model tells is the digit's. Class to image: of 1,000
images, 100 drawn of each class, how often a classifier that was trained on real digits (benchmarks/mnist_classifier.py)
says that class. Both are coherence as Shi et al. 2019 have it (arXiv:1911.03393).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.mnist_classifier import WEIGHTS, build_classifier, classify
from images.sheets import contact_sheet, to_pil
from stage1_vae.modalities.multimodal import Multimodal
from stage1_vae.modalities.views import Seen

DRAWN = 100  # images of each class


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="run of the recipe mnist_mvae")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of benchmarks.mnist_classifier")
    parser.add_argument("--picture", type=Path, help="PNG of ten images of each class")
    options = parser.parse_args()
    model = Multimodal.from_pretrained(options.model)
    digits = np.load(options.mnist)
    images = torch.from_numpy(digits["test_images"]).unsqueeze(1)
    black_and_white = (images >= 128).float() * 2 - 1
    told = [model.symbol_log_probabilities(model.encode(part)).argmax(-1)[:, 0] for part in black_and_white.split(500)]
    right = torch.cat(told) == torch.from_numpy(digits["test_labels"])
    print(f"image to class: {right.float().mean():.2%} of {len(right):,} test digits")
    labels = torch.arange(10).repeat_interleave(DRAWN)
    seen = model.seen(torch.zeros(len(labels), 1, 28, 28), labels.unsqueeze(1))
    posterior = model.posterior_of([Seen(seen[0].target, torch.zeros_like(seen[0].present)), seen[1]])
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    drawn = model.decode(posterior.draw(noise))
    classifier = build_classifier().eval()
    classifier.load_state_dict(load_file(options.weights))
    agrees = classify(classifier, (drawn + 1) / 2) == labels
    each = " ".join(f"{digit}:{agrees[labels == digit].float().mean():.0%}" for digit in range(10))
    print(f"class to image: {agrees.float().mean():.2%} of {len(labels):,} drawn images ({each})")
    if options.picture is not None:
        rows = [[to_pil(image) for image in drawn[DRAWN * digit :][:10]] for digit in range(10)]
        contact_sheet(rows, [str(digit) for digit in range(10)]).save(options.picture)


if __name__ == "__main__":
    main()
