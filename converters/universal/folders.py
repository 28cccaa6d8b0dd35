"""The param groups of a universal folder: the files of ``zero/NAME/``, as ``groups`` has them.

    zero/NAME/fp32.pt, exp_avg.pt, ...    {"param": tensor}, or (from stage 3) the bare flat tensor
    zero/NAME/step.pt                     a number, or a tensor that is one
    zero/optimizer_state.pt               what is kept once for a group, where it has that

Nothing is filled in: a state that one parameter of a group has and another has not, or that
``optimizer_state.pt`` says there was and no file has, is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from converters import states, torchzip, trees
from converters.errors import CheckpointError
from converters.groups import WEIGHTS, Group
from converters.records import Record
from converters.states import Shape
from converters.tensors import DType, TensorRef
from converters.torchzip import TorchFile

MASTER = "fp32"  # the name of the file that has the master weights
STEP = "step"
COMMON = "optimizer_state.pt"


def folder_name(name: str) -> str:
    """The folder of a parameter, or the files of a state; ``CheckpointError`` if it can be none."""
    plain = isinstance(name, str) and not {"/", "\0"} & set(name)
    if not plain or name in ("", ".", "..", COMMON) or len(name.encode()) > 250:
        raise CheckpointError(
            f"{name!r} cannot be the name of a folder or file, as the universal format wants it "
            "of every parameter and state; use ckpt reshard",
            "unsupported",
        )
    return name


def elsewhere(key: str) -> str:
    """What ``ckpt`` writes into ``optimizer_state.pt`` for a state that has files of its own."""
    return f"zero/*/{key}.pt"


def read(
    inner: Path, shapes: Mapping[str, Shape], options: Mapping[str, Any], kept: Mapping[str, Any]
) -> tuple[Group, list[TorchFile]]:
    """A param group from ``inner`` (the folder ``zero``), and the files that it lies in.

    ``shapes`` are in the order of the optimizer; ``kept`` is what ``optimizer_state.pt`` has as the
    state of the group, if anything, as a tree. ``CheckpointError`` for what is missing or unlike.
    """
    values: dict[str, dict[str, TensorRef]] = {}
    files: list[TorchFile] = []
    steps: dict[str, Any] = {}
    for name, shape in shapes.items():
        folder = inner / folder_name(name)
        stems = {path.stem for path in folder.glob("*.pt")} if folder.is_dir() else set()
        if MASTER not in stems:
            if prod(shape):
                raise CheckpointError(
                    f"{folder} has no {MASTER}.pt, the weights of a parameter that is trained; "
                    "the conversion did not finish: make it again",
                    "incomplete",
                )
            values.setdefault(WEIGHTS, {})[name] = TensorRef(DType.F32, tuple(shape), ())
            continue
        for stem in sorted(stems - {STEP}):
            file = torchzip.read(folder / f"{stem}.pt")
            key = WEIGHTS if stem == MASTER else stem
            values.setdefault(key, {})[name] = _tensor(file, shape)
            files.append(file)
        if STEP in stems:
            steps[name] = trees.read(folder / f"{STEP}.pt").root
    once = _once(inner, kept, values)
    _complete(inner, shapes, values, steps | ({COMMON: once[STEP]} if STEP in once else {}))
    if steps:
        once = {STEP: None, **once} if STEP not in once else once
        once[STEP] = next(iter(steps.values()))
    known = [*once, *sorted(values.keys() - {WEIGHTS})]
    keys = (*(key for key in kept if key in known), *(key for key in known if key not in kept))
    ordered = {key: {name: held[name] for name in shapes} for key, held in values.items()}
    return Group(dict(shapes), ordered, once, options, keys), files


def _tensor(file: TorchFile, shape: Shape) -> TensorRef:
    """The tensor of a file, under the shape of its parameter."""
    root = file.root
    found = root.get("param") if isinstance(root, dict) else root
    if isinstance(root, dict) and root.get("is_expert_param"):
        raise CheckpointError(
            f"{file.path} is a parameter of experts; merging these is not supported yet",
            "unsupported",
        )
    if not isinstance(found, TensorRef):
        raise CheckpointError(f"{file.path} holds no tensor but {states.kind(found)}")
    flat = not isinstance(root, dict) and found.shape == (prod(shape),)
    if found.shape != tuple(shape) and not flat:
        raise CheckpointError(
            f"{file.path} holds {list(found.shape)}, param_shapes of the model file says "
            f"{list(shape)}: it is of another model, or was made with tensor parallelism"
        )
    return found.view(*shape)


def _complete(
    inner: Path,
    shapes: Mapping[str, Shape],
    values: dict[str, dict[str, TensorRef]],
    steps: Mapping[str, Any],
) -> None:
    """Raises unless all parameters of a group have the same states, and the same step.

    Those without elements, for which DeepSpeed writes nothing, are given empty ones.
    """
    empty = [name for name, shape in shapes.items() if not prod(shape)]
    for key, held in values.items():
        kind = next(iter(held.values())).dtype
        for name in empty:
            held.setdefault(name, TensorRef(kind, tuple(shapes[name]), ()))
        for name in shapes:
            if name not in held:
                other = next(iter(held))
                raise CheckpointError(
                    f"{inner / name} has no {key or MASTER}.pt, which {other} of the same param "
                    "group has; the conversion did not finish, or the parameter was never trained",
                    "incomplete",
                )
    numbers = {name: number(node) for name, node in steps.items()}
    for name, value in numbers.items():
        if value != next(iter(numbers.values())):
            other = next(iter(numbers))
            raise CheckpointError(
                f"{inner / name}: its step is {value}, that of {other} in the same param group "
                f"{numbers[other]}; they are of different saves"
            )
    if lost := [
        n for n in shapes if n not in numbers and n not in empty and shapes.keys() & numbers.keys()
    ]:
        raise CheckpointError(
            f"{inner / lost[0]} has no {STEP}.pt, which others of the same param group have; the "
            "conversion did not finish: make it again",
            "incomplete",
        )


def _once(inner: Path, kept: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept once for the group: the rest of its state, without what the files have."""
    once = {key: node for key, node in kept.items() if key not in values}
    for key, node in once.items():
        shape = node.args[2] if isinstance(node, Record) and len(node.args) > 2 else ()
        lost = isinstance(shape, tuple) and prod(shape) > 1
        if lost or node == elsewhere(key):
            why = "ds_to_universal.py leaves out all but Adam's" if lost else "they were removed"
            raise CheckpointError(
                f"{inner} has no files {key}.pt, but the optimizer kept {key} for each element: "
                f"{why}; make the folder with ckpt to-universal",
                "incomplete",
            )
    return once


def number(node: Any) -> Any:
    """The value of a number that may be a tensor in a tree."""
    if not isinstance(node, Record):
        return node
    return states.scalar(node.args[0].ref)
