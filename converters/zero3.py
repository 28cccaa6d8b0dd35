"""Stage 3: names and master weights from the flat sub-groups of all ranks.

Each optimizer file holds one flat fp32 vector per sub-group (``fp32_flat_groups``), each model file
its rank's pieces of the frozen parameters, since 0.9.1. ``module`` has nothing but placeholders and
buffers; placeholders of tied names are views of one storage, though an empty one.

With NVMe offload the large sub-groups are empty in the file; their bytes are raw fp32 in
``offloaded_tensors/rankRR/IDS.tensor.swp``, where IDS is the attribute ``ds_id`` of the empty
tensor. Source: DeepSpeed 0.19.8 ``runtime/zero/stage3.py``, ``runtime/swap_tensor``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from converters import layout, states
from converters.errors import CheckpointError
from converters.parameters import Parameters
from converters.states import Shape, State
from converters.tensors import DType, Extent, TensorRef

SWAPPED = ".tensor.swp"  # how the names of files end that were on NVMe
FROZEN = "frozen, and not saved under stage 3 before DeepSpeed 0.9.1"
UNTRAINED = "without elements, in no param group, or left out by exclude_frozen_parameters"


def parameters(folder: Path, models: Sequence[State], ranks: Sequence[State]) -> Parameters:
    """All parameters of a stage 3 checkpoint; ``CheckpointError`` if something disagrees.

    ``models`` and ``ranks`` are the model and optimizer files in rank order; where nothing is
    frozen, the model file of rank 0 is enough.
    """
    _require_one_step(models)
    key = "fp32_flat_groups"
    by_rank = [states.tensors(state, state.optimizer.get(key), key) for state in ranks]
    if len({len(groups) for groups in by_rank}) != 1:
        raise ranks[-1].fail("the ranks have unlike numbers of sub-groups; saves are mixed")
    shapes = _sub_groups(models[0], ranks[0], by_rank)
    masters: dict[str, TensorRef] = {}
    for index, named in enumerate(shapes):
        flats = [
            vector(folder, state, rank, index, groups[index], layout.length3(named, len(ranks)))
            for rank, (state, groups) in enumerate(zip(ranks, by_rank, strict=True))
        ]
        masters |= dict(layout.stage3(flats, named))
    recorded = models[0].root.get("buffer_names")
    found = Parameters(masters, buffers=frozenset(recorded if isinstance(recorded, list) else ()))
    _add_frozen(models, found)
    _add_tied(models[0], found)
    _add_absent(models[0], found)
    return found


def _require_one_step(models: Sequence[State]) -> None:
    """Raises if the model files are not all of the same step."""
    for key in ("global_steps", "ds_version"):
        expected = models[0].root.get(key)
        for model in models[1:]:
            found = model.root.get(key)
            # only numbers and text are compared: of nested lists that takes for ever
            simple = all(isinstance(n, (int, str, type(None))) for n in (found, expected))
            if not simple or found != expected:
                raise model.fail(
                    f"is of another save than {models[0].path.name}: its {key} is "
                    f"{states.shown(found)}, expected {states.shown(expected)}; copy the file of "
                    "this save here"
                )


def _sub_groups(
    model: State, rank: State, by_rank: Sequence[Sequence[TensorRef]]
) -> list[dict[str, Shape]]:
    """The shapes of each sub-group.

    One dict a sub-group since 0.5.4. Before, one dict in the order of the groups (0.4.3), which is
    cut where the vectors end; and until 0.3.16 one in the model's order, which is enough only if
    there is one group and nothing frozen. The lengths prove it either way.
    """
    shapes = states.shapes(model, "param_shapes") or states.shapes(rank, "param_shapes")
    if shapes is None:
        raise CheckpointError(
            f"{model.path} records no param_shapes (DeepSpeed 0.3.13 and older), without which "
            "stage 3 weights have no names and no shapes; load it with that version and save the "
            "16-bit weights",
            "unsupported",
        )
    lengths = [flat.numel for flat in by_rank[0]]
    if states.listed(model, rank):
        if len(shapes) != len(lengths):
            raise rank.fail(f"{len(lengths)} sub-groups, but param_shapes has {len(shapes)}")
        return shapes
    rest = deque(shapes[0].items() if shapes else ())
    cut: list[dict[str, Shape]] = []
    for length in lengths:
        group: dict[str, Shape] = {}
        held = 0
        while rest and held < length:
            name, shape = rest.popleft()
            group[name] = shape
            held += layout.partition_numel(shape, len(by_rank))
        cut.append(group)
    fits = [layout.length3(group, len(by_rank)) for group in cut] == lengths and not rest
    if not fits or (rank.version is None and len(lengths) > 1):
        raise CheckpointError(
            f"{rank.path}: param_shapes of DeepSpeed before 0.4.3 does not tell the order of "
            f"{len(lengths)} parameter groups with frozen parameters among them, so stage 3 "
            "weights cannot be named; load it with that version and save the 16-bit weights",
            "unsupported",
        )
    return cut


def vector(
    folder: Path, state: State, rank: int, index: int, flat: TensorRef, length: int
) -> TensorRef:
    """A rank's vector of a sub-group, of exactly ``length`` elements, from wherever it lies.

    ``folder`` is the tag's. ``CheckpointError`` if it is nowhere, or has another length.
    """
    if flat.numel == length:
        return flat
    if flat.numel:
        raise state.fail(
            f"sub-group {index} has {flat.numel} elements, expected {length}; the file is of "
            "another save"
        )
    return _swapped(folder, state, rank, index, flat, "", DType.F32, length)


def kept(
    folder: Path,
    state: State,
    rank: int,
    index: int,
    flat: TensorRef,
    held: Mapping[str, Any],
    length: int,
) -> Mapping[str, Any]:
    """What the optimizer keeps of a sub-group: where ``flat`` is on NVMe, its tensors are, too."""
    if flat.numel == length:
        return held
    return {
        key: _swapped(folder, state, rank, index, flat, f"{key}-", value.dtype, length)
        if isinstance(value, TensorRef) and value.shape == (0,)
        else value
        for key, value in held.items()
    }


def _swapped(
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
    stem = flat.attributes.get("ds_id")
    path = folder / "offloaded_tensors" / f"rank{rank:02d}" / f"{prefix}{stem}{SWAPPED}"
    if not isinstance(stem, str) or "/" in f"{prefix}{stem}" or not path.is_file():
        raise CheckpointError(
            f"{state.path}: sub-group {index} was offloaded to NVMe, but its file {path} is "
            "missing; copy the folder offloaded_tensors of every rank here",
            "incomplete",
        )
    nbytes = length * dtype.itemsize
    if not nbytes <= path.stat().st_size < nbytes + (1 << 20):
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, expected {nbytes} and some padding; "
            "it is cut short or of another save"
        )
    return TensorRef(dtype, (length,), (Extent(path, 0, nbytes),))


def _add_frozen(models: Sequence[State], found: Parameters) -> None:
    """The frozen parameters, from every rank's fragments."""
    shapes: dict[str, Shape] = {}
    for group in states.shapes(models[0], "frozen_param_shapes") or ():
        shapes |= group
    module = models[0].module
    for name, shape in shapes.items():
        if not prod(shape):
            kind = states.tensor(models[0], module.get(name), name).dtype
            found.frozen[name] = TensorRef(kind, shape, ())
            continue
        parts = []
        for model in models:
            fragments = model.root.get("frozen_param_fragments")
            held = fragments.get(name) if isinstance(fragments, dict) else None
            parts.append(states.tensor(model, held, f"frozen_param_fragments[{name!r}]"))
        run = layout.partition_numel(shape, len(models))
        if all(part.shape == () for part in parts) and run > 1:
            found.absent[name] = "frozen on NVMe, which DeepSpeed does not save"
        elif any(part.numel != run for part in parts):
            raise models[0].fail(
                f"frozen {name} has pieces of {[part.numel for part in parts]} elements, "
                f"expected {run} on each rank"
            )
        elif models[0].setting("zero_optimization", "zero_quantized_nontrainable_weights"):
            found.absent[name] = "frozen and quantized; DeepSpeed does not save the scales"
        else:
            found.frozen[name] = TensorRef.concat(parts).narrow(0, prod(shape)).view(*shape)


