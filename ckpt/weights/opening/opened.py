"""A checkpoint opened without converting it: tensors are read when asked for.

The interface is that of ``safetensors.safe_open`` and of a ``Mapping``, so what is
opened goes into ``load_state_dict`` and ``from_pretrained(..., state_dict=...)``. Only
headers are read until then.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ckpt import text
from ckpt.folders import locks
from ckpt.runs.foreign import step_records
from ckpt.runs.states import newest
from ckpt.weights import arguments
from ckpt.weights.opening import unusual, wished_names
from ckpt.weights.opening.tensors import Framework, Slice, read
from ckpt.weights.opening.unusual import Unusual, UnusualSlice
from ckpt.weights.request import Layout, Names, Naming
from converters.detect import detect, detect_weights, filenames
from converters.errors import CheckpointError
from converters.formats import plain_values, safetensors, weight_files
from converters.plan import output_dtype
from converters.source import Source
from converters.storage import stores
from converters.tensors import DType, TensorRef, Weights
from converters.words import counted
from converters.zero.files import discovery
from converters.zero.parallel import rules

if TYPE_CHECKING:
    from ckpt.weights.opening.tensors import Array

log = logging.getLogger("ckpt")
_ARGUMENTS = (
    *("tag=", "last=True", "strip=", "rename=", "select=", "part=", "tp_rules="),
    *("names=", "layout=", "config=", "adapter_config="),
)
_FRAMEWORKS: dict[str, Framework] = {"pt": "pt", "torch": "pt", "np": "np", "numpy": "np"}


def open(
    path: str | os.PathLike[str],
    framework: Framework | Literal["torch", "numpy"] = "pt",
    *,
    tag: str | None = None,
    strip: str | Sequence[str] = (),
    rename: str | Mapping[str, str] | Sequence[str | tuple[str, str]] = (),
    select: str | Sequence[str] = (),
    part: str | None = None,
    adapter_config: str | os.PathLike[str] | None = None,
    tp_rules: str | os.PathLike[str] | None = None,
    last: bool = False,
    names: Names = "as-stored",
    layout: Layout = "runtime",
    config: str | os.PathLike[str] | None = None,
) -> Opened:
    """Opens a ZeRO checkpoint, a safetensors or .bin file, or a folder of such files.

    Weights of a ZeRO checkpoint are given in fp32 (buffers in at least fp32, integers as
    they are), others as stored. Tensors in dicts of a file of ``torch.save`` have dotted
    names: "state_dict.w". ``framework`` is "pt" or "torch", "np" or "numpy". ``strip``,
    ``rename``, ``select`` and ``part`` work like the options of ``ckpt to-fp32``:
    prefixes to drop, regular expressions to replace, globs of the names to have, one
    model of several. Without them the names are those of the checkpoint, with the
    ``_orig_mod.`` of a compiled model, which ``to-fp32`` takes off. ``names="reader"``
    gives those that ``to-fp32`` writes, "hf" also where another framework gave them
    others: a pipeline, Megatron, AutoEP. ``config`` is the config.json, or its folder,
    that says of which model they are, where the checkpoint has none. ``adapter_config``
    is PEFT's file, or its folder, for a checkpoint without one. ``tp_rules`` is a file
    that says how parameters were cut for tensor parallelism. ``last`` takes the newest
    checkpoint of the run at ``path`` that is committed or complete. ``layout="hub"``
    gives names and shapes as ``save_pretrained`` writes them, "runtime" those of the
    running model.

    ``CheckpointError`` if nothing can be opened there, or its layout is not known. While
    the checkpoint is open, ``ckpt prune`` does not delete it.
    """
    if framework not in _FRAMEWORKS:
        raise CheckpointError(f'framework is {framework!r}, expected "pt" or "np"', "output")
    arguments.require_choice("layout", layout, get_args(Layout))

    arguments.require_choice("names", names, get_args(Names))

    with arguments.naming_arguments(*_ARGUMENTS):
        path, _ = newest.choose(path, tag, last)
        lock = locks.reading(_place(path, tag))
        try:
            with rules.using(tp_rules):
                source = _source(path, tag)
            unusual_tensors = unusual.tensors_of(source)
            wishes = Naming.of(strip, rename, select, part)
            listed = _listed(source.weights, unusual_tensors)
            wished = wished_names.of(listed, source, wishes, names, layout, config)
        except BaseException:
            lock.release()
            raise

    for note in wished.notes:
        log.info("%s: %s", path, note)
    for contradiction in step_records.contradictions(source):
        log.warning("%s", contradiction)
    config_path = None if adapter_config is None else Path(adapter_config)
    checkpoint = source if source.topology else None
    values = {} if checkpoint is not None else plain_values.of(source.entries)
    return Opened(
        path=path,
        weights=wished.weights,
        checkpoint=checkpoint,
        framework=_FRAMEWORKS[framework],
        lock=lock,
        adapter_config=config_path,
        sources=wished.sources,
        unusual=unusual_tensors,
        plain_values=values,
    )


def _listed(weights: Weights, unusual_tensors: Mapping[str, Unusual]) -> Weights:
    """The weights with those tensors listed, each by what is stored of it."""
    if not unusual_tensors:
        return weights

    return replace(
        weights,
        tensors={**weights.tensors, **{name: t.ref for name, t in unusual_tensors.items()}},
        absent={n: why for n, why in weights.absent.items() if n not in unusual_tensors},
        packed=weights.packed | unusual_tensors.keys(),
    )


def _place(path: Path, tag: str | None) -> Path:
    """The folder that the tensors lie in: the tag's, if ``path`` leads to one."""
    if stores.is_folder(path) and (tag is not None or stores.exists(path / filenames.LATEST)):
        return discovery.find(path, tag).folder
    return path


