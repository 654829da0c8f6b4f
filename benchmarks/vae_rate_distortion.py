"""The rate-distortion curve of a VAE over beta: one small model for each beta, trained alike, judged on test images.

    OMP_NUM_THREADS=1 python -m benchmarks.vae_rate_distortion --data mnist --steps 2000 --out runs/rate_distortion

The recipe `mnist_binary` is trained with so many steps for each beta (objective.beta) and images binarised as it says.
Of test images, in nats: rate, KL(q(z|x) || p(z)); distortion, -E log p(x|z); their sum, which is -ELBO, and log p by
importance sampling, each with the standard error over images; units that are active; and I(x; z). Prints a Markdown
table and writes `curve.png`: distortion over rate, a point each, and the line on which the ELBO is that of the best
(Alemi et al. 2018, "Fixing a Broken ELBO", arXiv:1711.00464). A beta that is already in `--out` is not trained again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common.files import atomic_file
from common.runs import FACTS_NAME
from pipelines.commands.evaluate import EvaluateConfig, EvaluateDataConfig, evaluate
from pipelines.options import read_recipe
from stage1_vae.train import Stage1VAEConfig, train_vae

BETAS = (0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 16.0)


def figures_of(beta: float, data: str, steps: int, num: int, draws: int, out: Path) -> dict[str, Any]:
    """Trains, unless that is done, and judges."""
    run = out / f"beta_{beta:g}"
    figures = run / "figures.json"
    if not figures.exists():
        given = ["--config", "mnist_binary", "--data.path", data, "--objective.beta", f"{beta}"]
        given += [
            "--train.steps",
            f"{steps}",
            "--train.tracker",
            "none",
            "--train.preview_every",
            "0",
            "--run",
            f"{run}",
        ]
        given += ["--train.validate_every", f"{steps}", "--train.save_every", f"{steps}"]
        config, _ = read_recipe("train-vae", Stage1VAEConfig, "vae", given)
        if not (run / FACTS_NAME).exists() or not (run / "model").exists():
            train_vae(config, run)
        test = EvaluateDataConfig(path=data, split="test")
        evaluate(EvaluateConfig(model=str(run), data=test, num=num, draws=draws, out=str(figures), device="cpu"))
    found: dict[str, Any] = json.loads(figures.read_text())
    return found


def draw(points: list[tuple[float, dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    panel = figure.subplots()
    rates, distortions = ([found[name] for _, found in points] for name in ("rate", "distortion"))
    bars = ([2 * found[f"{name}_error_by_images"] for _, found in points] for name in ("distortion", "rate"))
    panel.errorbar(rates, distortions, *bars, fmt="o-", markersize=4, capsize=2)
    for (beta, _), rate, distortion in zip(points, rates, distortions, strict=True):
        panel.annotate(f"β={beta:g}", (rate, distortion), textcoords="offset points", xytext=(6, 4))
    best = min(rate + distortion for rate, distortion in zip(rates, distortions, strict=True))
    ends = (0, max(rates))
    panel.plot(ends, [best - end for end in ends], "--", color="#888888", label=f"ELBO = {-best:.1f} nats")
    panel.set(xlabel="rate: KL(q(z|x) || p(z)), nats", ylabel="distortion: -E log p(x|z), nats")
    panel.grid(alpha=0.3)
    panel.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="a set, or an .npz file, that has test images")
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--steps", type=int, default=2000, help="of the training for each beta")
    parser.add_argument("--num", type=int, default=1000, help="test images")
    parser.add_argument("--draws", type=int, default=500, help="of the latents of each image, for log p")
    parser.add_argument("--out", type=Path, default=Path("runs/rate_distortion"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    points = [
        (beta, figures_of(beta, args.data, args.steps, args.num, args.draws, args.out)) for beta in sorted(args.betas)
    ]
    first = points[0][1]
    print(f"{first['images']} test images, binarised {first['binarised']}, {args.steps} steps; nats, ± over images")
    print("| beta | rate | distortion | -ELBO | -log p | active units | I(x; z) |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for beta, found in points:
        signs = {"rate": 1, "distortion": 1, "elbo": -1, "log_p": -1}
        errors = {name: found[f"{name}_error_by_images"] for name in signs}
        cells = [f"{sign * found[name]:.2f} ± {errors[name]:.2f}" for name, sign in signs.items()]
        print(f"| {beta:g} | {' | '.join(cells)} | {found['active_units']} | {found['mutual_information']:.2f} |")
    draw(points, args.out / "curve.png")
    print(f"curve in {args.out / 'curve.png'}")


if __name__ == "__main__":
    main()
