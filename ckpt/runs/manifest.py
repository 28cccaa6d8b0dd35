"""The commit record of a checkpoint: ``manifest.json``, written last.

A checkpoint is committed if and only if its manifest is there, is valid, and every file
that it lists has its size. The kinds of digests are explained in ``digests``. The
manifest's own, ``digest``, is the SHA-256 of the rest as JSON with sorted keys and no
spaces, all but ASCII escaped; a manifest without one, as they were written at first, is
valid, too.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from ckpt.folders.filenames import MANIFEST, PINNED
from ckpt.runs import ancestry, fields
from ckpt.runs.ancestry import Ancestry
from ckpt.runs.digests import FileRecord, Progress, digest, is_of_size, quiet, unlike
from ckpt.runs.fields import FieldError, is_inside
from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.storage import bounded_json, stores
from converters.storage.system import errnos
from converters.words import shell_word

__all__ = [
    "ABSENT",
    "FileRecord",
    "Manifest",
    "check",
    "differences",
    "digest",
    "is_inside",
    "loads",
    "read",
]
FORMAT = 1
MAX_BYTES = 64 << 20  # bytes; a hundred thousand files take about 15 MB
# A disk, network or machine that fails, and what this user may not read: nothing is told.
_SHORTAGES = ("EMFILE", "ENFILE", "ENOMEM")
FAILING = errnos.numbers("EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "EACCES", *_SHORTAGES)
TIERS = ("full", "weights")
ABSENT = "no manifest.json"  # whether its save finished says ``states.status``
# What a document with other values than a manifest's makes of these functions.
_short_repr = reprlib.repr  # never longer than a line
_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of a commit. ``tag`` is the tag folder's name, which a full
    checkpoint of DeepSpeed always has. One of another training (FSDP, DDP, one process)
    has neither ``tag`` nor ``stage``: its states lie right in the folder, or in folders
    of FSDP.

    ``save`` is the same on all nodes of one save and on no other; ``created`` is in
    seconds since 1970. With ``nodes`` over 1 the folder holds one node's part.
    ``progress`` is JSON that a resume compares (learning rates, loss scale, samples).
    ``files`` are named by posix paths relative to the folder and come sorted; neither
    the manifest itself nor ``.pinned`` is among them. ``run`` is the id of the training,
    the same after every resume, and ``line`` the launches of it that led here
    (``lineage``); ``name`` is the folder's name, which a copy has another one than.
    ``made_of`` is the save that a resharded one was made of, and ``source`` what is
    known of the checkpoint that it, or a slimmed one, was made of. ``doubt`` is what
    speaks against its files being of one save, where whoever committed it knew better.
    All six are empty in manifests of older versions. ``ValueError`` for anything that
    contradicts this.
    """

    step: int
    tag: str | None
    tier: str
    save: str
    created: float
    stage: int | None
    world_size: int
    node: int = 0
    nodes: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    run: str | None = None
    line: tuple[tuple[str, int], ...] = ()
    name: str | None = None
    made_of: str | None = None
    source: Ancestry | None = None
    doubt: str | None = None

    def __post_init__(self) -> None:
        self._require_numbers()
        self._require_names()
        self._require_line()
        self._require_circumstances()
        self._require_values()

        object.__setattr__(self, "line", tuple((launch, step) for launch, step in self.line))
        object.__setattr__(self, "files", dict(sorted(self.files.items())))

    def _require_numbers(self) -> None:
        for name in ("step", "node"):
            value = getattr(self, name)
            fields.require(is_whole_number(value), name, value, "a whole number")

        for name in ("world_size", "nodes"):
            value = getattr(self, name)
            is_positive = is_whole_number(value) and value > 0
            fields.require(is_positive, name, value, "a positive number")

        is_one_of_nodes = self.node < self.nodes
        fields.require(is_one_of_nodes, "node", self.node, f"less than nodes, {self.nodes}")

    def _require_names(self) -> None:
        fields.require(self.tier in TIERS, "tier", self.tier, "full or weights")
        fields.require(
            fields.is_inside_or_none(self.tag), "tag", self.tag, "a folder inside the checkpoint"
        )
        has_its_tag = self.tag is not None or self.tier != "full" or self.stage is None
        fields.require(has_its_tag, "tag", None, "one: it is full, and of a ZeRO stage")
        fields.require(fields.is_id(self.save), "save", self.save, "hex digits")
        fields.require(
            fields.is_inside_or_none(self.name), "name", self.name, "the name of a folder"
        )

        for name in ("run", "made_of"):
            value = getattr(self, name)
            fields.require(value is None or fields.is_id(value), name, value, "hex digits or null")

        is_text = self.doubt is None or isinstance(self.doubt, str)
        fields.require(is_text, "doubt", self.doubt, "a text or null")

    def _require_line(self) -> None:
        for launch, step in self.line:
            is_launch = launch == "" or fields.is_id(launch)
            fields.require(is_launch, "line", launch, "the id of a launch")
            fields.require(is_whole_number(step), f"line: {launch}", step, "a step")

    def _require_circumstances(self) -> None:
        is_time = fields.is_number(self.created) and math.isfinite(self.created)
        fields.require(is_time, "created", self.created, "seconds")

        is_known_stage = self.stage is None
        if self.stage is not None:
            is_known_stage = is_whole_number(self.stage) and self.stage <= 3

        fields.require(is_known_stage, "stage", self.stage, "0 to 3 or null")

    def _require_values(self) -> None:
        value_types = (("versions", str), ("metrics", (int, float)), ("files", FileRecord))
        for name, expected_type in value_types:
            for entry_name, value in getattr(self, name).items():
                has_type = isinstance(value, expected_type) and not isinstance(value, bool)
                if not (has_type and isinstance(entry_name, str)):
                    fields.require(False, f"{name}: {entry_name}", value, "another type")

        for name, metric in self.metrics.items():
            fields.require(fields.is_number(metric), f"metrics: {name}", metric, "a number")

        for name in self.files:
            fields.require(fields.is_inside(name), "files", name, "names inside the checkpoint")
        own_names = [name for name in (MANIFEST, PINNED) if name in self.files]
        fields.require(not own_names, "files", own_names, "neither of the tool's own files")

    @property
    def origin(self) -> Ancestry | None:
        """The checkpoint that it was made of; of an older resharding only the save."""
        if self.source is None and self.made_of is not None:
            return Ancestry("resharded", save=self.made_of, step=self.step)
        return self.source

    @property
    def is_derived(self) -> bool:
        """Whether it was rewritten from another checkpoint,
        so that no training saved it."""
        return self.origin is not None and self.origin.is_rewriting

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def dumps(self) -> bytes:
        """The manifest as JSON; NaN and infinities among the metrics stand as strings."""
        data: dict[str, Any] = {"format": FORMAT}
        data |= {name: getattr(self, name) for name in _FIELDS if name != "files"}
        data["source"] = None if self.source is None else self.source.as_json()
        data["versions"] = dict(self.versions)
        data["progress"] = fields.json_value(self.progress)
        data["metrics"] = {name: fields.json_number(value) for name, value in self.metrics.items()}
        data["files"] = {
            file_name: {"size": file.size, "digest": file.digest}
            for file_name, file in self.files.items()
        }
        # keys as they will be read
        content = json.loads(json.dumps(data, allow_nan=False))
        data = {"format": FORMAT, "digest": _digest(content)} | data
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)

        try:
            return text.encode("utf-8", "surrogateescape") + b"\n"
        except UnicodeEncodeError:  # half a character, which stands for no byte of a name
            return json.dumps(data, indent=1, allow_nan=False).encode() + b"\n"


