"""The two kinds of state file, with the keys that a reader needs checked once.

What they hold is written down in ``deepspeed/runtime/engine.py`` (``_save_checkpoint``,
``_save_zero_checkpoint``) and the ``state_dict`` of the optimizer classes, DeepSpeed
0.3 to 0.19.8.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.pickles.values import Call, Global
from converters.storage import open_files
from converters.tensors import DType, TensorRef
from converters.torch_files import odd_tensors, reader
from converters.torch_files.odd_tensors import Repeated
from converters.torch_files.torch_file import TorchFile
from converters.zero.files import discovery, typed
from converters.zero.files.typed import Section
from converters.zero.files.typed import shown as shown

Shape = tuple[int, ...]
MAX_ELEMENTS = 1 << 60  # elements
MAX_AXES = 1 << 10
MAX_NESTING = 16  # dicts inside dicts in a state dict
MAX_RANKS = 1 << 20
_COUNTS = {  # keys of a model file, with the least and the most that they may say
    "mp_world_size": (1, MAX_RANKS),
    "dp_world_size": (1, MAX_RANKS),
    "global_steps": (0, 1 << 63),
}
_PARTITION = {  # keys that every optimizer under ZeRO has one of
    "partition_count",
    "zero_stage",
    "single_partition_of_fp32_groups",
    "local_sub_partitions_of_fp32_groups",
    "fp32_flat_groups",
}


@dataclass(frozen=True)  # without slots, so that what was checked once is remembered
class State:
    """One state file.

    ``root`` is its root dict, ``optimizer`` what an optimizer file is about.
    """

    file: TorchFile
    root: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file's path."""
        return self.file.path

    @property
    def optimizer(self) -> Mapping[str, Any]:
        """The root's ``optimizer_state_dict``; ``CheckpointError`` if it has none."""
        optimizer_state = self.root.get("optimizer_state_dict")
        if not isinstance(optimizer_state, dict):
            raise CheckpointError(
                f"{self.path} is not an optimizer file: it has no optimizer_state_dict"
            )

        return optimizer_state

    @cached_property
    def module(self) -> Mapping[str, Any]:
        """The root's ``module``, name to tensor; ``CheckpointError`` if it has none."""
        state_dict = self.root.get("module")
        if state_dict is None and "module" in self.root:
            raise CheckpointError(
                f"{self.path} has no module: it is of a pipeline, whose weights lie in files of "
                "layers (layer_NN-model_states.pt), and none is here; copy them here from the "
                "save",
                "incomplete",
            )

        if not isinstance(state_dict, dict) or not all(
            isinstance(name, str) for name in state_dict
        ):
            raise CheckpointError(
                f"{self.path} is not a model file: its module is not a state dict"
            )

        flat = dict(_flattened(state_dict))
        for name, value in flat.items():
            if not name.isprintable():
                raise no_name(self, name)
            if isinstance(value, Repeated):
                raise CheckpointError(
                    f"{self.path} is damaged: {name} is {odd_tensors.reason(value)}; no engine "
                    "saves such a tensor"
                )

        return flat

    @property
    def config(self) -> Mapping[str, Any]:
        """The DeepSpeed configuration of the run; empty before 0.4.2, where none is."""
        config = self.root.get("ds_config")
        return config if isinstance(config, dict) else {}

    @property
    def version(self) -> str | None:
        """The version of DeepSpeed; ``None`` before 0.4.2."""
        version = self.root.get("ds_version")
        if isinstance(version, str) and version.isprintable() and len(version) < 100:
            return version
        return None

    def setting(self, *keys: str) -> Any:
        """A value of the configuration by its path of keys; ``None`` if not set."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def fields(self) -> Section:
        """The root, for values that are looked at before they are used."""
        return Section(self.path, "", self.root)

    @property
    def optimizer_fields(self) -> Section:
        """The values of ``optimizer``, to be looked at before they are used."""
        return Section(self.path, "optimizer_state_dict", self.optimizer)

    def fail(self, reason: str) -> CheckpointError:
        """The error for a problem of this file; the caller raises it."""
        return CheckpointError(f"{self.path}: {reason}")


def _flattened(
    state_dict: Mapping[str, Any], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Any]]:
    """The names of a state dict that may be nested, as Megatron's is, joined by dots.

    What ``get_extra_state`` of a module returned stays as it is.
    """
    for key, value in state_dict.items():
        is_nested = isinstance(value, dict) and not key.endswith("_extra_state")
        if is_nested and depth < MAX_NESTING and all(isinstance(inner, str) for inner in value):
            yield from _flattened(value, f"{prefix}{key}.", depth + 1)
        else:
            yield prefix + key, value


def read(path: Path) -> State:
    """Reads a state file's pickle. ``CheckpointError`` if the file is damaged, or is
    not a state file."""
    file = reader.read(path)
    if file.root == "":
        raise CheckpointError(
            f"{path} is a placeholder of the Nebula service, which keeps the data "
            "elsewhere; download the checkpoint with Nebula first",
            "unsupported",
        )

    if not isinstance(file.root, dict):
        raise CheckpointError(f"{path} is not a state file of DeepSpeed: it does not hold a dict")

    saved_identity = discovery.rank_file(file.saved_as or "")
    named_identity = discovery.rank_file(path.name)
    both_known = saved_identity is not None and named_identity is not None
    if both_known and saved_identity != named_identity:
        raise CheckpointError(
            f"{path} was saved as {file.saved_as}: it is the file of another rank or "
            "kind under this name; give each file back its own name, or copy this one "
            "again"
        )

    state = State(file, file.root)
    for key, (minimum, maximum) in _COUNTS.items():
        count = state.root.get(key)
        if count is None:
            continue
        if type(count) is not int or not minimum <= count <= maximum:
            raise state.fail(f"{key} is {shown(count)}, expected {minimum} to {maximum}")

    return state


def shapes(state: State, key: str) -> list[dict[str, Shape]] | None:
    """The shapes by name that stand under ``key``: one dict for each group.

    A single dict (before 0.5.4) gives a list of one; ``None`` if the file has no
    such key.
    """
    value = state.root.get(key)
    if value is None:
        return None

    groups = value if isinstance(value, list) else [value]
    for group in groups:
        if not isinstance(group, dict):
            raise state.fail(f"{key} is not a list of dicts")
        for name, shape in group.items():
            is_name = isinstance(name, str) and name.isprintable()
            if not is_name or not is_shape(shape):
                raise state.fail(f"{key} gives {shown(name)} the shape {shown(shape)}")

    return [dict(group) for group in groups if group]


def require_kinds(models: Sequence[State], ranks: Sequence[State]) -> None:
    """Raises where a file has the name of one of another kind, or of another model.

    That is a model file that holds a partition of an optimizer, or an optimizer file
    with the shapes of another model.
    """
    for model in models:
        optimizer_state = model.root.get("optimizer_state_dict")
        keys = optimizer_state if isinstance(optimizer_state, dict) else {}
        if not _PARTITION.isdisjoint(keys):
            raise model.fail(
                "it holds a rank's part of the optimizer, and has the name of a model "
                "file; give each file back its own name"
            )

    for rank in ranks:
        rank_shapes = shapes(rank, "param_shapes")
        if rank_shapes is None:
            continue

        model_shapes = shapes(models[0], "param_shapes")
        if model_shapes is not None and rank_shapes != model_shapes:
            raise rank.fail(f"its param_shapes are not those of {models[0].path.name}")


def is_shape(shape: Any) -> bool:
    """Whether a value is the shape of a tensor that fits into memory somewhere."""
    if not isinstance(shape, tuple) or len(shape) > MAX_AXES:
        return False
    if not all(type(length) is int and 0 <= length < MAX_ELEMENTS for length in shape):
        return False
    return prod(shape) < MAX_ELEMENTS


def listed(model: State, rank: State) -> bool:
    """Whether ``param_shapes``, in either file, has a dict for each group.

    It does in 0.5.4 and later.
    """
    param_shapes = model.root.get("param_shapes") or rank.root.get("param_shapes")
    return isinstance(param_shapes, list)


def alignment_paddings(state: State, group_count: int) -> list[list[int]]:
    """The elements left empty behind each parameter of each group; none where that is
    not recorded, or no group has any."""
    key = "param_alignment_paddings"
    recorded = state.optimizer_fields.optional(key, list) or [()] * group_count
    if len(recorded) != group_count:
        raise state.fail(f"{key} has {len(recorded)} groups, expected {group_count}")

    paddings = [
        typed.numbers(state.path, f"{key}[{index}]", group) for index, group in enumerate(recorded)
    ]
    if any(padding < 0 for group in paddings for padding in group):
        raise state.fail(f"{key} has a number of elements below 0")

    return [group if any(group) else [] for group in paddings]


def tensors(state: State, value: Any, label: str) -> list[TensorRef]:
    """``value`` if it is a list of tensors.

    ``CheckpointError`` says which one, under ``label``, is not.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise state.fail(f"{label} is not a list of tensors")

    return [tensor(state, element, f"{label}[{index}]") for index, element in enumerate(value)]


