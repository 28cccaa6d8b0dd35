"""Stage 3: names and master weights from the flat sub-groups of all ranks.

Each optimizer file holds one flat fp32 vector per sub-group (``fp32_flat_groups``),
each model file its rank's pieces of the frozen parameters, since 0.9.1. ``module`` has
nothing but placeholders and buffers; placeholders of tied names are views of one
storage, though an empty one.

With NVMe offload the large sub-groups are empty in the file; their bytes are raw fp32
in ``offloaded_tensors/rankRR/IDS.tensor.swp``, where IDS is the attribute ``ds_id`` of
the empty tensor. Source: DeepSpeed 0.19.8 ``runtime/zero/stage3.py``,
``runtime/swap_tensor``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from converters import words
from converters.detect.filenames import SWAPPED
from converters.errors import CheckpointError
from converters.pickles.values import Call
from converters.storage import stores
from converters.storage.system.names import is_name
from converters.tensors import DType, Extent, Listed, TensorRef
from converters.zero import partitioning
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape, State
from converters.zero.naming import placeholders, storage_views
from converters.zero.naming.assemble import Parameters


def parameters(folder: Path, models: Sequence[State], ranks: Sequence[State]) -> Parameters:
    """All parameters of a stage 3 checkpoint.

    ``models`` and ``ranks`` are the model and optimizer files in rank order; where
    nothing is frozen, the model file of rank 0 is enough. ``CheckpointError`` if
    something disagrees.
    """
    require_one_step(models)
    key = "fp32_flat_groups"
    by_rank = [state_files.tensors(state, state.optimizer.get(key), key) for state in ranks]
    if len({len(groups) for groups in by_rank}) != 1:
        raise ranks[-1].fail("the ranks have unlike numbers of sub-groups; saves are mixed")

    shapes = _sub_groups(models[0], ranks[0], by_rank)
    masters: dict[str, TensorRef] = {}

    for index, group_shapes in enumerate(shapes):
        length = partitioning.subgroup_size(group_shapes, len(ranks))
        flat_vectors = [
            vector(folder, state, rank, index, groups[index], length)
            for rank, (state, groups) in enumerate(zip(ranks, by_rank, strict=True))
        ]
        masters |= dict(partitioning.stage3(flat_vectors, group_shapes))

    return complete(models, masters)


def complete(models: Sequence[State], masters: Mapping[str, TensorRef]) -> Parameters:
    """All parameters, where the trained ones are known by their own names.

    ``models`` are the model files in rank order. ``CheckpointError`` if something
    disagrees.
    """
    frozen, unsaved_reasons = _frozen_parameters(models)
    names = placeholders.names_of(models[0], [*masters, *frozen, *unsaved_reasons])
    module = models[0].module
    buffers = storage_views.buffer_names(models[0])

    result = Parameters(
        {names.of(name, module): tensor for name, tensor in masters.items()},
        {names.of(name, module): tensor for name, tensor in frozen.items()},
        absent={names.of(name, module): reason for name, reason in unsaved_reasons.items()},
        buffers=frozenset(names.of(name, module) for name in buffers),
        names=names,
    )

    placeholders.add_tied(models[0], result)
    placeholders.add_absent(models[0], result)
    result.notes.extend(placeholders.notes_on_layout(names))

    return result


def require_one_step(models: Sequence[State]) -> None:
    """Raises if the model files are not all of the same step."""
    for key in ("global_steps", "ds_version"):
        expected = models[0].root.get(key)
        for model in models[1:]:
            value = model.root.get(key)
            # only numbers and text are compared: of nested lists that takes for ever
            simple_types = (int, str, type(None))
            comparable = isinstance(value, simple_types) and isinstance(expected, simple_types)
            if not comparable or value != expected:
                raise model.fail(
                    f"is of another save than {models[0].path.name}: its {key} is "
                    f"{state_files.shown(value)}, expected "
                    f"{state_files.shown(expected)}; copy the file of this save here"
                )


def _sub_groups(
    model: State, rank: State, by_rank: Sequence[Sequence[TensorRef]]
) -> list[dict[str, Shape]]:
    """The shapes of each sub-group.

    One dict a sub-group since 0.5.4. Before, one dict in the order of the groups
    (0.4.3), which is cut where the vectors end; and until 0.3.16 one in the model's
    order, which is enough only if there is one group and nothing frozen. The lengths
    prove it either way.
    """
    shapes = state_files.shapes(model, "param_shapes")
    shapes = shapes or state_files.shapes(rank, "param_shapes")
    if shapes is None:
        raise CheckpointError(
            f"{model.path} records no param_shapes (DeepSpeed 0.3.13 and older), "
            "without which stage 3 weights have no names and no shapes; load it with "
            "that version and save the 16-bit weights",
            "unsupported",
        )

    lengths = [flat.numel for flat in by_rank[0]]
    if state_files.listed(model, rank):
        if len(shapes) != len(lengths):
            raise rank.fail(f"{len(lengths)} sub-groups, but param_shapes has {len(shapes)}")
        return shapes

    sub_groups = _cut_at_lengths(shapes[0] if shapes else {}, lengths, len(by_rank))
    if sub_groups is None or (rank.version is None and len(lengths) > 1):
        raise CheckpointError(
            f"{rank.path}: param_shapes of DeepSpeed before 0.4.3 does not tell the "
            f"order of {len(lengths)} parameter groups with frozen parameters among "
            "them, so stage 3 weights cannot be named; load it with that version and "
            "save the 16-bit weights",
            "unsupported",
        )

    return sub_groups


def _cut_at_lengths(
    shapes: Mapping[str, Shape], lengths: Sequence[int], world_size: int
) -> list[dict[str, Shape]] | None:
    """The shapes cut, in their order, into sub-groups of these numbers of elements.

    ``None`` if the shapes do not give these numbers.
    """
    remaining = deque(shapes.items())
    sub_groups: list[dict[str, Shape]] = []

    for length in lengths:
        group: dict[str, Shape] = {}
        filled_numel = 0
        while remaining and filled_numel < length:
            name, shape = remaining.popleft()
            group[name] = shape
            filled_numel += partitioning.partition_numel(shape, world_size)

        sub_groups.append(group)

    expected_lengths = [partitioning.subgroup_size(group, world_size) for group in sub_groups]
    return sub_groups if expected_lengths == list(lengths) and not remaining else None


def vector(
    folder: Path, state: State, rank: int, index: int, flat: TensorRef, length: int
) -> TensorRef:
    """A rank's vector of a sub-group, of exactly ``length`` elements, wherever it lies.

    ``folder`` is the tag's. ``CheckpointError`` if it is nowhere, or of another length.
    """
    if flat.numel == length:
        return flat
    if flat.numel:
        raise state.fail(
            f"sub-group {index} has {flat.numel} elements, expected {length}; the file "
            "is of another save"
        )

    return _swapped_tensor(folder, state, rank, index, flat, "", DType.F32, length)


def kept(
    folder: Path,
    state: State,
    rank: int,
    index: int,
    flat: TensorRef,
    values: Mapping[str, Any],
    length: int,
) -> Mapping[str, Any]:
    """The states that the optimizer keeps of a sub-group.

    Where ``flat`` is on NVMe, its tensors are, too.
    """
    if flat.numel == length:
        return values

    located = dict(values)
    for key, value in values.items():
        if isinstance(value, TensorRef) and value.shape == (0,):
            located[key] = _swapped_tensor(
                folder, state, rank, index, flat, f"{key}-", value.dtype, length
            )

    return located


def _swapped_tensor(
    folder: Path,
    state: State,
    rank: int,
    index: int,
    flat: TensorRef,
    prefix: str,
    dtype: DType,
    length: int,
) -> TensorRef:
    """A tensor of a sub-group in its own file; ``prefix`` tells which."""
    tensor_id = flat.attributes.get("ds_id")
    stem = f"{prefix}{tensor_id if isinstance(tensor_id, str) else ''}"
    path = folder / "offloaded_tensors" / f"rank{rank:02d}" / f"{stem}{SWAPPED}"
    if not isinstance(tensor_id, str) or not is_name(stem) or not stores.is_file(path):
        raise CheckpointError(
            f"{state.path}: sub-group {index} was offloaded to NVMe, but its file "
            f"{path} is missing; copy the folder offloaded_tensors of every rank here",
            "incomplete",
        )

    nbytes = length * dtype.itemsize
    file_size = stores.status(path).size
    if not nbytes <= file_size < nbytes + (1 << 20):
        raise CheckpointError(
            f"{path} has {file_size} bytes, expected {nbytes} and some "
            "padding; it is cut short or of another save"
        )

    return TensorRef(dtype, (length,), Listed([Extent(path, 0, nbytes)]))


def _frozen_parameters(
    models: Sequence[State],
) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """The frozen parameters, from all ranks' fragments, and why others are missing."""
    from converters.torch_files import odd_tensors

    shapes: dict[str, Shape] = {}
    for group in state_files.shapes(models[0], "frozen_param_shapes") or ():
        shapes |= group

    module = models[0].module
    is_quantized = models[0].setting("zero_optimization", "zero_quantized_nontrainable_weights")
    frozen_tensors: dict[str, TensorRef] = {}
    absence_reasons: dict[str, str] = {}

    for name, shape in shapes.items():
        pieces, unreadable = _frozen_pieces(models, name, shape)
        if unreadable is not None:
            absence_reasons[name] = f"frozen, and {odd_tensors.reason(unreadable)}"
            continue

        if not prod(shape):
            stored = pieces or [state_files.tensor(models[0], module.get(name), name)]
            frozen_tensors[name] = TensorRef(stored[0].dtype, shape, Listed())
            continue

        piece_size = partitioning.partition_numel(shape, len(models))
        if all(piece.shape == () for piece in pieces) and piece_size > 1:
            absence_reasons[name] = "frozen on NVMe, which DeepSpeed does not save"
        elif any(piece.numel != piece_size for piece in pieces):
            raise models[0].fail(
                f"frozen {name} has pieces of {words.numbers(piece.numel for piece in pieces)} "
                f"elements, expected {piece_size} on each rank"
            )
        elif is_quantized:
            absence_reasons[name] = "frozen and quantized; DeepSpeed does not save the scales"
        else:
            padded = partitioning.joined(pieces)
            frozen_tensors[name] = padded.narrow(0, prod(shape)).view(*shape)

    return frozen_tensors, absence_reasons


def _frozen_pieces(
    models: Sequence[State], name: str, shape: Shape
) -> tuple[list[TensorRef], Call | None]:
    """The ranks' pieces of a frozen parameter, and one that is not a tensor, if any.

    An empty parameter may have no pieces.
    """
    pieces = []
    unreadable = None
    for model in models:
        fragments = model.root.get("frozen_param_fragments")
        fragment = fragments.get(name) if isinstance(fragments, dict) else None
        if isinstance(fragment, Call):
            unreadable = fragment
        elif prod(shape) or fragment is not None:
            label = f"frozen_param_fragments[{name!r}]"
            pieces.append(state_files.tensor(model, fragment, label))

    return pieces, unreadable
