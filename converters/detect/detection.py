"""``detect``: what lies at a path, and the reader that fits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from converters import errors, options
from converters.detect import deepspeed, kinds, sharded, state_folders
from converters.detect.kind import CHECKPOINT, Kind, NoKindError, first
from converters.detect.look import Look
from converters.errors import CheckpointError
from converters.source import Source
from converters.storage.store import Name
from converters.storage.stores import source_path

_ARGUMENTS = options.of_functions({"tag": "tag="})  # of ``read``, as errors name them


class FormatReader(Protocol):
    """Locates all that a checkpoint holds; reads headers and pickles, no tensor."""

    def __call__(self, path: Path, tag: str | None = None, complete: bool = False) -> Source:
        """The checkpoint; ``CheckpointError`` for what is damaged or incomplete.

        ``complete`` asks for everything that a training goes on from, not for the
        weights alone.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """A description of what lies at ``path``.

    ``evidence`` is the sign that it was recognised by, such as the name of a file,
    ``folder`` what the kind is said of: the path, or the folder of its tag. ``detail``
    is what else names tell, such as the ZeRO stages that are possible.
    """

    path: Path
    tag: str | None
    kind: Kind
    evidence: str
    folder: Path
    detail: str = ""

    @property
    def statement(self) -> str:
        """A description to stand after the path: "is a model in safetensors"."""
        return self.kind.description(self.evidence)

    @property
    def trouble(self) -> errors.Kind:
        """The kind of an error about what lies there."""
        return kinds.trouble(self.kind, self.path)

    @property
    def refusal(self) -> str | None:
        """Why this cannot be converted,
        and what to do: one sentence; ``None`` if it can."""
        reason = self.kind.reason(self.evidence)
        return None if reason is None else f"{self.folder} {reason}"

    @property
    def error(self) -> CheckpointError:
        """The refusal as an error; of what can be read, that this is not DeepSpeed's.

        Of what its reader refuses it is the reader's error, which says why.
        """
        sentence = self.kind.objection(self.evidence)
        return self.damage or CheckpointError(f"{self.folder} {sentence}", self.trouble)

    def unlike(self, expected: str, remedy: str = "") -> CheckpointError:
        """That this is not what a command expects, such as "a run", and what handles it.

        ``remedy`` takes the place of the kind's own. Of what its reader refuses it is
        the reader's error: no command reads that as it is.
        """
        return self.damage or self.mismatch(expected, remedy)

    def mismatch(self, expected: str, remedy: str) -> CheckpointError:
        """As ``unlike``, whole or not: ``remedy`` is another path that the user meant."""
        sentence = self.kind.sentence(self.evidence, expected, remedy)
        return CheckpointError(f"{self.folder} {sentence}", self.trouble)

    @property
    def damage(self) -> CheckpointError | None:
        """What the kind's reader says of what is not whole; ``None`` of what it reads.

        A reader may ask for another kind's error, and never for that of its own kind.
        """
        if self.kind.reader is None:
            return None
        try:
            self.read()
        except CheckpointError as error:
            return error
        return None

    def read(self, complete: bool = False) -> Source:
        """The source that the kind's reader returns;
        ``CheckpointError`` where no reader fits."""
        if self.kind.name == "other-file":
            raise self.unlike(f"{CHECKPOINT}, or a file of weights (.safetensors, .bin, .pt)")
        if self.kind.reader is None:
            raise self.error
        return reader(self.kind.reader)(self.path, self.tag, complete)


def detect(path: Name, tag: str | None = None) -> Detection:
    """Detects what lies at ``path``, from names and first bytes alone.

    ``tag`` chooses one of several tags of DeepSpeed. Nothing is executed, and neither a
    tensor nor a pickle is read. ``OSError`` where the folder may not be looked into.
    """
    return _among(path, tag, kinds.KINDS)


def detect_weights(path: Name) -> Detection | None:
    """The weights at ``path``, whatever lies beside them; ``None`` where there are none."""
    try:
        return _among(path, None, kinds.WEIGHTS)
    except NoKindError:
        return None


def read(path: Name, tag: str | None = None, complete: bool = False) -> Source:
    """The checkpoint of a training at ``path``, as the reader that fits locates it.

    ``complete`` asks for everything that a training goes on from, not for the weights
    alone. ``CheckpointError`` says what lies there instead, and what to do about it.
    """
    with options.using(_ARGUMENTS):
        detection = detect(path, tag)
        if detection.refusal is not None:
            raise detection.error
        return detection.read(complete)


def _among(path: Name, tag: str | None, rows: Sequence[Kind]) -> Detection:
    path = source_path(path)
    look = Look(path, tag)
    if (pointed_folder := _without_deepspeed(look)) is not None:
        return _among(pointed_folder, None, rows)

    kind, evidence = first(look, rows)
    folder = look.state_folder if kind.of_tag else None
    detail = deepspeed.stage(look) if kind.name == "deepspeed" else ""

    return Detection(
        path=path, tag=tag, kind=kind, evidence=evidence, folder=folder or path, detail=detail
    )


def _without_deepspeed(look: Look) -> Path | None:
    """The checkpoint of a Trainer or of FSDP
    that the file ``latest`` of a run names, if any.

    ckpt writes such a file, which in a run of DeepSpeed leads to a tag.
    """
    folder = look.state_folder
    if look.tag is not None or folder is None or folder == look.path:
        return None
    if any(state_folders.is_state_file(name) for name in look.state_names):
        return None

    pointed = Look(folder)
    is_one = any(kind.sign(pointed) for kind in (*sharded.KINDS, *kinds.WITHOUT_DEEPSPEED))
    return folder if is_one else None


def reader(name: str) -> FormatReader:
    """The reader that a row names as "module:function"."""
    module_name, _, function_name = name.partition(":")
    function: FormatReader = getattr(import_module(module_name), function_name)
    return function


def require_readable(folder: Path) -> None:
    """``CheckpointError`` for the folder
    of a tag whose files are of a kind not read here."""
    tag = folder.resolve().name
    look = Look(folder, tag)
    for kind in kinds.OF_TAG:
        if (evidence := kind.sign(look)) is not None:
            raise Detection(path=folder, tag=tag, kind=kind, evidence=evidence, folder=folder).error
