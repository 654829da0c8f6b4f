"""Remedies of posterior collapse, each on the same model: a VAE of binary digits whose decoder is a PixelCNN.

    OMP_NUM_THREADS=1 python -m benchmarks.vae_collapse --data mnist --out runs/collapse --picture collapse.png

Every row is a training of its own through `train_vae`, of the same images, seed, network and number of steps, and
differs from the first, the plain evidence bound, in what its name says and in nothing else. Each is then judged on test
images by importance sampling; the differences to the first are of pairs, as all judge the same images. A row that is
done lies in `OUT/NAME/result.json` and is not done again, and one that was stopped goes on: `--rows` spreads the rows
over processes, and the last call, with all of them, prints the table and draws the picture.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.memory import keep_freed_memory
from common.model_io import load_pretrained
from images.datasets import DataConfig, ImageDataset, open_images, to_float
from images.sheets import contact_sheet, to_pil
from stage1_vae.aggregate import Aggregate
from stage1_vae.binarise import NumberedImages
from stage1_vae.evaluation import active_units, judge, mean_of
from stage1_vae.networks import DenseConfig
from stage1_vae.networks.pixelcnn import PixelCNNDecoderConfig
from stage1_vae.objectives import AggressiveConfig, ELBOConfig, ImportanceConfig, InfoVAEConfig, ObjectiveConfig
from stage1_vae.posteriors import CommittedRateConfig, VonMisesFisherConfig
from stage1_vae.priors import AutoregressiveGaussianConfig, UniformSphereConfig, VampPriorConfig
from stage1_vae.train import Stage1VAEConfig, train_vae
from stage1_vae.vae import VAE, VAEConfig
from training.config import TrainConfig

HIDDEN = (128, 128, 128)
FAR = PixelCNNDecoderConfig(
    layers=5, width=16, first_kernel_size=13, output_width=32, features=8, network=DenseConfig(hidden=HIDDEN)
)
MODEL = VAEConfig(latents=16, encoder=DenseConfig(hidden=(256, 256)), decoder=FAR)
BOUND = ELBOConfig()
SHOWN = 8  # images in each half of a row of the picture


class Row(NamedTuple):
    title: str
    model: VAEConfig = MODEL
    objective: ObjectiveConfig = BOUND
    validations: int = 2  # of a training


def rows(steps: int) -> dict[str, Row]:
    """By name, the plain bound first. steps: of a training, by which schedules are measured."""
    sphere = replace(MODEL, posterior=VonMisesFisherConfig(concentration=25.0), prior=UniformSphereConfig())
    return {
        "plain": Row("plain ELBO"),
        "free_dimension": Row("free bits, 0.4 nats a dimension", objective=replace(BOUND, free_nats=0.4)),
        "free_group": Row("free bits, 6 nats in all", objective=replace(BOUND, free_nats=6.0, free_nats_of="group")),
        "linear": Row("KL annealing, linear", objective=replace(BOUND, annealing="linear", annealing_steps=steps // 2)),
        "cyclical": Row(
            "KL annealing, 4 cycles", objective=replace(BOUND, annealing="cyclical", annealing_steps=steps * 4 // 5)
        ),
        "delta_prior": Row(
            "delta-VAE, correlated prior", replace(MODEL, prior=AutoregressiveGaussianConfig(correlation=0.95))
        ),
        "delta_posterior": Row("delta-VAE, committed rate 6", replace(MODEL, posterior=CommittedRateConfig(rate=6.0))),
        "beta": Row("beta 0.5", objective=replace(BOUND, beta=0.5)),
        "less_beta": Row("beta 0.2", objective=replace(BOUND, beta=0.2)),
        "short": Row("short-sighted PixelCNN", replace(MODEL, decoder=replace(FAR, layers=2, first_kernel_size=3))),
        "sphere": Row("von Mises-Fisher, concentration 25", sphere),
        "aggressive": Row("aggressive inference", objective=AggressiveConfig(inference_steps=5), validations=15),
        "info": Row("InfoVAE, alpha 0.5, lambda 50", objective=InfoVAEConfig(alpha=0.5, discrepancy_weight=50.0)),
        "skip": Row("Skip-VAE", replace(MODEL, decoder=replace(FAR, network=DenseConfig(hidden=HIDDEN, skip=True)))),
        "capacity": Row("capacity 6 nats", objective=replace(BOUND, capacity=6.0, capacity_steps=steps // 2)),
        "mmd": Row("MMD-VAE, lambda 50", objective=InfoVAEConfig(alpha=1.0, discrepancy_weight=50.0)),
        "vamp": Row("VampPrior, 100 components", replace(MODEL, prior=VampPriorConfig(components=100))),
        "weights": Row("SBAI, weights of variance 0.005", objective=replace(BOUND, generator_prior_variance=0.005)),
        "skip_and_free": Row(
            "Skip-VAE with free bits, 6 nats in all",
            replace(MODEL, decoder=replace(FAR, network=DenseConfig(hidden=HIDDEN, skip=True))),
            replace(BOUND, free_nats=6.0, free_nats_of="group"),
        ),
        "importance": Row("IWAE, 5 draws", objective=ImportanceConfig(draws=5)),
    }


def config_of(row: Row, data: DataConfig, steps: int) -> Stage1VAEConfig:
    train = TrainConfig(
        steps=steps,
        batch_size=32,
        learning_rate=3e-3,
        warmup_steps=100,
        max_grad_norm=200.0,
        precision="bf16",
        validate_every=max(1, steps // row.validations),
        preview_every=0,
        save_every=max(1, steps // 2),
        keep_newest=1,
        tracker="none",
        workers=0,
    )
    return Stage1VAEConfig(
        model=row.model,
        data=data,
        train=train,
        objective=row.objective,
        binarised="once",
    )


def test_images(data: DataConfig, count: int) -> Tensor:
    """count 1 H W in [-1, 1]: test images from all over the set."""
    config = replace(data, split="test")
    found = NumberedImages(ImageDataset(open_images(config), config), "once", training=False)
    indices = [i * len(found) // count for i in range(count)]
    return to_float(found.fetch(indices, indices)["images"])


def model_of(run: Path) -> VAE:
    return load_pretrained(run / "model", {"vae": VAE}).eval()


def result_of(run: Path, images: Tensor, draws: int) -> dict[str, Any]:
    """Figures in nats of a trained model."""
    model = model_of(run)
    figures = judge(model, images, range(len(images)), draws, bounds=(1,))
    aggregate = Aggregate(figures, model.prior, model.shape)
    aggregate.add(model.posterior(images))
    return {
        "kl": mean_of(figures.total_kl),
        "elbo": mean_of(figures.elbo, figures.elbo_error),
        "log_p": mean_of(figures.log_p, figures.log_p_error),
        "mutual_information": aggregate.figures().mutual_information,
        "active": int(active_units(figures.means[0]).sum()),
        "effective_draws": float(figures.effective_draws.median()),
        "each_log_p": figures.log_p.tolist(),
        "each_elbo": figures.elbo.tolist(),
    }


def table(results: dict[str, dict[str, Any]], titles: dict[str, str]) -> str:
    """One line for each result; differences to the first one are of pairs."""
    first = next(iter(results.values()))
    lines = [
        "| row | KL | I(x; z) | active units | ELBO | log p(x) | its error by draws | less plain's, of pairs | "
        "effective draws | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        apart = torch.tensor(result["each_log_p"]) - torch.tensor(first["each_log_p"])
        more = "" if result is first else f"{apart.mean():+.2f} ± {apart.std() / math.sqrt(len(apart)):.2f}"
        kl, elbo, log_p, information = (result[key] for key in ("kl", "elbo", "log_p", "mutual_information"))
        cells = [
            titles[name],
            f"{kl[0]:.2f} ± {kl[2]:.2f}",
            f"{information[0]:.2f}",
            str(result["active"]),
            f"{elbo[0]:.2f} ± {elbo[2]:.2f}",
            f"{log_p[0]:.2f} ± {log_p[2]:.2f}",
            f"{log_p[1]:.2f}",
            more,
            f"{result['effective_draws']:.0f}",
            f"{result['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(models: dict[str, VAE], titles: dict[str, str], images: Tensor, path: Path) -> None:
    """Of each model samples of the prior, draws of p(x|z) at the posterior means of images, and, at the same latents,
    what has in turn the most likely value of each pixel."""
    seen = images[:: len(images) // SHOWN][:SHOWN]
    blank = torch.ones_like(seen[0])
    lines = [[blank] * (SHOWN + 1) + [*seen, blank, *seen]]
    for place, model in enumerate(models.values()):
        torch.manual_seed(place)  # of the pixels, which a PixelCNN draws: others in each row
        with torch.no_grad():
            latents = model.encode(seen)
            samples = model.sample(SHOWN, torch.Generator().manual_seed(place))
            lines.append([*samples, blank, *model.decode(latents), blank, *model.decoder.mode(latents)])
    names = ["test images", *(titles[name] for name in models)]
    sheet = contact_sheet([list(map(to_pil, line)) for line in lines], names, legible=28)
    sheet.convert("L").save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="a set of grey images that has test images")
    parser.add_argument("--size", type=int, default=14, help="pixels of a side, to which images are scaled")
    parser.add_argument("--steps", type=int, default=1200, help="of each training")
    parser.add_argument("--num", type=int, default=200, help="test images")
    parser.add_argument("--draws", type=int, default=200, help="of the latents of each of them")
    parser.add_argument("--rows", nargs="*", help="their names; by default all")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--picture", type=Path, help="where it is written")
    args = parser.parse_args()
    keep_freed_memory()  # as commands do
    all_rows = rows(args.steps)
    if unknown := set(args.rows or ()) - set(all_rows):
        parser.error(f"--rows {' '.join(sorted(unknown))}: not among {', '.join(all_rows)}")
    data = DataConfig(path=args.data, image_size=args.size, channels=1, validation_count=128)
    images = test_images(data, args.num)
    results = {}
    for name in args.rows or all_rows:
        run = args.out / name
        kept = run / "result.json"
        if not kept.exists():
            begin = time.process_time()
            if not train_vae(config_of(all_rows[name], data, args.steps), run).finished:
                return
            seconds = time.process_time() - begin
            kept.write_text(json.dumps({**result_of(run, images, args.draws), "seconds": seconds}))
        results[name] = json.loads(kept.read_text())
        print(f"{name}: KL {results[name]['kl'][0]:.2f}, log p {results[name]['log_p'][0]:.2f}", flush=True)
    titles = {name: row.title for name, row in all_rows.items()}
    print(
        f"{len(images)} binary test images (drawn once) of {args.size}x{args.size} pixels, {args.draws} draws; "
        f"{args.steps} steps of 32; nats; seconds of one processor for training"
    )
    print(table(results, titles))
    if args.picture:
        picture({name: model_of(args.out / name) for name in results}, titles, images, args.picture)


if __name__ == "__main__":
    main()
