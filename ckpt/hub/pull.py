"""A repository, or a folder of it,
as a folder here: whole and verified, or not there at all.

.DIR.partial/     beside DIR while files come; an interrupted pull goes on with those that it has
DIR/              the same folder, renamed when every file has its digest

Files come through ``snapshot_download``; every one is then read and compared with the
size and the SHA-256 (of small ones the git blob) that the Hub's own list gives.
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

from ckpt.folders import filenames, locks
from ckpt.folders.replacing import is_arriving, replace_folder
from ckpt.folders.staging import folder_for, require_makeable, require_room
from ckpt.hub.client import errors, repository
from ckpt.hub.client.repository import RemoteFile
from ckpt.hub.client.retry import retry
from ckpt.hub.content.items import unfit
from ckpt.hub.plan import api_for
from ckpt.runs import user_paths, verify
from ckpt.runs.run import open_checkpoint
from ckpt.text import size
from converters.errors import CheckpointError
from converters.execute.workers import Progress
from converters.storage import local
from converters.words import counted

ANOTHER_NAME = "name another folder"
LOCK = ".pulling"
CACHE = ".cache"  # where the client keeps what it knows of a local folder


@dataclass(frozen=True, slots=True, kw_only=True)
class PullPlan:
    """A pull decided on but not begun: what the repository holds at one commit.

    ``files`` are by their names in the repository, of which ``repo_folder`` ("" or with
    a "/" at its end) becomes ``folder``. ``oid`` is the commit that ``revision`` was.
    """

    folder: Path
    repo: str
    revision: str
    oid: str
    repo_folder: str
    files: dict[str, RemoteFile]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(repo_file.size for repo_file in self.files.values())

    @property
    def placed_files(self) -> dict[str, RemoteFile]:
        """The files by their names in ``folder``."""
        return {name[len(self.repo_folder) :]: file for name, file in self.files.items()}


@dataclass(frozen=True, slots=True)
class Pulled:
    """The files that are there now. ``step`` is that of a training state, which was
    verified as such."""

    pull_plan: PullPlan
    step: int | None
    seconds: float

    def summary(self) -> str:
        """One line for a reader."""
        files = self.pull_plan.files
        training_state = (
            f", the training state of step {self.step}" if self.step is not None else ""
        )
        return (
            f"{counted(len(files), 'file')}, {size(self.pull_plan.nbytes)} of "
            f"{self.pull_plan.oid[:12]}{training_state}, all verified"
        )


def plan(
    repo: str,
    folder: Path,
    *,
    revision: str | None = None,
    path_in_repo: str | None = None,
) -> PullPlan:
    """Lists what the repository holds at the commit that ``revision`` (main) is now.

    With ``path_in_repo``, what that folder of it holds. ``CheckpointError`` for names
    that leave the folder, and for a place that is taken.
    """
    errors.require_client()
    user_paths.require_outside(folder)
    _require_place(folder)
    branch = revision or repository.MAIN
    repo_folder = f"{path_in_repo.strip('/')}/" if path_in_repo else ""

    api = api_for()
    with errors.translate_errors(repo):
        repo_info = retry(lambda: api.repo_info(repo, revision=branch), repository.SOON)
        commit_id = str(repo_info.sha)
        repo_files = {
            file_name: repo_file
            for file_name, repo_file in repository.files(api, repo, commit_id).items()
            if file_name.startswith(repo_folder)
        }

    _require_names(repo, repo_files)
    if not repo_files:
        place = f"in the folder {repo_folder}" if repo_folder else "in it"
        raise CheckpointError(f"{repo}@{branch} has no files {place}", "incomplete")

    return PullPlan(
        folder=folder,
        repo=repo,
        revision=branch,
        oid=commit_id,
        repo_folder=repo_folder,
        files=repo_files,
    )


def execute(pull_plan: PullPlan, progress: Progress = lambda _: None) -> Pulled:
    """Makes the folder what the repository holds, whole or not at all.

    ``progress`` gets the bytes that were verified, ``nbytes`` of the plan in all.
    ``CheckpointError`` for a byte that is not what the Hub has; then nothing is there
    under the name.
    """
    start_time = time.monotonic()
    require_output(pull_plan)
    folder, repo_folder = pull_plan.folder, pull_plan.repo_folder
    with errors.translate_errors(pull_plan.repo), _staged(folder) as staging:
        _download(pull_plan, staging, progress)

        pulled_root = staging / repo_folder if repo_folder else staging
        step = _require_committed(pulled_root)
        _sync(pulled_root, staging / CACHE)
        _remove(staging / CACHE)
        (staging / LOCK).unlink()
        local.sync_folder(staging)
        replace_folder(pulled_root, folder.absolute())

    return Pulled(pull_plan, step, time.monotonic() - start_time)


def require_output(pull_plan: PullPlan) -> None:
    """``CheckpointError`` where ``execute`` would refuse
    to make the folder; makes nothing."""
    folder = pull_plan.folder.absolute()
    require_makeable(folder, pull_plan.nbytes, ANOTHER_NAME)
    require_room(folder_for(folder), pull_plan.nbytes, ANOTHER_NAME)


def is_begun(pull_plan: PullPlan) -> bool:
    """Whether an interrupted ``execute`` left files that this one goes on with."""
    staging = folder_for(pull_plan.folder.absolute())
    return any((staging / name).is_file() for name in pull_plan.files)


def _download(pull_plan: PullPlan, staging: Path, progress: Progress) -> None:
    """Every file, compared with the Hub's list; what is wrong is fetched once more."""
    download = partial(
        api_for().snapshot_download,
        pull_plan.repo,
        revision=pull_plan.oid,
        local_dir=staging,
        allow_patterns=[f"{pull_plan.repo_folder}*"] if pull_plan.repo_folder else None,
    )
    with errors.naming_file(staging):
        download()
    _drop_others(staging, pull_plan.files)

    for name, repo_file in pull_plan.files.items():
        # an interrupted pull left it, or a disk
        if not _is_same(staging / name, repo_file):
            (staging / name).unlink(missing_ok=True)
            with errors.naming_file(staging):
                download()
            _require_same(pull_plan.repo, staging / name, repo_file)

        progress(repo_file.size)


