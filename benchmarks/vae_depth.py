"""Does depth pay? Hierarchies of 1, 2, 3 and 5 layers of latents on binary digits, each given the same time.

    OMP_NUM_THREADS=1 python -m benchmarks.vae_depth --data mnist --seconds 240 --out runs/depth

The generative model and the training are the same in all rows of the Markov hierarchy and of the ladder, which are one
class with one setting between them: how they infer (stage1_vae.hierarchies.markov). Sizes are those of Sønderby et al.
2016 (arXiv:1602.02282), halved in the hidden layers; batch normalisation and warm-up as there. With one layer the two
are one model. VD-VAEs are those of the recipe `vdvae_mnist` with other layers of the decoder. Each training has as many
steps as fit into so many seconds of one processor, by the time of its first ones; what it took in the end is printed.

Of test images, in nats: the ELBO, log p(x) by importance sampling, its difference to one layer, of pairs, and for each
layer, from the image up, the KL and two counts of its units: active ones, whose posterior means vary over images by
more than 0.01 (Burda et al. 2015), and those with a KL above 0.01. The second is the stricter one for top-down
inference, in which a mean also varies with what the layers above have drawn.

A row that is done lies in `OUT/NAME/result.json` and is not done again: `--rows` spreads them over processes or hours.
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
from pipelines.options import read_recipe
from stage1_vae.binarise import NumberedImages
from stage1_vae.evaluation import active_units, judge, mean_of
from stage1_vae.hierarchies.markov import MarkovConfig
from stage1_vae.models import MODEL_CLASSES, build_model
from stage1_vae.objectives import ELBOConfig, TrainingFacts, build_objective
from stage1_vae.train import Stage1VAEConfig, train_vae
from training.config import TrainConfig

LATENTS, HIDDEN = (64, 32, 16, 8, 4), (256, 128, 64, 32, 16)
LAYERS = (1, 2, 3, 5)
VDVAE_LAYERS = {  # by how many: the layers of the decoder, each with latents, from 1x1 to 28x28 pixels
    1: "28x1",
    2: "1x1,28m1",
    3: "1x1,7m1,28m7",
    5: "1x1,7m1,7x1,14m7,28m14",
}
INFORMED = 0.01  # nats of KL from which on a unit says something
WARM_UP = 5  # the KL term's weight rises over one of so many parts of the training
TIMED = 40  # steps by which a training's time is told, the first quarter of them left out


class Row(NamedTuple):
    title: str
    config: Stage1VAEConfig  # with any number of steps


def rows(data: str) -> dict[str, Row]:
    """By name, one layer first."""
    found = {"one": Row("one layer", config_of(1, "top_down", data))}
    for inference, name in (("bottom_up", "Markov"), ("top_down", "ladder")):
        for layers in LAYERS[1:]:
            found[f"{name.lower()}_{layers}"] = Row(f"{name}, {layers} layers", config_of(layers, inference, data))
    given = ["--config", "vdvae_mnist", "--data.path", data, "--data.validation_count", "512"]
    recipe, _ = read_recipe("train-vae", Stage1VAEConfig, "vae", given)
    for layers, decoder in VDVAE_LAYERS.items():
        title = f"VD-VAE, {layers} layers" if layers > 1 else "VD-VAE, one layer"
        found[f"vdvae_{layers}"] = Row(title, replace(recipe, model=replace(recipe.model, decoder_layers=decoder)))
    return found


def config_of(layers: int, inference: Any, data: str) -> Stage1VAEConfig:
    model = MarkovConfig(
        latents=LATENTS[:layers],
        hidden=HIDDEN[:layers],
        hidden_layers=2,
        inference=inference,
        activation="leaky_relu",
        batch_norm=True,
        variance="softplus",
    )
    return Stage1VAEConfig(
        model=model,
        data=DataConfig(path=data, image_size=28, channels=1, validation_count=512),
        train=TrainConfig(steps=1000, batch_size=128, learning_rate=2e-3, max_grad_norm=0),
        objective=ELBOConfig(annealing="linear"),
        binarised="once",
    )


def of_steps(config: Stage1VAEConfig, steps: int) -> Stage1VAEConfig:
    train = replace(
        config.train,
        steps=steps,
        validate_every=max(1, steps // 2),
        save_every=max(1, steps // 2),
        preview_every=0,
        keep_newest=1,
        tracker="none",
        workers=0,
    )
    objective = config.objective
    if isinstance(objective, ELBOConfig) and objective.annealing == "linear":
        objective = replace(objective, annealing_steps=max(1, steps // WARM_UP))
    return replace(config, train=train, objective=objective)


def seconds_of_step(config: Stage1VAEConfig) -> float:
    """Of one processor: the median of the first steps, forward, backward and optimiser."""
    torch.manual_seed(0)
    model = build_model(config.model, (28, 28), None).train()
    facts = TrainingFacts(1, TIMED, model.shape, tuple(model.generator_parameters()))
    objective, optimizer = build_objective(config.objective, facts), torch.optim.Adam(model.parameters(), lr=1e-3)
    images, taken = (torch.rand(config.train.batch_size, 1, 28, 28) > 0.8).float() * 2 - 1, []
    for step in range(TIMED):
        begin = time.process_time()
        optimizer.zero_grad()
        objective.loss(model, images, step).loss.backward()
        optimizer.step()
        taken.append(time.process_time() - begin)
    return sorted(taken[TIMED // 4 :])[len(taken[TIMED // 4 :]) // 2]


def test_images(data: DataConfig, count: int) -> Tensor:
    """count 1 H W in [-1, 1]: test images from all over the set, drawn black or white once."""
    config = replace(data, split="test", validation_count=None)
    found = NumberedImages(ImageDataset(open_images(config), config), "once", training=False)
    indices = [i * len(found) // count for i in range(count)]
    return to_float(found.fetch(indices, indices)["images"])


def result_of(run: Path, images: Tensor, draws: int) -> dict[str, Any]:
    """Figures in nats of a trained model; groups from the image up."""
    model = load_pretrained(run / "model", MODEL_CLASSES).eval()
    figures = judge(model, images, range(len(images)), draws, bounds=(1,))
    kl = [group.mean(0) for group in reversed(figures.kl)]
    return {
        "elbo": mean_of(figures.elbo, figures.elbo_error),
        "log_p": mean_of(figures.log_p, figures.log_p_error),
        "each_log_p": figures.log_p.tolist(),
        "kl": [float(group.sum()) for group in kl],
        "active": [int(active_units(means).sum()) for means in reversed(figures.means)],
        "informed": [int((group > INFORMED).sum()) for group in kl],
        "units": [group.shape[-1] for group in kl],
        "effective_draws": float(figures.effective_draws.median()),
    }


def table(results: dict[str, dict[str, Any]], titles: dict[str, str]) -> str:
    first = torch.tensor(next(iter(results.values()))["each_log_p"])
    lines = [
        "| layers | KL of each, from the image up | active units | units with a KL above 0.01 | ELBO | log p(x) | more "
        "than one layer, of pairs | effective draws | steps | seconds |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        apart = torch.tensor(result["each_log_p"]) - first
        more = f"{apart.mean():+.2f} ± {apart.std() / math.sqrt(len(apart)):.2f}" if apart.any() else ""
        units = [f"{count} of {of}" for count, of in zip(result["active"], result["units"], strict=True)]
        cells = [
            titles[name],
            ", ".join(f"{kl:.1f}" for kl in result["kl"]),
            ", ".join(units),
            ", ".join(map(str, result["informed"])),
            f"{result['elbo'][0]:.2f}",
            f"{result['log_p'][0]:.2f} ± {result['log_p'][2]:.2f}",
            more,
            f"{result['effective_draws']:.0f}",
            f"{result['steps']:,}",
            f"{result['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="a set of 28x28 grey images that has test images")
    parser.add_argument("--seconds", type=float, default=240, help="of one processor, for each training")
    parser.add_argument("--num", type=int, default=200, help="test images")
    parser.add_argument("--draws", type=int, default=1000, help="of the latents of each of them")
    parser.add_argument("--rows", nargs="*", help="their names; by default all")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    args = parser.parse_args()
    keep_freed_memory()  # as commands do
    all_rows = rows(args.data)
    if unknown := set(args.rows or ()) - set(all_rows):
        parser.error(f"--rows {' '.join(sorted(unknown))}: not among {', '.join(all_rows)}")
    results: dict[str, dict[str, Any]] = {}
    for name in args.rows or all_rows:
        run, config = args.out / name, all_rows[name].config
        kept, steps_kept = run / "result.json", args.out / f"{name}.steps"
        if not kept.exists():
            if not steps_kept.exists():  # a run that was stopped goes on with as many
                args.out.mkdir(parents=True, exist_ok=True)
                steps_kept.write_text(str(max(10, int(args.seconds / seconds_of_step(config)))))
            steps, begin = int(steps_kept.read_text()), time.process_time()
            if not train_vae(of_steps(config, steps), run).finished:
                return
            seconds = time.process_time() - begin
            found = result_of(run, test_images(config.data, args.num), args.draws)
            kept.write_text(json.dumps({**found, "steps": steps, "seconds": seconds}))
        results[name] = json.loads(kept.read_text())
        print(f"{name}: KL {results[name]['kl']}, log p {results[name]['log_p'][0]:.2f}", flush=True)
    print(
        f"{args.num} binary test digits (drawn once), {args.draws} draws; {args.seconds:g} seconds of one processor "
        "for each training; nats"
    )
    print(table(results, {name: row.title for name, row in all_rows.items()}))


if __name__ == "__main__":
    main()
