"""The allow-list: which files of a model's folder may be published,
and why the others may not.

Beside the weights these are the files of ``model_folder.companion_files``, as
``ckpt to-fp32`` copies them (generation config, tokenizer, processor, the code that an
``auto_map`` names), the model card and the license. Links out of the folder, pickles and
names unfit for the Hub stay here; where a link leads to what the model's reader needs,
nothing is sent at all. Links of a snapshot in the Hub's cache are followed: they lead to
the blobs of its own repository (huggingface_hub 1.5 ``file_download.py``:
``snapshots/REVISION/NAME`` is a link to ``../../blobs/HASH``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.hub.content.items import unfit
from ckpt.weights.companions import model_code, model_folder, run_folder
from converters.errors import CheckpointError, unreadable
from converters.words import shell_word

CARD = "README.md"
LEAVES = "a link that leaves the folder"
_ALSO = (CARD, "LICENSE", "LICENSE.txt", "LICENSE.md")
_SUFFIXES = (
    *(".json", ".jinja", ".md", ".model", ".py", ".spm", ".tiktoken", ".txt", ".bpe"),
    *(".codes", ".tokenizer", ".v1", ".v2", ".v3", ".v7", ".npy"),
)
_REASONS = {  # by the end of the name; what is not here is "not on the list"
    ".safetensors": "not among the weights that are sent",
    ".bin": "a pickle: weights are sent as safetensors, arguments never",
    ".pt": "optimizer, scheduler or model state",
    ".pth": "random state",
    ".state": "random state, or state of your own",
    "_state.json": "training state",
    "manifest.json": "about the checkpoint, not the model",
    "latest": "about the checkpoint, not the model",
    "zero_to_fp32.py": "DeepSpeed's script",
    "zero_to_torch.py": "DeepSpeed's script",
    ".py": "code that no auto_map names",
}


@dataclass(frozen=True, slots=True)
class Allowed:
    """Files to send, by name; what stays here, each with why;
    and lines on what may be amiss."""

    files: tuple[tuple[str, Path], ...]
    left_out: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def allowed(root: Path, own_names: frozenset[str] = frozenset()) -> Allowed:
    """The files of ``root`` that are published beside the weights and config.json.

    ``own_names`` are names that the push makes or sends itself, so that neither the
    list of what is sent nor that of what stays here has them. ``CheckpointError`` if
    the folder cannot be read.
    """
    try:
        entries = sorted(path.name for path in root.iterdir())
        companions = model_folder.companion_files(root, _sendable(root))
    except OSError as error:
        raise unreadable(error, root) from error

    sendable_names = {
        *companions.files,
        *(file_name for file_name in _ALSO if (root / file_name).is_file()),
    }
    files: list[tuple[str, Path]] = []
    left_out: list[tuple[str, str]] = []
    for file_name in sorted(sendable_names - own_names):
        if (reason := _unsendable(root, file_name)) is None:
            files.append((file_name, root / file_name))
        else:
            left_out.append((file_name, reason))

    warnings = tuple(f"{root}: {note}" for note in companions.notes)
    top_level_names = {file_name.partition("/")[0] for file_name in sendable_names}
    left_out += [
        (file_name, _reason_left_out(root, file_name))
        for file_name in entries
        if file_name not in top_level_names | own_names
    ]

    return Allowed(tuple(files), tuple(sorted(left_out)), warnings)


def of_conversion(
    allowed_files: Allowed,
    root: Path,
    companions: Mapping[str, Path],
    own_names: frozenset[str],
) -> Allowed:
    """The same with the files that a conversion copies
    from elsewhere (``--tokenizer DIR``).

    Those take the place of the checkpoint's own. ``CheckpointError`` for one that may
    not be sent.
    """
    local_names = {file_name for file_name, path in companions.items() if path == root / file_name}
    files = {
        file_name: path
        for file_name, path in allowed_files.files
        if file_name in local_names or file_name in _ALSO
    }
    left_out = list(allowed_files.left_out)
    left_out += [
        (file_name, "not among what the conversion writes")
        for file_name, _ in allowed_files.files
        if file_name not in files
    ]

    for file_name, path in companions.items():
        companion_home = path.parents[file_name.count("/")]
        if file_name in local_names or file_name in own_names:
            require_sendable(companion_home, {file_name} - own_names)
            continue

        if (reason := _unsendable(companion_home, file_name)) is not None:
            raise CheckpointError(f"{path} cannot be sent: {reason}", "refused")

        files[file_name] = path
        left_out = [(left_name, reason) for left_name, reason in left_out if left_name != file_name]

    return Allowed(
        tuple(sorted(files.items())),
        tuple(sorted(left_out)),
        allowed_files.warnings,
    )


def of_stored(root: Path, own_names: frozenset[str]) -> Allowed:
    """The files that go with weights that are sent
    as they lie in ``root``; as ``allowed``.

    With the tokenizer of its run, if it has none. ``CheckpointError`` for a link out of
    the folder to what the model's reader needs.
    """
    allowed_files = allowed(root, own_names)
    require_sendable(root, sorted({*model_folder.companion_files(root).files} - own_names))
    return with_tokenizer_of_run(allowed_files, root)


def with_tokenizer_of_run(allowed_files: Allowed, root: Path) -> Allowed:
    """The same with the tokenizer of the run that ``root`` is a checkpoint of,
    if it has none."""
    readers = run_folder.readers(root)
    if not readers or model_folder.companion_files(root, _sendable(root)).readers:
        return allowed_files

    require_sendable(root.resolve().parent, readers)
    reasons = {
        name: _unsendable(path.parents[name.count("/")], name) for name, path in readers.items()
    }
    files = [(name, path) for name, path in readers.items() if reasons[name] is None]
    left_out = [(name, reason) for name, reason in reasons.items() if reason is not None]
    return Allowed(
        tuple(sorted((*allowed_files.files, *files))),
        tuple(sorted((*allowed_files.left_out, *left_out))),
        (*allowed_files.warnings, f"note: {run_folder.note(readers)}"),
    )


def _unsendable(root: Path, file_name: str) -> str | None:
    """Why a file that is on the list of what a model needs may still not be sent."""
    reason = refusal(root, file_name)
    if (
        reason is None
        and not file_name.startswith("LICENSE")
        and Path(file_name).suffix not in _SUFFIXES
    ):
        return "not on the list of what a model needs"

    return reason


def refusal(root: Path, file_name: str) -> str | None:
    """Why a file of ``root`` may not be sent under its name; ``None`` if it may."""
    file_path = root / file_name
    if (name_fault := unfit(file_name)) is not None:
        return f"the name {name_fault}"
    if not os.path.lexists(file_path):
        return "it is missing"

    try:
        target = file_path.resolve(strict=True)
    except (OSError, RuntimeError):
        return "a link that leads nowhere"

    if not any(map(target.is_relative_to, _homes(root.resolve()))):
        return LEAVES

    return None if file_path.is_file() else "no plain file"


def _homes(root: Path) -> Iterator[Path]:
    """Where files of a folder may lie: in itself and, of a snapshot in the Hub's cache,
    among the blobs of its own repository."""
    yield root
    for place in (root, *root.parents):
        repository = place.parent.parent
        if place.parent.name == "snapshots" and repository.name.startswith("models--"):
            yield repository / "blobs"


def require_sendable(root: Path, file_names: Iterable[str]) -> None:
    """``CheckpointError`` for files that the model's reader needs, and that links out of
    the folder lead to: a model without its tokenizer is not what anybody meant to
    publish."""
    for file_name in file_names:
        # of code that stays here a warning is given
        if not file_name.endswith(".py") and refusal(root, file_name) == LEAVES:
            raise unsendable(root, file_name, LEAVES)


def unsendable(root: Path, file_name: str, reason: str) -> CheckpointError:
    """That a file which has to be sent may not be, and what helps."""
    remedy = ""
    if reason == LEAVES:
        copy = root.with_name(f"{root.name}-copy")
        remedy = (
            f"; cp -rL {shell_word(root)} {shell_word(copy)} makes a folder without links to push"
        )
    return CheckpointError(
        f"{root / file_name} cannot be sent: {reason}; nothing is sent without it{remedy}",
        "refused",
    )


def _reason_left_out(root: Path, name: str) -> str:
    file_path = root / name
    if file_path.is_symlink() and (reason := refusal(root, name)) is not None and "link" in reason:
        return reason

    if name.startswith("."):
        return "hidden"
    if file_path.is_dir():
        has_states = any(file_path.glob("*_states.pt*"))
        return "ZeRO states" if has_states else "a folder"

    reasons = (reason for ending, reason in _REASONS.items() if name.endswith(ending))

    return next(reasons, "not on the list of what a model needs")


def read_object(root: Path, file_name: str) -> dict[str, Any]:
    """A JSON object beside the weights;
    empty where there is none that may be sent, and is JSON.

    ``OSError`` if it cannot be read: what it names would be left out.
    """
    return model_code.read_object(root / file_name, _sendable(root))


def _sendable(root: Path) -> Callable[[Path], bool]:
    return lambda path: refusal(root, path.relative_to(root).as_posix()) is None
