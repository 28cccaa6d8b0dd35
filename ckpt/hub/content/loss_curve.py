"""A small picture of the losses of a training, for its model card."""

from __future__ import annotations

import io
from collections.abc import Sequence

Points = Sequence[tuple[float, float]]  # step, loss
MIN_POINTS = 3  # points of a curve
MAX_POINTS = 1000  # points drawn; a line has fewer pixels
MAX_PICTURE_BYTES = 40_000  # bytes of the picture


def curve(training: Points, evaluation: Points = ()) -> bytes | None:
    """A PNG of the losses by step, the same bytes for the same points.

    ``None`` where there are fewer than ``MIN_POINTS`` points, or matplotlib is not
    installed.
    """
    if max(len(training), len(evaluation)) < MIN_POINTS:
        return None

    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None

    figure = Figure(figsize=(6.4, 3.2), dpi=80, layout="constrained")
    axes = figure.subplots()
    series = ((training, "training", "-"), (evaluation, "evaluation", "o-"))
    for points, label, style in series:
        if points:
            drawn_points = thinned(points, MAX_POINTS)
            axes.plot(
                *zip(*drawn_points, strict=True),
                style,
                label=label,
                linewidth=1.2,
                markersize=3,
            )

    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})

    return picture.getvalue() if picture.tell() < MAX_PICTURE_BYTES else None


def thinned(points: Points, max_points: int) -> list[tuple[float, float]]:
    """At most ``max_points`` (2 or more) of them,
    evenly spread, the first and the last too."""
    if len(points) <= max_points:
        return list(points)
    last_index = len(points) - 1
    return [points[round(index * last_index / (max_points - 1))] for index in range(max_points)]
