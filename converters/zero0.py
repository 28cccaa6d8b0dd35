"""No ZeRO: one file, ``mp_rank_00_model_states.pt``, with the optimizer's state inside.

    fp32 training     the module itself is in fp32
    fused optimizer   ``fp32_groups_flat``: a vector per group, named by the views of the module
    other optimizer   ``fp32_groups``: lists of tensors without names

The unnamed ones are matched (``matching``) by shape, by value (each rounds to one 16-bit tensor)
and by the order of the module within a group. Where that leaves a choice between different fp32
values, the checkpoint is refused. Source: DeepSpeed 0.19.8 ``runtime/fp16/fused_optimizer.py`` and
``unfused_optimizer.py``.
"""

from __future__ import annotations

from converters import matching, states, views
from converters.errors import CheckpointError
from converters.ledger import Ledger
from converters.parameters import Parameters
from converters.states import State
from converters.tensors import DType, TensorRef

MOST_ALIKE = 1 << 20  # pairs of a master weight and a tensor that it may be


def parameters(model: State) -> Parameters:
    """All parameters of a checkpoint without ZeRO. ``CheckpointError`` if masters find no name."""
    optimizer = model.root.get("optimizer")
    kept = optimizer if isinstance(optimizer, dict) else {}
    if "fp32_groups_flat" in kept:
        flats = states.tensors(model, kept["fp32_groups_flat"], "fp32_groups_flat")
        return views.complete(model, views.by_view(model, flats), None)
    if "fp32_groups" in kept:
        groups = [
            states.tensors(model, group, f"fp32_groups[{index}]")
            for index, group in enumerate(kept["fp32_groups"])
        ]
        masters, notes = _matched(model, groups)
        found = views.complete(model, masters, None)
        found.notes.extend(notes)
        return found
    found = views.complete(model, {}, None)
    if any(ref.dtype in (DType.F16, DType.BF16) for ref in found.frozen.values()):
        found.notes.append("no fp32 master weights are saved: some weights are exact to 16 bits")
    return found


def _matched(model: State, groups: list[list[TensorRef]]) -> tuple[dict[str, TensorRef], list[str]]:
    """Name to master weight, and what was taken for granted, as notes.

    Within a group the masters come in the order of the module, if those that their values tell
    apart do; only tensors that are alike in 16 bits depend on it.
    """
    buffers = model.root.get("buffer_names") or ()
    untied: dict[object, tuple[str, TensorRef]] = {}
    for name, ref in model.module.items():
        if isinstance(ref, TensorRef) and name not in buffers and ref.numel:
            untied.setdefault(ref.extents, (name, ref))
    named = list(untied.values())
    masters = [master for group in groups for master in group if master.numel]
    candidates = _candidates(masters, [ref for _, ref in named])
    at, members = 0, []
    for group in groups:
        count = sum(1 for master in group if master.numel)
        members.append(range(at, at + count))
        at += count

    def exact(index: int) -> bool:
        return views.exact(masters[index], named[min(candidates[index])][1])

    try:
        places = matching.assign(candidates, members, exact)
    except LookupError as error:
        Ledger().check(model.file.checksums)  # damage is the better explanation
        raise _refused(
            model, masters, error, "no tensor of module in the order of a group"
        ) from error
    except matching.AmbiguousError as error:
        raise _refused(model, masters, error, "several tensors of module alike") from error
    open_ = [i for i, found in enumerate(candidates) if len(found) > 1 and not exact(i)]
    ordered = [sum(len(candidates[i]) == 1 for i in group) for group in members]
    if open_ and max(ordered) < 2:
        why = "several tensors of module alike, whose order nothing shows"
        raise _refused(model, masters, LookupError(open_[0]), why)
    notes = []
    if open_:
        notes.append(
            f"{len(open_)} fp32 tensors have no names and are alike in 16 bits; they are told "
            "apart by their order, that of the module, in which all others are"
        )
    return {named[place][0]: masters[index] for index, place in places.items()}, notes


def _candidates(masters: list[TensorRef], copies: list[TensorRef]) -> list[set[int]]:
    """For each master the 16-bit tensors of its shape that it begins as, once rounded."""
    begins: dict[object, set[int]] = {}
    kinds: dict[tuple[int, ...], set[DType]] = {}
    for place, copy in enumerate(copies):
        kinds.setdefault(copy.shape, set()).add(copy.dtype)
        begins.setdefault((copy.shape, views.begins(copy, copy.dtype)), set()).add(place)
    found: list[set[int]] = []
    total = 0
    for master in masters:
        found.append(_alike(master, kinds, begins, copies))
        total += len(found[-1])
        if total > MOST_ALIKE:
            raise CheckpointError(
                f"{master.extents[0].path}: too many fp32 tensors without names are alike to tell "
                "them apart; load the checkpoint with DeepSpeed and save it under ZeRO",
                "unsupported",
            )
    return found


def _alike(
    master: TensorRef,
    kinds: dict[tuple[int, ...], set[DType]],
    begins: dict[object, set[int]],
    copies: list[TensorRef],
) -> set[int]:
    return {
        place
        for kind in kinds.get(master.shape, ())
        for place in begins.get((master.shape, views.begins(master, kind)), ())
        if copies[place].dtype is kind
    }


def _refused(model: State, masters: list[TensorRef], error: Exception, why: str) -> CheckpointError:
    shape = list(masters[error.args[0]].shape)
    return CheckpointError(
        f"{model.path}: fp32 tensor {error.args[0]} {shape} has no name in the file and rounds to "
        f"{why}, so none can be given to it; load the checkpoint with DeepSpeed and save it under "
        "ZeRO, which records names",
        "unsupported",
    )
