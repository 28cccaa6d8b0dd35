"""A repository, or a folder of it, as a folder here: whole and verified, or not there at all.

.DIR.partial/     beside DIR while files come; an interrupted pull goes on with those that it has
DIR/              the same folder, renamed when every file has its digest

Files come through ``snapshot_download``; every one is then read and compared with the size and the
SHA-256 (of small ones the git blob) that the Hub's own list gives.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ckpt.hub import refusals, remote
from ckpt.hub.items import unfit
from ckpt.hub.patience import patient
from ckpt.hub.planning import api_for
from ckpt.hub.remote import Held
from ckpt.renaming import is_arriving, replace_folder
from ckpt.report import size
from ckpt.runs import locks, manifest, verify
from ckpt.runs.run import open_checkpoint
from ckpt.staging import folder_for, require_room
from converters import files
from converters.errors import CheckpointError
from converters.mover import Progress

LOCK = ".pulling"
CACHE = ".cache"  # where the client keeps what it knows of a local folder


@dataclass(frozen=True, slots=True)
class Pulled:
    """What is there now. ``step`` is that of a training state, which was verified as such."""

    folder: Path
    repo: str
    revision: str
    oid: str
    files: dict[str, Held]
    step: int | None
    seconds: float

    def summary(self) -> str:
        """One line for a reader."""
        what = f"{len(self.files)} files, {size(sum(one.size for one in self.files.values()))}"
        state = f", the training state of step {self.step}" if self.step is not None else ""
        return f"{what} of {self.oid[:12]}{state}, all verified"

    def facts(self) -> dict[str, Any]:
        """The pull as plain data."""
        return {
            "folder": str(self.folder),
            "repo": self.repo,
            "revision": self.revision,
            "oid": self.oid,
            "checkpoint_step": self.step,
            "files": [
                {"name": name, "size": held.size, "sha256": held.sha256, "git_blob": held.blob}
                for name, held in self.files.items()
            ],
            "seconds": round(self.seconds, 3),
        }


def pull(
    repo: str,
    folder: Path,
    *,
    revision: str | None = None,
    path_in_repo: str | None = None,
    progress: Progress = lambda _: None,
) -> Pulled:
    """Makes ``folder`` what the repository holds, at the commit that ``revision`` is now.

    With ``path_in_repo``, what that folder of it holds. ``progress`` gets the bytes that were
    verified. ``CheckpointError`` for names that leave the folder, for a byte that is not what the
    Hub has, and for a place that is taken; then nothing is there under the name.
    """
    begun = time.monotonic()
    refusals.require_client()
    _require_place(folder)
    branch, place = revision or remote.MAIN, f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    api = api_for()
    with refusals.told(repo):
        oid = str(patient(lambda: api.repo_info(repo, revision=branch), remote.SOON).sha)
        held = {n: h for n, h in remote.tree(api, repo, oid).items() if n.startswith(place)}
        _require_names(repo, held)
        if not held:
            raise CheckpointError(f"{repo}@{branch} has no files in {place or 'it'}", "incomplete")
        with _staged(folder) as staging:
            require_room(staging, sum(one.size for one in held.values()), "name another folder")
            bring = partial(
                api.snapshot_download,
                repo,
                revision=oid,
                local_dir=staging,
                allow_patterns=[f"{place}*"] if place else None,
            )
            with refusals.at(staging):
                bring()
            _drop_others(staging, held)
            for name, one in held.items():
                if not _is_same(staging / name, one):  # an interrupted pull left it, or a disk
                    (staging / name).unlink(missing_ok=True)
                    with refusals.at(staging):
                        bring()
                    _require_same(repo, staging / name, one)
                progress(one.size)
            root = staging / place if place else staging
            step = _require_committed(root)
            _sync(root, staging / CACHE)
            _remove(staging / CACHE)
            (staging / LOCK).unlink()
            files.sync_folder(staging)
            replace_folder(root, folder.absolute())
    found = {name[len(place) :]: one for name, one in held.items()}
    return Pulled(folder, repo, branch, oid, found, step, time.monotonic() - begun)


def _require_place(folder: Path) -> None:
    if not folder.name or folder.name == "..":
        raise CheckpointError(f"{folder} is no folder to make; name a new one", "output")
    filled = folder.is_dir() and any(folder.iterdir()) and not is_arriving(folder)
    if folder.is_symlink() or folder.is_file() or filled:
        raise CheckpointError(f"{folder} exists already; name a new folder", "output")


def _require_names(repo: str, names: dict[str, Held]) -> None:
    for name in names:
        if (why := unfit(name)) is not None and not _is_gits(name):
            raise CheckpointError(f"{repo} has a file {name!r}, which {why}", "refused")


def _is_gits(name: str) -> bool:
    """What every repository of the Hub has, and git reads from its work tree only."""
    return name.split("/")[-1] in (".gitattributes", ".gitignore") and not unfit(
        name.replace(".git", "git")
    )


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """The folder to download into, locked; it stays behind where the same pull can go on."""
    staging = folder_for(folder.absolute())
    staging.mkdir(parents=True, exist_ok=True)
    path = staging / LOCK
    path.touch()
    lock = locks.exclusive(path)
    if lock is None:
        raise CheckpointError(f"{staging} is in use: another pull makes {folder}", "output")
    with lock:
        for cut in (staging / CACHE).rglob("*.incomplete"):  # the client does not go on with them
            cut.unlink()
        yield staging
    shutil.rmtree(staging, ignore_errors=True)  # of a folder of the repository, what is around it


def _drop_others(staging: Path, held: dict[str, Held]) -> None:
    """Removes what an interrupted pull of another commit left."""
    for path in sorted(staging.rglob("*"), reverse=True):
        name = path.relative_to(staging).as_posix()
        if name.split("/")[0] in (CACHE, LOCK) or name in held:
            continue
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        else:
            path.unlink()


def _is_same(path: Path, held: Held) -> bool:
    """Whether the file is what the Hub's list says."""
    if path.is_symlink() or not path.is_file():
        return False
    found = remote.sha256(path) if held.sha256 is not None else ""
    return held.is_content(path.stat().st_size, found, path)


def _require_same(repo: str, path: Path, held: Held) -> None:
    """``CheckpointError`` unless the file is what the Hub's list says; a wrong one is removed."""
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{repo}: {path.name} did not come; pull again", "incomplete")
    if not _is_same(path, held):
        path.unlink()
        raise CheckpointError(
            f"{path} came with other bytes than {repo} lists ({held.size:,} bytes, "
            f"{held.sha256 or held.blob}); pull again",
        )


def _require_committed(root: Path) -> int | None:
    """The step of a training state, proven by its manifest; ``None`` for a model."""
    if not (root / manifest.NAME).is_file():
        return None
    checkpoint = open_checkpoint(root)
    verdict = verify.verify(checkpoint, data=True)
    if not verdict.whole:
        raise CheckpointError(
            f"{root}: its manifest does not hold: {verdict.problems[0]}; push it again", "corrupt"
        )
    return checkpoint.step


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        error.filename = str(folder)  # it names what is inside without its folders
        raise


def _sync(root: Path, origin: Path) -> None:
    """Makes what the client wrote durable; the names come from ``origin``, by renames."""
    for where, _, _ in os.walk(origin):
        files.sync_folder(Path(where))
    for where, _, names in os.walk(root):
        for name in names:
            files.sync_file(Path(where, name))
        files.sync_folder(Path(where))