def _source(path: Path, tag: str | None) -> Source:
    """The source, by the reader that fits:
    weights come before states nothing points to."""
    pointers = (path / filenames.LATEST, path / filenames.LATEST_UNIVERSAL)
    has_choice = stores.is_folder(path) and tag is None and not any(map(stores.exists, pointers))
    weights = detect_weights(path) if has_choice else None
    return (weights or detect(path, tag)).read()


def _read_once(name: str, ref: TensorRef, dtype: DType, framework: Framework) -> Array:
    """The tensor, after what other ranks have of it was compared."""
    if ref.replicas:
        from converters.execute import replicas  # which most checkpoints need not

        replicas.require_same([(name, ref)])
    return read(ref, dtype, framework)


def _place_in_file(ref: TensorRef) -> tuple[str, int]:
    first = ref.extents[0] if len(ref.extents) else None
    return (str(first.path), first.offset) if first else ("", 0)


@dataclass(frozen=True, slots=True)
class Opened(Mapping[str, "Array"]):
    """The weights of a checkpoint by name, tied names included; a context manager.

    ``sources`` maps names to those in the checkpoint, where they differ. ``unusual`` are
    the tensors that no safetensors file could have, by their names there.
    ``plain_values`` are numbers, texts and lists of these that a file of ``torch.save``
    holds beside its tensors, by dotted names.
    """

    path: Path
    weights: Weights
    checkpoint: Source | None
    framework: Framework
    lock: locks.Lock = field(default_factory=locks.Lock, repr=False, compare=False)
    adapter_config: str | Path | None = None
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    unusual: Mapping[str, Unusual] = field(default_factory=dict, repr=False, compare=False)
    plain_values: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        """One short line: where it is, and how much."""
        nbytes = sum(ref.nbytes for ref in self.weights.tensors.values())
        return f"<Opened {self.path}: {counted(len(self), 'tensor')}, {text.size(nbytes)}>"

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        """Lets go of the checkpoint, which may be deleted from now on."""
        self.lock.release()

    def __len__(self) -> int:
        return len(self.weights.tensors) + len(self.weights.aliases)

    def __iter__(self) -> Iterator[str]:
        present = self.weights.tensors.keys() | self.weights.aliases.keys()
        return (name for name in self.weights.order or self.weights.tensors if name in present)

    def __contains__(self, name: object) -> bool:
        return name in self.weights.tensors or name in self.weights.aliases

    def __getitem__(self, name: str) -> Array:
        return self.get_tensor(name)

    def get_tensor(self, name: str) -> Array:
        """The tensor, read now; ``KeyError``, with the reason if it is absent.

        ``CheckpointError`` for a kind of tensor that is listed, and not read, and where
        ranks that should all have it have different values.
        """
        if (tensor := self._unusual(name)) is not None:
            return tensor.read(self.framework)
        return _read_once(name, self.ref(name), self.dtype(name), self.framework)

    @property
    def absent(self) -> Mapping[str, str]:
        """Names without a tensor here, and why; also tensors of a kind that is not read."""
        return self.weights.absent

    def get_tensors(self) -> dict[str, Array]:
        """All tensors by name, read now."""
        return {name: self.get_tensor(name) for name in self}

    def offset_keys(self) -> list[str]:
        """The names in the order in which the tensors lie in their files."""
        return sorted(self, key=lambda name: _place_in_file(self.ref(name)))

    def get_slice(self, name: str) -> Slice | UnusualSlice:
        """The tensor for indexing; only the rows that an index wants are read."""
        if (tensor := self._unusual(name)) is not None:
            return UnusualSlice(tensor, self.framework)
        return Slice(self.ref(name), self.dtype(name), self.framework)

    def _unusual(self, name: str) -> Unusual | None:
        self.ref(name)
        return self.unusual.get(self.sources.get(name, name))

    @property
    def adapter(self) -> Opened:
        """Of a PEFT checkpoint the adapter, under the names that PEFT saves and loads.

        It is worked out at each access. ``CheckpointError`` where there is no adapter,
        where there are several and none is called ``default``, or where no
        adapter_config.json is found.
        """
        from ckpt.weights.adapters.adapter_config import DEFAULT

        adapters = self.adapters
        if DEFAULT in adapters or len(adapters) == 1:
            return adapters.get(DEFAULT) or next(iter(adapters.values()))

        listing = ", ".join(adapters)
        several = f"has the adapters {listing}: take one of .adapters"
        raise CheckpointError(
            f"{self.path} {several if adapters else 'holds no adapter'}", "refused"
        )

    @property
    def adapters(self) -> Mapping[str, Opened]:
        """Of a PEFT checkpoint every adapter by its name; empty for any other."""
        from ckpt.weights.opening import opened_adapter

        with arguments.naming_arguments("adapter_config="):
            halves = opened_adapter.adapters(self.weights, self.checkpoint, self.adapter_config)

        return {name: self._half(half.weights, half.sources) for name, half in halves.items()}

    @property
    def base(self) -> Opened:
        """The base model's weights in a PEFT checkpoint, under the base model's names.

        It is empty where they were not saved. ``CheckpointError`` for a checkpoint
        without an adapter.
        """
        from ckpt.weights.opening import opened_adapter

        with arguments.naming_arguments():
            half = opened_adapter.base(self.path, self.weights, self.checkpoint)

        return self._half(half.weights, half.sources)

    def _half(self, weights: Weights, sources: Mapping[str, str]) -> Opened:
        """Some of the weights; the lock stays with the whole."""
        return replace(self, weights=weights, sources=sources, lock=locks.Lock())

    def metadata(self) -> dict[str, str]:
        """Facts about the checkpoint as text: format, and ZeRO's step, stage, version.

        For a safetensors file these are the file's own (``__metadata__``), for one of
        ``torch.save`` the plain values beside its tensors, long lists as their
        beginning.
        """
        if self.checkpoint is None and weight_files.is_safetensors(self.path):
            return safetensors.metadata(self.path)

        values = {
            name: value if isinstance(value, str) or value is None else plain_values.line(value)
            for name, value in self.plain_values.items()
        }
        facts: dict[str, Any] = {"format": "pt", **values}
        if self.checkpoint is not None:
            facts |= {
                "tag": self.checkpoint.place.tag,
                "step": self.checkpoint.step,
                "stage": self.checkpoint.stage,
                "world_size": self.checkpoint.world_size,
                "deepspeed": self.checkpoint.version,
            }

        return {key: str(value) for key, value in facts.items() if value is not None}

    def optimizer_state(self, name: str) -> dict[str, Any]:
        """A parameter's optimizer state, such as ``exp_avg``, ``exp_avg_sq``, ``step``.

        The tensors come as they are stored. ``KeyError`` for names that are not
        trained, ``CheckpointError`` where the file holds no optimizer.
        """
        if self.checkpoint is None or self.checkpoint.optimizer is None:
            raise CheckpointError(f"{self.path} holds weights only, no optimizer", "incomplete")

        self.ref(name)
        state = self.checkpoint.optimizer(self.sources.get(name, name))

        return {
            key: _read_once(f"{key} of {name}", value, value.dtype, self.framework)
            if isinstance(value, TensorRef)
            else value
            for key, value in state.items()
        }

    def ref(self, name: str) -> TensorRef:
        """Where the tensor lies."""
        owner = self.weights.aliases.get(name, name)
        if owner in self.weights.tensors:
            return self.weights.tensors[owner]
        reason = self.weights.absent.get(name, "no such name")
        raise KeyError(f"{self.path}: {name}: {reason}")

    def dtype(self, name: str) -> DType:
        """The element type that the tensor is given in."""
        target = DType.F32 if self.checkpoint is not None else None
        return output_dtype(self.weights.aliases.get(name, name), self.weights, target)
