"""The commit record of a checkpoint: ``manifest.json``, written last.

A checkpoint is committed if and only if its manifest is there, is valid, and every file that it
lists has its size. The kinds of digests are explained in ``digests``. The manifest's own,
``digest``, is the SHA-256 of the rest as JSON with sorted keys and no spaces, all but ASCII
escaped; a manifest without one, as they were written at first, is valid, too.
"""

from __future__ import annotations

import errno
import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from ckpt.runs.digests import File, Progress, digest, quiet, unlike
from converters import bounded_json
from converters.errors import CheckpointError

__all__ = [
    "ABSENT",
    "NAME",
    "PINNED",
    "File",
    "Manifest",
    "check",
    "digest",
    "is_inside",
    "loads",
    "read",
]
NAME = "manifest.json"
PINNED = ".pinned"
FORMAT = 1
LARGEST = 64 << 20  # bytes; a hundred thousand files take about 15 MB
# A disk or network that fails, and what this user may not read: nothing can be told then.
FAILING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EACCES)
TIERS = ("full", "weights")
ABSENT = "no manifest.json: written without ckpt, or its save did not finish"
_shown = reprlib.repr  # never longer than a line
_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was committed. ``tag`` is the tag folder's name, which a full checkpoint always has.

    ``save`` is the same on all nodes of one save and on no other; ``created`` is in seconds since
    1970. With ``nodes`` over 1 the folder holds one node's part. ``progress`` is JSON that a resume
    compares (learning rates, loss scale, samples). ``files`` are named by posix paths relative to
    the folder and come sorted; neither the manifest itself nor ``.pinned`` is among them.
    ``run`` is the id of the training, the same after every resume, and ``line`` the launches of it
    that led here (``lineage``); ``name`` is the folder's name, which a copy has another one than.
    ``made_of`` is the save that a resharded one was made of. All four are empty in manifests of
    older versions.
    ``ValueError`` for anything that contradicts this.
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
    files: Mapping[str, File] = field(default_factory=dict)
    run: str | None = None
    line: tuple[tuple[str, int], ...] = ()
    name: str | None = None
    made_of: str | None = None

    def __post_init__(self) -> None:
        for name in ("step", "node"):
            _require(_whole(getattr(self, name)), name, getattr(self, name), "a whole number")
        for name in ("world_size", "nodes"):
            value = getattr(self, name)
            _require(_whole(value) and value > 0, name, value, "a positive number")
        _require(self.node < self.nodes, "node", self.node, f"less than nodes, {self.nodes}")
        _require(self.tier in TIERS, "tier", self.tier, "full or weights")
        inside = self.tag is None or (isinstance(self.tag, str) and is_inside(self.tag))
        _require(inside, "tag", self.tag, "a folder inside the checkpoint")
        _require(self.tag is not None or self.tier != "full", "tag", None, "one: it is full")
        _require(_is_id(self.save), "save", self.save, "hex digits")
        named = self.name is None or (isinstance(self.name, str) and is_inside(self.name))
        _require(named, "name", self.name, "the name of a folder")
        for name in ("run", "made_of"):
            value = getattr(self, name)
            _require(value is None or _is_id(value), name, value, "hex digits or null")
        for launch, step in self.line:
            _require(launch == "" or _is_id(launch), "line", launch, "the id of a launch")
            _require(_whole(step), f"line: {launch}", step, "a step")
        object.__setattr__(self, "line", tuple((launch, step) for launch, step in self.line))
        real = isinstance(self.created, (int, float)) and not isinstance(self.created, bool)
        _require(real and math.isfinite(self.created), "created", self.created, "seconds")
        known = self.stage is None or (_whole(self.stage) and self.stage <= 3)
        _require(known, "stage", self.stage, "0 to 3 or null")
        for name, kind in (("versions", str), ("metrics", (int, float)), ("files", File)):
            for key, value in getattr(self, name).items():
                fits = isinstance(key, str) and isinstance(value, kind) and value is not True
                _require(fits and value is not False, f"{name}: {key}", value, "another type")
        for name in self.files:
            _require(is_inside(name), "files", name, "names inside the checkpoint")
            _require(name not in (NAME, PINNED), "files", name, "neither of the tool's own files")
        object.__setattr__(self, "files", dict(sorted(self.files.items())))

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def dumps(self) -> bytes:
        """The manifest as JSON; NaN and infinities among the metrics stand as strings."""
        held: dict[str, Any] = {"format": FORMAT}
        held |= {name: getattr(self, name) for name in _FIELDS if name != "files"}
        held["versions"], held["progress"] = dict(self.versions), _plain(self.progress)
        held["metrics"] = {name: written(value) for name, value in self.metrics.items()}
        held["files"] = {n: {"size": f.size, "digest": f.digest} for n, f in self.files.items()}
        rest = json.loads(json.dumps(held, allow_nan=False))  # keys as they will be read
        held = {"format": FORMAT, "digest": _digest(rest)} | held
        text = json.dumps(held, indent=1, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8", "surrogateescape") + b"\n"


def _digest(rest: Mapping[str, Any]) -> str:
    """That of all but the digest."""
    plain = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"sha256:{sha256(plain.encode()).hexdigest()}"


_FIELDS = tuple(Manifest.__dataclass_fields__)


OPTIONAL = ("run", "line", "name", "made_of")  # not in manifests of versions before 0.2


def _is_id(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{8,64}", value) is not None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(true: bool, name: str, found: object, expected: str) -> None:
    if not true:
        raise ValueError(f"{name} is {_shown(found)}, expected {expected}")


def is_inside(name: str) -> bool:
    """Whether a posix path stays inside the folder that it is relative to, and is spelt plainly."""
    parts = name.split("/")  # of an absolute path the first is empty
    return "\0" not in name and all(p not in ("", ".", "..") and len(p) < 256 for p in parts)


def written(value: float) -> float | str:
    """A number as JSON can hold it: NaN and infinities as strings."""
    if math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _plain(value: Any) -> Any:
    """JSON whose numbers are all numbers of JSON; the others come back as strings."""
    if isinstance(value, float):
        return written(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def loads(data: bytes, path: Path) -> Manifest:
    """The manifest in ``data``, which was read from ``path``; ``CheckpointError`` if it is none."""
    try:
        text = data.decode("utf-8", "surrogateescape")
        held = bounded_json.loads(data, text)
        if not isinstance(held, dict) or "format" not in held:
            raise ValueError("it is no manifest")
        if held["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {_shown(held['format'])}, this ckpt reads {FORMAT}; use a "
                "newer ckpt",
                "unsupported",
            )
        if "digest" in held and (said := held.pop("digest")) != (found := _digest(held)):
            raise ValueError(f"its digest is {found}, it says {_shown(said)}")
        missing = [name for name in _FIELDS if name not in held and name not in OPTIONAL]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing")
        held = {name: held[name] for name in _FIELDS if name in held}
        metrics = held["metrics"].items()
        held["metrics"] = {n: _NUMBERS[v] if isinstance(v, str) else v for n, v in metrics}
        held["files"] = {n: File(f["size"], f["digest"]) for n, f in held["files"].items()}
        if not isinstance(held["progress"], dict):
            raise ValueError(f"progress is {_shown(held['progress'])}, expected names and values")
        return Manifest(**held)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(
            f"{path} is damaged ({why}); ckpt doctor {path.parent.parent} --adopt writes a new one "
            "if the checkpoint proves to be whole"
        ) from error


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint; ``CheckpointError``, "incomplete" if there is none."""
    path = folder / NAME
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(f"{path} is no plain file; it is no manifest", "refused")
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{folder} has {ABSENT}",
            "incomplete",
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if len(data) > LARGEST:
        raise CheckpointError(f"{path} is over {LARGEST} bytes; it is no manifest", "refused")
    return loads(data, path)


def check(
    folder: Path,
    manifest: Manifest,
    data: bool = False,
    progress: Progress = quiet,
    strict: bool = False,
) -> list[str]:
    """One line for each file that is not as the manifest has it; nothing if all are.

    Looks at sizes only, unless ``data``: then at every digest, which reads every byte, those of a
    torch zip against the CRC32s of its records. ``progress`` gets the bytes read.
    A file that cannot be read is a line, too; with ``strict`` a failing disk
    is a ``CheckpointError``.
    """
    found = []
    for name, file in manifest.files.items():
        try:
            why = unlike(folder / name, file, data, progress)
        except OSError as error:
            if strict and error.errno in FAILING:
                raise CheckpointError(f"{folder / name}: {error.strerror}") from error
            why = str(error.strerror)
        found += [f"{name}: {why}"] if why is not None else []
    return found
