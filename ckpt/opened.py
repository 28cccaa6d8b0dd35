"""A checkpoint opened without converting it: every tensor by name, read when it is asked for.

The interface is that of ``safetensors.safe_open`` and of a ``Mapping``, so what is opened goes into
``load_state_dict`` and ``from_pretrained(..., state_dict=...)``. Only headers are read until then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ckpt.runs import locks
from converters import files, folder, moments, safetensors, torchbin, zero
from converters.errors import CheckpointError
from converters.plan import output_dtype
from converters.tensors import DType, TensorRef, Weights

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, Any] | torch.Tensor

Framework = Literal["pt", "np"]


def open(path: str | Path, framework: Framework = "pt", *, tag: str | None = None) -> Opened:
    """Opens a ZeRO checkpoint, a safetensors or ``pytorch_model.bin`` file, or a folder of these.

    Weights of a ZeRO checkpoint come in fp32 (buffers in at least that, integers as they are);
    others as stored. ``framework`` is that of the tensors, torch or numpy. ``CheckpointError`` if
    there is nothing that can be opened. While it is open, ``ckpt prune`` leaves the checkpoint be.
    """
    path = Path(path)
    lock = locks.reading(_place(path, tag))
    try:
        weights, checkpoint = _weights(path, tag)
    except BaseException:
        lock.release()
        raise
    return Opened(path, weights, checkpoint, framework, lock)


def _place(path: Path, tag: str | None) -> Path:
    """The folder that the tensors lie in: the tag's, if ``path`` leads to one."""
    if path.is_dir() and (tag is not None or (path / "latest").exists()):
        return folder.find(path, tag).folder
    return path


def _weights(path: Path, tag: str | None) -> tuple[Weights, zero.Checkpoint | None]:
    if path.is_file():
        reader = safetensors.read if path.suffix == ".safetensors" else torchbin.read
        return reader(path), None
    if tag is None and not (path / "latest").exists():
        if any((path / name).is_file() for name in _names("model.safetensors")):
            return safetensors.read(path), None
        if any((path / name).is_file() for name in _names("pytorch_model.bin")):
            return torchbin.read(path), None
    checkpoint = zero.read(path, tag)
    return checkpoint.weights, checkpoint


def _names(name: str) -> tuple[str, str]:
    return name, f"{name}.index.json"


@dataclass(frozen=True, slots=True)
class Opened(Mapping[str, "Array"]):
    """The weights of a checkpoint by name, tied names included; a context manager."""

    path: Path
    weights: Weights
    checkpoint: zero.Checkpoint | None
    framework: Framework
    lock: locks.Lock = field(default_factory=locks.Lock, repr=False, compare=False)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        """Lets go of the checkpoint, which may be deleted from now on."""
        self.lock.release()

    def __len__(self) -> int:
        return len(self.weights.tensors) + len(self.weights.aliases)

    def __iter__(self) -> Iterator[str]:
        known = self.weights.tensors.keys() | self.weights.aliases.keys()
        return (name for name in self.weights.order or self.weights.tensors if name in known)

    def __contains__(self, name: object) -> bool:
        return name in self.weights.tensors or name in self.weights.aliases

    def __getitem__(self, name: str) -> Array:
        return self.get_tensor(name)

    def get_tensor(self, name: str) -> Array:
        """The tensor, read now; ``KeyError``, with the reason if it is absent."""
        return read(self.ref(name), self.dtype(name), self.framework)

    def get_slice(self, name: str) -> Slice:
        """The tensor for indexing; only the rows that an index wants are read."""
        return Slice(self.ref(name), self.dtype(name), self.framework)

    def metadata(self) -> dict[str, str]:
        """What is known of the checkpoint, as text: format, and of ZeRO step, stage, version."""
        found: dict[str, Any] = {"format": self.framework}
        if self.checkpoint is not None:
            found |= {
                "tag": self.checkpoint.place.tag,
                "step": self.checkpoint.step,
                "stage": self.checkpoint.stage,
                "world_size": self.checkpoint.world_size,
                "deepspeed": self.checkpoint.version,
            }
        return {key: str(value) for key, value in found.items() if value is not None}

    def optimizer_state(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps for a parameter, such as ``exp_avg``, ``exp_avg_sq``, ``step``.

        Tensors as they are stored. ``KeyError`` for names that are not trained, ``CheckpointError``
        where the file holds no optimizer.
        """
        if self.checkpoint is None:
            raise CheckpointError(f"{self.path} holds weights only, no optimizer", "incomplete")
        self.ref(name)
        state = moments.read(self.checkpoint, name)
        return {
            key: read(value, value.dtype, self.framework) if isinstance(value, TensorRef) else value
            for key, value in state.items()
        }

    def ref(self, name: str) -> TensorRef:
        """Where the tensor lies."""
        owner = self.weights.aliases.get(name, name)
        if owner in self.weights.tensors:
            return self.weights.tensors[owner]
        why = self.weights.absent.get(name, "no such name")
        raise KeyError(f"{self.path}: {name}: {why}")

    def dtype(self, name: str) -> DType:
        """The element type that the tensor is given in."""
        wanted = DType.F32 if self.checkpoint is not None else None
        return output_dtype(self.weights.aliases.get(name, name), self.weights, wanted)


@dataclass(frozen=True, slots=True)
class Slice:
    """A tensor that is read as far as it is indexed."""

    ref: TensorRef
    dtype: DType
    framework: Framework

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self.ref.shape)

    def get_dtype(self) -> str:
        """Its element type under its safetensors name."""
        return self.dtype.value

    def __getitem__(self, index: Any) -> Array:
        """What numpy or torch would give for the index; reads the rows between its ends."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        shape = self.ref.shape
        rows = _rows(first, shape[0]) if shape and not isinstance(first, type(...)) else None
        if rows is None:
            return read(self.ref, self.dtype, self.framework)[index]
        width = prod(shape[1:])
        part = self.ref.narrow(rows.start * width, len(rows) * width)
        held = read(part.view(len(rows), *shape[1:]), self.dtype, self.framework)
        inside = first - rows.start if isinstance(first, int) else slice(None, None, first.step)
        if isinstance(first, int) and first < 0:
            inside = 0
        return held[(inside, *rest)]


def _rows(index: Any, count: int) -> range | None:
    """The rows from the first to the last that an index of the first axis takes, if that helps."""
    if isinstance(index, int):
        at = range(count)[index]
        return range(at, at + 1)
    if isinstance(index, slice) and (index.step or 1) > 0:
        start, stop, _ = index.indices(count)
        return range(start, max(start, stop))
    return None


def read(ref: TensorRef, dtype: DType, framework: Framework) -> Array:
    """The tensor in the given type, read now into memory of its own."""
    if framework == "np":
        from converters import cast

        held = cast.load(ref)
        wide = held if dtype is ref.dtype else cast.rounded(held, dtype)
        return wide.reshape(ref.shape)
    import torch

    kept = torch.empty(ref.numel, dtype=torch_dtype(ref.dtype))
    files.fill(kept.view(torch.uint8).numpy().data, ref.extents)
    return kept.to(torch_dtype(dtype)).reshape(ref.shape)


def torch_dtype(dtype: DType) -> torch.dtype:
    """The type of torch for an element type."""
    import torch

    from converters.rebuild import DTYPES

    name = next(name for name, held in DTYPES.items() if held is dtype)
    found: torch.dtype = getattr(torch, name)
    return found
