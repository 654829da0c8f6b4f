"""Do the latents of a VAE of texts tell anything, with and without remedies?

    python -m benchmarks.sequences --runs RUNS [--text lines.txt] [--steps 2000]

Trains a recurrent decoder that reads its latents at the start, and a transformer that reads them as a memory, character
by character: by the plain ELBO, and with word dropout and free bits, as the recipe `text` has them. Prints KL and
-ELBO of held-out lines, and what is written of their posterior means. Without --text the lines are sentences, and
parts of such, of README and docs, of 12 to 55 small letters, which are written to RUNS/lines.txt.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from stage1_vae.objectives import ELBOConfig
from stage1_vae.sequences.data import SequenceDataConfig, open_sequences
from stage1_vae.sequences.decoders import RecurrentConfig, TransformerConfig
from stage1_vae.sequences.sequence_vae import SequenceVAE, SequenceVAEConfig
from stage1_vae.sequences.train import Stage1SequenceConfig, train_sequence
from training.config import TrainConfig

DECODERS = {
    "recurrent": RecurrentConfig(hidden=192, latents="start"),
    "transformer": TransformerConfig(hidden=96, layers=2, heads=4, latents="memory"),
}
REMEDIES = {"plain": (0.0, 0.0), "word dropout and free bits": (0.4, 8.0)}  # share of steps, nats


def write_lines(path: Path) -> Path:
    """Of README and docs."""
    root, found = Path(__file__).parents[1], set()
    for page in [*sorted(root.glob("*.md")), *sorted((root / "docs").glob("*.md"))]:
        plain = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for part in re.split(r"(?<=[.:;,])\s+", re.sub(r"\s+", " ", re.sub(r"[|`*#\[\]()]", "", plain))):
            line = part.strip().lower()
            if 12 <= len(line) <= 55 and re.fullmatch(r"[a-z ,.;:'\-]+", line):
                found.add(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(sorted(found)) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    text = options.text or write_lines(options.runs / "lines.txt")
    data = SequenceDataConfig(path=str(text), longest=60, validation_count=200)
    _, held_out, _ = open_sequences(data, 0)
    print("| decoder | training | KL, nats | -ELBO, nats |\n|---|---|---|---|")
    written = []
    for decoder, network in DECODERS.items():
        for name, (dropout, free) in REMEDIES.items():
            config = Stage1SequenceConfig(
                model=SequenceVAEConfig(latents=32, encoder_hidden=96, decoder=network, word_dropout=dropout),
                sequences=data,
                train=TrainConfig(
                    steps=options.steps,
                    batch_size=32,
                    learning_rate=1e-3,
                    warmup_steps=100,
                    schedule="cosine",
                    max_grad_norm=1.0,
                    validate_every=options.steps,
                    preview_every=0,
                    save_every=500,
                    log_every=500,
                    workers=0,
                    tracker="none",
                ),
                objective=ELBOConfig(free_nats=free, free_nats_of="group"),
            )
            run = options.runs / f"{decoder}_{'remedies' if free else 'plain'}"
            found = train_sequence(config, run).metrics
            print(f"| {decoder} | {name} | {found['kl']:.2f} | {found['negative_elbo']:.1f} |", flush=True)
            model = SequenceVAE.from_pretrained(run / "model")
            means = model.encode(held_out.fetch(range(4), range(4))["sequences"])
            written.append((f"{decoder}, {name}", [model.text(one) for one in model.draw(means, 0.0)]))
    for name, lines in [("held out", held_out.names[:4]), *written]:
        print(f"\n{name}:\n" + "\n".join(f"  {line}" for line in lines))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
