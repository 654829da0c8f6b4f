"""Sample i of seed s has the same codes whatever the batch: how many of 1,000 samples differ between batch sizes.

`python -m benchmarks.sampling_invariance [--model RUN]` draws 1,000 samples of a prior with batches of 64, of 7 and of
1 and counts those that differ from batch 64. Matrix products of one to three rows round otherwise than those of more
(MKL on x86; from four rows on, all batches agree bit for bit), so logits differ in their last bits; a choice changes
only where its random number falls within that distance of the border between two codes. Such a sample is told, with the
distance. Without --model: fresh priors of both kinds, 8x8 codes of 512, logits scaled to a standard deviation of 3.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common.model_io import load_pretrained
from stage2_prior.condition import Condition
from stage2_prior.drawing import noise, probabilities
from stage2_prior.priors import PRIORS, PixelCNN, PixelCNNConfig, Prior, Transformer, TransformerConfig
from stage2_prior.sampling import SamplingConfig, sample_codes


def fresh_priors() -> dict[str, Prior]:
    spec = CodeSpec((Grid("codes", 8, 8, 512),), 32, 32)
    transformer = Transformer(TransformerConfig(layers=4, width=128, heads=4), spec, 10)
    pixelcnn = PixelCNN(PixelCNNConfig(layers=6, width=64, output_width=128), spec, 10)
    probe, condition = (torch.randint(512, (8, 8, 8)),), Condition(torch.arange(8))
    for prior in (transformer, pixelcnn):
        with torch.no_grad():
            prior.output.weight.mul_(3 / prior.logits(probe, condition).std())
    return {"fresh transformer": transformer.eval(), "fresh pixelcnn": pixelcnn.eval()}


def sample(prior: Prior, count: int, batch_size: int, sampling: SamplingConfig) -> Tensor:
    """Codes `count n`, drawn in batches."""
    codes = []
    for indices in torch.arange(count).split(batch_size):
        condition = Condition(indices % prior.num_classes if prior.num_classes else None)
        codes.append(sample_codes(prior, indices.tolist(), condition, 0, sampling)[0].flatten(1))
    return torch.cat(codes)


def distance_to_border(prior: Prior, index: int, codes: Tensor, position: int, sampling: SamplingConfig) -> float:
    """How far the random number of one choice lies from the nearest border between two codes. Guidance must be 1."""
    condition = Condition(torch.tensor([index % prior.num_classes]) if prior.num_classes else None)
    stepper = prior.stepper(1, condition)
    for place in range(position + 1):
        logits = stepper.next(codes[None, place - 1 : place] if place else None)
    number = noise(0, [index], len(codes))[0, position]
    return float((probabilities(logits[:, 0], sampling).cumsum(-1) - number).abs().min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="run or model folder of a prior; default: fresh priors")
    parser.add_argument("--num", type=int, default=1000, help="samples")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=None)
    parser.add_argument("--top_p", type=float, default=1.0)
    args = parser.parse_args()
    sampling = SamplingConfig(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    torch.manual_seed(0)
    priors = {args.model: load_pretrained(args.model, PRIORS)} if args.model else fresh_priors()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.num} samples, {sampling}\n")
    worst = 0
    for name, prior in priors.items():
        expected = sample(prior, args.num, 64, sampling)
        for batch_size in (7, 1):
            different = sample(prior, args.num, batch_size, sampling) != expected  # num n
            samples = different.any(1).nonzero()[:, 0].tolist()
            worst = max(worst, len(samples))
            print(f"{name}: batch {batch_size} against 64: {len(samples)} of {args.num} samples differ")
            for index in samples:
                position = int(different[index].int().argmax())
                distance = distance_to_border(prior, index, expected[index], position, sampling)
                print(f"  sample {index} from code {position} on: {distance:.1e} from the border between two codes")
    sys.exit(worst > args.num // 200)


if __name__ == "__main__":
    main()