def _add_tied(model: State, found: Parameters) -> None:
    """The tied names: those whose placeholders are views of one storage.

    That tells in every version and on every rank; ``shared_params`` (rank 0, 0.9.2 and later) only
    where placeholders are told apart. Names with values of their own are not tied.
    """
    own = found.masters.keys() | found.frozen.keys() | found.absent.keys() | found.buffers
    named: dict[object, list[str]] = {}
    for name, value in model.module.items():
        if isinstance(value, TensorRef):
            named.setdefault((value.extents, value.shape), []).append(name)
    for names in named.values():
        owners = [name for name in names if name in own]
        if len(owners) == 1:
            found.aliases |= {name: owners[0] for name in names if name != owners[0]}
    shared = model.root.get("shared_params")
    for name, owner in (shared if isinstance(shared, dict) else {}).items():
        if isinstance(name, str) and isinstance(owner, str) and name not in own:
            found.aliases[name] = owner


def _add_absent(model: State, found: Parameters) -> None:
    """The names of ``module`` whose placeholder is all there is."""
    known = found.masters | found.frozen | found.aliases | found.absent
    early = model.version is None or model.version.startswith(("0.3.", "0.4.", "0.5."))
    old = "frozen_param_fragments" not in model.root  # which 0.9.1 brought
    placeholders = ((0,), (1,)) if early else ((0,),)
    for name, value in model.module.items():
        if name in known or name in found.buffers or not isinstance(value, TensorRef):
            continue
        if value.shape in placeholders:
            found.absent[name] = FROZEN if old else UNTRAINED
