"""The origin of a checkpoint, where ckpt made it of another one.

    ckpt reshard, from-universal   "resharded": native files for other ranks or another stage
    ckpt to-universal              "universal"
    ckpt to-dcp                    "dcp": torch's format for distributed checkpoints
    ckpt slim                      "slimmed": of the full one that had the same folder

A manifest has it as ``source``. What gets no manifest, as the universal format and what
is made of a checkpoint without one, has it in ``rewriting.json``:

    {"format": 1, "ckpt": "0.2.0", "stage": null, "world_size": null,
     "source": {"form": "universal", "name": "checkpoint-8", "world_size": 4, "stage": 2, ...}}

Of something that was made in several steps it is the first one, which a training saved;
its ``parent`` is then the one that was rewritten last, and the parent of that the one
before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from ckpt.folders.filenames import REWRITING
from ckpt.runs import fields
from ckpt.runs.fields import FieldError
from ckpt.version import __version__
from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.storage import bounded_json, stores
from converters.words import counted

FORMAT = 1
MAX_BYTES = 1 << 16
MAX_PARENTS = 100
Form = Literal["resharded", "universal", "dcp", "slimmed"]


class Partitioning(Protocol):
    """The stage, and the number of ranks, that the files of a checkpoint are for."""

    @property
    def stage(self) -> int | None:
        """The ZeRO stage; ``None`` without ZeRO."""

    @property
    def world_size(self) -> int | None:
        """The ranks; ``None`` where that is not known."""


@dataclass(frozen=True, slots=True)
class Ancestry:
    """The checkpoint that another was made of: its folder's ``name``, and what it was.

    ``save`` is that of its manifest, if it had one. ``stage`` and ``world_size`` are
    those of its files. What is not known is ``None``. ``parent`` is the checkpoint that
    the other was made of directly, with the form that it has itself, where it was not
    this one. ``FieldError`` for values that these fields cannot have.
    """

    form: str
    name: str | None = None
    save: str | None = None
    step: int | None = None
    world_size: int | None = None
    stage: int | None = None
    parent: Ancestry | None = None

    def __post_init__(self) -> None:
        is_form = self.form in get_args(Form)
        fields.require(is_form, "source: form", self.form, ", ".join(get_args(Form)))
        is_name = fields.is_inside_or_none(self.name)
        fields.require(is_name, "source: name", self.name, "the name of a folder")
        is_save = self.save is None or fields.is_id(self.save)
        fields.require(is_save, "source: save", self.save, "hex digits or null")

        for name in ("step", "world_size", "stage"):
            value = getattr(self, name)
            is_number = value is None or is_whole_number(value)
            fields.require(is_number, f"source: {name}", value, "a whole number or null")

    @property
    def is_rewriting(self) -> bool:
        """Whether it was another folder, which may lie beside what was made of it."""
        return self.form != "slimmed"

    @property
    def parents(self) -> Iterator[Ancestry]:
        """The checkpoints that were made of this one on the way to ``checkpoint``, the
        last one first."""
        parent = self.parent
        while parent is not None:
            yield parent
            parent = parent.parent

    @property
    def sentence(self) -> str:
        """How it was made, as words after the name of what was made of it."""
        if self.form == "slimmed":
            return f"slimmed from a full checkpoint{self._topology}"

        nearest = self.parent or self
        source = nearest.name or "another checkpoint"
        first = f", which was made of {self.name or 'another one'}" if self.parent else ""
        if self.form == "universal":
            return f"universal, made from {source}{first}"
        if self.form == "dcp":
            return f"made for torch's dcp.load from {source}{first}"

        is_universal = nearest is not self and nearest.form == "universal"
        topology = "" if is_universal else nearest._topology
        return f"resharded from {source}{topology}{first}"

    @property
    def _topology(self) -> str:
        """The ranks and the stage, in brackets, as far as they are known."""
        facts = []
        if self.world_size is not None:
            facts.append(counted(self.world_size, "rank"))
        if self.stage is not None:
            facts.append(f"stage {self.stage}")
        return f" ({', '.join(facts)})" if facts else ""

    def as_json(self) -> dict[str, Any]:
        """The fields, as ``parse`` reads them."""
        return asdict(self)


def parse(value: object, depth: int = 0) -> Ancestry | None:
    """The value that ``as_json`` made JSON of; ``None`` for null.
    ``FieldError`` for anything else."""
    if value is None:
        return None
    fields.require(depth <= MAX_PARENTS, "source", "...", f"no more than {MAX_PARENTS} parents")
    is_named = isinstance(value, Mapping) and "form" in value
    fields.require(is_named, "source", value, "a form and what it was made of")
    assert isinstance(value, Mapping)

    facts: dict[str, Any] = {name: value.get(name) for name in Ancestry.__dataclass_fields__}
    facts["parent"] = parse(facts["parent"], depth + 1)

    return Ancestry(**facts)


@dataclass(frozen=True, slots=True)
class Record:
    """The content of ``rewriting.json``: what was made, and of what.

    ``stage`` and ``world_size`` are ``None`` for the universal format and DCP, which
    have none. ``buffers`` are the names of the model's buffers, which DCP does not tell
    from parameters.
    """

    source: Ancestry
    stage: int | None = None
    world_size: int | None = None
    buffers: tuple[str, ...] | None = None

    def dumps(self) -> bytes:
        """The content of the file."""
        content = {"format": FORMAT, "ckpt": __version__} | asdict(self)
        if self.buffers is None or len(str(self.buffers)) > MAX_BYTES // 4:
            del content["buffers"]
        return bounded_json.dumps(content)


def document_in(path: Path, max_bytes: int) -> Any:
    """The content of a file of JSON; ``None`` where there is none, or it is cut short.

    ``CheckpointError`` if the disk or network fails.
    """
    try:
        if not stores.is_file(path):
            return None
        data = stores.head(path, max_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "refused") from error

    try:
        return bounded_json.loads(data, data.decode("utf-8", "surrogateescape"))
    except ValueError:
        return None


def record_in(folder: Path) -> Record | None:
    """The content of ``rewriting.json`` of a folder; ``None`` if it has none, or not
    one of ours.

    ``CheckpointError`` if the disk or network fails.
    """
    document = document_in(folder / REWRITING, MAX_BYTES)
    try:
        return _record(document)
    except FieldError:  # another program's
        return None


def _record(document: object) -> Record | None:
    """The record in a document; ``None`` if it is not one of this format."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return None
    if (source := parse(document.get("source"))) is None:
        return None

    topology = {name: document.get(name) for name in ("stage", "world_size")}
    for name, value in topology.items():
        is_number = value is None or is_whole_number(value)
        fields.require(is_number, name, value, "a whole number or null")

    names = document.get("buffers")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return Record(source, **topology, buffers=tuple(names or ()) if is_list else None)
