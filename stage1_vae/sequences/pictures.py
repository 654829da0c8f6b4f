"""Drawings of a pen for people: as a picture, and as SVG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

SIDE, MARGIN, LINE = 96, 8, 2  # pixels


def polylines(strokes: np.ndarray) -> list[np.ndarray]:
    """Rows n 5, or n 3, as lines of points, m 2 each, y upwards; a dot is a line of one. A row is a move, and whether
    the pen is lifted after it; the pen starts on the paper at (0, 0)."""
    lifted = strokes[:, 3] if strokes.shape[1] == 5 else strokes[:, 2]
    places = np.concatenate([np.zeros((1, 2)), np.cumsum(strokes[:, :2], axis=0)])
    lines, start = [], 0
    for number, up in enumerate(lifted, 1):
        if up > 0.5 or number == len(lifted):
            lines.append(places[start : number + 1])
            start = number + 1
    return lines


def fitted(strokes: np.ndarray, side: float) -> list[np.ndarray]:
    """Lines scaled into a square with a margin, y downwards."""
    lines = polylines(strokes)
    if not lines:
        return []
    points = np.concatenate(lines)
    low, high = points.min(0), points.max(0)
    scale = (side - 2 * MARGIN) / max(float((high - low).max()), 1e-6)
    middle = (low + high) / 2
    return [(line - middle) * np.array([scale, -scale]) + side / 2 for line in lines]


def picture(strokes: np.ndarray, side: int = SIDE) -> Image.Image:
    """Black on white, "L"; of nothing, white."""
    image = Image.new("L", (4 * side, 4 * side), 255)
    draw = ImageDraw.Draw(image)
    for line in fitted(strokes, side):
        points = [(float(4 * x), float(4 * y)) for x, y in line]
        if len(points) == 1:
            draw.circle(points[0], 2 * LINE, fill=0)
        draw.line(points, fill=0, width=4 * LINE, joint="curve")
    return image.resize((side, side), Image.Resampling.LANCZOS)


def pictures(drawings: Sequence[np.ndarray]) -> list[Image.Image]:
    return [picture(one) for one in drawings]


def svg(strokes: np.ndarray, side: int = 256) -> str:
    """A drawing as an SVG file, a dot as a line to itself, of which the round caps are seen."""
    lines = [line if len(line) > 1 else line.repeat(2, axis=0) for line in fitted(strokes, side)]
    paths = "".join(f'<polyline points="{" ".join(f"{x:.2f},{y:.2f}" for x, y in line)}"/>' for line in lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" fill="none" stroke="black" '
        f'stroke-width="{LINE}" stroke-linecap="round" stroke-linejoin="round">{paths}</svg>\n'
    )
