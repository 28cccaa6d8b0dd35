"""How DeepSpeed parts the layers of a pipeline for so many stages (``partition_method``).

    uniform      as many layers in each stage, one more in the first ones
    parameters   the heaviest and the lightest stage differ as little as can be; the default

Both give the first layer of each stage, and the number of layers. Source: DeepSpeed 0.19.8
``runtime/utils.py`` (``partition_uniform``, ``partition_balanced``), which
``runtime/pipe/module.py`` (``_partition_layers``) calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import inf

_MAX_TRIALS = 2_000_000  # splits to look at: a second or two; real pipelines have far fewer


def bounds_by_method(numels: Sequence[int], stage_count: int) -> Mapping[str, list[int]]:
    """The bounds of the stages by the name of the method; ``numels`` are those of the layers.

    Without a method that would take too long.
    """
    bounds = {"parameters": balanced(numels, stage_count)} if _is_quick(numels, stage_count) else {}
    return {**bounds, "uniform": uniform(len(numels), stage_count)}


def _is_quick(numels: Sequence[int], stage_count: int) -> bool:
    return len(numels) ** 2 * stage_count <= _MAX_TRIALS


def uniform(layer_count: int, stage_count: int) -> list[int]:
    """As many layers in each stage."""
    size, remainder = divmod(layer_count, stage_count)
    sizes = [size + (number < remainder) for number in range(stage_count)]
    return [0, *accumulate(sizes)]


def balanced(numels: Sequence[int], stage_count: int) -> list[int]:
    """About as many elements in each stage.

    Of several equal ways it is the one that DeepSpeed's order of trials ends with.
    """
    count = len(numels)
    if count <= stage_count:
        return uniform(count, stage_count)

    sums = [0, *accumulate(numels)]
    # of the first layers in so many stages: the largest and the smallest stage, the difference,
    # and where the last stage begins
    best = [[(inf, inf, inf, 0)] * (stage_count + 1) for _ in range(count + 1)]
    best[0][0] = (0, inf, 0, 0)
    for end in range(1, count + 1):
        for stages in range(1, min(end, stage_count) + 1):
            for first in range(end):
                numel = sums[end] - sums[first]
                largest = max(best[first][stages - 1][0], numel)
                smallest = min(best[first][stages - 1][1], numel)
                if largest - smallest <= best[end][stages][2]:
                    best[end][stages] = (largest, smallest, largest - smallest, first)

    bounds = [count]
    for stages in range(stage_count, 0, -1):
        bounds.append(best[bounds[-1]][stages][3])
    return bounds[::-1]