def _digest(content: Mapping[str, Any]) -> str:
    """The digest of a document without its own digest."""
    canonical_json = json.dumps(
        content,
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
    )
    return f"sha256:{sha256(canonical_json.encode()).hexdigest()}"


_FIELDS = tuple(Manifest.__dataclass_fields__)


# not in manifests of versions before 0.2
OPTIONAL = ("run", "line", "name", "made_of", "source", "doubt")


def loads(data: bytes, path: Path) -> Manifest:
    """The manifest in ``data``, read from ``path``;
    ``CheckpointError`` if it is damaged."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        document = bounded_json.loads(data, text)
    except ValueError as error:
        raise _damaged(path, error) from error

    try:
        _require_own(document, path)
        return _manifest(document)
    except FieldError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({reason}); ckpt doctor {shell_word(path.parent.parent)} --adopt "
        "writes a new one if the checkpoint proves to be whole"
    )


def _require_own(document: Any, path: Path) -> None:
    """``FieldError`` for what is not a manifest, or was changed; ``CheckpointError`` for
    one that a newer ckpt wrote. Takes the digest out of the document."""
    if not isinstance(document, dict) or "format" not in document:
        raise FieldError("it is not a manifest")
    if document["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {_short_repr(document['format'])}, this ckpt reads "
            f"{FORMAT}; use a newer ckpt",
            "unsupported",
        )

    if "digest" in document:
        stated_digest = document.pop("digest")
        try:
            actual_digest = _digest(document)
        except (RecursionError, ValueError) as error:  # nested too deep; 1e999, an infinity
            raise FieldError(f"it holds what JSON cannot: {error}") from error

        if stated_digest != actual_digest:
            raise FieldError(f"its digest is {actual_digest}, it says {_short_repr(stated_digest)}")


def _manifest(document: dict[str, Any]) -> Manifest:
    """The manifest that the fields of a document make."""
    required_fields = [name for name in _FIELDS if name not in OPTIONAL]
    missing_fields = [name for name in required_fields if name not in document]
    if missing_fields:
        raise FieldError(f"no {', '.join(missing_fields)}")

    entries = {name: document[name] for name in _FIELDS if name in document}
    fields.require_kinds(entries)
    entries["metrics"] = {
        name: _number(name, metric) if isinstance(metric, str) else metric
        for name, metric in entries["metrics"].items()
    }
    entries["files"] = {
        name: FileRecord(entry["size"], entry["digest"]) for name, entry in entries["files"].items()
    }
    entries["source"] = ancestry.parse(entries.get("source"))
    return Manifest(**entries)


def _number(name: str, text: str) -> float:
    """A metric that stands as a text: one of NaN and the infinities."""
    fields.require(text in _NUMBERS, f"metrics: {name}", text, "a number, nan, inf or -inf")
    return _NUMBERS[text]


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint; ``CheckpointError``, "incomplete" if there is none."""
    manifest_path = folder / MANIFEST
    try:
        # opening a pipe would wait forever
        if stores.exists(manifest_path) and not stores.is_file(manifest_path):
            raise CheckpointError(
                f"{manifest_path} is not a plain file; it is not a manifest",
                "refused",
            )

        data = stores.head(manifest_path, MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{folder} has {ABSENT}",
            "incomplete",
        ) from error
    except OSError as error:
        raise CheckpointError(f"{manifest_path}: {error.strerror}", "refused") from error

    if len(data) > MAX_BYTES:
        raise CheckpointError(
            f"{manifest_path} is over {MAX_BYTES} bytes; it is not a manifest", "refused"
        )

    return loads(data, manifest_path)


