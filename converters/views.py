"""Names by storage: the trained tensors of ``module`` are views into flat 16-bit storages.

    storage of a group   |--- a ---|------ b ------|- c -|pad|      16 bits an element
    fp32 partitions      |--- a ---|------ b ------|- c -|          the same element offsets

True for ZeRO-1 and 2, BF16_Optimizer and the fused FP16_Optimizer of every version seen, 0.3.16 to
0.19.8. It finds names where ``param_shapes`` does not (before 0.5.4), and tied names everywhere:
they are the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256

from converters import matching
from converters.parameters import Parameters
from converters.states import Shape, State
from converters.tensors import DType, Extent, TensorRef

PROBE = 1 << 16  # elements looked at to tell tensors apart; all are compared on the way


def place(model: State, ref: TensorRef) -> tuple[Extent, int] | None:
    """The storage of a tensor and the element it begins at; ``None`` for an empty tensor."""
    storage = model.file.storage(ref)
    if storage is None:
        return None
    at = ref.extents[0].offset - storage.extent.offset
    return storage.extent, at // ref.dtype.itemsize


def by_view(model: State, flats: Sequence[TensorRef]) -> dict[str, TensorRef]:
    """Name to master weight, where each of ``flats`` is the fp32 vector of a group.

    Storages and groups are matched by size, and by values where sizes leave a choice
    (``matching``). ``CheckpointError`` if there is no match, or a choice between different values.
    """
    storages: dict[Extent, dict[str, tuple[int, TensorRef]]] = {}
    for name, ref in model.module.items():
        if isinstance(ref, TensorRef) and ref.dtype.floating and (found := place(model, ref)):
            storages.setdefault(found[0], {})[name] = (found[1], ref)
    named = [
        (storage, views, end)
        for storage, views in storages.items()
        if (end := _covered(views)) is not None
    ]
    flats = [flat for flat in flats if flat.numel]
    candidates = [
        {
            index
            for index, (storage, views, end) in enumerate(named)
            if end <= flat.numel <= storage.length // next(iter(views.values()))[1].dtype.itemsize
            and _same(flat, views)
        }
        for flat in flats
    ]

    def exact_group(group: int) -> bool:
        _, views, _ = named[min(candidates[group])]
        return all(exact(flats[group].narrow(at, ref.numel), ref) for at, ref in views.values())

    try:
        places = matching.assign(candidates, [[index] for index in range(len(flats))], exact_group)
    except (LookupError, matching.AmbiguousError) as error:
        ways = "no storage" if isinstance(error, LookupError) else "several storages"
        raise model.fail(
            f"group {error.args[0]} of the fp32 weights ({flats[error.args[0]].numel} elements) "
            f"fits {ways} of module by size and values, so its parameters have no names"
        ) from error
    masters: dict[str, TensorRef] = {}
    for group, index in places.items():
        for name, (at, ref) in named[index][1].items():
            masters[name] = flats[group].narrow(at, ref.numel).view(*ref.shape)
    return masters


def _covered(named: Mapping[str, tuple[int, TensorRef]]) -> int | None:
    """Where the views end that cover a storage from its beginning, without a gap or an overlap."""
    end = 0
    for at, length in sorted({(at, ref.numel) for at, ref in named.values()}):
        if at != end:
            return None
        end += length
    return end


def _same(flat: TensorRef, named: Mapping[str, tuple[int, TensorRef]]) -> bool:
    """Whether the fp32 vector, rounded, begins each named view with the view's values."""
    from converters import cast

    for at, ref in named.values():
        count = min(ref.numel, PROBE)
        if not cast.rounds_to(flat.narrow(at, count), ref.narrow(0, count)):
            return False
    return True


def begins(ref: TensorRef, dtype: DType) -> bytes:
    """A digest of what the tensor begins with, rounded to ``dtype``. Reads it now."""
    from converters import cast

    head = cast.load(ref.narrow(0, min(ref.numel, PROBE)))
    return sha256(cast.rounded(head, dtype).tobytes()).digest()


def exact(master: TensorRef, copy: TensorRef) -> bool:
    """Whether the master weights hold nothing beyond their 16-bit copy. Reads both now."""
    from converters import cast

    for start in range(0, master.numel, PROBE):
        count = min(PROBE, master.numel - start)
        values = cast.load(copy.narrow(start, count))
        wide = cast.rounded(values, master.dtype)
        if wide.tobytes() != cast.load(master.narrow(start, count)).tobytes():
            return False
    return True


def complete(
    model: State, masters: dict[str, TensorRef], shapes: list[dict[str, Shape]] | None
) -> Parameters:
    """Adds the frozen parameters and the tied names, which only ``module`` tells.

    A name without a master is tied if its bytes are those of a trained or an earlier tensor of the
    same shape; otherwise it is frozen (buffers are told apart later, by their names).
    """
    found = Parameters(masters, buffers=_buffers(model, shapes))
    shared = model.root.get("shared_params")
    owners: dict[object, str] = {}
    module = {name: ref for name, ref in model.module.items() if isinstance(ref, TensorRef)}
    # without elements parameters lie anywhere, but a buffer in a storage of its own
    empty = {_place(module[name]): name for name in module if name in found.buffers}
    for name in sorted(module, key=lambda name: name not in masters):
        ref = module[name]
        owner = name
        if ref.numel:
            owner = owners.setdefault((ref.extents, ref.shape), name)
        elif name not in masters:
            owner = empty.get(_place(ref), name)
        if owner == name and ref.numel and name not in masters and isinstance(shared, dict):
            told = shared.get(name)  # the only witness where module was cloned
            owner = told if told in masters and masters[told].shape == ref.shape else name
        if name in found.buffers:
            continue
        if owner != name:
            masters.pop(name, None)
            found.aliases[name] = owner
        elif name in masters:
            found.copies[name] = ref
        else:
            found.frozen[name] = ref
    return found


def _place(ref: TensorRef) -> object:
    return ref.extents, ref.shape, ref.dtype


def _buffers(model: State, shapes: list[dict[str, Shape]] | None) -> frozenset[str]:
    """The names of buffers. Before 0.4.2 only param_shapes, which named frozen ones too, tells."""
    named = model.root.get("buffer_names")
    if isinstance(named, list):
        return frozenset(name for name in named if isinstance(name, str))
    known = {name for group in shapes or () for name in group}
    module = {name: ref for name, ref in model.module.items() if isinstance(ref, TensorRef)}
    tied = {module[name].extents for name in known if name in module}
    return frozenset(
        name
        for name, ref in module.items()
        if known and name not in known and ref.extents not in tied
    )
