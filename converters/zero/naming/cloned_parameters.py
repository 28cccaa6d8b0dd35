"""Trained parameters that a hook of the state dict copied, found by their values.

A copy lies in a storage of its own, so no place tells which parameter it is of:

    parameter   |---------- a ----------|   fp32, in the partitions
    module      |----- x -----|---- y --|   16 bits, cloned: x and y begin with a's rounded values

    parameters  |--- a ---|- b -|-- c --|   fp32, in the partitions
    module      |---------- x ----------|   16 bits, joined (torch.cat, torch.stack) by a hook
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import takewhile

from converters.names.rules import Names
from converters.tensors import TensorRef
from converters.zero.files import state_files
from converters.zero.files.state_files import State
from converters.zero.naming import storage_views

MAX_COMPARISONS = 1 << 12  # comparisons of the beginnings of two tensors
GLANCE, MAX_GLANCES = 1 << 12, 1 << 16  # elements of shorter ones, and how many


def unexplained(model: State, known_names: Iterable[str]) -> dict[str, TensorRef]:
    """The floating-point tensors of ``module`` that nothing explains yet.

    That is all but ``known_names``, what is tied or frozen, and buffers.
    """
    explained = {
        *known_names,
        *storage_views.buffer_names(model),
        *storage_views.shared_names(model, Names()),
    }

    for shapes in state_files.shapes(model, "frozen_param_shapes") or ():
        explained |= shapes.keys()

    module = {
        name: tensor for name, tensor in model.module.items() if isinstance(tensor, TensorRef)
    }
    taken_extents = {module[name].extents for name in explained if name in module}

    return {
        name: tensor
        for name, tensor in module.items()
        if tensor.dtype.floating
        and tensor.numel
        and name not in explained
        and tensor.extents not in taken_extents
    }


def copies_by_parameter(
    masters: Mapping[str, TensorRef], unclaimed_tensors: Mapping[str, TensorRef]
) -> dict[str, dict[str, TensorRef]]:
    """For each parameter its copies, with the fp32 weights of each.

    There are one or several, in the order of its elements. ``masters`` are flat fp32
    vectors. Only parameters whose copies no other tensor may be.
    """
    remaining = dict(unclaimed_tensors)
    comparisons_left = MAX_COMPARISONS
    copies: dict[str, dict[str, TensorRef]] = {}

    for name, vector in masters.items():
        pieces: dict[str, TensorRef] = {}
        offset = 0
        while offset < vector.numel:
            fitting = [
                candidate
                for candidate, tensor in remaining.items()
                if tensor.numel <= vector.numel - offset
            ]

            comparisons_left -= len(fitting)
            if comparisons_left < 0:
                return copies

            matches = [
                candidate
                for candidate in fitting
                if candidate not in pieces and _begins(vector, offset, remaining[candidate])
            ]
            if len(matches) != 1:
                break

            tensor = remaining[matches[0]]
            pieces[matches[0]] = vector.narrow(offset, tensor.numel).view(*tensor.shape)
            offset += tensor.numel

        if pieces and offset == vector.numel:
            copies[name] = pieces
            remaining = {
                candidate: tensor
                for candidate, tensor in remaining.items()
                if candidate not in pieces
            }

    return copies


def joined(
    masters: Mapping[str, TensorRef], unclaimed_tensors: Mapping[str, TensorRef]
) -> dict[str, tuple[str, ...]]:
    """The tensors that are several parameters one after another, with their names.

    ``masters`` are flat fp32 vectors. Each is in one tensor at most; of several that
    are alike it is the next one by its place.
    """
    remaining = dict(masters)
    comparisons_left = MAX_GLANCES
    parts_by_name: dict[str, tuple[str, ...]] = {}

    for name, tensor in unclaimed_tensors.items():
        # the parameters whose names begin most like the tensor's
        closeness = {parameter: _shared_pieces(parameter, name) for parameter in remaining}
        closest = max(closeness.values(), default=0)
        nearby = [parameter for parameter in remaining if closeness[parameter] == closest]

        parts: list[str] = []
        offset = 0

        while offset < tensor.numel:
            comparisons_left -= len(nearby)
            if comparisons_left <= 0:
                break
            part = _next_part(nearby, remaining, tensor, offset)
            if part is None:
                break

            offset += remaining[part].numel
            position = nearby.index(part)
            nearby = nearby[position + 1 :] + nearby[:position]
            parts.append(part)

        if offset == tensor.numel and len(parts) > 1:
            parts_by_name[name] = tuple(parts)
            remaining = {
                parameter: vector
                for parameter, vector in remaining.items()
                if parameter not in parts
            }

    return parts_by_name


def _next_part(
    names: Iterable[str],
    vectors: Mapping[str, TensorRef],
    tensor: TensorRef,
    offset: int,
) -> str | None:
    """The first of some vectors whose rounded values a tensor has from an element on."""
    for name in names:
        vector = vectors[name]
        count = min(vector.numel, GLANCE)
        if not 0 < vector.numel <= tensor.numel - offset:
            continue

        beginning = tensor.narrow(offset, count)
        if storage_views.same(vector.narrow(0, count), {"": (0, beginning)}):
            return name

    return None


def _shared_pieces(name: str, other_name: str) -> int:
    """The number of first pieces that two names have in common."""
    pairs = zip(name.split("."), other_name.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _begins(vector: TensorRef, offset: int, tensor: TensorRef) -> bool:
    return storage_views.same(vector, {"": (offset, tensor)})
