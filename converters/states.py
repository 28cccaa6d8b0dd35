"""The two kinds of state file, with the keys that a reader needs checked once.

What they hold is written down in ``deepspeed/runtime/engine.py`` (``_save_checkpoint``,
``_save_zero_checkpoint``) and the ``state_dict`` of the optimizer classes, DeepSpeed 0.3 to 0.19.8.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from reprlib import Repr
from typing import Any

from converters import files, folder, torchzip
from converters.errors import CheckpointError
from converters.records import Global, Record
from converters.tensors import DType, TensorRef
from converters.torchzip import TorchFile

Shape = tuple[int, ...]
LARGEST = 1 << 60  # elements
MOST_AXES = 1 << 10
MOST_RANKS = 1 << 20
_COUNTS = {  # keys of a model file, with the least and the most that they may say
    "mp_world_size": (1, MOST_RANKS),
    "dp_world_size": (1, MOST_RANKS),
    "global_steps": (0, 1 << 63),
}
_PARTITION = {  # keys that every optimizer under ZeRO has one of
    "partition_count",
    "zero_stage",
    "single_partition_of_fp32_groups",
    "local_sub_partitions_of_fp32_groups",
    "fp32_flat_groups",
}
_shown = Repr()  # short, whatever a file nests
_shown.maxlevel = 3
_shown.maxother = 120


def shown(value: Any) -> str:
    """What a file holds, for a message: never longer than a line, nor for long at work."""
    return _shown.repr(value)


@dataclass(frozen=True, slots=True)
class State:
    """One state file: its root dict, and under ``optimizer`` what an optimizer file is about."""

    file: TorchFile
    root: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def optimizer(self) -> Mapping[str, Any]:
        """The root's ``optimizer_state_dict``; ``CheckpointError`` if it has none."""
        found = self.root.get("optimizer_state_dict")
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path} is no optimizer file: no optimizer_state_dict")
        return found

    @property
    def module(self) -> Mapping[str, Any]:
        """The root's ``module``, name to tensor; ``CheckpointError`` if it has none."""
        found = self.root.get("module")
        if found is None and "module" in self.root:
            raise CheckpointError(
                f"{self.path} has no module: it is of a pipeline-parallel run; merging stages is "
                "not supported yet",
                "unsupported",
            )
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise CheckpointError(f"{self.path} is no model file: its module is no state dict")
        for name in found:
            if not name.isprintable():
                raise no_name(self, name)
        return found

    @property
    def config(self) -> Mapping[str, Any]:
        """The DeepSpeed configuration of the run; empty before 0.4.2, which did not save it."""
        found = self.root.get("ds_config")
        return found if isinstance(found, dict) else {}

    @property
    def version(self) -> str | None:
        """The version of DeepSpeed; ``None`` before 0.4.2."""
        found = self.root.get("ds_version")
        usable = isinstance(found, str) and found.isprintable() and len(found) < 100
        return found if usable else None

    def setting(self, *keys: str) -> Any:
        """A value of the configuration by its path of keys; ``None`` where it is not set."""
        found: Any = self.config
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def fail(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {why}")


def read(path: Path) -> State:
    """Reads a state file's pickle. ``CheckpointError`` if it is damaged or none."""
    file = torchzip.read(path)
    if file.root == "":
        raise CheckpointError(
            f"{path} is a placeholder of the Nebula service, which keeps the data elsewhere; "
            "download the checkpoint with Nebula first",
            "unsupported",
        )
    if not isinstance(file.root, dict):
        raise CheckpointError(f"{path} is no state file of DeepSpeed: it holds no dict")
    saved, named = (folder.rank_file(name or "") for name in (file.saved_as, path.name))
    if saved is not None and named is not None and saved != named:
        raise CheckpointError(
            f"{path} was saved as {file.saved_as}: it is the file of another rank or kind under "
            "this name; give each file back its own name, or copy this one again"
        )
    state = State(file, file.root)
    for key, (least, most) in _COUNTS.items():
        count = state.root.get(key)
        if count is not None and not (type(count) is int and least <= count <= most):
            raise state.fail(f"{key} is {shown(count)}, expected {least} to {most}")
    return state


def shapes(state: State, key: str) -> list[dict[str, Shape]] | None:
    """The shapes by name that stand under ``key``: one dict for each group.

    A single dict (before 0.5.4) gives a list of one; ``None`` if the file has no such key.
    """
    found = state.root.get(key)
    if found is None:
        return None
    groups = found if isinstance(found, list) else [found]
    for group in groups:
        if not isinstance(group, dict):
            raise state.fail(f"{key} is no list of dicts")
        for name, shape in group.items():
            if not isinstance(name, str) or not name.isprintable() or not _is_shape(shape):
                raise state.fail(f"{key} gives {shown(name)} the shape {shown(shape)}")
    return [dict(group) for group in groups if group]


def require_kinds(models: Sequence[State], ranks: Sequence[State]) -> None:
    """Raises where a model file holds a partition of an optimizer, or an optimizer file the shapes
    of another model."""
    for model in models:
        held = model.root.get("optimizer_state_dict")
        if isinstance(held, dict) and not _PARTITION.isdisjoint(held):
            raise model.fail(
                "it holds a rank's part of the optimizer, and has the name of a model file; give "
                "each file back its own name"
            )
    for rank in ranks:
        own = shapes(rank, "param_shapes")
        named = shapes(models[0], "param_shapes") if own is not None else None
        if named is not None and own != named:
            raise rank.fail(f"its param_shapes are not those of {models[0].path.name}")


def _is_shape(shape: Any) -> bool:
    if not isinstance(shape, tuple) or len(shape) > MOST_AXES:
        return False
    return all(type(n) is int and 0 <= n < LARGEST for n in shape) and prod(shape) < LARGEST


def listed(model: State, rank: State) -> bool:
    """Whether ``param_shapes`` has a dict for each group (0.5.4 and later), wherever it stands."""
    held = model.root.get("param_shapes") or rank.root.get("param_shapes")
    return isinstance(held, list)


def tensors(state: State, found: Any, what: str) -> list[TensorRef]:
    """``found`` if it is a list of tensors; ``CheckpointError`` names ``what`` is not."""
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise state.fail(f"{what} is no list of tensors")
    return [tensor(state, value, f"{what}[{i}]") for i, value in enumerate(found)]


def tensor(state: State, found: Any, what: str) -> TensorRef:
    """``found`` if it is a tensor; ``CheckpointError`` says what it is instead."""
    if isinstance(found, TensorRef):
        return found
    raise no_tensor(state, found, what)


def no_tensor(state: State, found: Any, what: str) -> CheckpointError:
    """The error for what should be a tensor and is something else."""
    return CheckpointError(
        f"{state.path}: {what} is no plain tensor but {kind(found)}, which is not read",
        "unsupported",
    )


def no_name(state: State, name: str) -> CheckpointError:
    """The error for a name with control characters or half a character."""
    return CheckpointError(
        f"{state.path} holds the name {name!r}, which no file of weights can hold", "unsupported"
    )


def kind(found: Any) -> str:
    """What a value is, under the name that its pickle gives it."""
    if not isinstance(found, Record):
        return type(found).__name__
    name = str(found.of) if isinstance(found.of, Global) else "the result of a call"
    return name if name.isprintable() else ascii(name)


def progress(state: State) -> dict[str, Any]:
    """What is the same on every rank of one save: step counts, learning rates and loss scale.

    Keys say where it stands. Files of different saves differ in one of these, as a rule.
    """
    optimizer = state.optimizer
    inner = optimizer.get("base_optimizer_state", optimizer.get("optimizer_state_dict"))
    found = {key: optimizer.get(key) for key in ("zero_stage", "base_optimizer_state_step")}
    found |= {"ds_version": state.version, "ranks": str(optimizer.get("partition_count"))}
    scaler = optimizer.get("loss_scaler")
    if isinstance(scaler, Record) and isinstance(scaler.state, dict):
        found |= {f"loss scaler {k}": scaler.state.get(k) for k in ("cur_scale", "cur_iter")}
    if isinstance(inner, dict):
        for index, group in enumerate(inner.get("param_groups") or ()):
            if isinstance(group, dict):
                found[f"learning rate of group {index}"] = group.get("lr")
        inner = inner.get("state")
    for index, kept in _numbered(inner):
        if isinstance(kept, dict):
            found[f"step of group {index}"] = scalar(kept.get("step"))
    return {key: v for key, v in found.items() if isinstance(v, (int, float, str))}


def _numbered(found: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(found, dict):
        yield from found.items()
    elif isinstance(found, list):
        yield from enumerate(found)


def scalar(found: Any) -> Any:
    """The value of a number that may be stored as a 0-dim fp32 or int64 tensor."""
    if not isinstance(found, TensorRef):
        return found
    if found.numel != 1 or found.dtype not in (DType.F32, DType.I64):
        return None
    form = "<f" if found.dtype is DType.F32 else "<q"
    return struct.unpack(form, files.read_extent(found.extents[0]))[0]
