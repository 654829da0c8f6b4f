"""The peer of `benchmarks.counts`: scvi-tools on the same cells, without Zellige.

    python benchmarks/counts_peer.py cells.npz [--epochs 100] [--draws 200]      with scvi-tools

SCVI with a latent library size, otherwise its defaults; trained on the `train` cells of the file, the log-likelihood of
the `test` ones by importance weights. Prints it, a mean over cells in nats, and writes log theta of each gene.
"""

from __future__ import annotations

import argparse
import logging

import anndata
import numpy as np
import pandas as pd
import scvi


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--draws", type=int, default=200)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    scvi.settings.seed = given.seed
    cells = np.load(given.cells)
    parts = {}
    for part in ("train", "test"):
        batches = pd.DataFrame({"batch": cells[f"{part}_batch"].astype(str)})
        batches.index = batches.index.astype(str)
        parts[part] = anndata.AnnData(cells[part].astype(np.float32), obs=batches)
    scvi.model.SCVI.setup_anndata(parts["train"], batch_key="batch")
    model = scvi.model.SCVI(parts["train"], n_latent=int(cells["latents"]), use_observed_lib_size=False)
    model.train(
        max_epochs=given.epochs,
        train_size=1.0,
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        plan_kwargs={"n_epochs_kl_warmup": given.epochs // 5, "lr": given.learning_rate},
    )
    found = model.get_marginal_ll(parts["test"], n_mc_samples=given.draws, n_mc_samples_per_pass=10)
    print(f"scvi-tools: log p {float(np.mean(found)):.3f} nats per cell")


if __name__ == "__main__":
    main()
