"""A small picture of the losses of a training, for its model card."""

from __future__ import annotations

import io
from collections.abc import Sequence

Points = Sequence[tuple[float, float]]  # step, loss
LEAST = 3  # points of a curve
MOST = 1000  # points drawn; a line has fewer pixels
LARGEST = 40_000  # bytes of the picture


def curve(training: Points, evaluation: Points = ()) -> bytes | None:
    """A PNG of the losses by step, the same bytes for the same points.

    ``None`` where there are fewer than ``LEAST`` points, or matplotlib is not installed.
    """
    if max(len(training), len(evaluation)) < LEAST:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6.4, 3.2), dpi=80, layout="constrained")
    axes = figure.subplots()
    for points, label, style in ((training, "training", "-"), (evaluation, "evaluation", "o-")):
        if points:
            drawn = thinned(points, MOST)
            axes.plot(*zip(*drawn, strict=True), style, label=label, linewidth=1.2, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    held = io.BytesIO()
    figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue() if held.tell() < LARGEST else None


def thinned(points: Points, most: int) -> list[tuple[float, float]]:
    """At most ``most`` of the points (2 or more), evenly spread, with the first and the last."""
    if len(points) <= most:
        return list(points)
    last = len(points) - 1
    return [points[round(number * last / (most - 1))] for number in range(most)]