def tensor(state: State, value: Any, label: str) -> TensorRef:
    """``value`` if it is a tensor; ``CheckpointError`` says what it is instead."""
    if isinstance(value, TensorRef):
        return value
    raise no_tensor(state, value, label)


def no_tensor(state: State, value: Any, label: str) -> CheckpointError:
    """The error for what should be a tensor and is something else."""
    return CheckpointError(
        f"{state.path}: {label} is not a plain tensor but {kind(value)}, which is not read",
        "unsupported",
    )


def no_name(state: State, name: str) -> CheckpointError:
    """The error for a name with control characters or half a character."""
    return CheckpointError(
        f"{state.path} holds the name {name!r}, which no file of weights can hold",
        "unsupported",
    )


def kind(value: Any) -> str:
    """The kind of a value, under the name that its pickle gives it."""
    if not isinstance(value, Call):
        return type(value).__name__
    name = str(value.of) if isinstance(value.of, Global) else "the result of a call"
    return name if name.isprintable() else ascii(name)


def progress(state: State) -> dict[str, Any]:
    """The values that are the same on every rank of one save.

    Step counts, learning rates and loss scale; keys say where each stands. Files of
    different saves differ in one of these, as a rule.
    """
    optimizer = state.optimizer
    facts = {
        "zero_stage": optimizer.get("zero_stage"),
        "base_optimizer_state_step": optimizer.get("base_optimizer_state_step"),
        "ds_version": state.version,
        "ranks": typed.text(optimizer.get("partition_count")),
    }

    scaler = optimizer.get("loss_scaler")
    if isinstance(scaler, Call) and isinstance(scaler.state, dict):
        for key in ("cur_scale", "cur_iter"):
            facts[f"loss scaler {key}"] = scaler.state.get(key)

    inner_state = optimizer.get("optimizer_state_dict")
    inner_state = optimizer.get("base_optimizer_state", inner_state)
    if isinstance(inner_state, dict):
        groups = inner_state.get("param_groups")
        for index, group in enumerate(groups if isinstance(groups, list) else ()):
            if isinstance(group, dict):
                facts[f"learning rate of group {index}"] = group.get("lr")
        inner_state = inner_state.get("state")

    for index, group_state in _numbered(inner_state):
        if isinstance(group_state, dict):
            facts[f"step of group {index}"] = scalar(group_state.get("step"))

    return {
        fact_name: value
        for fact_name, value in facts.items()
        if isinstance(value, (int, float, str))
    }


def _numbered(states: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(states, dict):
        yield from states.items()
    elif isinstance(states, list):
        yield from enumerate(states)


def scalar(value: Any) -> Any:
    """The value of a number that may be stored as a 0-dim fp32 or int64 tensor."""
    if not isinstance(value, TensorRef):
        return value
    if value.numel != 1 or value.dtype not in (DType.F32, DType.I64):
        return None
    struct_format = "<f" if value.dtype is DType.F32 else "<q"
    return struct.unpack(struct_format, open_files.read_extent(value.extents[0]))[0]
