"""A file written by ``torch.save``: whether it is a zip, an older stream,
or something else."""

from __future__ import annotations

from pathlib import Path

from converters.errors import CheckpointError
from converters.pickles.machine import Builders
from converters.storage import first_bytes, misplaced_files, open_files, stores
from converters.storage.store import File
from converters.torch_files import zip_format
from converters.torch_files.rebuild import BUILDERS
from converters.torch_files.torch_file import Stored, TorchFile, located

MIN_KEPT_BYTES = 2048  # that a file is counted with, however short its pickle is


def read(path: Path) -> TorchFile:
    """Reads the pickle of ``path`` and none of its tensors. Runs nothing the file names.

    In a command (``open_files.once``) a file that was read already is not read again.
    ``CheckpointError`` if the file is damaged, is not a file of ``torch.save``, or is
    too new.
    """
    return read_as(path, "values", BUILDERS, located)


def read_as(path: Path, form: str, builders: Builders, stored: Stored) -> TorchFile:
    """Reads a file in another form, which has a name of its own.

    ``builders`` and ``stored`` say what calls and storages become in the root object.
    """

    def parse(file: File) -> tuple[TorchFile, int]:
        torch_file = _parse(file, path, form, builders, stored)
        return torch_file, torch_file.pickle_bytes + MIN_KEPT_BYTES

    try:
        if not stores.status(path).is_file:  # opening a pipe would wait for ever
            raise CheckpointError(f"{path} is not a plain file; expected one of torch.save")
        return open_files.parsed(path, form, parse)
    except OSError as error:
        reason = f"{error.strerror or error}{misplaced_files.link(path)}"
        raise CheckpointError(f"{path}: {reason}", "incomplete") from error


def _parse(file: File, path: Path, form: str, builders: Builders, stored: Stored) -> TorchFile:
    head = file.read([(0, first_bytes.LEGACY_HEAD_BYTES)])[0]
    if head[:4] == b"PK\x03\x04":
        return zip_format.read(file, path, builders, stored, form=form)
    if first_bytes.is_legacy_torch(head):
        from converters.torch_files import legacy_format

        return legacy_format.read(file, path, builders, stored)
    raise _not_a_torch_file(file, path, head[:8])


def _not_a_torch_file(file: File, path: Path, head: bytes) -> CheckpointError:
    """The error for a file that begins with these bytes."""
    if not file.size:
        return CheckpointError(f"{path} is empty; copy it again from where it was saved")

    beginning, second_word = file.read([(0, 128), (8, 1)])
    if (explanation := misplaced_files.content(beginning)) is not None:
        return CheckpointError(f"{path} {explanation}", "incomplete")

    if first_bytes.is_oldest_torch(beginning):
        return CheckpointError(
            f"{path} is of torch.save with pickle_protocol=0 or 1, which is not read here: load it "
            "with torch.load, and save it again without that argument (of protocol 0 torch itself "
            "loads no tensors)",
            "unsupported",
        )
    if first_bytes.is_safetensors(file.read([(0, min(file.size, first_bytes.HEAD_BYTES))])[0]):
        return CheckpointError(
            f"{path} is in safetensors, and not a file of torch.save; give it a name that ends "
            "in .safetensors",
            "unsupported",
        )

    # JSON that follows its length in 8 bytes
    if int.from_bytes(head, "little") < file.size and second_word == b"{":
        return CheckpointError(
            f"{path} was written by DeepSpeed's DataStates engine, whose files are not "
            "read here; load it with that engine and save it again with the default one",
            "unsupported",
        )

    return CheckpointError(
        f"{path} is not a file of torch.save: it begins with {head[:4]!r}, expected a zip; "
        "copy it again from where it was saved"
    )
