"""DeepSpeed's own loading, with files that are mapped instead of read into memory.

``engine.load_checkpoint`` asks its ``checkpoint_engine`` for whole files (DeepSpeed
0.19.8 ``runtime/engine.py``: ``_load_checkpoint``,
``_get_all_zero_checkpoint_state_dicts``), and stock reads each into memory first.
Mapped, a tensor's bytes are read when they are copied to where they belong, and what is
mapped is the page cache, which all ranks of a node share and the kernel can take back.
What would keep pointing into a file is copied, one tensor at a time: a training must
not depend on the file of a checkpoint.
"""

from __future__ import annotations

import bisect
import gc
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ckpt.distributed.load_slots import LoadSlot, Need
from ckpt.engine import optimizers, parameters, precision
from ckpt.engine.remedies import DEFAULT_WAYS, Ways
from ckpt.engine.view import EngineView, internals, offloads_optimizer_to_nvme
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.storage import local

log = logging.getLogger("ckpt")
_MODEL_RANK = LazyPattern(r"mp_rank_(\d+)")

# Attributes of an optimizer that hold the loss scale, or are parts of it.
SCALING = (
    "loss_scaler",
    "loss_scale_config",
    "dynamic_loss_scale",
    "overflow",
    "clip_grad",
    # of fp16 without ZeRO before DeepSpeed 0.18, which has them in loss_scale_config
    *("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window"),
)


