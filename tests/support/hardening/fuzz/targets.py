"""What is fuzzed: a reader and bytes. All but an answer or ``CheckpointError`` is a finding."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ckpt.runs import manifest
from converters.dcp import reader as dcp_reader
from converters.errors import CheckpointError
from converters.formats import gathered_16bit, pytorch_bin, safetensors
from converters.pickles import interpreter, values
from converters.storage import open_files
from converters.tensors import DType, Extent, TensorRef, Weights
from converters.torch_files import reader, rebuild
from converters.torch_files import zip_directory as zips
from converters.zero import checkpoint as zero

FIXTURES = Path(__file__).parents[4] / "fixtures"
TAG = "global_step2"
_FOLDER = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
Target = Callable[[bytes], None]


def _file(data: bytes, suffix: str) -> Path:
    path = _FOLDER / f"fuzz-{os.getpid()}{suffix}"
    path.write_bytes(data)
    return path


def _storage(pid: object) -> object:
    """Any persistent id as a storage of as many elements as it says, up to a million."""
    dtype, _, numel = rebuild.storage_id(pid, Path("x.pt"))
    if dtype is None or numel > 1_000_000:
        return values.Call(None)
    return TensorRef(dtype, (numel,), (Extent(Path("x.pt"), 0, numel * dtype.itemsize),))


def pickle(data: bytes) -> None:
    """The interpreter, and what error messages say of what it made."""
    from converters.zero.files import state_files

    found = interpreter.Interpreter(data, rebuild.BUILDERS, _storage, "x.pt").run()
    state_files.shown(found)
    state_files.kind(found)


def zip_directory(data: bytes) -> None:
    """The directory of a zip, and the place of each record."""
    path = _file(data, ".zip")
    with open_files.opened(path) as file:
        directory = zips.read(file, path)
        for name in directory.records:
            directory.payload(file, name)


def torch_file(data: bytes) -> None:
    """A file of torch.save, of either form, and the names in it."""
    path = _file(data, ".pt")
    reader.read(path)
    pytorch_bin.weights_of(pytorch_bin.values(path))


def safetensors_file(data: bytes) -> None:
    """A safetensors file, planned again if it can be read."""
    weights = safetensors.read(_file(data, ".safetensors"))
    safetensors.plan(weights, None, 1 << 40, "keep")


def index(data: bytes) -> None:
    """The index of shards."""
    path = _FOLDER / f"fuzz-{os.getpid()}-index"
    path.mkdir(exist_ok=True)
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (path / name).write_bytes(data)
    refs = {"a": TensorRef(DType.F32, (1,), (Extent(Path("x"), 0, 4),))}
    gathered_16bit.attach(Weights(refs), path)
    for read in (safetensors.read, pytorch_bin.read):
        try:
            read(path)
        except CheckpointError:
            continue


def manifest_file(data: bytes) -> None:
    """The commit record; what is read must be written as it was read."""
    held = manifest.loads(data, Path("out/checkpoint-5/manifest.json"))
    assert manifest.loads(held.dumps(), Path("x")).dumps() == held.dumps()


def dcp_metadata(data: bytes) -> None:
    """The description of a distributed checkpoint; its items are missing."""
    folder = _FOLDER / f"fuzz-{os.getpid()}-dcp"
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_bytes(data)
    dcp_reader.read(folder, complete=True)


def checkpoint(folder: Path) -> None:
    """A whole folder, located and planned."""
    safetensors.plan(zero.read(folder).weights, DType.F32, 1 << 40, "keep")


TARGETS: dict[str, Target] = {
    "pickle": pickle,
    "zip": zip_directory,
    "torch file": torch_file,
    "safetensors": safetensors_file,
    "index": index,
    "manifest": manifest_file,
    "dcp metadata": dcp_metadata,
}


def fails(target: Target, data: bytes) -> str | None:
    """What went wrong, as a line; ``None`` for an answer or a proper error."""
    try:
        target(data)
    except CheckpointError as error:
        line = str(error)
        return None if line.isprintable() and len(line) < 5000 else f"a message of {len(line)}"
    except (Exception, RecursionError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None
