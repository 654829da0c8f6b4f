"""The peers of `benchmarks.tables`, with scikit-learn and without Zellige:

    python benchmarks/tables_peer.py export breast_cancer t.csv     a table that scikit-learn ships, as CSV
    python benchmarks/tables_peer.py impute holes.npz filled.npz    missForest

missForest (Stekhoven and Buehlmann 2012) as the public comparisons have it: IterativeImputer around ExtraTreesRegressor
of 100 trees. holes.npz has `rows`, n p, nan where a number is missing; filled.npz gets `forest`.
"""

from __future__ import annotations

import csv
import sys

import numpy as np
from sklearn import datasets
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer


def export(name: str, path: str) -> None:
    found = getattr(datasets, f"load_{name}")()
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(found.feature_names)
        writer.writerows([repr(float(value)) for value in row] for row in found.data)


def impute(holes: str, filled: str) -> None:
    given = np.load(holes)
    rows, seed = given["rows"], int(given["seed"])
    trees = ExtraTreesRegressor(n_estimators=100, random_state=seed)
    forest = IterativeImputer(estimator=trees, max_iter=10, random_state=seed).fit_transform(rows)
    np.savez(filled, forest=forest)


if __name__ == "__main__":
    {"export": export, "impute": impute}[sys.argv[1]](*sys.argv[2:])