class Mapped:
    """In the place of the checkpoint engine ``original``: loads files as maps of them.

    It can tell which tensors are parts of such. ``dropped_keys``: keys that are taken
    out of each state. ``config``: DeepSpeed's, as it was saved, from the first state.
    ``slot``: when this rank may read what cannot be mapped. ``engine`` is the one that
    loads; ``renamed``: the new names of parameters by the saved ones; ``remedies``:
    what the front end offers for going on nevertheless. ``change`` is that of precision, if
    the checkpoint is of another.
    """

    def __init__(
        self,
        original: Any,
        dropped_keys: tuple[str, ...] = (),
        slot: LoadSlot | None = None,
        engine: EngineView | None = None,
        renamed: Mapping[str, str] | None = None,
        ways: Ways = DEFAULT_WAYS,
    ):
        self.original, self.dropped_keys = original, dropped_keys
        self.slot, self.engine = slot, engine
        self.renamed, self.ways = renamed, ways
        self.config: Any = None
        self.change: precision.PrecisionChange | None = None
        self.starts: list[int] = []  # addresses of mapped storages, sorted
        self.ends: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    @property
    def new_counters(self) -> tuple[str, ...]:
        """Counters that do not come back: the loss scale, where the precision is another."""
        return () if self.change is None else ("loss_scale",)

    def load(self, path: str, map_location: Any = None) -> Any:
        """The state in a file, its tensors mapped; of torch's old stream format, read.

        A file of another precision is found under its name, and becomes one of the
        engine's.
        """
        path = precision.saved_path(path)
        if is_mappable(path):
            note = self._note_storage
            state = torch.load(path, map_location=note, mmap=True, weights_only=False)
        else:
            if self.slot:
                self.slot.begin()
            state = self.original.load(path, map_location=map_location)

        if isinstance(state, dict):
            if self.engine is not None:
                if _is_of_rank(self.engine, path):
                    shapes = state.get("param_shapes")
                    parameters.require(self.engine, shapes, path, self.renamed)
                parameters.rename_module(self.engine, state, self.renamed)
                optimizers.require_options(self.engine, state, path, self.ways.optimizer)
                self._translate(self.engine, state, path)

            self.config = self.config or state.get("ds_config")
            for key in self.dropped_keys:
                state.pop(key, None)

        return state

    def _translate(self, engine: EngineView, state: dict[str, Any], path: str) -> None:
        """Makes the state one of the engine's precision, and says so once."""
        if self.change is None:
            self.change = precision.PrecisionChange.of(engine, state)
            if self.change is not None and not internals(engine).global_rank:
                folder = os.path.dirname(os.path.dirname(path))
                log.warning("%s: %s", folder, self.change.sentence)
        if self.change is not None:
            self.change.translate(state, path)

    def _note_storage(self, storage: Any, location: str) -> Any:
        """Where a storage is mapped; it stays there, whatever device it was saved from."""
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if end > start and self.ends.get(start, 0) < end:
            if start not in self.ends:
                bisect.insort(self.starts, start)
            self.ends[start] = end
        return storage

    def is_mapped(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's bytes are a file's."""
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return False
        if not tensor.numel():
            return False

        address = tensor.untyped_storage().data_ptr()
        index = bisect.bisect_right(self.starts, address) - 1
        return index >= 0 and address < self.ends[self.starts[index]]

    def detach(self, states: Any) -> None:
        """Gives every mapped tensor in ``states`` memory of its own, without changing its identity.

        Looks into dicts, lists, tuples and the attributes of objects that are not
        modules.
        """
        seen_ids: set[int] = set()
        to_visit = [states]
        while to_visit:
            value = to_visit.pop()
            if id(value) in seen_ids:
                continue

            seen_ids.add(id(value))
            if isinstance(value, torch.Tensor):
                if self.is_mapped(value):
                    value.data = value.data.clone()
            elif isinstance(value, dict):
                to_visit.extend(value.values())
            elif isinstance(value, (list, tuple, set)):
                to_visit.extend(value)
            elif isinstance(value, (type, torch.nn.Module)):
                continue  # a model's tensors are its own, whatever was loaded into them
            elif hasattr(value, "__dict__"):
                attributes = vars(value).values()
                to_visit.extend(item for item in attributes if not callable(item))


def _is_of_rank(engine: EngineView, path: str) -> bool:
    """Whether a model file is that of this rank's stage and tensor-parallel rank, or of all.

    DeepSpeed looks into the file of the first one on every rank (0.19.8
    ``runtime/state_dict_factory.py``, ``check_ckpt_list``), and loads its own after that.
    """
    own_name = os.path.basename(internals(engine)._get_ckpt_name("", ""))
    names = (os.path.basename(path), own_name)
    model_ranks = [_MODEL_RANK.search(name) for name in names]
    numbers = [None if match is None else int(match[1]) for match in model_ranks]
    return None in numbers or numbers[0] == numbers[1]


def is_mappable(path: str | os.PathLike[str]) -> bool:
    """Whether torch can map the file where it lies: a zip, not torch's stream format."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    return local.is_mappable(path)


@contextmanager
def mapped(
    engine: EngineView,
    dropped_keys: tuple[str, ...] = (),
    slot: LoadSlot | None = None,
    renamed: Mapping[str, str] | None = None,
    ways: Ways = DEFAULT_WAYS,
) -> Iterator[Mapped]:
    """``engine.load_checkpoint`` maps files in this block; after it nothing points into one.

    What the block keeps of the loaded states it gives to ``detach`` itself. What cannot
    be mapped is read when it is this rank's ``slot``.
    """
    original = internals(engine).checkpoint_engine
    reader = Mapped(original, dropped_keys, slot, engine, renamed, ways)
    internals(engine).checkpoint_engine = reader
    try:
        with _ending_slot(engine, slot), precision.from_masters(engine, reader):
            yield reader
        if reader.change is not None:
            reader.change.finish()
        optimizer = engine.optimizer
        inner_optimizer = getattr(optimizer, "optimizer", optimizer)
        reader.detach(getattr(inner_optimizer, "state", None))
        reader.detach(getattr(inner_optimizer, "param_groups", None))
        if optimizer:
            reader.detach([vars(optimizer).get(name) for name in SCALING])
        reader.detach(internals(engine).lr_scheduler)
    finally:
        internals(engine).checkpoint_engine = original
        gc.collect()  # states in reference cycles would keep the files mapped


@contextmanager
def _ending_slot(engine: EngineView, slot: LoadSlot | None) -> Iterator[None]:
    """Frees the slot when ``engine.load_checkpoint`` has put everything in its place.

    That is when it returns or, under stage 3, before the optimizer gathers what all
    ranks keep.
    """
    if slot is None or not slot.reads:  # all is mapped
        yield
        return

    load, optimizer = internals(engine).load_checkpoint, engine.optimizer
    gather = getattr(optimizer, "checkpoint_event_epilogue", None)

    def end_slot() -> None:
        gc.collect()
        slot.end()

    def load_and_end(*args: Any, **options: Any) -> Any:
        result = load(*args, **options)
        end_slot()
        return result

    def end_and_gather() -> Any:
        end_slot()
        return gather() if gather else None

    internals(engine).load_checkpoint = load_and_end
    if gather:
        optimizer.checkpoint_event_epilogue = end_and_gather
    try:
        yield
    finally:
        del internals(engine).load_checkpoint
        if gather:
            del optimizer.checkpoint_event_epilogue


@contextmanager
def weights_alone(engine: EngineView) -> Iterator[None]:
    """The optimizer takes the fp32 masters of what is loaded in this block, and nothing else.

    For the two options of ``load_checkpoint`` that DeepSpeed 0.19.8 gets wrong: without
    optimizer states ZeRO-3 loads the weights of whatever ``latest`` names, stages 0 to
    2 round the masters to 16 bits or keep old ones; ``load_module_only`` of ZeRO-3
    loads nothing.
    """
    optimizer = engine.optimizer
    if optimizer is None:
        yield
        return

    load: Callable[..., Any] = optimizer.load_state_dict
    uses_zero = engine.zero_optimization()
    attributes = vars(optimizer)
    scaling = {name: attributes[name] for name in SCALING if name in attributes}
    config = scaling.get("loss_scale_config")
    scale_values = dict(vars(config)) if config is not None else {}

    def load_masters(*args: Any, **options: Any) -> None:
        if uses_zero:
            from_masters = {"load_optimizer_states": False, "load_from_fp32_weights": True}
            load(*args, **options | from_masters)
        elif hasattr(optimizer, "fp32_groups") or hasattr(optimizer, "fp32_groups_flat"):
            load(*args, **options | {"load_optimizer_states": False})

        for name, value in scaling.items():
            setattr(optimizer, name, value)
        if config is not None:
            vars(config).update(scale_values)

    optimizer.load_state_dict = load_masters
    try:
        yield
    finally:
        del optimizer.load_state_dict


def files_of(engine: EngineView, folder: Path, tag: str) -> list[Path]:
    """The files that this rank loads; ``CheckpointError`` if one is not there.

    Names: DeepSpeed's own (``_get_ckpt_name``, ``_get_zero_ckpt_name``).
    """
    names = [internals(engine)._get_ckpt_name(str(folder), tag)]
    offloaded = offloads_optimizer_to_nvme(engine)
    if engine.zero_optimization() and engine.optimizer is not None and not offloaded:
        names.append(precision.saved_path(internals(engine)._get_zero_ckpt_name(str(folder), tag)))
    for name in names:
        if not os.path.isfile(name):
            raise CheckpointError(
                f"{name} is not there: the checkpoint is of another world size, ZeRO "
                "stage or model parallelism than this training, or incomplete; see "
                "ckpt verify",
                "incomplete",
            )

    return [Path(name) for name in names]


def need(engine: EngineView, paths: list[Path]) -> Need:
    """The bytes that loading these files takes: those that cannot be mapped are read,
    and of the optimizer's most stays where the engine computes in host memory or keeps
    its optimizer there."""
    sizes = [0 if is_mappable(path) else path.stat().st_size for path in paths]
    stays_in_host_memory = internals(engine).device.type == "cpu" or bool(
        internals(engine).zero_cpu_offload()
    )
    return Need(sum(sizes), sum(sizes[1:] or sizes) if stays_in_host_memory else 0)


def require_own_order(engine: EngineView, folder: Path) -> None:
    """``CheckpointError`` if DeepSpeed has an order of its own, in which ranks wait for others."""
    if internals(engine)._config.zero_config.pipeline_loading_checkpoint:
        raise CheckpointError(
            f"{folder}: there is not the memory for all ranks of a node to load at "
            "once; unset zero_optimization.pipeline_loading_checkpoint, so that they "
            "can take turns here",
            "refused",
        )


def is_mapped(engine: EngineView) -> bool:
    """Whether ``engine`` loads in a block of ``mapped``."""
    return isinstance(internals(engine).checkpoint_engine, Mapped)


@contextmanager
def before_load(engine: EngineView, call: Callable[[], None]) -> Iterator[None]:
    """In this block ``engine.load_checkpoint`` calls ``call`` first."""
    load = internals(engine).load_checkpoint

    def call_and_load(*args: Any, **options: Any) -> Any:
        call()
        return load(*args, **options)

    internals(engine).load_checkpoint = call_and_load
    try:
        yield
    finally:
        del internals(engine).load_checkpoint
