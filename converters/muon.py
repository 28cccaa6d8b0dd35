"""Muon's momentum under stages 1 and 2, which every rank keeps for whole parameters.

DeepSpeed orthogonalizes the momentum of a whole matrix. So where the optimizer is not offloaded, a
rank's ``momentum_buffer`` of a group is the momenta of all parameters that have elements in its
partition, whole, one behind the other and without padding; a rank with padding alone has none:

    parameters       |--- a ---|------ b ------|- c -|pad|
    ranks            |------ 0 -------|------ 1 ---------|
    buffer of 0      |--- a ---|------ b ------|
    buffer of 1      |------ b ------|- c -|

What several ranks keep is the same, bit for bit, since each folds the whole gradient into it, which
all of them have from one all-reduce. Whether it is so is looked at; nothing else is cut up anew.

An offloaded optimizer, stage 3 and BF16_Optimizer keep it for the elements of the partition, as any
state. Sources: ``get_flat_partition``, ``_muon_momentum_buffer`` and
``_apply_muon_updates_cpu_offload`` in DeepSpeed 0.19.8 ``runtime/zero/stage_1_and_2.py``,
``_muon_update_sub_group`` in ``stage3.py``, ``_prepare_muon_updates`` in ``bf16_optimizer.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from converters import files, layout
from converters.errors import CheckpointError
from converters.layout import Shapes
from converters.states import State
from converters.tensors import TensorRef

MOMENTUM = "momentum_buffer"
PIECE = 1 << 20  # bytes compared at a time
Part = tuple[str, int, int, int]  # name, its first element here, how many, where in the partition


def offloaded(model: State) -> bool:
    """Whether the run's optimizer was offloaded, by its configuration."""
    zero = ("zero_optimization",)
    device = model.setting(*zero, "offload_optimizer", "device")
    return device not in (None, "none") or model.setting(*zero, "cpu_offload") is True


def deepspeeds(model: State) -> bool:
    """Whether the optimizer is DeepSpeed's own Muon, by the configuration: of another that has
    ``use_muon`` in its groups nothing is known."""
    kind = model.setting("optimizer", "type")
    return isinstance(kind, str) and kind.lower() == "muon"


def whole(model: State) -> bool:
    """Whether ranks of stage 1 or 2 keep the momentum for whole parameters."""
    return deepspeeds(model) and not offloaded(model)


def uses(options: Mapping[str, Any] | None) -> bool:
    """Whether a param group is one of matrices that Muon updates, not of those left to Adam."""
    return options is not None and options.get("use_muon") is True


def ordered(shapes: Shapes) -> list[str]:
    """The names of a Muon group in the order that ``MuonWithAuxAdam`` gives its parameters.

    By shape, the largest first, else as it was given them (``sorted(..., reverse=True)`` in
    ``muon/original_muon.py``). Under ``zero.Init`` it sees no shapes, and leaves them as they were.
    """
    return sorted(shapes, key=lambda name: tuple(shapes[name]), reverse=True)


def parts(shapes: Shapes, start: int, run: int, paddings: Sequence[int] = ()) -> list[Part]:
    """What a rank has of a group whose partition is the ``run`` elements from ``start`` on."""
    found: list[Part] = []
    at = 0
    for index, (name, shape) in enumerate(shapes.items()):
        first, last = max(at, start), min(at + prod(shape), start + run)
        if first < last:
            found.append((name, first - at, last - first, first - start))
        at += prod(shape) + (paddings[index] if paddings else 0)
    return found


def require_whole(
    path: Path, where: str, buffer: TensorRef, shapes: Shapes, held: Sequence[Part], what: str
) -> None:
    """``CheckpointError`` unless the buffer in a rank's file is as long as these parts, whole.

    ``where`` names the group, ``what`` says what does not go on then.
    """
    wanted = sum(prod(shapes[name]) for name, *_ in held)
    if buffer.numel != wanted:
        raise CheckpointError(
            f"{path}: Muon's {MOMENTUM} of {where} has {buffer.numel} elements, the parameters "
            f"that this rank has parts of have {wanted}: {what}",
            "unsupported",
        )


def own(buffer: TensorRef, shapes: Shapes, held: Sequence[Part], numel: int) -> TensorRef:
    """Of a rank's buffer the ``numel`` elements of its own partition, padding between included."""
    found: list[TensorRef] = []
    at = filled = 0
    for name, first, count, place in held:
        found += [layout.zeros(buffer.dtype, place - filled), buffer.narrow(at + first, count)]
        at, filled = at + prod(shapes[name]), place + count
    return TensorRef.concat([*found, layout.zeros(buffer.dtype, numel - filled)])


def copies(
    buffer: TensorRef, shapes: Shapes, held: Sequence[Part]
) -> Iterator[tuple[str, TensorRef]]:
    """Of a rank's buffer those parameters that other ranks have parts of, too, whole."""
    at = 0
    for name, _, count, _ in held:
        numel = prod(shapes[name])
        if count < numel:
            yield name, buffer.narrow(at, numel)
        at += numel


def cut(
    momenta: Mapping[str, TensorRef], world_size: int, run: int, paddings: Sequence[int]
) -> list[TensorRef]:
    """Each rank's buffer, empty where it has padding alone.

    ``momenta`` are in the order of the group.
    """
    shapes = {name: ref.shape for name, ref in momenta.items()}
    none = layout.zeros(next(iter(momenta.values())).dtype, 0)
    return [
        TensorRef.concat([none, *(momenta[name] for name, *_ in held)])
        for held in (parts(shapes, rank * run, run, paddings) for rank in range(world_size))
    ]


def same(one: TensorRef, other: TensorRef) -> bool:
    """Whether two tensors hold the same bytes. Reads them, a piece at a time."""
    if (one.dtype, one.numel) != (other.dtype, other.numel):
        return False
    step = PIECE // one.dtype.itemsize
    for at in range(0, one.numel, step):
        count = min(step, one.numel - at)
        if _bytes(one.narrow(at, count)) != _bytes(other.narrow(at, count)):
            return False
    return True


def _bytes(ref: TensorRef) -> bytearray:
    data = bytearray(ref.nbytes)
    files.fill(memoryview(data), ref.extents)
    return data