def check(
    folder: Path,
    manifest: Manifest,
    data: bool = False,
    progress: Progress = quiet,
    strict: bool = False,
) -> list[str]:
    """``differences`` as lines."""
    difference_by_name = differences(folder, manifest, data, progress, strict)
    return [f"{file_name}: {difference}" for file_name, difference in difference_by_name.items()]


def differences(
    folder: Path,
    manifest: Manifest,
    data: bool = False,
    progress: Progress = quiet,
    strict: bool = False,
) -> dict[str, str]:
    """How each file differs that is not as the manifest has it.

    Looks at sizes only, unless ``data``: then at every digest, which reads every byte,
    those of a torch zip against the CRC32s of its records. ``progress`` gets the bytes
    read. A file that cannot be read differs, too; with ``strict`` a failing disk is a
    ``CheckpointError``.
    """
    difference_by_name = {}
    for file_name, file in manifest.files.items():
        if not data and is_of_size(f"{folder}/{file_name}", file.size):
            continue  # thousands, of which no path is built
        try:
            difference = unlike(folder / file_name, file, data, progress)
        except OSError as error:
            if strict and error.errno in FAILING:
                raise CheckpointError(f"{folder / file_name}: {error.strerror}") from error
            difference = str(error.strerror)

        if difference is not None:
            difference_by_name[file_name] = difference

    return difference_by_name
