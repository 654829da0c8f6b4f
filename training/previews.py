"""Which held-out samples a preview shows: always the same, from all over the set, and of all classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROWS, COLUMNS = 2, 8
MOST_COLUMNS, MOST_CLASSES = 10, 40


def preview_rows(labels: Sequence[int] | np.ndarray) -> list[list[int]]:
    """Positions in `labels` (a class each, below 0 for none), row by row.

    Without classes two rows of eight. With up to ten each row shows all of them, class after class; with more there is
    one sample of each, ten in a row, and of more than forty classes those of forty.
    """
    labels = np.asarray(labels)
    classes = [int(label) for label in np.unique(labels) if label >= 0]
    if len(classes) < 2:
        return in_rows([i * len(labels) // (ROWS * COLUMNS) for i in range(ROWS * COLUMNS)], labels, COLUMNS)
    if len(classes) > MOST_COLUMNS:
        shown = min(len(classes), MOST_CLASSES)
        classes = [classes[i * len(classes) // shown] for i in range(shown)]
        return in_rows([int(np.flatnonzero(labels == label)[0]) for label in classes], labels, MOST_COLUMNS)
    each = max(1, COLUMNS // len(classes))  # samples of a class in a row
    members = [np.flatnonzero(labels == label).tolist() for label in classes]
    rows = [[i for own in members for i in own[row * each : (row + 1) * each]] for row in range(ROWS)]
    return [row for row in rows if row]


def in_rows(positions: Sequence[int], labels: np.ndarray, columns: int) -> list[list[int]]:
    """Positions in reading order, each once."""
    once = list(dict.fromkeys(position for position in positions if position < len(labels)))
    return [once[start : start + columns] for start in range(0, len(once), columns)]
