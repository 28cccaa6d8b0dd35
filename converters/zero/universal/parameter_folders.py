"""The param groups of a universal folder: the files of ``zero/NAME/``, as
``groups`` has them.

    zero/NAME/fp32.pt, exp_avg.pt, ...    {"param": tensor}, or (from stage 3) the bare flat tensor
    zero/NAME/step.pt                     a number, or a tensor that is one
    zero/optimizer_state.pt               what is kept once for a group, where it has that

Nothing is filled in: a state that one parameter of a group has and another has not, or
that ``optimizer_state.pt`` says there was and no file has, is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from converters import words
from converters.errors import CheckpointError, MalformedError
from converters.pickles.values import Call
from converters.storage import stores
from converters.storage.system.names import is_name
from converters.tensors import DType, Listed, TensorRef
from converters.torch_files import object_graph, reader
from converters.torch_files.object_graph import Storage
from converters.torch_files.torch_file import TorchFile
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape
from converters.zero.param_groups import WEIGHTS, ParamGroup

MASTER = "fp32"  # the name of the file that has the master weights
STEP = "step"
COMMON = "optimizer_state.pt"


def folder_name(name: str) -> str:
    """The folder of a parameter, or the files of a state.

    ``CheckpointError`` if the name cannot be one.
    """
    usable = isinstance(name, str) and name.isprintable() and is_name(name) and name != COMMON
    if not usable or len(name.encode()) > 250:
        raise CheckpointError(
            f"{name!r} cannot be the name of a folder or file, as the universal format "
            "wants it of every parameter and state; use ckpt reshard",
            "unsupported",
        )

    return name


def elsewhere(key: str) -> str:
    """The value that ``ckpt`` writes into ``optimizer_state.pt``
    for a state with its own files."""
    return f"zero/*/{key}.pt"


def states_in(inner: Path) -> dict[str, set[str]]:
    """The files in the folders of parameters,
    by the name of the folder, without ``.pt``.

    One listing serves all of them: a folder may have one for each of 10,000 parameters.
    """
    states_by_name: dict[str, set[str]] = {}
    for file in stores.files_below(inner):
        folder, _, name = file.name.partition("/")
        if name.endswith(".pt") and "/" not in name:
            states_by_name.setdefault(folder, set()).add(name.removesuffix(".pt"))

    return states_by_name


def masters_in(states_by_name: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Of the files in the folders of parameters those with the weights alone."""
    return {name: states & {MASTER} for name, states in states_by_name.items()}


def states_of(inner: Path, name: str) -> dict[str, set[str]]:
    """The files in the folder of one parameter, as ``states_in`` has those of all."""
    folder = inner / folder_name(name)
    names = stores.names(folder) if stores.is_folder(folder) else ()
    return {folder.name: {file.removesuffix(".pt") for file in names if file.endswith(".pt")}}


def read(
    inner: Path,
    states_by_name: Mapping[str, set[str]],
    shapes: Mapping[str, Shape],
    options: Mapping[str, Any],
    group_state: Mapping[str, Any],
) -> tuple[ParamGroup, list[TorchFile]]:
    """A param group from ``inner`` (the folder ``zero``), and the files that it lies in.

    ``states_by_name`` says which files there are (``states_in``).
    ``shapes`` are in the order of the optimizer; ``group_state`` is what
    ``optimizer_state.pt`` has as the state of the group, if anything, as a tree.
    ``CheckpointError`` for what is missing or unlike.
    """
    values, steps, files = _read_folders(inner, states_by_name, shapes)
    constants = _constants(inner, group_state, values)
    common_steps = {COMMON: constants[STEP]} if STEP in constants else {}
    _require_complete(inner, shapes, values, steps | common_steps)

    # a step in the files wins; where only they have one, it stands first
    if steps:
        constants = constants if STEP in constants else {STEP: None, **constants}
        constants[STEP] = next(iter(steps.values()))

    state_names = [*constants, *sorted(values.keys() - {WEIGHTS})]
    keys = (
        *(key for key in group_state if key in state_names),
        *(key for key in state_names if key not in group_state),
    )
    ordered = {key: {name: tensors[name] for name in shapes} for key, tensors in values.items()}

    return ParamGroup(dict(shapes), ordered, constants, options, keys), files


