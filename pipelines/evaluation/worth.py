"""What the number of images makes of a figure, in notes (metrics/trust.py says why)."""

from __future__ import annotations

from metrics import trust


def frechet_is_refused(made: int, others: int, width: int) -> bool:
    """Whether there are too few images for a covariance of features of this width; others: 0 where it is not known."""
    return min(made, others or made) <= width


def notes_of_frechet(name: str, made: int, others: int, width: int) -> list[str]:
    """What a person should know before quoting a Frechet distance, or why there is none."""
    if frechet_is_refused(made, others, width):
        return [f"refused: {name} is left out: {trust.frechet(made, others, width).reason}"]
    found = notes_of(name, trust.frechet(made, others, width))
    if not others:
        found.append(f"note: {name}: of how many images the statistics of the reference are is not known")
    return found


def notes_of(name: str, worth: trust.Worth) -> list[str]:
    return [f"note: {name}: {worth.reason}"] if worth else []