def _require_place(folder: Path) -> None:
    if not folder.name or folder.name == "..":
        raise CheckpointError(
            f"{folder} is not a folder that can be made; name a new one", "output"
        )
    is_filled = folder.is_dir() and any(folder.iterdir()) and not is_arriving(folder)
    if folder.is_symlink() or folder.is_file() or is_filled:
        raise CheckpointError(f"{folder} exists already; name a new folder", "output")


def _require_names(repo: str, names: dict[str, RemoteFile]) -> None:
    for name in names:
        if (fault := unfit(name)) is not None and not _is_gits(name):
            raise CheckpointError(
                f"{repo} has a file {name!r}, which {fault}",
                "refused",
            )


def _is_gits(name: str) -> bool:
    """What every repository of the Hub has, and git reads from its work tree only."""
    return name.split("/")[-1] in (".gitattributes", ".gitignore") and not unfit(
        name.replace(".git", "git")
    )


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """The folder to download into, locked;
    it stays behind where the same pull can go on."""
    staging = folder_for(folder.absolute())
    staging.mkdir(parents=True, exist_ok=True)
    lock_path = staging / LOCK
    lock_path.touch()
    lock = locks.exclusive(lock_path)
    if lock is None:
        raise CheckpointError(
            f"{staging} is in use: another pull makes {folder}",
            "output",
        )

    with lock:
        # the client does not go on with them
        for partial_download in (staging / CACHE).rglob("*.incomplete"):
            partial_download.unlink()
        yield staging

    # of a folder of the repository, what is around it
    shutil.rmtree(staging, ignore_errors=True)


def _drop_others(staging: Path, repo_files: dict[str, RemoteFile]) -> None:
    """Removes what an interrupted pull of another commit left."""
    for leftover in sorted(staging.rglob("*"), reverse=True):
        name = leftover.relative_to(staging).as_posix()
        if name.split("/")[0] in (CACHE, LOCK) or name in repo_files:
            continue

        if leftover.is_dir() and not leftover.is_symlink():
            if not any(leftover.iterdir()):
                leftover.rmdir()
        else:
            leftover.unlink()


def _is_same(path: Path, repo_file: RemoteFile) -> bool:
    """Whether the file is what the Hub's list says."""
    if path.is_symlink() or not path.is_file():
        return False
    content_digest = repository.sha256(path) if repo_file.sha256 is not None else ""
    return repo_file.is_content(path.stat().st_size, content_digest, path)


def _require_same(repo: str, path: Path, repo_file: RemoteFile) -> None:
    """``CheckpointError`` unless the file is what the Hub's list says;
    a wrong one is removed."""
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(
            f"{repo}: {path.name} did not come; pull again",
            "incomplete",
        )
    if not _is_same(path, repo_file):
        path.unlink()
        raise CheckpointError(
            f"{path} came with other bytes than {repo} lists ({repo_file.size:,} bytes, "
            f"{repo_file.sha256 or repo_file.blob}); pull again",
        )


def _require_committed(pulled_root: Path) -> int | None:
    """The step of a training state, proven by its manifest; ``None`` for a model."""
    if not (pulled_root / filenames.MANIFEST).is_file():
        return None

    checkpoint = open_checkpoint(pulled_root)
    verdict = verify.verify(checkpoint, data=True)
    if not verdict.whole:
        raise CheckpointError(
            f"{pulled_root}: its manifest does not hold: {verdict.problems[0]}; push it again",
            "corrupt",
        )

    return checkpoint.step


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        error.filename = str(folder)  # it names what is inside without its folders
        raise


def _sync(pulled_root: Path, origin: Path) -> None:
    """Makes what the client wrote durable; the names come from ``origin``, by renames."""
    for parent, _, _ in os.walk(origin):
        local.sync_folder(Path(parent))
    for parent, _, file_names in os.walk(pulled_root):
        for file_name in file_names:
            local.sync_file(Path(parent, file_name))
        local.sync_folder(Path(parent))
