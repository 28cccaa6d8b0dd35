"""No ZeRO: one file, ``mp_rank_00_model_states.pt``, with the optimizer's state inside.

    fp32 training     the module itself is in fp32
    fused optimizer   ``fp32_groups_flat``: a vector per group, named by the views of the module
    other optimizer   ``fp32_groups``: lists of tensors without names

The unnamed ones are matched (``name_matching``) by shape, by value (each rounds to one
16-bit tensor) and by the order of the module within a group. Where that leaves a choice
between different fp32 values, the checkpoint is refused. Source: DeepSpeed 0.19.8,
``runtime/fp16/fused_optimizer.py`` and ``unfused_optimizer.py``.
"""

from __future__ import annotations

from collections.abc import Callable

from converters import words
from converters.errors import CheckpointError
from converters.storage.checksums import Ledger
from converters.tensors import DType, TensorRef
from converters.zero.files import state_files
from converters.zero.files.state_files import State
from converters.zero.files.typed import Section
from converters.zero.naming import name_matching, storage_views
from converters.zero.naming.assemble import Parameters

MAX_PAIRS = 1 << 20  # pairs of a master weight and a tensor that it may be


def parameters(model: State) -> Parameters:
    """All parameters of a checkpoint without ZeRO.

    ``CheckpointError`` if masters find no name.
    """
    optimizer = model.root.get("optimizer")
    optimizer_state = optimizer if isinstance(optimizer, dict) else {}
    section = Section(model.path, "optimizer", optimizer_state)
    if "fp32_groups_flat" in optimizer_state:
        flat_groups = optimizer_state["fp32_groups_flat"]
        flat_vectors = state_files.tensors(model, flat_groups, "fp32_groups_flat")
        masters = storage_views.by_view(model, flat_vectors)

        return storage_views.complete(model, masters, None)

    if "fp32_groups" in optimizer_state:
        groups = [
            state_files.tensors(model, group, f"fp32_groups[{index}]")
            for index, group in enumerate(section.required("fp32_groups", list))
        ]
        masters, notes = _match_masters(model, groups)
        result = storage_views.complete(model, masters, None)
        result.notes.extend(notes)

        return result

    result = storage_views.complete(model, {}, None)
    dtypes = {tensor.dtype for tensor in result.frozen.values()}
    if dtypes & {DType.F16, DType.BF16}:
        result.notes.append("no fp32 master weights are saved: some weights are exact to 16 bits")

    return result


def _match_masters(
    model: State, groups: list[list[TensorRef]]
) -> tuple[dict[str, TensorRef], list[str]]:
    """Name to master weight, and what was taken for granted, as notes.

    Within a group the masters come in the order of the module, if those that their
    values tell apart do; only tensors that are alike in 16 bits depend on it.
    """
    module_tensors = _untied_tensors(model)
    masters = [master for group in groups for master in group if master.numel]
    candidates = _candidates(masters, [tensor for _, tensor in module_tensors])
    indices_by_group = _indices_by_group(groups)

    def exact(index: int) -> bool:
        _, tensor = module_tensors[min(candidates[index])]
        return storage_views.exact(masters[index], tensor)

    positions, by_value = _assign(model, masters, candidates, indices_by_group, exact)
    masters_by_name = {
        module_tensors[position][0]: masters[index] for index, position in positions.items()
    }
    if by_value:
        return masters_by_name, []

    ambiguous = [
        index for index, choices in enumerate(candidates) if len(choices) > 1 and not exact(index)
    ]
    if not ambiguous:
        return masters_by_name, []

    if not _shows_order(candidates, indices_by_group):
        reason = "matches several 16-bit tensors equally well, and nothing shows their order"
        raise _no_name_error(model, masters, name_matching.NoPlaceError(ambiguous[0]), reason)

    note = (
        f"{len(ambiguous)} fp32 tensors are stored without names and are equal in 16 bits; "
        "their order in the file names them: all other tensors are in the order of the module"
    )
    return masters_by_name, [note]


