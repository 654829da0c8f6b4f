"""Our transformer's sampling beside Hugging Face's GPT-2 of the same size, in codes per second.

    python -m benchmarks.transformer_sampling
    python -m benchmarks.transformer_sampling --device cuda --precision bf16

Prints a Markdown table. Both have 8 layers of width 256 with 8 heads and a vocabulary of 1,024, and draw 256 codes with
top-k 100 from a start token, GPT-2 by `generate(use_cache=True)`. They take turns in one process; a figure is the
median of the runs. Everything from labels to codes counts; what is made of our weights once for all batches is made
before. Ours takes a step for each code: lookahead would be flattered by a prior that has learned nothing. It runs with
keys and values of their own for each head, as GPT-2 has them, and with two that are shared by four heads each; on a
CUDA device also as one CUDA graph. The last column is what no step can exceed that reads every weight once, with the
bandwidth of a sum over 256 MiB.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.timing import medians
from codes.spec import CodeSpec, Grid
from stage2_prior.condition import Condition
from stage2_prior.cuda_graph import RecordedDraw
from stage2_prior.priors import Transformer, TransformerConfig
from stage2_prior.sampling import SamplingConfig, draw_in_order, sample_codes

LAYERS, WIDTH, HEADS, VOCABULARY, SIDE, TOP_K = 8, 256, 8, 1024, 16, 100
CODES = SIDE * SIDE
BATCHES = (1, 8)
SHARED = (None, 2)  # heads of keys and values
BOUNDS = {1: 5.0, 8: 3.0}  # times as many codes per second as the peer, by the batch


def ours(shared: int | None) -> Transformer:
    spec = CodeSpec((Grid("codes", SIDE, SIDE, VOCABULARY),), 8 * SIDE, 8 * SIDE)
    config = TransformerConfig(layers=LAYERS, width=WIDTH, heads=HEADS, key_value_heads=shared)
    return Transformer(config, spec, num_classes=0).eval()


def peer() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY + 1,  # and the start token
        n_positions=CODES,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=VOCABULARY,
        eos_token_id=None,
        pad_token_id=VOCABULARY,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def sample_ours(prior: Transformer, batch: int, recorded: RecordedDraw | None = None) -> Tensor:
    sampling = SamplingConfig(top_k=TOP_K, lookahead="off")
    codes = sample_codes(prior, range(batch), Condition(), 0, sampling, recorded=recorded)
    return codes[0].flatten(1).cpu()


@torch.inference_mode()
def sample_peer(model: Any, batch: int) -> Tensor:
    start = torch.full((batch, 1), VOCABULARY, device=model.device)
    sequence = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=CODES,
        do_sample=True,
        top_k=TOP_K,
        use_cache=True,
    )
    return sequence[:, 1:].cpu()


def bytes_per_second(device: torch.device) -> float:
    numbers = torch.ones(64 * 2**20, device=device)
    return 4 * numbers.numel() / medians({"sum": lambda: float(numbers.sum())}, 9)["sum"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="runs of each that count")
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch; default: its own choice")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of all weights")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    priors = {shared: ours(shared).to(args.device, dtype) for shared in SHARED}
    model = peer().to(args.device, dtype)
    sizes = [sum(weight.numel() for weight in network.parameters()) for network in (*priors.values(), model)]
    print(
        f"torch {torch.__version__}, {args.device}, {args.precision}, {torch.get_num_threads()} threads; transformers "
        f"{transformers.__version__}; {', '.join(f'{size / 1e6:.1f}' for size in sizes)} million parameters, medians "
        f"of {args.repeats}\n"
    )
    print(
        "| key and value heads | batch | ours, codes/s | GPT-2, codes/s | times as many | bound | weights read once |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|")
    missed, bandwidth = [], bytes_per_second(args.device)
    for batch in BATCHES:
        works: dict[str, Callable[[], Tensor]] = {"peer": partial(sample_peer, model, batch)}
        for shared, prior in priors.items():
            works[f"{shared or HEADS}"] = partial(sample_ours, prior, batch)
            if args.device.type == "cuda":
                recorded = RecordedDraw(draw_in_order)
                works[f"{shared or HEADS}, CUDA graph"] = partial(sample_ours, prior, batch, recorded)
        for name, work in works.items():
            assert work().shape == (batch, CODES), name
        took = medians(works, args.repeats)
        speed = {name: batch * CODES / seconds for name, seconds in took.items()}
        floor = batch * bandwidth / (sizes[0] * dtype.itemsize)
        for name in list(works)[1:]:
            ratio = speed[name] / speed["peer"]
            figures = f"{speed[name]:,.0f} | {speed['peer']:,.0f} | {ratio:.2f} | {BOUNDS[batch]:g} | {floor:,.0f}"
            print(f"| {name} | {batch} | {figures} |", flush=True)
            if ratio < BOUNDS[batch]:
                missed.append(f"{name} heads, batch {batch}")
    print(f"\nbound missed with {'; '.join(missed)}" if missed else "\nthe bound is met")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
