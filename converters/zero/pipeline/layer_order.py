"""Which parameters of a pipeline an optimizer without ZeRO has, by order and shape.

Its state has numbers in the place of names: those of the stage's parameters in the order
of the module, which is that of the layers, a tied module first (``nn.Module`` registers
``tied_modules`` before the layers; DeepSpeed 0.19.8 ``runtime/pipe/module.py``).

    layer files   |- 0 -|--- 2 ---|--- 3 ---|- 4 -|
    stage 0       |- 0 -|--- 2 ---|
    stage 1       |- 0 -|--- 3 ---|- 4 -|           0 is tied

Where the stages end, and which module is tied, is not written. So all ways are tried in
which the shapes of all stages follow from the layer files, each layer in one stage but
for at most one that is tied. Nothing is taken for granted if there are two such ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

Shape = tuple[int, ...]
Way = tuple[tuple[int, ...], ...]  # the layers of each stage, in the order of its parameters
MAX_STEPS = 1 << 22  # shapes compared at most; ends the search in odd files
MAX_WAYS = 64  # that are followed at once


def ways(
    stages: Sequence[Sequence[Shape]], layers: Mapping[int, Sequence[Shape]]
) -> set[Way] | None:
    """The layers of each stage, in all ways to deal them out, or some of these if there
    are several; ``None`` if that is too much to try.

    ``stages`` has the shapes of each stage's parameters in order, ``layers`` those of
    each layer.
    """
    shape_count = sum(map(len, layers.values())) + sum(map(len, stages))
    if (len(layers) + 1) * shape_count > MAX_STEPS:
        return None

    result: set[Way] = set()
    for tied_layer in (None, *(layer for layer in layers if layers[layer])):
        result.update(_ways(stages, layers, tied_layer))
        if len(result) > 1:
            break

    return result


def _ways(
    stages: Sequence[Sequence[Shape]], layers: Mapping[int, Sequence[Shape]], tied: int | None
) -> Iterator[Way]:
    """The ways in which a layer, or none, is tied."""
    order = [layer for layer in layers if layer != tied and layers[layer]]
    partial: list[tuple[int, Way]] = [(0, ())]  # how many layers are dealt out, and how

    for shapes in stages:
        longer: list[tuple[int, Way]] = []
        for start, way in partial:
            for prefix in ((), (tied,)) if tied is not None else ((),):
                end, stage_layers = _stage_from(shapes, layers, order, start, prefix)
                if end is not None:
                    longer.append((end, (*way, stage_layers)))
        partial = longer[:MAX_WAYS]

    for end, way in partial:
        has_tied = tied is None or any(tied in stage_layers for stage_layers in way)
        if end == len(order) and has_tied:
            yield way


def _stage_from(
    shapes: Sequence[Shape],
    layers: Mapping[int, Sequence[Shape]],
    order: Sequence[int],
    start: int,
    prefix: tuple[int, ...],
) -> tuple[int | None, tuple[int, ...]]:
    """Where in ``order`` a stage ends that begins at ``start``, and its layers.

    ``None`` for the end if its shapes are not those of whole layers.
    """
    stage_layers: list[int] = []
    offset = 0
    remaining = iter((*prefix, *order[start:]))
    while offset < len(shapes):
        layer = next(remaining, None)
        if layer is None:
            return None, ()

        layer_shapes = layers[layer]
        if list(shapes[offset : offset + len(layer_shapes)]) != list(layer_shapes):
            return None, ()
        stage_layers.append(layer)
        offset += len(layer_shapes)

    if len(stage_layers) < len(prefix):
        return None, ()
    return start + len(stage_layers) - len(prefix), tuple(stage_layers)
