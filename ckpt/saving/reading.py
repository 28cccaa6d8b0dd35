"""DeepSpeed's own loading, with files that are mapped instead of read into memory.

``engine.load_checkpoint`` asks its ``checkpoint_engine`` for whole files (DeepSpeed 0.19.8
``runtime/engine.py``: ``_load_checkpoint``, ``_get_all_zero_checkpoint_state_dicts``), and stock
reads each into memory first. Mapped, a tensor's bytes are read when they are copied to where they
belong, and what is mapped is the page cache, which all ranks of a node share and the kernel can
take back. What would keep pointing into a file is copied, one tensor at a time: a training must not
depend on the file of a checkpoint.
"""

from __future__ import annotations

import bisect
import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ckpt.saving import optimizers, parameters, precision
from ckpt.saving.turns import Need, Turn
from converters import files
from converters.errors import CheckpointError

# Attributes of an optimizer that hold the loss scale, or are parts of it.
SCALING = ("loss_scaler", "loss_scale_config", "dynamic_loss_scale", "overflow", "clip_grad")


class Mapped:
    """In the place of the checkpoint engine ``before``: loads files as maps of them.

    It can tell which tensors are parts of such. ``without``: keys that are taken out of each state.
    ``config``: DeepSpeed's, as it was saved, from the first state. ``turn``: when this rank may
    read what cannot be mapped. ``engine`` is the one that loads; ``renamed``: the new names of
    parameters by the saved ones. ``change`` is that of precision, if the checkpoint is of another.
    """

    def __init__(
        self,
        before: Any,
        without: tuple[str, ...] = (),
        turn: Turn | None = None,
        engine: Any = None,
        renamed: Mapping[str, str] | None = None,
    ):
        self.before, self.without, self.turn, self.engine = before, without, turn, engine
        self.renamed = renamed
        self.config: Any = None
        self.change: precision.Change | None = None
        self.starts: list[int] = []  # addresses of mapped storages, sorted
        self.ends: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.before, name)

    def load(self, path: str, map_location: Any = None) -> Any:
        """The state in a file, its tensors mapped; of torch's old stream format, read.

        A file of another precision is found under its name, and becomes one of the engine's.
        """
        path = precision.saved_path(path)
        if is_mappable(path):
            state = torch.load(path, map_location=self._note, mmap=True, weights_only=False)
        else:
            if self.turn:
                self.turn.begin()
            state = self.before.load(path, map_location=map_location)
        if isinstance(state, dict):
            if self.engine is not None:
                shapes = state.get("param_shapes")
                parameters.require(self.engine, shapes, path, self.renamed)
                parameters.rename_module(self.engine, state, self.renamed)
                optimizers.require_options(self.engine, state, path)
                self._translate(state, path)
            self.config = self.config or state.get("ds_config")
            for key in self.without:
                state.pop(key, None)
        return state

    def _translate(self, state: dict[str, Any], path: str) -> None:
        """Makes the state one of the engine's precision, and says so once."""
        if self.change is None:
            self.change = precision.Change.of(self.engine, state)
            if self.change is not None and not self.engine.global_rank:
                where = os.path.dirname(os.path.dirname(path))
                print(f"ckpt: {where}: {self.change.sentence}", file=sys.stderr, flush=True)
        if self.change is not None:
            self.change.translate(state, path)

    def _note(self, storage: Any, location: str) -> Any:
        """Where a storage is mapped; it stays there, whatever device it was saved from."""
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if end > start and self.ends.get(start, 0) < end:
            if start not in self.ends:
                bisect.insort(self.starts, start)
            self.ends[start] = end
        return storage

    def is_mapped(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's bytes are a file's."""
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.numel():
            return False
        address = tensor.untyped_storage().data_ptr()
        at = bisect.bisect_right(self.starts, address) - 1
        return at >= 0 and address < self.ends[self.starts[at]]

    def detach(self, held: Any) -> None:
        """Gives every mapped tensor in ``held`` memory of its own, without changing its identity.

        Looks into dicts, lists, tuples and the attributes of objects that are no modules.
        """
        seen: set[int] = set()
        left = [held]
        while left:
            value = left.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, torch.Tensor):
                if self.is_mapped(value):
                    value.data = value.data.clone()
            elif isinstance(value, dict):
                left.extend(value.values())
            elif isinstance(value, (list, tuple, set)):
                left.extend(value)
            elif not isinstance(value, (type, torch.nn.Module)) and hasattr(value, "__dict__"):
                left.extend(v for v in vars(value).values() if not callable(v))


def is_mappable(path: str | os.PathLike[str]) -> bool:
    """Whether torch can map the file where it lies: a zip, not torch's stream format."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    return files.is_mappable(path)


@contextmanager
def mapped(
    engine: Any,
    without: tuple[str, ...] = (),
    turn: Turn | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Iterator[Mapped]:
    """``engine.load_checkpoint`` maps files in this block; after it nothing points into one.

    What the block keeps of the loaded states it gives to ``detach`` itself. What cannot be mapped
    is read when it is this rank's ``turn``.
    """
    before = engine.checkpoint_engine
    engine.checkpoint_engine = reader = Mapped(before, without, turn, engine, renamed)
    try:
        with _ending(engine, turn), precision.from_masters(engine, reader):
            yield reader
        if reader.change is not None:
            reader.change.finish()
        optimizer = engine.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        reader.detach([getattr(inner, "state", None), getattr(inner, "param_groups", None)])
        reader.detach([vars(optimizer).get(name) for name in SCALING] if optimizer else None)
        reader.detach(engine.lr_scheduler)
    finally:
        engine.checkpoint_engine = before
        gc.collect()  # states in reference cycles would keep the files mapped


@contextmanager
def _ending(engine: Any, turn: Turn | None) -> Iterator[None]:
    """The turn ends in this block when ``engine.load_checkpoint`` has put everything in its place.

    That is when it returns or, under stage 3, before the optimizer gathers what all ranks keep.
    """
    if turn is None or not turn.reads:  # all is mapped
        yield
        return
    load, optimizer = engine.load_checkpoint, engine.optimizer
    gather = getattr(optimizer, "checkpoint_event_epilogue", None)

    def end() -> None:
        gc.collect()
        turn.end()

    def loaded(*args: Any, **options: Any) -> Any:
        found = load(*args, **options)
        end()
        return found

    def gathered() -> Any:
        end()
        return gather() if gather else None

    engine.load_checkpoint = loaded
    if gather:
        optimizer.checkpoint_event_epilogue = gathered
    try:
        yield
    finally:
        del engine.load_checkpoint
        if gather:
            del optimizer.checkpoint_event_epilogue


@contextmanager
def weights_alone(engine: Any) -> Iterator[None]:
    """The optimizer takes the fp32 masters of what is loaded in this block, and nothing else.

    For the two options of ``load_checkpoint`` that DeepSpeed 0.19.8 gets wrong: without optimizer
    states ZeRO-3 loads the weights of whatever ``latest`` names, stages 0 to 2 round the masters to
    16 bits or keep old ones; ``load_module_only`` of ZeRO-3 loads nothing.
    """
    optimizer = engine.optimizer
    if optimizer is None:
        yield
        return
    load: Callable[..., Any] = optimizer.load_state_dict
    zero = engine.zero_optimization()
    held = {name: vars(optimizer)[name] for name in SCALING if name in vars(optimizer)}
    config = held.get("loss_scale_config")
    scale = dict(vars(config)) if config is not None else {}

    def masters(*args: Any, **options: Any) -> None:
        if zero:
            load(
                *args, **options | {"load_optimizer_states": False, "load_from_fp32_weights": True}
            )
        elif hasattr(optimizer, "fp32_groups") or hasattr(optimizer, "fp32_groups_flat"):
            load(*args, **options | {"load_optimizer_states": False})
        for name, value in held.items():
            setattr(optimizer, name, value)
        if config is not None:
            vars(config).update(scale)

    optimizer.load_state_dict = masters
    try:
        yield
    finally:
        del optimizer.load_state_dict


def files_of(engine: Any, folder: Path, tag: str) -> list[Path]:
    """The files that this rank loads; ``CheckpointError`` if one is not there.

    Names: DeepSpeed's own (``_get_ckpt_name``, ``_get_zero_ckpt_name``).
    """
    names = [engine._get_ckpt_name(str(folder), tag)]
    offloaded = bool(engine.zero_nvme_offload_optimizer())
    if engine.zero_optimization() and engine.optimizer is not None and not offloaded:
        names.append(precision.saved_path(engine._get_zero_ckpt_name(str(folder), tag)))
    for name in names:
        if not os.path.isfile(name):
            raise CheckpointError(
                f"{name} is not there: the checkpoint is of another world size, ZeRO stage or "
                "model parallelism than this training, or incomplete; see ckpt verify",
                "incomplete",
            )
    return [Path(name) for name in names]


def need(engine: Any, paths: list[Path]) -> Need:
    """What loading these files takes: those that cannot be mapped are read, and of the optimizer's
    most stays where the engine computes in host memory or keeps its optimizer there."""
    sizes = [0 if is_mappable(path) else path.stat().st_size for path in paths]
    here = engine.device.type == "cpu" or bool(engine.zero_cpu_offload())
    return Need(sum(sizes), sum(sizes[1:] or sizes) if here else 0)