def _assign(
    model: State,
    masters: list[TensorRef],
    candidates: list[set[int]],
    indices_by_group: list[range],
    exact: Callable[[int], bool],
) -> tuple[dict[int, int], bool]:
    """The place of each master's tensor,
    and whether values alone, not the order, tell it.

    ``CheckpointError`` for a master that fits no tensor, or several.
    """
    try:
        return name_matching.assign(candidates, indices_by_group, exact), False
    except name_matching.NoPlaceError as error:
        # a hook on the state dict may have changed the order; values tell, if they can
        positions_by_value = _without_order(candidates, exact)
        if positions_by_value is None:
            Ledger().check(model.file.checksums)  # damage is the better explanation
            raise _no_name_error(
                model, masters, error, "matches no 16-bit tensor in the order of its group"
            ) from error

        return positions_by_value, True
    except name_matching.AmbiguousError as error:
        reason = "matches several 16-bit tensors equally well"
        raise _no_name_error(model, masters, error, reason) from error


def _untied_tensors(model: State) -> list[tuple[str, TensorRef]]:
    """The tensors of ``module`` that may be parameters, each once, under its first name."""
    buffers = storage_views.buffer_names(model)
    untied_tensors: dict[object, tuple[str, TensorRef]] = {}
    for name, tensor in model.module.items():
        if isinstance(tensor, TensorRef) and name not in buffers and tensor.numel:
            untied_tensors.setdefault(tensor.extents, (name, tensor))

    return list(untied_tensors.values())


def _indices_by_group(groups: list[list[TensorRef]]) -> list[range]:
    """The numbers of each group's master weights, counted over all groups."""
    indices_by_group = []
    first_index = 0
    for group in groups:
        count = sum(1 for master in group if master.numel)
        indices_by_group.append(range(first_index, first_index + count))
        first_index += count

    return indices_by_group


def _shows_order(candidates: list[set[int]], indices_by_group: list[range]) -> bool:
    """Whether a group has two members or more whose values leave no choice.

    Fewer do not show that the group keeps the module's order.
    """
    return any(
        sum(len(candidates[index]) == 1 for index in indices) >= 2 for indices in indices_by_group
    )


def _without_order(
    candidates: list[set[int]], exact: Callable[[int], bool]
) -> dict[int, int] | None:
    """The place of each tensor by its values alone; ``None`` if they leave a choice."""
    groups_of_one = [[index] for index in range(len(candidates))]
    try:
        return name_matching.assign(candidates, groups_of_one, exact)
    except (name_matching.NoPlaceError, name_matching.AmbiguousError):
        return None


def _candidates(masters: list[TensorRef], references: list[TensorRef]) -> list[set[int]]:
    """For each master the 16-bit tensors of its shape that it begins as, rounded."""
    positions_by_beginning: dict[object, set[int]] = {}
    dtypes_by_shape: dict[tuple[int, ...], set[DType]] = {}
    for position, reference in enumerate(references):
        beginning = storage_views.begins(reference, reference.dtype)
        dtypes_by_shape.setdefault(reference.shape, set()).add(reference.dtype)
        positions_by_beginning.setdefault((reference.shape, beginning), set()).add(position)

    candidates: list[set[int]] = []
    pair_count = 0
    for master in masters:
        positions = _possible_positions(master, dtypes_by_shape, positions_by_beginning, references)
        candidates.append(positions)
        pair_count += len(positions)
        if pair_count > MAX_PAIRS:
            raise CheckpointError(
                f"{master.extents[0].path}: too many fp32 tensors without names are "
                "alike to tell them apart; load the checkpoint with DeepSpeed and save "
                "it under ZeRO",
                "unsupported",
            )

    return candidates


def _possible_positions(
    master: TensorRef,
    dtypes_by_shape: dict[tuple[int, ...], set[DType]],
    positions_by_beginning: dict[object, set[int]],
    references: list[TensorRef],
) -> set[int]:
    possible: set[int] = set()
    for dtype in dtypes_by_shape.get(master.shape, ()):
        beginning = storage_views.begins(master, dtype)
        positions = positions_by_beginning.get((master.shape, beginning), ())
        possible |= {position for position in positions if references[position].dtype is dtype}

    return possible


def _no_name_error(
    model: State, masters: list[TensorRef], error: Exception, reason: str
) -> CheckpointError:
    shape = words.shape(masters[error.args[0]].shape)
    return CheckpointError(
        f"{model.path}: fp32 tensor {error.args[0]} ({shape}) is stored without a name and "
        f"{reason}, so it cannot be identified; load the checkpoint with DeepSpeed and save it "
        "under ZeRO, which records names",
        "unsupported",
    )