def _read_folders(
    inner: Path, states_by_name: Mapping[str, set[str]], shapes: Mapping[str, Shape]
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, Any], list[TorchFile]]:
    """The weights and states of parameters by key and name, the steps, and the files.

    ``CheckpointError`` if a parameter that has elements has no weights.
    """
    values: dict[str, dict[str, TensorRef]] = {}
    steps: dict[str, Any] = {}
    files: list[TorchFile] = []

    for name, shape in shapes.items():
        folder = inner / folder_name(name)
        stems = states_by_name.get(folder.name, set())
        if MASTER not in stems:
            if prod(shape):
                raise CheckpointError(
                    f"{folder} has no {MASTER}.pt, the weights of a parameter that is "
                    "trained; the conversion did not finish: make it again",
                    "incomplete",
                )

            values.setdefault(WEIGHTS, {})[name] = TensorRef(DType.F32, tuple(shape), Listed())
            continue

        for stem in sorted(stems - {STEP}):
            file = reader.read(folder / f"{stem}.pt")
            key = WEIGHTS if stem == MASTER else stem
            values.setdefault(key, {})[name] = _tensor(file, shape)
            files.append(file)

        if STEP in stems:
            steps[name] = object_graph.read(folder / f"{STEP}.pt").root

    return values, steps, files


def _tensor(file: TorchFile, shape: Shape) -> TensorRef:
    """The tensor of a file, under the shape of its parameter."""
    root = file.root
    is_dict = isinstance(root, dict)
    tensor = root.get("param") if is_dict else root
    if not isinstance(tensor, TensorRef):
        raise CheckpointError(f"{file.path} holds {state_files.kind(tensor)}, expected a tensor")

    flattened = not is_dict and tensor.shape == (prod(shape),)
    if tensor.shape != tuple(shape) and not flattened:
        raise CheckpointError(
            f"{file.path} holds {words.shape(tensor.shape)}, param_shapes of the model file "
            f"says {words.shape(shape)}: it is of another model, or was made with tensor "
            "parallelism"
        )

    return tensor.view(*shape)


def _require_complete(
    inner: Path,
    shapes: Mapping[str, Shape],
    values: dict[str, dict[str, TensorRef]],
    steps: Mapping[str, Any],
) -> None:
    """Raises unless all parameters of a group have the same states, and the same step.

    Those without elements, for which DeepSpeed writes nothing, are given empty ones.
    """
    empty = [name for name, shape in shapes.items() if not prod(shape)]
    for key, tensors in values.items():
        dtype = next(iter(tensors.values())).dtype
        unlike_names = [name for name, tensor in tensors.items() if tensor.dtype is not dtype]
        if unlike_names:
            raise CheckpointError(
                f"{inner / unlike_names[0]}: its {key or MASTER} is of type "
                f"{tensors[unlike_names[0]].dtype.value}, that of {next(iter(tensors))} in "
                f"the same param group {dtype.value}; make the folder again"
            )

        for name in empty:
            tensors.setdefault(name, TensorRef(dtype, tuple(shapes[name]), Listed()))

        for name in shapes:
            if name not in tensors:
                other_name = next(iter(tensors))
                raise CheckpointError(
                    f"{inner / name} has no {key or MASTER}.pt, which {other_name} of "
                    "the same param group has; the conversion did not finish, or the "
                    "parameter was never trained",
                    "incomplete",
                )

    numbers = {name: number(node) for name, node in steps.items()}
    for name, value in numbers.items():
        if value != next(iter(numbers.values())):
            other_name = next(iter(numbers))
            raise CheckpointError(
                f"{inner / name}: its step is {value}, that of {other_name} in the "
                f"same param group {numbers[other_name]}; they are of different saves"
            )

    without_step = [name for name in shapes if name not in numbers and name not in empty]
    if without_step and shapes.keys() & numbers.keys():
        raise CheckpointError(
            f"{inner / without_step[0]} has no {STEP}.pt, which others of the same "
            "param group have; the conversion did not finish: make it again",
            "incomplete",
        )


def _constants(
    inner: Path, group_state: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The values that the group keeps once: its state without those that files have."""
    constants = {key: node for key, node in group_state.items() if key not in values}
    for key, node in constants.items():
        shape = node.args[2] if isinstance(node, Call) and len(node.args) > 2 else ()
        lost_elements = state_files.is_shape(shape) and prod(shape) > 1
        if lost_elements or node == elsewhere(key):
            reason = "they were removed"
            if lost_elements:
                reason = "ds_to_universal.py leaves out all but Adam's"

            raise CheckpointError(
                f"{inner} has no files {key}.pt, but the optimizer kept {key} for each "
                f"element: {reason}; make the folder with ckpt to-universal",
                "incomplete",
            )

    return constants


def number(node: Any) -> Any:
    """The value of a number that may be a tensor in a tree;
    ``MalformedError`` for what is neither."""
    if isinstance(node, Call) and node.args and isinstance(node.args[0], Storage):
        return state_files.scalar(node.args[0].ref)
    if node is None or isinstance(node, (int, float, str)):
        return node
    raise MalformedError(f"a step is {state_files.shown(node)}, expected a number")
