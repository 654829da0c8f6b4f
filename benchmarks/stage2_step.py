"""A training step of stage two: this build, another build of it, and Hugging Face's GPT-2 of the same size.

    python -m benchmarks.stage2_step --before FOLDER --threads 1
    python -m benchmarks.stage2_step --device cuda --threads 1

The transformer has 8 layers of width 256 with 8 heads, over 256 codes of a vocabulary of 1,024 or 16,384; a step takes
a batch of 16 through the model, the loss, the backward pass and fused AdamW, all in float32 and without dropout. Each
build and the peer have a process of their own, which take turns; FOLDER is a checkout of the other build. Prints a
Markdown table of ratios of medians: above 1, this build is faster. The last column is the share of this build's step
that its matrix products and its attention take alone, which no arrangement of the rest changes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAYERS, WIDTH, HEADS, SIDE, BATCH = 8, 256, 8, 16, 16
VOCABULARIES = (1_024, 16_384)
BOUNDS = {"before": (1.3, 2.0), "GPT-2": (1.2, 1.2)}  # of each vocabulary


def ours(vocabulary: int) -> tuple[torch.nn.Module, Callable[[torch.nn.Module, Tensor], Tensor]]:
    from codes.spec import CodeSpec, Grid
    from stage2_prior.condition import Condition
    from stage2_prior.priors import Transformer, TransformerConfig

    spec = CodeSpec((Grid("codes", SIDE, SIDE, vocabulary),), 8 * SIDE, 8 * SIDE)
    model = Transformer(TransformerConfig(layers=LAYERS, width=WIDTH, heads=HEADS), spec, num_classes=0)
    return model, lambda model, codes: model((codes.view(-1, SIDE, SIDE),), Condition()).loss.mean()


def peer(vocabulary: int) -> tuple[torch.nn.Module, Callable[[torch.nn.Module, Tensor], Tensor]]:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=SIDE * SIDE,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model: Any = transformers.GPT2LMHeadModel(config)
    return model, lambda model, codes: model(codes, labels=codes).loss


def alone(vocabulary: int, device: torch.device) -> Callable[[], None]:
    """The products and the attention of our step, forward and backward, with nothing between them."""
    hidden = -(-8 * WIDTH // 3 // 32) * 32
    shapes = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (2 * hidden, WIDTH), (WIDTH, hidden)] * LAYERS + [(vocabulary, WIDTH)]
    rows = BATCH * SIDE * SIDE
    inputs = {width: torch.randn(rows, width, device=device, requires_grad=True) for _, width in shapes}
    weights = {shape: torch.randn(shape, device=device, requires_grad=True) for shape in shapes}
    gradients = {height: torch.randn(rows, height, device=device) for height, _ in shapes}
    qkv = torch.randn(3, BATCH, HEADS, SIDE * SIDE, WIDTH // HEADS, device=device, requires_grad=True)

    def work() -> None:
        for height, width in shapes:
            product = torch.nn.functional.linear(inputs[width], weights[height, width])
            torch.autograd.grad(product, [inputs[width], weights[height, width]], gradients[height])
        for _ in range(LAYERS):
            attended = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
            torch.autograd.grad(attended, qkv, attended)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return work


def worker(name: str, vocabulary: int, device: torch.device) -> None:
    """Waits for a line before each step and answers with its seconds and its loss."""
    from common.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    if name == "alone":
        work = alone(vocabulary, device)
        step: Callable[[Tensor], float] = lambda codes: work() or 0.0  # noqa: E731
    else:
        model, loss_of = (peer if name == "GPT-2" else ours)(vocabulary)
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

        def step(codes: Tensor) -> float:
            loss = loss_of(model, codes)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())  # a GPU has done the whole step by then

    generator = torch.Generator().manual_seed(0)
    for _ in sys.stdin:
        codes = torch.randint(vocabulary, (BATCH, SIDE * SIDE), generator=generator).to(device)
        begin = time.perf_counter()
        loss = step(codes)
        print(time.perf_counter() - begin, loss, flush=True)


def measured(before: Path | None, vocabulary: int, threads: int, repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each, after one step that does not count."""
    trees = {"now": Path.cwd(), "GPT-2": Path.cwd(), "alone": Path.cwd(), **({"before": before} if before else {})}
    processes, seconds, losses = {}, {name: list[float]() for name in trees}, {name: list[float]() for name in trees}
    for name, tree in trees.items():
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--worker", name, "--vocabulary", str(vocabulary), "--device", device]
        processes[name] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    for repeat in range(repeats + 1):
        for name, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            took, loss = (float(number) for number in process.stdout.readline().split())
            seconds[name] += [took] if repeat else []
            losses[name].append(loss)
    for process in processes.values():
        process.communicate()
    if before:
        apart = max(abs(a - b) for a, b in zip(losses["now"], losses["before"], strict=True))
        print(f"losses of the two builds are at most {apart:.1e} apart", file=sys.stderr)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of another build")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of PyTorch")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--repeats", type=int, default=9, help="steps of each that count")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker, arguments.vocabulary[0], torch.device(arguments.device))
    print("| vocabulary | threads | before | GPT-2 | products and attention alone |")
    print("|---:|---:|---:|---:|---:|")
    for vocabulary in arguments.vocabulary:
        for threads in arguments.threads:
            took = measured(arguments.before, vocabulary, threads, arguments.repeats, arguments.device)
            before = f"{took['before'] / took['now']:.2f}" if "before" in took else "-"
            print(
                f"| {vocabulary:,} | {threads} | {before} | {took['GPT-2'] / took['now']:.2f} "
                f"| {took['alone'] / took['now']:.0%} |",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
